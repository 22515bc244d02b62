"""Stage 3, at the server: merge the uploaded experts into one model (Sec. 3.4-3.5, Algorithm 1, lines 13-18).

Reads RUN/run.json, RUN/public/ and the clients' uploads, nothing else of theirs; writes RUN/moe/NAME/. The
methods:

    metamoe       proxy-aligned experts, context-aware router from the uploaded vectors, final training of
                  router and
                  experts on the union of all proxies
    flexolmo      private-only experts, token-level router from the uploaded vectors, the router alone trained
                  on the union
                  of proxies chosen by relevance
    btx           private-only experts, random token-level router, router and experts trained on random public
                  samples
    soup          one expert: the average of the private-only experts' weight updates B_p A_p
    btm           no model: evaluate.py averages the private-only experts' predictions
    unrestricted  the upper bound: as metamoe from private-only experts, final training on ALL CLIENTS'
                  PRIVATE DATA

Each switch of the paper's ablations is a flag; a model made with one wants a --name of its own. From a model
that is there:

    --without NAME   writes RUN/moe/MODEL-without-NAME, the model without that client's expert: no training,
                     the others renormalised
    --extend MODEL   adds the clients of the run that RUN/moe/MODEL lacks, from their uploads; its experts and
                     routers keep
                     their trained weights, and the final training is run again, on the union of all proxies
    --export DIR     also writes the model as a folder that transformers loads without this project
                     (trust_remote_code=True)
"""

import argparse
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import moe
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import train, use_checkpointing
from metamoe.cli import add_machine_flags
from metamoe.errors import UserError, run_main
from metamoe.methods import METHODS
from metamoe.presets import PRESETS
from metamoe.records import read_records, usable_public
from metamoe.rivals.soup import average, save_soup
from metamoe.rundir import atomic, finished, open_run, read_json, sha256, write_json
from metamoe.serving.export import check_export, export
from metamoe.serving.members import remove_expert
from metamoe.uploads import read_expert, read_manifest, upload_variant


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", required=True, help="folder of the run")
    parser.add_argument("--method", required=True, choices=METHODS, help="see above")
    parser.add_argument("--name", help="folder of the model under RUN/moe/ (default: the method)")
    parser.add_argument(
        "--data",
        choices=["aligned", "private", "proxies"],
        help="which experts: trained on private + proxies, private, proxies (default: the method's, like "
        "all below)",
    )
    parser.add_argument(
        "--selection",
        choices=["dpp", "similarity", "random", "dpp-all"],
        help="uploads of which proxy selection",
    )
    parser.add_argument("--full-ffn", action="store_true", help="uploads of experts trained with --full-ffn")
    parser.add_argument(
        "--context",
        choices=["on", "off"],
        help="router on the blend with the sequence mean (Eq. 6), or on the token alone",
    )
    parser.add_argument(
        "--init",
        choices=["uploaded", "random"],
        help="routing vectors start at the clients' means, or random",
    )
    parser.add_argument(
        "--train",
        choices=["all", "router", "none"],
        help="final training of router and experts, the router alone, or none",
    )
    parser.add_argument(
        "--samples",
        choices=["proxies", "public", "private"],
        help="final training on all proxies, as many random public samples, or the private data (breaks "
        "privacy)",
    )
    parser.add_argument(
        "--seed-expert",
        action="store_true",
        help="add e_0, the seed model's own FFN, as an expert (full paper, Eq. 6)",
    )
    parser.add_argument(
        "--weighting",
        choices=moe.WEIGHTINGS,
        default="stopgrad",
        help="weights of the chosen experts: pi / stop_gradient(sum), Eq. 5's pi, or pi / sum (default: "
        "%(default)s)",
    )
    parser.add_argument("--top-k", type=int, default=1, help="experts a token (default: %(default)s)")
    parser.add_argument(
        "--offset",
        action="store_true",
        help="add -|e_p|^2 / 2 to the routing logits: nearest mean instead of largest product",
    )
    parser.add_argument(
        "--lambda-init",
        type=float,
        help="lambda at the start (default: the backbone's preset, like all below)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help="final epochs over the proxies; sets the steps of every method but unrestricted, which takes "
        "the expert stage's epochs",
    )
    parser.add_argument("--lr", type=float, help="final learning rate")
    parser.add_argument("--lambda-lr", type=float, help="learning rate of lambda")
    parser.add_argument("--batch-size", type=int, help="samples a step")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], help="sgd: with Nesterov momentum 0.9")
    parser.add_argument("--weight-decay", type=float, help="of the optimiser (never of lambda)")
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="language models: recompute activations in the backward instead of keeping them (default: the "
        "backbone's preset)",
    )
    parser.add_argument(
        "--without",
        metavar="NAME",
        help="leave the expert NAME out of the model (--name, else the method's) and write it as a model "
        "of its own",
    )
    parser.add_argument(
        "--extend",
        metavar="MODEL",
        help="add the clients that the model RUN/moe/MODEL lacks and train again, to a model --name",
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="also write the model there as a Hugging Face folder (language models; context: the prefix's "
        "mean)",
    )
    add_machine_flags(parser)
    parser.add_argument("--force", action="store_true", help="redo a model that was made with other settings")
    return parser.parse_args()


