"""Stage 1, at each client: choose proxies for its private data out of the public set (Sec. 3.2, Algorithm 1, lines 2-8).

Embeds D_0 once for all clients with the seed model, trains each client's relevance head (Eq. 7), keeps the n most
relevant public samples as candidates and takes m of them: by the relevance-weighted DPP (Eq. 2-4), by relevance alone
(FlexOlmo's rule), or at random. Clients are the paper's, the embedded default's, or the user's own files. Writes RUN/public/,
RUN/clients/NAME/private/ and RUN/clients/NAME/selection/RULE/.
"""

import argparse
import io
import os
import re
import time
from pathlib import Path

import numpy as np

import dpp
import tasks
from backbones import PRESETS, load_backbone, processes
from glyph_clip import world
from rundir import UserError, atomic, check_client, finished, open_run, read_json, read_records, run_main, usable_public
from rundir import write_json, write_records

RULES = ("dpp", "similarity", "random", "dpp-all")
MOST_PRIVATE = 20_000  # private samples that a relevance head is fitted on


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="folder of this run; made here, read by every later stage")
    parser.add_argument("--backbone", help=f"seed model and its presets: {', '.join(PRESETS)} (default: the run's, for a new run smollm2-135m)")
    parser.add_argument("--seed-model", "--pretrained", help="load the seed from this hub id, local folder or (CLIP) checkpoint instead of the backbone's own")
    parser.add_argument("--clients", nargs="+", help=f"clients of the run (default: those of --client NAME=PATH, else all of the backbone's: {', '.join(tasks.CLIENTS)}; "
                        f"{', '.join(tasks.TEXT_CLIENTS)}; pets, flowers, eurosat; {', '.join(world.CLIENTS)})")
    parser.add_argument("--client", action="append", metavar="NAME[=PATH]", help="NAME=PATH, once for each: a client of the run with data of your own, JSON lines with `prompt`, "
                        "`choices`, `answer` (a choice's text, or its index from 0) or with `prompt`, `response`; for CLIP a folder CLASS/IMAGE. NAME: select for this one alone")
    parser.add_argument("--join", metavar="NAME[=PATH]", help="add this client to a run that is there, prepare its data (PATH: as for --client) and select its proxies; the others' work stays")
    parser.add_argument("--skip-bad-records", action="store_true", help="leave out and count what is wrong in own data, instead of ending at the first of it")
    parser.add_argument("--data-root", help="folder of the paper's datasets: oxford_pets/, oxford_flowers/, eurosat/ in CoOp's layout; commonsenseqa/, cosmosqa/, socialiqa/, alpaca/")
    parser.add_argument("--data", nargs="+", metavar="NAME=SOURCE", help="this client's copy of the paper's dataset: a folder, or a Hugging Face dataset (hub id or local copy)")
    parser.add_argument("--public", metavar="PATH", help="public set. Text: JSON lines as for --client, or Alpaca (hub id, local copy, alpaca_data.json; default: the backbone's own). "
                        "CLIP: ImageNet, a folder CLASS/IMAGE or a Hugging Face dataset (hub id or local copy)")
    parser.add_argument("--seed", type=int, help="of the splits and of every random choice (default 0)")
    parser.add_argument("--train-size", type=int, help="private training samples a client (default: the backbone's preset, like all below; 0, also below: all; own data: default and 0 are 80/10/10 of it)")
    parser.add_argument("--validation-size", type=int, help="private validation samples a client")
    parser.add_argument("--test-size", type=int, help="test samples a client")
    parser.add_argument("--public-size", type=int, help="public samples, |D_0|")
    parser.add_argument("--candidates", "--pool", type=int, help="n: most relevant public samples that the DPP chooses from (0: all of them, no pre-filter)")
    parser.add_argument("--proxies", type=int, help="m: proxies a client")
    parser.add_argument("--answers", choices=["text", "letters"], help="language models, multiple choice: train on the answer's text, or list the choices in the prompt and train on the answer's letter (default: the backbone's preset, also below)")
    parser.add_argument("--loss", choices=["answer", "text"], help="language models: loss on the answer (router context: the prompt's mean) or on the whole text (context: the mean so far)")
    parser.add_argument("--selection", choices=RULES, default="dpp", help="rule that chooses the proxies; dpp-all: the DPP without the pre-filter (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that decode images (default: one a core with CUDA, else none)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where the hardware computes in it")
    parser.add_argument("--force", action="store_true", help="redo everything from the embeddings on, where this selection was made with other settings")
    return parser.parse_args()


