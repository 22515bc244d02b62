"""Which clients take part in a run, and whose data they bring: run.json from the flags, each party's data."""

from pathlib import Path

from metamoe.data.registry import DATASETS, FAMILIES, OWN, datasets_of
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.records import write_records
from metamoe.rundir import atomic, check_client, is_name, open_run, read_json, write_json

PARTS = ("train", "validation", "test")
PART_SIZES = tuple(f"{part}_size" for part in PARTS)
# The relevance head needs 2 samples of each class for its folds, and two halves of D_0.
LEAST = dict(train_size=2, validation_size=0, test_size=1, public_size=4, candidates=0, proxies=1)


def known_clients(backbone):
    """The clients that the backbone's data offers."""
    return list(datasets_of(PRESETS[backbone]["data"]))


def start_run(args):
    """(settings of RUN/run.json, names to select for): made of flags and preset, or checked against flags.

    run.json has "own" where clients bring their own data: {NAME: {"path", "train", "validation", "test"}},
    sizes of 0 are shares of 80/10/10. Nothing is written yet: data and seed model may still be missing.
    """
    own, alone, joined = client_flags(args)
    run_file = Path(args.run_dir) / "run.json"
    found = read_json(run_file) if run_file.exists() else {}
    backbone = found["backbone"] if found else args.backbone or "smollm2-135m"
    check_names(args, backbone)
    settings = given_settings(args, backbone)
    if joined:
        return join_run(args, settings, found, *joined)
    if own:
        before = found.get("own", {})
        settings["own"] = {name: own_client(args, path, before.get(name, {})) for name, path in own.items()}
        settings["clients"] = (args.clients or []) + list(own)
    only_own = all_own(found) if found else bool(own) and not args.clients
    if not found:
        settings = with_defaults(settings, backbone, only_own)
    run = found or settings
    check_numbers(run, FAMILIES[PRESETS[backbone]["data"]].files, only_own)
    for name in alone:
        check_client(run, name)
    return open_run(args.run_dir, **settings), alone or run["clients"]


def client_flags(args):
    """({NAME: PATH} and [NAME] of the --client, (NAME, PATH or "") of --join or None)."""
    own, alone, joined = {}, [], None
    for value in args.client or []:
        name, path = name_and_path("--client", value, "each NAME once,", own)
        if path:
            own[name] = path
        else:
            alone.append(name)
    if args.join:
        joined = name_and_path("--join", args.join, "NAME", own)
    return own, alone, joined


def name_and_path(flag, value, give, taken):
    """NAME and PATH ("" where there is none) of a flag's value; UserError where they cannot be."""
    name, equals, path = value.partition("=")
    if not is_name(name) or equals and (not path or name in taken):
        letters = "NAME of letters, digits, '-', '_' and '.'"
        raise UserError(f"{flag} {value}: give {give} or NAME=PATH, {letters}")
    return name, path


def check_names(args, backbone):
    """UserError where a flag names a backbone or a client that there is not."""
    if (args.backbone or backbone) not in PRESETS:
        raise UserError(f"--backbone {args.backbone}: unknown, choose from {', '.join(PRESETS)}")
    known = known_clients(backbone)
    for name in args.clients or []:
        if name not in known:
            own = "data of your own: --client NAME=PATH"
            raise UserError(f"--clients {name}: unknown, {backbone} has {', '.join(known)} ({own})")


def given_settings(args, backbone):
    """The settings of run.json that the flags give, None where they do not."""
    settings = {key: getattr(args, key) for key in ("backbone", "seed_model", "seed", "clients")}
    settings["sources"] = given_sources(args, backbone)
    settings |= {key: getattr(args, key) for key in LEAST}
    if PRESETS[backbone]["kind"] == "text":
        if args.chat_template == "off":
            settings["chat_template"] = "off"
        if args.max_length is not None:
            if args.max_length < 8:
                raise UserError(f"--max-length {args.max_length}: must be at least 8")
            settings["max_length"] = args.max_length
        return settings | {"answers": args.answers, "loss": args.loss}
    if args.answers or args.loss or args.chat_template or args.max_length:
        flags = "--answers, --loss, --chat-template and --max-length"
        raise UserError(f"{flags} are for language models: {backbone} is none")
    return settings


def given_sources(args, backbone):
    """run.json's "sources": {NAME: folder or hub id, "root": folder, "public": path}; None without a flag."""
    if not (args.data_root or args.dataset or args.public):
        return None
    if (args.data_root or args.dataset) and not FAMILIES[PRESETS[backbone]["data"]].files:
        own = f"{backbone} brings its data (your own: --client NAME=PATH)"
        raise UserError(f"--data-root and --dataset name the paper's datasets: {own}")
    known = known_clients(backbone)
    sources = dict(pair.partition("=")[::2] for pair in args.dataset or [])
    for name, source in sources.items():
        if name not in known or not source:
            give = f"give NAME=FOLDER_OR_DATASET, NAME one of {', '.join(known)}"
            raise UserError(f"--dataset {name}={source}: {give}")
    return sources | {"root": args.data_root, "public": args.public}


def own_client(args, path, found):
    """run.json's entry of an own client; sizes that are not given are those of `found`, else shares."""
    entry = {"path": path}
    for part in PARTS:
        size = getattr(args, f"{part}_size")
        if size is not None and size < 0:
            raise UserError(f"--{part}-size {size}: must be at least 1, or 0 for its share of 80/10/10")
        entry[part] = found.get(part, 0) if size is None else size
    return entry


def all_own(run):
    """Whether all clients of the run bring their own data."""
    return all(name in run.get("own", {}) for name in run["clients"])


