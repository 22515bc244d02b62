"""Stage 2, at each client: train the expert and pack the one upload (Sec. 3.3, Algorithm 1, lines 9-11).

Trains LoRA factors (or, with --full-ffn, the weights) of the FFN sublayers alone on private data and proxies,
takes the routing vector of every layer as the mean of the FFN's input over that same data, and writes what
leaves the client:

    RUN/clients/NAME/upload/DATA-SELECTION/manifest.json       hashes of the files below; closes the upload
                                           proxies.json        indices into D_0, sorted (no scores)
                                           adapter/            the expert, a PEFT adapter (ffn.safetensors
                                                               with --full-ffn)
                                           router.safetensors  routing vectors (L, d)

DATA: aligned = private + proxies (MetaMoE), private = private alone (FlexOlmo, BTX, BTM, ModelSoup), proxies
= proxies alone.
"""

import argparse
import gc
import math
from pathlib import Path

from safetensors.torch import save_file

from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import train, use_checkpointing
from metamoe.cli import add_machine_flags
from metamoe.errors import UserError, run_main
from metamoe.presets import PRESETS
from metamoe.records import read_records
from metamoe.rundir import (
    atomic,
    check_client,
    finished,
    folder_bytes,
    open_run,
    read_json,
    sha256,
    write_json,
)
from metamoe.uploads import save_expert, upload_variant, write_manifest

DATA = ("aligned", "private", "proxies")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", required=True, help="folder of the run, made by select_proxies.py")
    parser.add_argument("--client", help="train this one alone (default: every client of the run)")
    parser.add_argument(
        "--data",
        choices=DATA,
        default="aligned",
        help="train on private + proxies, private only, proxies only (default: %(default)s)",
    )
    parser.add_argument(
        "--selection",
        default="dpp",
        choices=["dpp", "similarity", "random", "dpp-all"],
        help="whose proxies to train on and upload (default: %(default)s)",
    )
    parser.add_argument(
        "--full-ffn",
        action="store_true",
        help="train and upload the FFN weights themselves instead of LoRA factors",
    )
    parser.add_argument("--rank", type=int, help="LoRA rank (default: the backbone's preset, like all below)")
    parser.add_argument("--alpha", type=int, help="LoRA alpha; the update is scaled by alpha / rank")
    parser.add_argument("--epochs", type=int, help="passes over the training data")
    parser.add_argument("--lr", type=float, help="learning rate, constant after the warm-up")
    parser.add_argument("--batch-size", type=int, help="samples a step")
    parser.add_argument("--warmup-steps", type=int, help="steps of linear warm-up")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], help="sgd: with Nesterov momentum 0.9")
    parser.add_argument("--weight-decay", type=float, help="of the optimiser")
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="language models: recompute activations in the backward instead of keeping them (default: the "
        "backbone's preset)",
    )
    add_machine_flags(parser)
    parser.add_argument(
        "--force", action="store_true", help="redo an expert that was made with other settings"
    )
    return parser.parse_args()


def variant(args):
    """The expert's folder name. A private-only expert knows no proxies: one serves the uploads of every
    selection."""
    return args.data + f"-{args.selection}" * (args.data != "private") + "-full" * args.full_ffn


