"""Stage 2, at each client: train the expert and pack the one upload (Sec. 3.3, Algorithm 1, lines 9-11).

Trains LoRA factors (or, with --full-ffn, the weights) of the FFN sublayers alone on private data and proxies,
takes the routing vector of every layer as the mean of the FFN's input over half of the private data
(metamoe/sending.py says why; with --epsilon noisy, over all), and writes what leaves the client:

    RUN/clients/NAME/upload/DATA-SELECTION/manifest.json       hashes of the files below; closes the upload
                                           proxies.json        indices into D_0, sorted (no scores)
                                           adapter/            the expert, a PEFT adapter (ffn.safetensors
                                                               with --full-ffn)
                                           router.safetensors  routing vectors (L, d)

DATA: aligned = private + proxies (MetaMoE), private = private alone (FlexOlmo, BTX, BTM, ModelSoup), proxies
= proxies alone, anchored = private alone, beside the frozen seed model (FlexOlmo, anchored; with a bias).
"""

import gc
from pathlib import Path

from metamoe import cli, rundir
from metamoe.agreement import FORMAT, check_here, read_local
from metamoe.atomic import locked
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import ends
from metamoe.errors import UserError, run_main
from metamoe.expert_training import Anchored, check_anchored, train_model
from metamoe.flag_values import count, number, positive_int
from metamoe.party import label_set, selection_of, training_data
from metamoe.presets import PRESETS
from metamoe.privacy import parts
from metamoe.privacy.flags import add_privacy_flags, private_settings
from metamoe.sending import check_again, pack, private_half, save_result
from metamoe.start import public_mean
from metamoe.uploads import expert_variant, upload_variant

# flag -> key of the preset that is its default
DEFAULTS = dict(rank="lora_rank", alpha="lora_alpha", epochs="expert_epochs", lr="expert_lr")
DEFAULTS |= dict(batch_size="expert_batch", warmup_steps="warmup_steps", optimizer="optimizer")
DEFAULTS["weight_decay"] = "weight_decay"


def parse_args():
    parser = cli.stage_parser(__doc__, help="folder of the run, made by select_proxies.py")
    flag = parser.add_argument
    flag("--client", metavar="NAME", help="train this one alone (default: every client of the run)")
    cli.add_upload_flags(parser, data="aligned", selection="dpp")
    rank = "LoRA rank (default: the backbone's preset, like all below)"
    flag("--rank", type=number(int, 1, 4096), help=rank)
    flag("--alpha", type=positive_int, help="LoRA alpha; the update is scaled by alpha / rank")
    fixed = "LoRA factors B alone are trained, A stays random (FFA-LoRA): half as many weights get noise"
    flag("--fixed-a", action="store_true", help=fixed)
    flag("--warmup-steps", type=count, help="steps of linear warm-up (default: at most a tenth of all)")
    cli.add_training_flags(parser)
    add_privacy_flags(parser)
    cli.add_machine_flags(parser)
    again = "make another upload of a client of --agreement, though its difference to the first tells more"
    flag("--again", action="store_true", help=again)
    flag("--force", action="store_true", help="redo an expert that was made with other settings")
    return parser.parse_args()


def resolve(args, run):
    """The settings of the experts: the backbone's preset, overridden by flags."""
    agreed = {"lora_rank": run["rank"], "lora_alpha": run["alpha"]}
    settings = cli.from_preset(args, PRESETS[run["backbone"]] | agreed, DEFAULTS)
    if settings["rank"] > run["rank"]:
        most = f"the agreement (run.json) has {run['rank']} at most (select_proxies.py --rank)"
        raise UserError(f"--rank {settings['rank']}: {most}")
    check_anchored(args)
    settings |= {"data": args.data, "full_ffn": args.full_ffn, "seed": run["seed"], "dtype": args.dtype}
    return settings | {"format": FORMAT} | private_settings(args)