def with_defaults(settings, backbone, only_own):
    """The settings of a new run: what is not given comes from the backbone's preset."""
    defaults = PRESETS[backbone] | {"backbone": backbone, "seed_model": "", "seed": 0, "sources": {}}
    defaults["clients"] = known_clients(backbone)
    if only_own:
        defaults |= dict.fromkeys(PART_SIZES, 0)
    if (settings["sources"] or {}).get("public"):
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


def check_numbers(run, files, only_own):
    """UserError where a number is out of range, or a client twice. Sizes of 0 need data that have an end."""
    for key, least in LEAST.items():
        own = run.get("sources", {}).get("public") if key == "public_size" else only_own
        may_be_0 = key.endswith("_size") and (files or own)
        if run[key] < least and not (may_be_0 and run[key] == 0):
            raise UserError(f"--{key.replace('_', '-')} {run[key]}: must be at least {least}")
    if not 0 <= run["seed"] < 2**32:
        raise UserError(f"--seed {run['seed']}: must lie in 0 to 4294967295")
    if len(set(run["clients"])) < len(run["clients"]):
        raise UserError(f"--clients {' '.join(run['clients'])}: each client once")
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


def join_run(args, settings, found, name, path):
    """As start_run, for --join: the run with one client more, whose sizes the flags give."""
    check_join(args, found, name, path)
    clients, own = found["clients"], found.get("own", {})
    run, before = {**found, "clients": list(dict.fromkeys([*clients, name]))}, own.get(name, {})
    entry = own_client(args, path or before.get("path"), before)
    if before and entry != before:
        raise UserError(f"--join {name}: joined with other sizes before ({before}): take another name")
    if path or before:
        run["own"] = own | {name: entry}
        settings |= dict.fromkeys(PART_SIZES)
    elif name not in clients and all_own(found):  # the first whose sizes are the run's
        run |= {key: settings[key] or PRESETS[found["backbone"]][key] for key in PART_SIZES}
        settings |= dict.fromkeys(PART_SIZES)
    if settings["sources"]:
        given = {key: value for key, value in settings["sources"].items() if value and key in (name, "root")}
        run["sources"] = found.get("sources", {}) | given
    open_run(args.run_dir, **settings | {"clients": None, "sources": None})
    return run, [name]


def check_join(args, found, name, path):
    """UserError where this client cannot join the run."""
    known = known_clients(found["backbone"]) if found else []
    there, before = name in found.get("clients", []), found.get("own", {}).get(name, {})
    why = None
    if not found:
        why = "holds no run yet (no run.json): name its clients with --client or --clients"
        why = f"--run-dir {args.run_dir} {why}"
    elif args.client or args.clients or args.public:
        why = "one client joins a run as it is: leave out --client, --clients and --public"
    elif not path and name not in known and not there:
        why = f"{found['backbone']} has {', '.join(known)}; data of your own: --join {name}=PATH"
    elif there and path and path != before.get("path"):
        where = Path(args.run_dir) / "run.json"
        why = f"a client of that name is in {where} already, with other data: take another name"
    if why:
        raise UserError(f"--join {name}: {why}")


def read_data(run_dir, run, skip_bad=False, given=LEAST):
    """(D_0 or None, {client: parts}) of what the run has not got yet.

    n and m of `run` shrink to D_0 where they are not among the `given` settings.
    """
    preset, own, sources = PRESETS[run["backbone"]], run.get("own", {}), run.get("sources", {})
    family, by_kind = FAMILIES[preset["data"]], OWN[preset["kind"]]
    clients, public, parts = run_dir / "clients", None, {}
    new = [name for name in run["clients"] if not (clients / name / "private" / "done.json").exists()]
    new_public = not (run_dir / "public" / "done.json").exists()
    for name in [name for name in new if name in own]:  # first: what is wrong in it shows at once
        sizes = {part: own[name][part] for part in PARTS}
        parts[name] = by_kind.client(name, own[name]["path"], sizes, run["seed"], skip_bad)
    named = [name for name in new if name not in own]
    if named or new_public and not sources.get("public"):
        source = family.source(sources, datasets_of(preset["data"]))
    sizes = {part: run[f"{part}_size"] for part in PARTS}
    for name in named:
        parts[name] = DATASETS[name].load(name, sizes, run["seed"], source)
    if new_public and sources.get("public"):
        public = by_kind.public(run["public_size"], sources, skip_bad)
    elif new_public:
        public = family.public(run["public_size"], source, skip_bad)
    for name in named:
        family.check([record for records in parts[name].values() for record in records], name)
    if new_public:
        shrink(run, given, len(public))
        check_sizes(run, len(public), "public samples there are")
    return public, parts


def write_data(run_dir, run, public, parts):
    """Write run.json and what read_data has found."""
    if not (run_dir / "run.json").exists() or read_json(run_dir / "run.json") != run:
        write_json(run_dir / "run.json", run)
    for name in parts:
        with atomic(run_dir / "clients" / name / "private") as folder:
            for part, records in parts[name].items():
                write_records(folder / f"{part}.jsonl", records)
            counts = {part: len(records) for part, records in parts[name].items()}
            write_json(folder / "done.json", {"seed": run["seed"], **counts})
    if public is not None:
        with atomic(run_dir / "public") as folder:
            write_records(folder / "records.jsonl", public)
            if PRESETS[run["backbone"]]["kind"] == "clip":
                write_json(folder / "classes.json", sorted({record["answer"] for record in public}))
            write_json(folder / "done.json", {"records": len(public)})