def known_clients(backbone):
    """The clients that the backbone's data offers."""
    return {"bigbench": tasks.CLIENTS, "qa": tasks.TEXT_CLIENTS, "images": tasks.IMAGE_CLIENTS, "glyphs": world.CLIENTS}[PRESETS[backbone]["data"]]


def client_flags(args):
    """({NAME: PATH} of the --client NAME=PATH, the names of the --client NAME, (NAME, PATH or "") of --join or None)."""
    own, alone, joined = {}, [], None
    for flag, value in [("--client", value) for value in args.client or []] + [("--join", args.join)] * bool(args.join):
        name, equals, path = value.partition("=")
        if not re.fullmatch(r"\w[\w.-]*", name) or equals and (not path or name in own):
            raise UserError(f"{flag} {value}: give {'NAME' if flag == '--join' else 'each NAME once,'} or NAME=PATH, NAME of letters, digits, '-', '_' and '.'")
        if flag == "--join":
            joined = name, path
        elif equals:
            own[name] = path
        else:
            alone.append(name)
    return own, alone, joined


def start_run(args):
    """(settings of RUN/run.json, names to select for): made from the flags and the backbone's preset, or checked against them.

    run.json has "own" where clients bring their own data: {NAME: {"path", "train", "validation", "test"}}, sizes of 0 are shares of 80/10/10.
    """
    own, alone, joined = client_flags(args)
    found = read_json(run_file) if (run_file := Path(args.run_dir) / "run.json").exists() else {}
    backbone = found["backbone"] if found else args.backbone or "smollm2-135m"
    if (args.backbone or backbone) not in PRESETS:
        raise UserError(f"--backbone {args.backbone}: unknown, choose from {', '.join(PRESETS)}")
    known, data = known_clients(backbone), PRESETS[backbone]["data"]
    for name in args.clients or []:
        if name not in known:
            raise UserError(f"--clients {name}: unknown, {backbone} has {', '.join(known)} (data of your own: --client NAME=PATH)")
    sources = None
    if args.data_root or args.data or args.public:
        if (args.data_root or args.data) and data not in ("images", "qa"):
            raise UserError(f"--data-root and --data name the paper's datasets: {backbone} brings its data (your own: --client NAME=PATH)")
        sources = dict(pair.partition("=")[::2] for pair in args.data or [])
        for name, source in sources.items():
            if name not in known or not source:
                raise UserError(f"--data {name}={source}: give NAME=FOLDER_OR_DATASET, NAME one of {', '.join(known)}")
        sources |= {"root": args.data_root, "public": args.public}
    sizes = {key: getattr(args, key) for key in ("train_size", "validation_size", "test_size", "public_size", "candidates", "proxies")}
    settings = {"backbone": args.backbone, "seed_model": args.seed_model, "seed": args.seed, "clients": None, "sources": sources, **sizes}
    if PRESETS[backbone]["kind"] == "text":
        settings |= {"answers": args.answers, "loss": args.loss}
    elif args.answers or args.loss:
        raise UserError(f"--answers and --loss are for language models: {backbone} has neither")
    for key, was in (("answers", "text"), ("loss", "answer")):
        if found and key not in found and settings.pop(key, None) not in (None, was):  # made before it was a setting
            raise UserError(f"--run-dir {args.run_dir} was made with {key} {was!r}, now {getattr(args, key)!r}: use another --run-dir")
    if args.clients or own:
        settings["clients"] = (args.clients or []) + list(own)
    if joined:
        return join_run(args, settings, found, joined, known)
    if own:
        settings["own"] = {name: own_client(args, path, found.get("own", {}).get(name, {})) for name, path in own.items()}
    only_own = bool(own) and not args.clients or bool(found) and all(name in found.get("own", {}) for name in found["clients"])
    if not found:
        defaults = PRESETS[backbone] | {"backbone": backbone, "seed_model": "", "seed": 0, "clients": list(known), "sources": {}}
        defaults |= dict.fromkeys(("train_size", "validation_size", "test_size"), 0) if only_own else {}
        defaults |= {"public_size": 0} if args.public else {}
        settings = {key: defaults[key] if value is None else value for key, value in settings.items()}
    run = found or settings
    # the relevance head needs 2 samples of each class for its folds, and two halves of D_0
    for key, least in {"train_size": 2, "validation_size": 0, "test_size": 1, "public_size": 4, "candidates": 0, "proxies": 1}.items():
        may_be_0 = data in ("images", "qa") or (run.get("sources", {}).get("public") if key == "public_size" else only_own)
        if run[key] < least and not (may_be_0 and key.endswith("_size") and run[key] == 0):
            raise UserError(f"--{key.replace('_', '-')} {run[key]}: must be at least {least}")
    if not 0 <= run["seed"] < 2**32:
        raise UserError(f"--seed {run['seed']}: must lie in 0 to 4294967295")
    if len(set(run["clients"])) < len(run["clients"]):
        raise UserError(f"--clients {' '.join(run['clients'])}: each client once")
    for name in alone:
        check_client(run, name)
    if run["proxies"] > run["candidates"] > 0:
        raise UserError(f"--proxies {run['proxies']} is more than --candidates {run['candidates']}: m must be at most n")
    for key, letter in (("candidates", "n"), ("proxies", "m")):
        if run[key] > run["public_size"] > 0:
            raise UserError(f"--{key} {run[key]} is more than --public-size {run['public_size']}: {letter} must be at most |D_0|")
    return open_run(args.run_dir, create=False, **settings), alone or run["clients"]  # not before the data and the seed model are there


