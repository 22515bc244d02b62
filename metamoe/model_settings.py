"""The settings of a unified model: its method's and the backbone's preset, overridden by flags."""

import math

import moe
from metamoe.backbones.distributed import processes
from metamoe.cli import from_preset
from metamoe.errors import UserError
from metamoe.flag_values import not_negative, positive_int
from metamoe.methods import METHODS, main_rows
from metamoe.presets import PRESETS
from metamoe.rundir import check_name, read_json, versions
from metamoe.uploads import upload_variant

# flag -> key of the preset that is its default
DEFAULTS = {
    "lambda_init": "lambda_init",
    "epochs": "final_epochs",
    "lr": "final_lr",
    "lambda_lr": "lambda_lr",
    "batch_size": "final_batch",
    "optimizer": "optimizer",
    "weight_decay": "weight_decay",
}
# of a simulated federation, which trains as the experts are trained
OF_EXPERTS = {"epochs": "expert_epochs", "lr": "expert_lr", "batch_size": "expert_batch"}
OF_EXPERTS |= {name: name for name in ("optimizer", "weight_decay")}
# switches of a method, and of one that is a mixture of experts
UPLOADS = ("data", "selection")
MIXTURE = ("context", "init", "train", "samples", "seed_expert", "weighting", "top_k", "offset")
ROUTER_LOSSES = ("routing_loss", "balancing_loss")
# flags that a simulated federation has no use for
NO_ROUNDS = (*UPLOADS, "full_ffn", "upload", "extend", "lambda_init", "lambda_lr", *MIXTURE, *ROUTER_LOSSES)


def add_method_flags(parser):
    """The switches of a method; all defaults are the method's."""
    flag = parser.add_argument
    context = "router on the blend with the sequence mean (Eq. 6), or on the token alone"
    flag("--context", choices=["on", "off"], help=context)
    init = (
        "routing vectors start at the clients' means, at these scaled to one length, at their discriminants "
        "(LDA, covariance of D_0), at the experts' top singular vectors (Arrow), or random"
    )
    flag("--init", choices=["uploaded", "unit", "lda", "arrow", "random"], help=init)
    trained = "final training of router and experts, the router alone, or none"
    flag("--train", choices=["all", "router", "none"], help=trained)
    samples = (
        "final training on all proxies, as many random public samples, both, or the private data (breaks "
        "privacy)"
    )
    flag("--samples", choices=["proxies", "public", "proxies+public", "private"], help=samples)
    seed_expert = "add e_0, the seed model's own FFN, as an expert (full paper, Eq. 6)"
    flag("--seed-expert", action="store_true", default=None, help=seed_expert)
    routed = "weight of a loss that tells the router whose proxy a sample is (0: none)"
    flag("--routing-loss", type=not_negative, metavar="W", help=routed)
    balanced = "weight of a loss that gives all experts as many tokens (BTX's; 0: none)"
    flag("--balancing-loss", type=not_negative, metavar="W", help=balanced)
    weights = "weights of the chosen experts: pi / stop_gradient(sum), Eq. 5's pi, or pi / sum"
    flag("--weighting", choices=moe.WEIGHTINGS, help=weights)
    flag("--top-k", type=positive_int, help="experts a token")
    offset = "routing logits with a learned bias, at first -|e_p|^2 / 2: nearest mean, not largest product"
    flag("--offset", action="store_true", default=None, help=offset)
    rounds = "fedavg, comigs: times that weights are averaged, at most a client's steps (default: 20)"
    flag("--rounds", type=positive_int, help=rounds)