def final_samples(run_dir, run, uploads, settings):
    """The records of the final training."""
    public = read_records(run_dir / "public" / "records.jsonl")
    if settings["samples"] == "proxies":
        union = sorted({i for upload in uploads for i in read_json(upload / "proxies.json")})
        if not union:
            raise UserError(
                "the uploads name no proxies: nothing to train on (no final training: --train none)"
            )
        if union[0] < 0 or union[-1] >= len(public):
            raise UserError(
                f"an upload names public sample {union[0] if union[0] < 0 else union[-1]}, D_0 has "
                f"{len(public)}: all parties need the same public set"
            )
        return [public[i] for i in union]
    if settings["samples"] == "public":
        count = min(len(public), sum(len(read_json(upload / "proxies.json")) for upload in uploads))
        return [
            public[i]
            for i in np.random.default_rng([run["seed"], 13]).choice(
                usable_public(run_dir, public), count, replace=False
            )
        ]
    print(
        "unify_moe: THIS MODEL IS TRAINED ON ALL CLIENTS' PRIVATE DATA: the upper bound, not a private "
        "method",
        flush=True,
    )
    return [
        record
        for name in run["clients"]
        for record in read_records(run_dir / "clients" / name / "private" / "train.jsonl")
    ]


def label_set(backbone, run_dir, run, settings):
    """The classes that an image model's final training tells apart: the public set's, or for the upper bound
    all clients'."""
    classes = backbone.public_classes(run_dir / "public")
    if classes and settings["samples"] == "private":
        own = [
            read_records(run_dir / "clients" / name / "private" / "train.jsonl")[0]["choices"]
            for name in run["clients"]
        ]
        classes = list(dict.fromkeys(name for names in own for name in names))
    return classes


def final_training(backbone, model, records, classes, run, settings, checkpointing):
    """Train router (and experts) of the unified model in place; returns each step's loss."""
    groups = [
        {"params": moe.router_parameters(model), "lr": settings["lr"]},
        {"params": moe.lambda_parameters(model), "lr": settings["lambda_lr"], "weight_decay": 0.0},
    ]
    if settings["train"] == "all":
        groups.append({"params": moe.expert_parameters(model), "lr": settings["lr"]})
    else:
        for parameter in moe.expert_parameters(model):
            parameter.requires_grad_(False)
    return train(
        backbone,
        model,
        records,
        groups,
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        warmup_steps=0,
        optimizer=settings["optimizer"],
        weight_decay=settings["weight_decay"],
        seed=run["seed"],
        classes=classes,
        label=f"final training {settings['name']}",
        after_step=lambda: moe.clamp_(model),
        checkpointing=checkpointing,
    )


def build(backbone, run_dir, run, uploads, settings):
    """The unified model before its final training (Eq. 5-6)."""
    experts = [read_expert(upload) for upload in uploads]
    vectors = [load_file(upload / "router.safetensors")["vectors"] for upload in uploads]
    names = list(run["clients"])
    if settings["seed_expert"]:  # e_0: the seed's FFN, and its mean over up to 3,000 random samples of D_0
        public = read_records(run_dir / "public" / "records.jsonl")
        sample = np.random.default_rng([run["seed"], 17]).permutation(usable_public(run_dir, public))[:3000]
        vectors.insert(
            0,
            backbone.routing_vectors(
                backbone.model, [public[i] for i in sample], label="routing vector of e_0"
            ),
        )
        experts.insert(
            0,
            {
                ffn: moe.seed_expert(backbone.model.get_submodule(ffn), experts[0][ffn])
                for ffn in backbone.ffn_names
            },
        )
        names.insert(0, "seed")
    if settings["init"] == "random":
        generator = torch.Generator().manual_seed(run["seed"])
        vectors = [torch.randn(v.shape, generator=generator) / v.shape[1] ** 0.5 for v in vectors]
    context = "none"
    if settings["context"] == "on":  # whole texts have no end of the prompt to take a mean at
        context = "prefix" if run.get("loss") == "text" else "fixed"
    return moe.unify(
        backbone.model,
        backbone.ffn_names,
        experts,
        vectors,
        names=names,
        lam=settings["lambda_init"],
        top_k=settings["top_k"],
        weighting=settings["weighting"],
        context=context,
        offset=settings["offset"],
    )