def train_client(run_dir, run, name, args, settings):
    """Train one client's expert and take its routing vectors; returns a line about it, or None where it is
    there already."""
    client = run_dir / "clients" / name
    folder = client / "experts" / variant(args)
    with processes(args.device).main_process_first():  # of several processes, under `accelerate launch`
        if finished(folder, settings, args.force):
            return None
    private = read_records(client / "private" / "train.jsonl") if args.data != "proxies" else []
    proxies = []
    if args.data != "private":
        public = read_records(run_dir / "public" / "records.jsonl")
        proxies = [public[i] for i in read_json(selection_file(client, args.selection))["proxies"]]
    records = private + proxies
    backbone = run_backbone(run, args)
    classes = backbone.public_classes(run_dir / "public")
    if classes:  # the client's own first, one that both have once
        classes = list(
            dict.fromkeys(read_records(client / "private" / "train.jsonl")[0]["choices"] + classes)
        )
    model = (
        backbone.train_full_ffn()
        if args.full_ffn
        else backbone.add_lora(settings["rank"], settings["alpha"], run["seed"])
    )
    steps = settings["epochs"] * math.ceil(len(records) / settings["batch_size"])
    losses = train(
        backbone,
        model,
        records,
        [{"params": [p for p in model.parameters() if p.requires_grad], "lr": settings["lr"]}],
        steps=steps,
        batch_size=settings["batch_size"],
        warmup_steps=settings["warmup_steps"],
        optimizer=settings["optimizer"],
        weight_decay=settings["weight_decay"],
        seed=run["seed"],
        label=f"expert {name} ({args.data})",
        classes=classes,
        checkpointing=use_checkpointing(args.gradient_checkpointing, run, backbone),
    )
    vectors = backbone.routing_vectors(model, records, label=f"routing vectors {name}")
    if not processes().is_main_process:
        return None
    with atomic(folder) as part:
        part.mkdir(parents=True)
        save_expert(model, backbone, part, args.full_ffn)
        save_file({"vectors": vectors}, part / "router.safetensors")
        write_json(part / "losses.json", losses)
        write_json(part / "done.json", settings)
    return (
        f"{len(private)} private + {len(proxies)} proxies, {steps} steps, loss "
        f"{sum(losses[:5]) / len(losses[:5]):.3f} -> {sum(losses[-5:]) / len(losses[-5:]):.3f}"
    )


def selection_file(client, rule):
    """What select_proxies.py wrote for the client under this rule; UserError if it did not."""
    path = client / "selection" / rule / "selection.json"
    if not (path.parent / "done.json").exists():
        raise UserError(f"{path} is missing: run select_proxies.py --selection {rule} first")
    return path


def pack_upload(run_dir, name, args):
    """RUN/clients/NAME/upload/DATA-SELECTION/: copies of the expert's files, the proxy indices, the manifest.
    Returns its bytes."""
    client = run_dir / "clients" / name
    expert = client / "experts" / variant(args)
    upload = client / "upload" / upload_variant(args.data, args.selection, args.full_ffn)
    proxies = sorted(read_json(selection_file(client, args.selection))["proxies"])
    with atomic(upload) as part:
        part.mkdir(parents=True)
        write_json(part / "proxies.json", proxies)
        for path in sorted(p for p in expert.rglob("*") if p.is_file()):
            inside = path.relative_to(expert)
            if inside.name not in ("done.json", "losses.json"):  # the client's own notes
                (part / inside).parent.mkdir(parents=True, exist_ok=True)
                (part / inside).write_bytes(path.read_bytes())
        write_manifest(part, {"client": name, "data": args.data, "selection": args.selection})
    return folder_bytes(upload)


def main():
    args = parse_args()
    run_dir = Path(args.run_dir)
    run = open_run(run_dir, backbone=None)
    preset = PRESETS[run["backbone"]]
    names = [args.client] if args.client else run["clients"]
    defaults = {
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "epochs": "expert_epochs",
        "lr": "expert_lr",
        "batch_size": "expert_batch",
        "warmup_steps": "warmup_steps",
    }
    defaults |= {"optimizer": "optimizer", "weight_decay": "weight_decay"}
    settings = {
        key: preset[default] if getattr(args, key) is None else getattr(args, key)
        for key, default in defaults.items()
    }
    for key, value in settings.items():
        # nan too
        if key != "optimizer" and not value >= (0 if key in ("warmup_steps", "weight_decay") else 1e-12):
            raise UserError(f"--{key.replace('_', '-')} {value}: must be positive")
    settings |= {"data": args.data, "full_ffn": args.full_ffn, "seed": run["seed"], "dtype": args.dtype}
    for name in names:
        check_client(run, name)
        selection = selection_file(run_dir / "clients" / name, args.selection)
        if args.data != "private":  # other proxies, another expert
            settings |= {"selection": args.selection, "proxies": sha256(selection)}
        done = train_client(run_dir, run, name, args, settings)
        gc.collect()  # a PEFT model is a reference cycle: without this two of them are in memory at once
        if not processes().is_main_process:
            continue
        size = pack_upload(run_dir, name, args)
        print(
            f"train_expert: {name}: {args.data}-{args.selection}: "
            f"{done or 'expert is there already, skipped'}; upload {size / 1e6:.1f} MB"
        )
    processes().wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
