"""Stage 3, at the server: merge the uploaded experts into one model (Sec. 3.4-3.5, Algorithm 1, lines 13-18).

Reads RUN/run.json, RUN/public/ and the clients' uploads, nothing else of theirs; writes RUN/moe/NAME/. Each
switch of the paper's ablations is a flag. A model made with one takes a --name of its own, or is an entry of
metamoe/methods.py. The methods:

METHODS
From a model that is there:

    --without NAME   writes RUN/moe/MODEL-without-NAME: without that expert, others renormalised, no training
    --extend MODEL   adds the clients of the run that RUN/moe/MODEL lacks, from their uploads; its experts and
                     routers keep their trained weights; the final training is run again, on all proxies
    --compress K     writes RUN/moe/MODEL-compressed-K: like experts merged to K in all, no training
    --export DIR     also writes the model as a folder that transformers loads without this project
                     (trust_remote_code=True)
"""

import importlib
import time
from pathlib import Path

import numpy as np

import moe
from metamoe import cli
from metamoe.agreement import read_local
from metamoe.atomic import locked
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import ends, train, use_checkpointing
from metamoe.errors import run_main
from metamoe.flag_values import fraction, number, positive_float
from metamoe.methods import METHODS, described
from metamoe.model_settings import add_method_flags, resolve, sources
from metamoe.records import read_records, usable_public
from metamoe.rivals.simulation import simulate
from metamoe.routing import router_losses
from metamoe.rundir import finished, inside, making, open_run, write_json
from metamoe.serving.compression import compress
from metamoe.serving.export import check_export, export
from metamoe.serving.members import add_member_flags, check_extension, check_member_flags, extend, leave_out
from metamoe.start import set_bias, start, with_seed_model
from metamoe.takeover import attraction, check_lengths, tell_routing
from metamoe.uploads import read_uploads, receive


def parse_args():
    parser = cli.stage_parser(__doc__.replace("METHODS\n", described() + "\n"))
    flag = parser.add_argument
    flag("--method", required=True, choices=METHODS, metavar="METHOD", help="above, or an ablation")
    flag("--name", help="folder of the model under RUN/moe/ (default: the method)")
    cli.add_upload_flags(parser, data=None, selection=None)
    add_method_flags(parser)
    flag("--lambda-init", type=fraction, help="lambda at the start (default: the preset's)")
    flag("--lambda-lr", type=positive_float, help="learning rate of lambda (default: the preset's)")
    cli.add_training_flags(parser)
    sent = "the folder that a client has sent, once for each: checked, and copied into the run directory"
    flag("--upload", action="append", metavar="NAME=DIR", help=sent)
    bound = "refuse a client with a routing vector this many times longer or shorter than D_0 allows"
    flag("--length-bound", type=number(float, 1), default=2.0, metavar="TIMES", help=bound + " (default: 2)")
    add_member_flags(parser)
    folder = "also write the model as a Hugging Face folder (language models; context: the prefix's mean)"
    flag("--export", metavar="DIR", help=folder)
    cli.add_machine_flags(parser)
    flag("--force", action="store_true", help="redo a model that was made with other settings")
    return parser.parse_args()


def build(backbone, run_dir, run, uploads, settings):
    """The unified model before its final training (Eq. 5-6)."""
    if settings["seed_expert"]:
        uploads = with_seed_model(backbone, run_dir, run, uploads)
    experts = [upload.expert for upload in uploads.values()]
    vectors, bias = start(backbone, run_dir, run, uploads, settings)
    context = "none"
    if settings["context"] == "on":  # whole texts have no end of the prompt to take a mean at
        context = "prefix" if run.get("loss") == "text" else "fixed"
    options = {"names": list(uploads), "lam": settings["lambda_init"], "context": context}
    options |= {"top_k": settings["top_k"], "weighting": settings["weighting"]}
    options |= {"offset": settings["offset"] or bias is not None, "absolute": settings["init"] == "arrow"}
    model = moe.unify(backbone.model, backbone.ffn_names, experts, vectors, **options)
    set_bias(model, bias)
    return model


def final_samples(run_dir, run, uploads, settings):
    """The records of the final training."""
    public, chosen = read_records(run_dir / "public" / "records.jsonl"), []
    if "proxies" in settings["samples"]:
        chosen += sorted(set().union(*(upload.proxies for upload in uploads.values())))
    if "public" in settings["samples"]:
        count, usable = min(len(public), len(uploads) * run["proxies"]), usable_public(run_dir, public)
        chosen += [*np.random.default_rng([run["seed"], 13]).choice(usable, count, replace=False)]
    if chosen:
        return [public[i] for i in chosen]
    # flushed: ahead of the training's progress, also in a log
    print("unify_moe: THIS MODEL IS TRAINED ON ALL CLIENTS' PRIVATE DATA: the upper bound", flush=True)
    return [record for part in private_data(run_dir, run) for record in part]


def private_data(run_dir, run):
    """The training records of each client; only the upper bound reads them."""
    return [read_records(run_dir / "clients" / name / "private" / "train.jsonl") for name in run["clients"]]


