"""The settings that an agreement (run.json) holds: the backbone's preset, overridden by flags."""

from metamoe.backbones.architectures import check_architecture
from metamoe.check_run import check_clients
from metamoe.data.registry import FAMILIES, datasets_of, default_clients
from metamoe.errors import UserError
from metamoe.presets import PRESETS

PARTS = ("train", "validation", "test")
PART_SIZES = tuple(f"{part}_size" for part in PARTS)
# The relevance head needs 2 samples of each class for its folds, and two halves of D_0.
LEAST = dict(train_size=2, validation_size=0, test_size=1, public_size=4, candidates=0, proxies=1)
LORA = {"rank": "lora_rank", "alpha": "lora_alpha"}  # key of run.json -> of the preset


def known_clients(backbone):
    """The clients that the backbone's data offers."""
    return list(datasets_of(PRESETS[backbone]["data"]))


def check_names(args, backbone):
    """Names for `--clients NUMBER`; UserError where a flag names a backbone or a client that there is not."""
    if (args.backbone or backbone) not in PRESETS:
        raise UserError(f"--backbone {args.backbone}: unknown, choose from {', '.join(PRESETS)}")
    known = known_clients(backbone)
    if args.clients and len(args.clients) == 1 and args.clients[0].isdecimal():
        number = int(args.clients[0])
        if not 1 <= number <= len(known):
            raise UserError(f"--clients {number}: {backbone} has {len(known)}: {', '.join(known)}")
        args.clients = known[:number]
    for name in args.clients or []:
        if name not in known:
            own = "data of your own: --client NAME=PATH"
            raise UserError(f"--clients {name}: unknown, {backbone} has {', '.join(known)} ({own})")


def given_settings(args, backbone):
    """The settings of run.json that the flags give, None where they do not."""
    settings = {key: getattr(args, key) for key in ("backbone", "seed", "clients", *LORA, *LEAST)}
    if args.architecture and PRESETS[backbone]["data"] != "images":
        raise UserError(f"--architecture {args.architecture}: {backbone} is no model that open_clip makes")
    if PRESETS[backbone]["kind"] == "text":
        if args.chat_template == "off":
            settings["chat_template"] = "off"
        if args.max_length is not None:
            settings["max_length"] = args.max_length
        return settings | {"answers": args.answers, "loss": args.loss}
    if args.answers or args.loss or args.chat_template or args.max_length:
        flags = "--answers, --loss, --chat-template and --max-length"
        raise UserError(f"{flags} are for language models: {backbone} is none")
    if PRESETS[backbone]["data"] == "images":
        settings["architecture"] = args.architecture
    if args.architecture:
        check_architecture(args.architecture)
    return settings


def with_defaults(settings, local, backbone, only_own):
    """The settings of a new run: what is not given comes from the backbone's preset."""
    defaults = PRESETS[backbone] | {"backbone": backbone, "seed": 0}
    defaults["clients"] = default_clients(PRESETS[backbone]["data"])
    defaults |= {key: PRESETS[backbone][name] for key, name in LORA.items()}
    if only_own:
        defaults |= dict.fromkeys(PART_SIZES, 0)
    if local["sources"].get("public"):
        defaults["public_size"] = 0
    run = {key: defaults[key] if value is None else value for key, value in settings.items()}
    if run["public_size"] > 0:
        shrink(run, {key for key, value in settings.items() if value is not None}, run["public_size"])
    return run


def shrink(run, given, count):
    """Make n and m smaller, in place, where they are not `given` and do not fit `count` public samples."""
    n, m = run["candidates"], run["proxies"]
    before = {"candidates": n, "proxies": m}
    if n > count and "candidates" not in given:
        run["candidates"] = count
    most = min(run["candidates"] or count, count)
    if (m > most or most < n) and "proxies" not in given:
        preset = PRESETS[run["backbone"]]
        run["proxies"] = max(1, min(m, most * preset["proxies"] // preset["candidates"]))
    changed = [f"--{key} {old} -> {run[key]}" for key, old in before.items() if run[key] != old]
    if changed:
        print(f"select_proxies: the preset's {', '.join(changed)}: D_0 has {count} samples, n is {most}")


def check_numbers(run, local, only_own):
    """UserError where a number is out of range, or a client twice. Sizes of 0 need data that have an end."""
    files = FAMILIES[PRESETS[run["backbone"]]["data"]].files
    for key, least in (LEAST | dict.fromkeys(LORA, 1)).items():
        own = local["sources"].get("public") if key == "public_size" else only_own
        may_be_0 = key.endswith("_size") and (files or own)
        if run[key] < least and not (may_be_0 and run[key] == 0):
            raise UserError(f"--{key.replace('_', '-')} {run[key]}: must be at least {least}")
    check_clients(run["clients"], "--clients")
    m, n, most = run["proxies"], run["candidates"], run["public_size"]  # n or |D_0| 0: all there is
    if m > n > 0:
        raise UserError(f"--proxies {m} is more than --candidates {n}: m must be at most n")
    if most > 0:
        check_at_most(run, most, f"--public-size {most}", "|D_0|")


def check_at_most(run, most, what, bound):
    for key, letter in (("candidates", "n"), ("proxies", "m")):
        if run[key] > most:
            raise UserError(f"--{key} {run[key]} is more than {what}: {letter} must be at most {bound}")


def check_sizes(run, count, what):
    """UserError where n or m is more than the `count` public samples."""
    check_at_most(run, count, f"the {count} {what}", "that")