def own_client(args, path, found):
    """run.json's entry of an own client; sizes that no flag gives are those it was made with, else shares."""
    sizes = {part: getattr(args, f"{part}_size") for part in ("train", "validation", "test")}
    for part, size in sizes.items():
        if size is not None and size < 0:
            raise UserError(f"--{part}-size {size}: must be at least 1, or 0 for its share of 80/10/10")
    return {"path": path} | {part: found.get(part, 0) if size is None else size for part, size in sizes.items()}


def join_run(args, settings, found, joined, known):
    """As start_run, for --join: the run with one client more. The run's own settings must be as they are; sizes are the client's."""
    (name, path), run_file = joined, Path(args.run_dir) / "run.json"
    if not found:
        raise UserError(f"--join {name}: --run-dir {args.run_dir} holds no run yet (no run.json): name its clients with --client or --clients")
    if args.client or args.clients or args.public:
        raise UserError(f"--join {name}: one client joins a run as it is: leave out --client, --clients and --public")
    if not path and name not in known and name not in found["clients"]:
        raise UserError(f"--join {name}: {found['backbone']} has {', '.join(known)}; data of your own: --join {name}=PATH")
    before = found.get("own", {}).get(name, {})
    if name in found["clients"] and path and path != before.get("path"):
        raise UserError(f"--join {name}: a client of that name is in {run_file} already, with other data: take another name")
    run = {**found, "clients": found["clients"] + [name] * (name not in found["clients"])}
    own, of_client = own_client(args, path or before.get("path"), before), ("train_size", "validation_size", "test_size")
    if before and own != before:
        raise UserError(f"--join {name}: joined with other sizes before ({before}): take another name")
    if path or before:
        run["own"] = found.get("own", {}) | {name: own}
        settings |= dict.fromkeys(of_client)
    elif name not in found["clients"] and all(other in found.get("own", {}) for other in found["clients"]):  # the first whose sizes are the run's
        run |= {key: settings[key] or PRESETS[found["backbone"]][key] for key in of_client}
        settings |= dict.fromkeys(of_client)
    if settings["sources"]:
        run["sources"] = found.get("sources", {}) | {key: value for key, value in settings["sources"].items() if value and key in (name, "root")}
    open_run(args.run_dir, create=False, **settings | {"clients": None, "sources": None})
    return run, [name]


