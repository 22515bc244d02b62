"""What one party has itself: D_0, its own clients' data, and where they come from."""

import re
from pathlib import Path

from metamoe.agreement import check_public, ffn_shapes, public_fingerprint, read_local, seed_fingerprint
from metamoe.atomic import atomic
from metamoe.backbones import check_source, run_backbone
from metamoe.backbones.distributed import processes
from metamoe.cli import WITHOUT_PROXIES
from metamoe.data.registry import DATASETS, FAMILIES, OWN, kept_out
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.records import read_records, write_records
from metamoe.run_settings import LEAST, PARTS, check_sizes, known_clients, shrink
from metamoe.rundir import check_whole, finish, inside, making, read_json, read_run, sha256, write_json


def local_places(args, backbone, own):
    """This party's own: read_local's of the run directory, with what the flags give.

    own: {NAME: PATH} of --client NAME=PATH. Adds "own": {NAME: {"path", "train", "validation", "test"}} of
    the clients here with data of their own. UserError where data were read from another place before.
    """
    run_dir = Path(args.run_dir)
    local, new = read_local(run_dir), not (run_dir / "local.json").exists()
    local["own"] = {}
    joins = (args.join or "").partition("=")[0]
    for name in dict.fromkeys([*local["clients"], *own, joins]):
        source = run_dir / "clients" / name / "private" / "source.json"
        if source.exists() and "path" in read_json(source):
            local["own"][name] = read_json(source)
    given = given_sources(args, backbone) | ({"seed_model": args.seed_model} if args.seed_model else {})
    before = {**local["sources"], "seed_model": local["seed_model"]}
    for key, value in given.items():
        if not (new or joins and key in ("root", joins) or value == before.get(key)):
            was = f"was made with {key} {before.get(key)!r}, now {value!r}"
            raise UserError(f"--run-dir {run_dir} {was}: use another --run-dir")
    local["seed_model"] = given.pop("seed_model", local["seed_model"])
    local["sources"] = local["sources"] | given
    for name, path in own.items():
        found = local["own"].get(name, {})
        entry = local["own"][name] = own_client(args, path, found)
        if found and found != entry:
            raise UserError(f"--client {name}={path}: was {found} before: use another --run-dir")
    return local


def given_sources(args, backbone):
    """{NAME: folder or hub id, "root": folder, "public": path}, as far as flags give them."""
    if (args.data_root or args.dataset) and not FAMILIES[PRESETS[backbone]["data"]].files:
        own = f"{backbone} brings its data (your own: --client NAME=PATH)"
        raise UserError(f"--data-root and --dataset name the paper's datasets: {own}")
    known = known_clients(backbone)
    sources = dict(pair.partition("=")[::2] for pair in args.dataset or [])
    for name, source in sources.items():
        if name not in known or not source:
            give = f"give NAME=FOLDER_OR_DATASET, NAME one of {', '.join(known)}"
            raise UserError(f"--dataset {name}={source}: {give}")
    sources |= {"root": args.data_root, "public": args.public}
    return {name: source for name, source in sources.items() if source}


def own_client(args, path, found):
    """Where an own client's data come from; sizes that are not given are those of `found`, else shares."""
    entry = {"path": path}
    for part in PARTS:
        size = getattr(args, f"{part}_size")
        entry[part] = found.get(part, 0) if size is None else size
    return entry


def read_data(run_dir, run, local, skip_bad=False, given=LEAST):
    """(D_0 or None, {client: parts}) of what this party has not got yet.

    n and m of `run` shrink to D_0 where they are not among the `given` settings.
    """
    preset, own, sources = PRESETS[run["backbone"]], local["own"], local["sources"]
    family, by_kind = FAMILIES[preset["data"]], OWN[preset["kind"]]
    clients, public, parts = run_dir / "clients", None, {}
    new = [name for name in local["clients"] if not (clients / name / "private" / "done.json").exists()]
    new_public = not (run_dir / "public" / "done.json").exists()
    for name in [name for name in new if name in own]:  # first: what is wrong in it shows at once
        sizes = {part: own[name][part] for part in PARTS}
        parts[name] = by_kind.client(name, own[name]["path"], sizes, run["seed"], skip_bad)
    named = [name for name in new if name not in own]
    if named or new_public and not sources.get("public"):
        source = family.source(sources, kept_out(preset["data"], run["clients"]))
    sizes = {part: run[f"{part}_size"] for part in PARTS}
    for name in named:
        if name not in DATASETS:
            raise UserError(f"--client {name}: where are its data? give --client {name}=PATH")
        parts[name] = DATASETS[name].load(name, sizes, run["seed"], source)
    if new_public and sources.get("public"):
        public = by_kind.public(run["public_size"], sources, skip_bad)
    elif new_public:
        public = family.public(run["public_size"], source, skip_bad)
    for name in named:
        family.check([record for records in parts[name].values() for record in records], name)
    if new_public and "public" not in run:  # an agreed one is compared as a whole
        shrink(run, given, len(public))
        check_sizes(run, len(public), "public samples there are")
    return public, parts


