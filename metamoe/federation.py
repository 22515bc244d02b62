"""Which clients take part in a run, and whose data they bring: run.json from the flags, and the data of each
party."""

import re
from pathlib import Path

from metamoe.data.bigbench import CLIENTS, load_bigbench
from metamoe.data.decoding import check_images
from metamoe.data.glyphs import world
from metamoe.data.images import IMAGE_CLIENTS, load_images, public_images
from metamoe.data.questions import TEXT_CLIENTS, load_text, public_text
from metamoe.data.user import own_images, own_text
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.records import write_records
from metamoe.rundir import atomic, check_client, open_run, read_json, write_json


def known_clients(backbone):
    """The clients that the backbone's data offers."""
    return {"bigbench": CLIENTS, "qa": TEXT_CLIENTS, "images": IMAGE_CLIENTS, "glyphs": world.CLIENTS}[
        PRESETS[backbone]["data"]
    ]


def client_flags(args):
    """({NAME: PATH} of the --client NAME=PATH, the names of the --client NAME, (NAME, PATH or "") of --join
    or None)."""
    own, alone, joined = {}, [], None
    for flag, value in [("--client", value) for value in args.client or []] + [("--join", args.join)] * bool(
        args.join
    ):
        name, equals, path = value.partition("=")
        if not re.fullmatch(r"\w[\w.-]*", name) or equals and (not path or name in own):
            raise UserError(
                f"{flag} {value}: give {'NAME' if flag == '--join' else 'each NAME once,'} or NAME=PATH, "
                "NAME of letters, digits, '-', '_' and '.'"
            )
        if flag == "--join":
            joined = name, path
        elif equals:
            own[name] = path
        else:
            alone.append(name)
    return own, alone, joined