def read_data(run_dir, run, skip_bad=False):
    """(D_0 or None, {client: parts}) of what the run has not got yet. In a real federation each party holds its own; here one archive does."""
    own, preset, sources = run.get("own", {}), PRESETS[run["backbone"]], run.get("sources", {})
    new = [name for name in run["clients"] if not (run_dir / "clients" / name / "private" / "done.json").exists()]
    new_public = not (run_dir / "public" / "done.json").exists()
    if not new and not new_public:
        return None, {}
    sizes = {part: run[f"{part}_size"] for part in ("train", "validation", "test")}
    data, known, brought = preset["data"], [name for name in new if name not in own], sources.get("public")
    public, parts, theirs = None, {}, {}
    for name in [name for name in new if name in own]:  # first: what is wrong in it shows at once
        load = tasks.own_text if preset["kind"] == "text" else tasks.own_images
        parts[name] = load(name, own[name]["path"], {part: own[name][part] for part in sizes}, run["seed"], skip_bad)
    if data == "images":
        public, theirs = tasks.load_images(known, sizes, run["public_size"] if new_public else None, run["seed"], sources)
    elif data == "qa":
        theirs = tasks.load_text(known, sizes, run["seed"], sources)
    elif known or new_public and not brought:
        load = tasks.load_bigbench if data == "bigbench" else world.load_glyphs
        public, theirs = load(known, sizes, run["public_size"] if new_public and not brought else 0, run["seed"])
    parts |= theirs
    if new_public and (data == "qa" or brought and data != "images"):
        public = tasks.public_text(run["public_size"], sources, skip_bad) if preset["kind"] == "text" else tasks.public_images(run["public_size"], sources)
    if data == "images":
        for name in known:
            tasks.check_images([record for records in parts[name].values() for record in records], name)
    if new_public:
        check_sizes(run, len(public), "public samples there are")
    return public, parts


def check_sizes(run, count, what):
    """UserError where n or m is more than the `count` public samples."""
    for key, letter in (("candidates", "n"), ("proxies", "m")):
        if run[key] > count:
            raise UserError(f"--{key} {run[key]} is more than the {count} {what}: {letter} must be at most that")


def write_data(run_dir, run, public, parts):
    """Write run.json and what read_data has found."""
    if not (run_dir / "run.json").exists() or read_json(run_dir / "run.json") != run:
        write_json(run_dir / "run.json", run)
    for name in parts:
        with atomic(run_dir / "clients" / name / "private") as folder:
            for part, records in parts[name].items():
                write_records(folder / f"{part}.jsonl", records)
            write_json(folder / "done.json", {"seed": run["seed"], **{part: len(records) for part, records in parts[name].items()}})
    if public is not None:
        with atomic(run_dir / "public") as folder:
            write_records(folder / "records.jsonl", public)
            if PRESETS[run["backbone"]]["kind"] == "clip":
                write_json(folder / "classes.json", sorted({record["answer"] for record in public}))
            write_json(folder / "done.json", {"records": len(public)})


def public_features(run_dir, backbone, records, dtype):
    """RUN/public/features.npy, memory-mapped: D_0's embeddings (|D_0|, d) float32, computed once for all clients.

    One streaming pass, which goes on where a kill stopped it. The row of an image that cannot be decoded stays NaN;
    RUN/public/unreadable.json lists those.
    """
    path = run_dir / "public" / "features.npy"
    part, progress = path.with_name(".features.npy"), path.with_name(".progress.json")
    if not path.exists():
        try:
            state = embed_public(part, progress, backbone, records, dtype)
        except OSError:  # a full disk: nothing half-written stays on it
            part.unlink(missing_ok=True)
            progress.unlink(missing_ok=True)
            raise
        if processes().is_main_process:
            write_json(path.with_name("unreadable.json"), sorted(index for index, _ in state["unreadable"]))
            write_json(path.with_name("timing.json"), {"embedding_seconds": state["seconds"]})
            os.replace(part, path)
            progress.unlink()
        processes().wait_for_everyone()
    return np.load(path, mmap_mode="r")