def label_set(backbone, run_dir, run, settings):
    """The classes that an image model's final training tells apart; for the upper bound all clients'."""
    classes = backbone.public_classes(run_dir / "public")
    if classes and settings["samples"] == "private":
        own = [records[0]["choices"] for records in private_data(run_dir, run)]
        classes = list(dict.fromkeys(name for names in own for name in names))
    return classes


def final_training(backbone, model, records, classes, run, settings, checkpointing, uploads):
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
    options = {key: settings[key] for key in ("steps", "batch_size", "optimizer", "weight_decay")}
    options |= {"seed": run["seed"], "label": f"final training {settings['name']}", "warmup_steps": 0}
    options |= {"classes": classes, "checkpointing": checkpointing, "after_step": lambda: moe.clamp_(model)}
    extra = router_losses(model, uploads, settings)
    if extra:
        options["extra_loss"] = lambda batch: sum(loss(batch) for loss in extra)
    losses = train(backbone, model, records, groups, **options)
    for loss in extra:
        loss.remove()
    return losses


def make(args, run_dir, run, backbone, uploads, settings):
    """Merge (Eq. 5-6) and train (lines 15-18); returns (model, losses, tokens drawn, start of the merge)."""
    if backbone is None:
        return None, [], {}, time.perf_counter()
    start, losses = time.perf_counter(), []  # the seed model is in memory
    if args.extend:
        model = extend(backbone, run_dir, run, args.extend, uploads, settings)
    else:
        model = build(backbone, run_dir, run, uploads, settings)
    if settings["steps"]:
        records = final_samples(run_dir, run, uploads, settings)
        checkpointing = use_checkpointing(args.gradient_checkpointing, run, backbone)
        classes = label_set(backbone, run_dir, run, settings)
        losses = final_training(backbone, model, records, classes, run, settings, checkpointing, uploads)
    merged = time.perf_counter()
    tokens = attraction(backbone, model, read_records(run_dir / "public" / "records.jsonl"), uploads)
    start += time.perf_counter() - merged
    return model, losses, tokens, start


def write(folder, args, run_dir, made, lengths, uploads, settings, made_from):
    """Write the model, or what the rival's merge makes of the uploads, and say so."""
    model, losses, tokens, start = made
    with making(folder, settings, run_dir, made_from) as part:
        if model is not None:
            moe.save(model, part)
            write_json(part / "losses.json", losses)
            write_json(part / "routing.json", {"lengths": lengths, "tokens": tokens})
        else:
            rival = importlib.import_module(f"metamoe.rivals.{METHODS[args.method].merge}")
            rival.merge(list(uploads.values()), part)
        seconds = time.perf_counter() - start
        write_json(part / "timing.json", {"unify_seconds": seconds})
    about = f"{len(uploads)} experts ({settings['variant']})"
    if losses:
        about += ", {} final steps, loss {:.3f} -> {:.3f}".format(len(losses), *ends(losses))
    tell_routing(settings["name"], lengths, tokens)
    print(f"unify_moe: {settings['name']}: {about}, {seconds:.1f} s")


def unify(args, run_dir, run):
    """RUN/moe/NAME/ from the uploads; returns its folder."""
    settings = resolve(args, run_dir, run)
    resolved = cli.announce(args, "unify_moe", settings)
    with processes(args.device).main_process_first():  # of several processes, under `accelerate launch`
        receive(run_dir, run, args.upload or [], settings["variant"])
    uploads = read_uploads(run_dir, run, settings["variant"])
    settings["uploads"] = {name: upload.digest for name, upload in uploads.items()}
    if args.extend:
        settings["extend"] = check_extension(args, run_dir, run, settings)
    folder = inside(run_dir, "moe") / settings["name"]
    with locked(folder):
        made_from = sources(run_dir, run, settings)
        with processes().main_process_first():
            there = finished(folder, settings, args.force, made_from)
        if there:
            print(f"unify_moe: {settings['name']}: is there already, skipped")
            return folder
        backbone, lengths = None, {}
        if METHODS[args.method].merge == "moe":
            backbone = run_backbone(run, read_local(run_dir), args)
            lengths = check_lengths(backbone, run_dir, run, uploads, args.length_bound)
        cli.save_settings(run_dir, "unify_moe", settings["name"], resolved)
        made = make(args, run_dir, run, backbone, uploads, settings)
        if processes().is_main_process:
            write(folder, args, run_dir, made, lengths, uploads, settings, made_from)
    return folder


def main():
    args = parse_args()
    run_dir = Path(args.run_dir)
    run = open_run(run_dir, backbone=None)
    if args.export:
        check_export(args, run)
    check_member_flags(args)
    make_model = simulate if METHODS[args.method].rounds else unify
    if args.compress:
        folder = compress(args, run_dir, run)
    else:
        folder = leave_out(args, run_dir) if args.without else make_model(args, run_dir, run)
    if args.export and processes().is_main_process:
        export(run, read_local(run_dir), folder, Path(args.export), args.force)


if __name__ == "__main__":
    run_main(main)