def extend(backbone, run_dir, run, uploads, settings):
    """The model RUN/moe/EXTEND with the experts of the clients it lacks, before the final training."""
    config, tensors = moe.read(run_dir / "moe" / settings["extend"]["model"])
    new = [
        (name, upload)
        for name, upload in zip(run["clients"], uploads, strict=True)
        if name not in config["names"]
    ]
    joining = [
        (name, read_expert(upload), load_file(upload / "router.safetensors")["vectors"])
        for name, upload in new
    ]
    return moe.assemble(backbone.model, config, tensors, joining)


def extended(args, run_dir, run, settings, variant):
    """What `done.json` records of the model that is extended; UserError where it does not go with these
    settings."""
    folder = run_dir / "moe" / args.extend
    if not (folder / "moe_config.json").exists():
        raise UserError(f"--extend {args.extend}: there is no such MoE in {run_dir / 'moe'}")
    if args.name in (None, args.extend):
        raise UserError(f"--extend {args.extend}: give the extended model a --name of its own")
    made, config = read_json(folder / "done.json"), read_json(folder / "moe_config.json")
    for key in ("method", "top_k", "weighting", "offset", "context", "seed_expert"):
        if made[key] != settings[key]:
            raise UserError(
                f"--{key.replace('_', '-')} {settings[key]}: {args.extend} was made with {made[key]}, and "
                "is extended with the same alone"
            )
    if made["variant"] != variant:
        raise UserError(
            f"--extend {args.extend}: made from the uploads {made['variant']}, now {variant}: pass the "
            "same --data and --selection"
        )
    if not set(run["clients"]) - set(config["names"]):
        raise UserError(f"--extend {args.extend}: has an expert of every client of this run already")
    return {"model": args.extend, "moe": sha256(folder / "moe.safetensors")}


def leave_out(args, run_dir):
    """RUN/moe/MODEL-without-NAME; returns its folder."""
    base = args.name or args.method
    source, folder = run_dir / "moe" / base, run_dir / "moe" / f"{base}-without-{args.without}"
    if not (source / "moe_config.json").exists():
        raise UserError(
            f"--without {args.without}: there is no MoE {base} in {run_dir / 'moe'}: make it first, or "
            "name another with --name"
        )
    made = read_json(source / "done.json")
    if made["method"] != args.method:
        raise UserError(f"--method {args.method}: {base} was made with {made['method']}")
    settings = made | {
        "name": folder.name,
        "without": made.get("without", []) + [args.without],
        "from": sha256(source / "moe.safetensors"),
    }
    if finished(folder, settings, args.force):
        print(f"unify_moe: {folder.name}: is there already, skipped")
        return folder
    try:
        config, tensors = remove_expert(*moe.read(source), args.without)
    except ValueError as error:
        raise UserError(f"--without {args.without}: {error}") from None
    with atomic(folder) as part:
        part.mkdir(parents=True)
        moe.write(part, config, tensors)
        write_json(part / "done.json", settings)
    print(
        f"unify_moe: {folder.name}: {len(config['names'])} experts ({', '.join(config['names'])}), no "
        "training"
    )
    return folder