def start_run(args):
    """(settings of RUN/run.json, names to select for): made from the flags and the backbone's preset, or
    checked against them.

    run.json has "own" where clients bring their own data: {NAME: {"path", "train", "validation", "test"}},
    sizes of 0 are shares of 80/10/10.
    """
    own, alone, joined = client_flags(args)
    found = read_json(run_file) if (run_file := Path(args.run_dir) / "run.json").exists() else {}
    backbone = found["backbone"] if found else args.backbone or "smollm2-135m"
    if (args.backbone or backbone) not in PRESETS:
        raise UserError(f"--backbone {args.backbone}: unknown, choose from {', '.join(PRESETS)}")
    known, data = known_clients(backbone), PRESETS[backbone]["data"]
    for name in args.clients or []:
        if name not in known:
            raise UserError(
                f"--clients {name}: unknown, {backbone} has {', '.join(known)} (data of your own: --client "
                "NAME=PATH)"
            )
    sources = None
    if args.data_root or args.dataset or args.public:
        if (args.data_root or args.dataset) and data not in ("images", "qa"):
            raise UserError(
                f"--data-root and --dataset name the paper's datasets: {backbone} brings its data (your own: "
                "--client NAME=PATH)"
            )
        sources = dict(pair.partition("=")[::2] for pair in args.dataset or [])
        for name, source in sources.items():
            if name not in known or not source:
                raise UserError(
                    f"--dataset {name}={source}: give NAME=FOLDER_OR_DATASET, NAME one of {', '.join(known)}"
                )
        sources |= {"root": args.data_root, "public": args.public}
    sizes = {
        key: getattr(args, key)
        for key in ("train_size", "validation_size", "test_size", "public_size", "candidates", "proxies")
    }
    settings = {
        "backbone": args.backbone,
        "seed_model": args.seed_model,
        "seed": args.seed,
        "clients": None,
        "sources": sources,
        **sizes,
    }
    if PRESETS[backbone]["kind"] == "text":
        settings |= {"answers": args.answers, "loss": args.loss}
    elif args.answers or args.loss:
        raise UserError(f"--answers and --loss are for language models: {backbone} has neither")
    for key, was in (("answers", "text"), ("loss", "answer")):
        # made before it was a setting
        if found and key not in found and settings.pop(key, None) not in (None, was):
            raise UserError(
                f"--run-dir {args.run_dir} was made with {key} {was!r}, now {getattr(args, key)!r}: use "
                "another --run-dir"
            )
    if args.clients or own:
        settings["clients"] = (args.clients or []) + list(own)
    if joined:
        return join_run(args, settings, found, joined, known)
    if own:
        settings["own"] = {
            name: own_client(args, path, found.get("own", {}).get(name, {})) for name, path in own.items()
        }
    only_own = (
        bool(own)
        and not args.clients
        or bool(found)
        and all(name in found.get("own", {}) for name in found["clients"])
    )
    if not found:
        defaults = PRESETS[backbone] | {
            "backbone": backbone,
            "seed_model": "",
            "seed": 0,
            "clients": list(known),
            "sources": {},
        }
        defaults |= dict.fromkeys(("train_size", "validation_size", "test_size"), 0) if only_own else {}
        defaults |= {"public_size": 0} if args.public else {}
        settings = {key: defaults[key] if value is None else value for key, value in settings.items()}
    run = found or settings
    # the relevance head needs 2 samples of each class for its folds, and two halves of D_0
    for key, least in {
        "train_size": 2,
        "validation_size": 0,
        "test_size": 1,
        "public_size": 4,
        "candidates": 0,
        "proxies": 1,
    }.items():
        may_be_0 = data in ("images", "qa") or (
            run.get("sources", {}).get("public") if key == "public_size" else only_own
        )
        if run[key] < least and not (may_be_0 and key.endswith("_size") and run[key] == 0):
            raise UserError(f"--{key.replace('_', '-')} {run[key]}: must be at least {least}")
    if not 0 <= run["seed"] < 2**32:
        raise UserError(f"--seed {run['seed']}: must lie in 0 to 4294967295")
    if len(set(run["clients"])) < len(run["clients"]):
        raise UserError(f"--clients {' '.join(run['clients'])}: each client once")
    for name in alone:
        check_client(run, name)
    if run["proxies"] > run["candidates"] > 0:
        raise UserError(
            f"--proxies {run['proxies']} is more than --candidates {run['candidates']}: m must be at most n"
        )
    for key, letter in (("candidates", "n"), ("proxies", "m")):
        if run[key] > run["public_size"] > 0:
            raise UserError(
                f"--{key} {run[key]} is more than --public-size {run['public_size']}: {letter} must be at "
                "most |D_0|"
            )
    # not before the data and the seed model are there
    return open_run(args.run_dir, create=False, **settings), alone or run["clients"]


def own_client(args, path, found):
    """run.json's entry of an own client; sizes that no flag gives are those it was made with, else shares."""
    sizes = {part: getattr(args, f"{part}_size") for part in ("train", "validation", "test")}
    for part, size in sizes.items():
        if size is not None and size < 0:
            raise UserError(f"--{part}-size {size}: must be at least 1, or 0 for its share of 80/10/10")
    return {"path": path} | {
        part: found.get(part, 0) if size is None else size for part, size in sizes.items()
    }