def resolve(args, run_dir, run):
    """All settings of this model: the method's and the backbone's preset, overridden by flags."""
    method, name = METHODS[args.method], args.name or args.method
    check_model_name(name, args.method)
    settings = {"name": name, "method": args.method, "seed": run["seed"], "dtype": args.dtype}
    if method.rounds:
        return settings | simulation_settings(args, run)
    if args.rounds:
        raise UserError(f"--rounds {args.rounds}: {args.method} has one upload and no rounds: leave it out")
    switches, count = UPLOADS, len(run["clients"])
    if method.merge == "moe":
        switches += MIXTURE
    settings["full_ffn"] = args.full_ffn
    settings |= from_preset(args, vars(method), {switch: switch for switch in switches})
    if "top_k" in settings and args.top_k is None:
        settings["top_k"] = min(method.top_k, count + settings["seed_expert"])  # of all experts at most
    settings["variant"] = upload_variant(settings["data"], settings["selection"], args.full_ffn)
    if method.merge != "moe":
        return settings
    preset = PRESETS[run["backbone"]]
    rates = preset["final_lr"]
    preset = preset | {"final_lr": rates.get(args.method, rates.get(method.like))}
    defaults, samples = DEFAULTS, count * run["proxies"]
    if settings["samples"] == "private":
        defaults = DEFAULTS | {"epochs": "expert_epochs"}
        done = [run_dir / "clients" / name / "private" / "done.json" for name in run["clients"]]
        samples = sum(read_json(path)["train"] for path in done)
    if args.lr is None and preset["final_lr"] is None:
        raise UserError(f"--lr is needed: presets.py has no final_lr for {args.method} on {run['backbone']}")
    settings |= from_preset(args, preset, defaults)
    losses = {name: name for name in ROUTER_LOSSES}
    weights = from_preset(args, vars(method), losses)
    settings |= {name: weight for name, weight in weights.items() if weight}
    check_settings(settings, run)
    check_router_losses(settings, args.gradient_checkpointing)
    steps = settings["epochs"] * math.ceil(samples / settings["batch_size"])
    settings["steps"] = 0 if settings["train"] == "none" else steps
    return settings


def simulation_settings(args, run):
    """The settings of a simulated federation beside its name: those of the experts."""
    for name in NO_ROUNDS:
        if getattr(args, name) not in (None, False):
            why = f"{args.method} is a simulated federation, with rounds of LoRA training and no uploads"
            raise UserError(f"--{name.replace('_', '-')}: {why}: leave it out")
    preset = PRESETS[run["backbone"]]
    settings = from_preset(args, preset, OF_EXPERTS)
    settings["rounds"] = args.rounds or METHODS[args.method].rounds
    return settings | {"rank": run["rank"], "alpha": run["alpha"], "warmup_steps": preset["warmup_steps"]}


def sources(run_dir, run, settings):
    """The versions of the files that the model is made from."""
    clients, names = [f"clients/{name}" for name in run["clients"]], ["public/records.jsonl"]
    if settings.get("samples") == "private" or "rounds" in settings:
        names = [f"{client}/private/train.jsonl" for client in clients]
    if "rounds" in settings:
        return versions(run_dir, *names)
    names += [f"{client}/upload/{settings['variant']}/manifest.json" for client in clients]
    return versions(run_dir, *names)


def check_model_name(name, method):
    """UserError where a model may not have this name."""
    other_row = name == "zeroshot" or name.startswith("expert-") or name in main_rows()
    if name != method and (other_row or method == "btm"):
        raise UserError(f"--name {name}: is the name of another row of the table, or of a second btm")
    check_name("--name", name)


def check_router_losses(settings, checkpointing):
    """UserError where a loss of the routers cannot be taken."""
    given = [name for name in ROUTER_LOSSES if name in settings]
    if not given:
        return
    flag = f"--{given[0].replace('_', '-')} {settings[given[0]]}"
    if settings["train"] == "none":
        raise UserError(f"{flag}: goes with a final training: leave out --train none")
    if "routing_loss" in settings and settings["samples"] != "proxies":
        raise UserError(
            f"{flag}: goes with a final training on proxies: whose another sample is nobody knows"
        )
    if checkpointing or processes().num_processes > 1:
        raise UserError(f"{flag}: needs one process and no --gradient-checkpointing")


def check_settings(settings, run):
    """UserError naming the flag of a setting that is out of range."""
    count = len(run["clients"]) + settings["seed_expert"]
    if settings["top_k"] > count:
        raise UserError(f"--top-k {settings['top_k']}: must be 1 to {count}, the number of experts")
    if settings["data"] == "anchored" and (settings["init"] != "uploaded" or settings["offset"]):
        flag = "--offset" if settings["offset"] else f"--init {settings['init']}"
        raise UserError(f"{flag}: anchored experts bring routing vectors with a bias: leave it out")
    if settings["init"] == "lda" and settings["offset"]:
        raise UserError("--offset: --init lda has a bias of its own: leave out one of them")
    if settings["init"] == "arrow" and (settings["full_ffn"] or settings["seed_expert"]):
        flag = "--full-ffn" if settings["full_ffn"] else "--seed-expert"
        raise UserError(f"{flag}: --init arrow routes by LoRA factors, which not every expert would have")