def resolve(args, run_dir, run):
    """All settings of this model: the method's, the backbone's preset, overridden by flags."""
    preset = PRESETS[run["backbone"]]
    preset = preset | {"final_lr": preset["final_lr"].get(args.method)}
    name = args.name or args.method
    taken = (
        name == "zeroshot"
        or name.startswith("expert-")
        or (name in METHODS or args.method == "btm")
        and name != args.method
    )
    if taken or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"--name {name}: letters, digits, '-', '_' and '.'; no other row of the table, and none for btm"
        )
    settings = {
        "name": name,
        "method": args.method,
        "seed": run["seed"],
        "dtype": args.dtype,
        "full_ffn": args.full_ffn,
    }
    for key, value in METHODS[args.method].items():
        settings[key] = value if getattr(args, key) is None else getattr(args, key)
    if args.method in ("soup", "btm"):
        return settings
    settings |= {key: getattr(args, key) for key in ("seed_expert", "weighting", "top_k", "offset")}
    defaults = {
        "lambda_init": "lambda_init",
        "epochs": "final_epochs",
        "lr": "final_lr",
        "lambda_lr": "lambda_lr",
        "batch_size": "final_batch",
    }
    defaults |= {"optimizer": "optimizer", "weight_decay": "weight_decay"}
    if settings["samples"] == "private":
        defaults["epochs"] = "expert_epochs"
    settings |= {
        key: preset[default] if getattr(args, key) is None else getattr(args, key)
        for key, default in defaults.items()
    }
    if not 0 <= settings["lambda_init"] <= 1:
        raise UserError(f"--lambda-init {settings['lambda_init']}: must lie in [0, 1]")
    count = len(run["clients"]) + settings["seed_expert"]
    if not 1 <= settings["top_k"] <= count:
        raise UserError(f"--top-k {settings['top_k']}: must be 1 to {count}, the number of experts")
    for key in ("epochs", "lr", "lambda_lr", "batch_size"):
        if not settings[key] > 0:  # nan too
            raise UserError(
                f"--{key.replace('_', '-')} {settings[key]}: must be positive (no final training: --train "
                "none)"
            )
    if not settings["weight_decay"] >= 0:
        raise UserError(f"--weight-decay {settings['weight_decay']}: must be at least 0")
    samples = len(run["clients"]) * run["proxies"]
    if settings["samples"] == "private":
        samples = sum(
            read_json(run_dir / "clients" / name / "private" / "done.json")["train"]
            for name in run["clients"]
        )
    settings["steps"] = (
        settings["epochs"] * math.ceil(samples / settings["batch_size"]) if settings["train"] != "none" else 0
    )
    return settings


def main():
    args = parse_args()
    run_dir = Path(args.run_dir)
    run = open_run(run_dir, backbone=None)
    if args.export:
        check_export(args, run)
    if args.without and args.extend:
        raise UserError("--without and --extend: one after the other")
    if args.without:
        folder = leave_out(args, run_dir)
        if args.export:
            export(run, folder, Path(args.export), args.force)
        return
    settings = resolve(args, run_dir, run)
    variant = upload_variant(settings["data"], settings["selection"], args.full_ffn)
    uploads = [run_dir / "clients" / name / "upload" / variant for name in run["clients"]]
    for upload in uploads:
        read_manifest(upload)
    settings["uploads"] = {
        name: sha256(upload / "manifest.json") for name, upload in zip(run["clients"], uploads, strict=True)
    }
    settings["variant"] = variant
    if args.extend:
        settings["extend"] = extended(args, run_dir, run, settings, variant)
    folder = run_dir / "moe" / settings["name"]
    with processes(args.device).main_process_first():  # of several processes, under `accelerate launch`
        there = finished(folder, settings, args.force)
    if there:
        print(f"unify_moe: {settings['name']}: is there already, skipped")
    else:
        make(args, run_dir, run, uploads, settings, folder)
    if args.export and processes().is_main_process:
        export(run, folder, Path(args.export), args.force)


def make(args, run_dir, run, uploads, settings, folder):
    """Merge, train and write the model."""
    start, model, losses = time.perf_counter(), None, []
    if args.method not in ("soup", "btm"):
        backbone = run_backbone(run, args)
        start = time.perf_counter()  # unification begins with the seed in memory
        model = (extend if args.extend else build)(backbone, run_dir, run, uploads, settings)
        if settings["steps"]:
            checkpointing = use_checkpointing(args.gradient_checkpointing, run, backbone)
            losses = final_training(
                backbone,
                model,
                final_samples(run_dir, run, uploads, settings),
                label_set(backbone, run_dir, run, settings),
                run,
                settings,
                checkpointing,
            )
    if not processes().is_main_process:
        return
    with atomic(folder) as part:
        part.mkdir(parents=True)
        if model is not None:
            moe.save(model, part)
            write_json(part / "losses.json", losses)
        elif args.method == "soup":
            save_soup(average([read_expert(upload) for upload in uploads]), uploads[0], part)
        seconds = time.perf_counter() - start
        write_json(part / "timing.json", {"unify_seconds": seconds})
        write_json(part / "done.json", settings)
    trained = (
        f", {len(losses)} final steps, loss {np.mean(losses[:5]):.3f} -> {np.mean(losses[-5:]):.3f}"
        if losses
        else ""
    )
    print(
        f"unify_moe: {settings['name']}: {len(uploads)} experts ({settings['variant']}){trained}, "
        f"{seconds:.1f} s"
    )


if __name__ == "__main__":
    run_main(main)