def join_run(args, settings, found, joined, known):
    """As start_run, for --join: the run with one client more. The run's own settings must be as they are;
    sizes are the client's."""
    (name, path), run_file = joined, Path(args.run_dir) / "run.json"
    if not found:
        raise UserError(
            f"--join {name}: --run-dir {args.run_dir} holds no run yet (no run.json): name its clients "
            "with --client or --clients"
        )
    if args.client or args.clients or args.public:
        raise UserError(
            f"--join {name}: one client joins a run as it is: leave out --client, --clients and --public"
        )
    if not path and name not in known and name not in found["clients"]:
        raise UserError(
            f"--join {name}: {found['backbone']} has {', '.join(known)}; data of your own: --join {name}=PATH"
        )
    before = found.get("own", {}).get(name, {})
    if name in found["clients"] and path and path != before.get("path"):
        raise UserError(
            f"--join {name}: a client of that name is in {run_file} already, with other data: take another "
            "name"
        )
    run = {**found, "clients": found["clients"] + [name] * (name not in found["clients"])}
    own, of_client = (
        own_client(args, path or before.get("path"), before),
        ("train_size", "validation_size", "test_size"),
    )
    if before and own != before:
        raise UserError(f"--join {name}: joined with other sizes before ({before}): take another name")
    if path or before:
        run["own"] = found.get("own", {}) | {name: own}
        settings |= dict.fromkeys(of_client)
    elif name not in found["clients"] and all(
        other in found.get("own", {}) for other in found["clients"]
    ):  # the first whose sizes are the run's
        run |= {key: settings[key] or PRESETS[found["backbone"]][key] for key in of_client}
        settings |= dict.fromkeys(of_client)
    if settings["sources"]:
        run["sources"] = found.get("sources", {}) | {
            key: value for key, value in settings["sources"].items() if value and key in (name, "root")
        }
    open_run(args.run_dir, create=False, **settings | {"clients": None, "sources": None})
    return run, [name]


def read_data(run_dir, run, skip_bad=False):
    """(D_0 or None, {client: parts}) of what the run has not got yet. In a real federation each party holds
    its own; here one archive does."""
    own, preset, sources = run.get("own", {}), PRESETS[run["backbone"]], run.get("sources", {})
    new = [
        name for name in run["clients"] if not (run_dir / "clients" / name / "private" / "done.json").exists()
    ]
    new_public = not (run_dir / "public" / "done.json").exists()
    if not new and not new_public:
        return None, {}
    sizes = {part: run[f"{part}_size"] for part in ("train", "validation", "test")}
    data, known, brought = preset["data"], [name for name in new if name not in own], sources.get("public")
    public, parts, theirs = None, {}, {}
    for name in [name for name in new if name in own]:  # first: what is wrong in it shows at once
        load = own_text if preset["kind"] == "text" else own_images
        parts[name] = load(
            name, own[name]["path"], {part: own[name][part] for part in sizes}, run["seed"], skip_bad
        )
    if data == "images":
        public, theirs = load_images(
            known, sizes, run["public_size"] if new_public else None, run["seed"], sources
        )
    elif data == "qa":
        theirs = load_text(known, sizes, run["seed"], sources)
    elif known or new_public and not brought:
        load = load_bigbench if data == "bigbench" else world.load_glyphs
        public, theirs = load(
            known, sizes, run["public_size"] if new_public and not brought else 0, run["seed"]
        )
    parts |= theirs
    if new_public and (data == "qa" or brought and data != "images"):
        public = (
            public_text(run["public_size"], sources, skip_bad)
            if preset["kind"] == "text"
            else public_images(run["public_size"], sources)
        )
    if data == "images":
        for name in known:
            check_images([record for records in parts[name].values() for record in records], name)
    if new_public:
        check_sizes(run, len(public), "public samples there are")
    return public, parts


def check_sizes(run, count, what):
    """UserError where n or m is more than the `count` public samples."""
    for key, letter in (("candidates", "n"), ("proxies", "m")):
        if run[key] > count:
            raise UserError(
                f"--{key} {run[key]} is more than the {count} {what}: {letter} must be at most that"
            )


def write_data(run_dir, run, public, parts):
    """Write run.json and what read_data has found."""
    if not (run_dir / "run.json").exists() or read_json(run_dir / "run.json") != run:
        write_json(run_dir / "run.json", run)
    for name in parts:
        with atomic(run_dir / "clients" / name / "private") as folder:
            for part, records in parts[name].items():
                write_records(folder / f"{part}.jsonl", records)
            write_json(
                folder / "done.json",
                {"seed": run["seed"], **{part: len(records) for part, records in parts[name].items()}},
            )
    if public is not None:
        with atomic(run_dir / "public") as folder:
            write_records(folder / "records.jsonl", public)
            if PRESETS[run["backbone"]]["kind"] == "clip":
                write_json(folder / "classes.json", sorted({record["answer"] for record in public}))
            write_json(folder / "done.json", {"records": len(public)})