def train_client(run_dir, run, local, name, indices, args, settings, made_from, budget):
    """Train one client's expert, take its routing vectors and write both; returns a line about it."""
    client = run_dir / "clients" / name
    folder = client / "experts" / expert_variant(args.data, args.selection, args.full_ffn)
    private, proxies = training_data(run_dir, client, args.data, indices)
    backbone = run_backbone(run, local, args)
    measured = private_half(client / "private" / "train.jsonl", private) if private else proxies
    told, lora = f"routing vectors {name}", (settings["rank"], settings["alpha"], run["seed"], args.fixed_a)
    options = {key: settings[key] for key in ("optimizer", "weight_decay", "seed")}
    if args.data == "anchored":
        vectors = backbone.routing_vectors(backbone.model, measured, label=told)
        pair = Anchored(backbone, public_mean(backbone, run_dir, run), vectors, lora)
        model, options["after_step"] = pair.model, pair.hold
    else:
        model = backbone.train_full_ffn() if args.full_ffn else backbone.add_lora(*lora)
    options |= {"label": f"expert {name} ({args.data})", "classes": label_set(backbone, run_dir, client)}
    options["groups"] = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": settings["lr"]}]
    task = backbone, model, private, proxies, args, settings, run, options
    covers = budget.covers if budget and private else lambda part: False
    losses = parts.expert_under(budget, run_dir, *task) if covers("expert") else train_model(*task)
    if args.data == "anchored":
        model, sent = pair.take_apart()
    elif covers("vectors"):
        sent = {"vectors": parts.vectors_under(budget, run_dir, backbone, model, private, run)}
    else:
        sent = {"vectors": backbone.routing_vectors(model, measured, label=told)}
    if processes().is_main_process:
        with rundir.making(folder, settings, run_dir, made_from) as part:
            save_result(model, backbone, sent, part, args.full_ffn)
            rundir.write_json(part / "losses.json", losses)
            parts.keep_bill(budget, part)
    told = "{} steps, loss {:.3f} -> {:.3f}".format(len(losses), *ends(losses))
    return f"{len(private)} private + {len(proxies)} proxies, {told}"


def make_expert(run_dir, run, local, name, args, settings, resolved):
    """One client's expert, where it is not there yet, and its upload."""
    kind = args.data, args.selection, args.full_ffn
    client, done = run_dir / "clients" / name, "expert is there already, skipped"
    proxies, digest = selection_of(client, args.selection)
    budget = parts.budget_of(client, args)
    names = ["public/records.jsonl", f"clients/{name}/private/train.jsonl"]
    if args.data == "private":
        names = names[1:]
    elif args.data != "anchored":  # other proxies, another expert
        settings = settings | {"selection": args.selection, "proxies": digest}
    folder = rundir.inside(client, "experts") / expert_variant(*kind)
    with locked(folder):
        made_from = rundir.versions(run_dir, *names)
        with processes(args.device).main_process_first():  # of several processes, under `accelerate launch`
            there = rundir.finished(folder, settings, args.force, made_from)
        sends = local["clients"] != run["clients"]  # to somebody else
        if sends:
            check_again(client, upload_variant(*kind), there, args.again)
        if not there:
            parts.check_unspent(budget, args.data)
            cli.save_settings(run_dir, "train_expert", folder.name, resolved)
            task = proxies, args, settings, made_from, budget
            done = train_client(run_dir, run, local, name, *task)  # lines 9-10
            gc.collect()  # a PEFT model is a reference cycle: without this two are in memory at once
        if processes().is_main_process:
            upload = rundir.inside(client, "upload") / upload_variant(*kind)
            about = dict(client=name, data=args.data, selection=args.selection, full_ffn=args.full_ffn)
            about["privacy"] = parts.settle(budget, folder)
            pack(folder, proxies, upload, run, about, sends)  # line 11
            megabytes = rundir.folder_bytes(upload) / 1e6
            print(f"train_expert: {name}: {args.data}-{args.selection}: {done}; upload {megabytes:.1f} MB")


def main():
    args = parse_args()
    run_dir = Path(args.run_dir)
    run = rundir.open_run(run_dir, backbone=None)
    local, settings = read_local(run_dir), resolve(args, run)
    resolved = cli.announce(args, "train_expert", settings | {"selection": args.selection})
    names = [args.client] if args.client else local["clients"]
    for name in check_here(run_dir, run, names, local):
        make_expert(run_dir, run, local, name, args, settings, resolved)
    processes().wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