def embed_public(part, progress, backbone, records, dtype):
    """Embed D_0 into `part`, or go on where `progress` says that it stopped; returns what is known then: "unreadable", "seconds", ...."""
    state, shape = {"dtype": dtype, "batches": 0, "unreadable": [], "seconds": 0.0}, (len(records), backbone.width)
    main = processes().is_main_process
    with processes().main_process_first():
        if part.exists() and progress.exists() and (found := read_json(progress))["dtype"] == dtype:
            out, state = np.load(part, mmap_mode="r+"), found
        elif main:
            progress.unlink(missing_ok=True)
            out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk ends here, not in a SIGBUS half-way through
                with open(part, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    before, earlier, count, start = list(state["unreadable"]), state["seconds"], 0, time.perf_counter()
    saved = start
    for indices, values, bad in backbone.shared_embed(records, "embedding D_0", skip=state["batches"]):
        if not main:
            continue
        out[indices] = values
        count += len(indices)
        state["batches"] += 1
        state["unreadable"] = before + [list(item) for item in bad]
        if time.perf_counter() - saved > 30:
            out.flush()
            saved = time.perf_counter()
            write_json(progress, state | {"seconds": earlier + saved - start})
    if not main:
        return state
    out[[index for index, _ in state["unreadable"]]] = np.nan
    out.flush()
    seconds = time.perf_counter() - start
    state["seconds"] = earlier + seconds
    write_json(progress, state)
    waited = f", {100 * backbone.seconds / seconds:.0f}% of the time waiting for decoded images" if backbone.seconds else ""
    print(f"select_proxies: embedded {count} public samples, {count / seconds:.1f} a second{waited}")
    for _, message in state["unreadable"]:
        print(f"    skipped: {message}")
    return state


def relevance(public, private, seed, usable=None):
    """g(x, D_p) of Eq. 7 for every public sample: the calibrated probability that x is from the client, (|D_0|,) in (0, 1).

    Logistic regression on frozen features. Two heads, each with the negatives of one half of D_0 (10,000 at most), score
    the other half (of `usable`, the rest gets 0), so no sample is scored by a head that was told it is a negative; each is calibrated (Platt) on its
    own out-of-fold predictions, so that r and with it Eq. 4's balance of relevance and diversity are probabilities.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(5, len(private))
    if folds < 2:
        raise UserError(f"--train-size {len(private)}: the relevance head needs at least 2 private samples")
    order = np.random.default_rng([seed, 7]).permutation(len(public) if usable is None else usable)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    scores = np.zeros(len(public))
    for fit, score in (halves, halves[::-1]):
        negatives = public[np.sort(fit[:10_000])]
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        split = StratifiedKFold(min(folds, len(negatives)), shuffle=True, random_state=seed)
        head = CalibratedClassifierCV(head, method="sigmoid", cv=split, ensemble=False)
        head.fit(np.concatenate([private, negatives]), np.repeat([1, 0], [len(private), len(negatives)]))
        for start in range(0, len(score), 65_536):  # of a memory map: a stretch at a time
            rows = score[start : start + 65_536]
            scores[rows] = head.predict_proba(public[rows])[:, 1]
    return scores


def choose(rule, features, scores, run, client, usable):
    """Indices into D_0 of the client's proxies, in the order they were chosen."""
    m, n = run["proxies"], run["candidates"]
    if rule == "random":
        rng = np.random.default_rng([run["seed"], 11, run["clients"].index(client)])
        return rng.choice(usable, m, replace=False)
    ranked = np.argsort(-scores, kind="stable")
    if rule == "similarity":
        return ranked[:m]
    if rule == "dpp" and n:
        candidates = ranked[:n]  # C_p, Algorithm 1 line 5
    elif len(usable) < len(scores):
        candidates = np.asarray(usable)
    else:
        return dpp.relevance_weighted_dpp(features, scores, m)  # from the disk, without a copy of all
    return candidates[dpp.relevance_weighted_dpp(features[candidates], scores[candidates], m)]


def describe(rule, features, scores, proxies, m):
    """Both terms of Eq. 4 for the chosen set, and its overlap with the m most relevant."""
    unit = features[proxies].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    top = set(np.argsort(-scores, kind="stable")[:m].tolist())
    chosen = set(proxies.tolist())
    return {
        "relevance_term": float(2 * np.log(scores[proxies]).sum()),  # Eq. 4, first term
        "diversity_term": float(np.linalg.slogdet(unit @ unit.T)[1]),  # Eq. 4, second term
        "jaccard_similarity": len(chosen & top) / len(chosen | top),
    }


def main():
    args = parse_args()
    run_dir = Path(args.run_dir)
    run, names = start_run(args)
    main_first = processes(args.device).main_process_first  # of several processes, under `accelerate launch`
    settings = {key: run[key] for key in ("seed", "candidates", "proxies")} | {"selection": args.selection, "dtype": args.dtype}
    settings |= {"candidates": 0} if args.selection == "dpp-all" else {}
    folders = {name: run_dir / "clients" / name / "selection" / args.selection for name in names}
    with main_first():
        todo = [name for name in names if not finished(folders[name], settings, args.force)]
    if args.force and todo and processes().is_main_process:
        for stale in [run_dir / "public" / name for name in ("features.npy", ".features.npy")] + [folders[name].parent / "relevance.npy" for name in todo]:
            stale.unlink(missing_ok=True)
    for name in names:
        if name not in todo:
            print(f"select_proxies: {name}: {args.selection} selection is there already, skipped")
    if not todo:
        if processes().is_main_process:
            write_data(run_dir, run, None, {})  # a client whose work is there joins (again)
        return
    data = read_data(run_dir, run, args.skip_bad_records) if processes().is_main_process else None  # what is wrong in it shows before the seed is loaded
    backbone = load_backbone(run["backbone"], run["seed_model"], args.device, args.dtype, args.workers)
    with main_first():
        if data:
            write_data(run_dir, run, *data)
    public = read_records(run_dir / "public" / "records.jsonl")
    features = public_features(run_dir, backbone, public, args.dtype)
    usable = usable_public(run_dir, public)
    check_sizes(run, len(usable), "readable public samples")
    with main_first():
        backbone.public_classes(run_dir / "public")  # their text features, once for all stages
    for name in todo:
        cached = run_dir / "clients" / name / "selection" / "relevance.npy"
        start, private = time.perf_counter(), None
        if not cached.exists():  # the same for every rule
            private = read_records(run_dir / "clients" / name / "private" / "train.jsonl")
            if len(private) > MOST_PRIVATE:
                sample = np.random.default_rng([run["seed"], 5]).permutation(len(private))[:MOST_PRIVATE]
                private = [private[i] for i in np.sort(sample)]
            private = backbone.features(private, label=f"embedding {name}")
        if not processes().is_main_process:
            continue
        if private is not None:
            np.save(buffer := io.BytesIO(), relevance(features, private, run["seed"], usable))
            with atomic(cached) as temporary:  # NumPy's own write to a full disk raises an OSError without errno
                temporary.write_bytes(buffer.getvalue())
            write_json(cached.with_name("timing.json"), {"relevance_seconds": time.perf_counter() - start})
        scores = np.load(cached)
        start = time.perf_counter()
        proxies = choose(args.selection, features, scores, run, name, usable)
        seconds = time.perf_counter() - start
        terms = describe(args.selection, features, scores, proxies, run["proxies"])
        with atomic(folders[name]) as folder:
            folder.mkdir(parents=True)
            write_json(folder / "selection.json", {"proxies": proxies.tolist(), **terms})
            write_json(folder / "timing.json", {"selection_seconds": seconds})
            write_json(folder / "done.json", settings)
        print(
            f"select_proxies: {name}: {len(proxies)} of {len(public)} by {args.selection}: 2 sum log r = {terms['relevance_term']:.1f}, "
            f"log det L_S = {terms['diversity_term']:.1f}, Jaccard with the most relevant = {terms['jaccard_similarity']:.2f}"
        )
        for index in proxies[:3]:
            what = public[index].get("prompt", public[index].get("image"))
            print(f"    r = {scores[index]:.3f}  {what!r} -> {public[index]['answer']!r}")
    processes().wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