def open_party(args, run_dir, run, local):
    """(backbone, agreement) after what this party has not got yet was read, checked and written."""
    given = {key for key in ("candidates", "proxies") if getattr(args, key) is not None}
    given |= {"candidates", "proxies"} if "public" in run else set()  # agreed
    data = None
    if processes().is_main_process:  # what is wrong in the data shows before the seed model is loaded
        check_source(run, local)
        data = read_data(run_dir, run, local, args.skip_bad_records, given)
    backbone = run_backbone(run, local, args)
    with processes().main_process_first():
        if data:
            write_data(run_dir, seal(run, backbone, data[0]), local, backbone, *data)
    return backbone, read_run(run_dir)  # n and m may have shrunk to D_0


def selection_of(client, rule):
    """(the proxies that select_proxies.py chose in a client's folder by this rule, hash of its file)."""
    flags = re.sub(r"^(dpp|dpp-all)-w([\d.e-]+)$", r"\1 --relevance-weight \2", rule)
    path, stage = client / "selection" / rule / "selection.json", f"run select_proxies.py --selection {flags}"
    if not (path.parent / "done.json").exists():
        raise UserError(f"{path} is missing: {stage} first")
    check_whole(path.parent, f"{stage} again")
    return read_json(path)["proxies"], sha256(path)


def training_data(run_dir, client, data, indices):
    """(private records, proxies) that the expert in a client's folder is trained on."""
    private = [] if data == "proxies" else read_records(client / "private" / "train.jsonl")
    public = read_records(run_dir / "public" / "records.jsonl")
    return private, [] if data in WITHOUT_PROXIES else [public[i] for i in indices]


def label_set(backbone, run_dir, client):
    """The classes that an image model's expert tells apart: the client's own, then the public set's."""
    classes = backbone.public_classes(run_dir / "public")
    if classes:
        own = read_records(client / "private" / "train.jsonl")[0]["choices"]
        classes = list(dict.fromkeys(own + classes))
    return classes


def seal(run, backbone, public):
    """The agreement with its fingerprints; UserError where this party's D_0 is not the agreed one."""
    if public is not None:
        fingerprint = public_fingerprint(public)
        check_public(run, fingerprint)
        run = {**run, "public": fingerprint}
    return run if run.get("seed_model") else {**run, "seed_model": seed_fingerprint(backbone)}


def write_data(run_dir, run, local, backbone, public, parts):
    """Write run.json, local.json and what read_data has found."""
    new = not (run_dir / "run.json").exists()
    if new:
        write_run(run_dir, run, local)
    own = local["own"]
    for name in parts:
        with atomic(inside(run_dir, "clients", name) / "private", private=True) as folder:
            folder.mkdir(mode=0o700)
            for part, records in parts[name].items():
                write_records(folder / f"{part}.jsonl", records)
            counts = {part: len(records) for part, records in parts[name].items()}
            source = local["sources"].get(name) or local["sources"].get("root") or ""
            write_json(folder / "source.json", own.get(name) or {"dataset": source})
            finish(folder, {"seed": run["seed"], **counts})
    if public is not None:
        with making(run_dir / "public", {"records": len(public)}) as folder:
            write_records(folder / "records.jsonl", public)
            if PRESETS[run["backbone"]]["kind"] == "clip":
                write_json(folder / "classes.json", sorted({record["answer"] for record in public}))
            write_json(folder / "ffns.json", ffn_shapes(backbone))
    if not new:  # a client that joins is one when its data are there
        write_run(run_dir, run, local)


def write_run(run_dir, run, local):
    """Write local.json and run.json where they change; run.json last: it makes the folder a run."""
    local = {key: value for key, value in local.items() if key != "own"}
    if local != read_local(run_dir) or not (run_dir / "local.json").exists():
        write_json(run_dir / "local.json", local, private=True)
    if not (run_dir / "run.json").exists() or read_json(run_dir / "run.json") != run:
        write_json(run_dir / "run.json", run)
