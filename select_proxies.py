"""Stage 1, at each client: choose proxies for its private data out of the public set (Sec. 3.2, Algorithm 1, lines 2-8).

Embeds D_0 once for all clients with the seed model, trains each client's relevance head (Eq. 7), keeps the n most
relevant public samples as candidates and takes m of them: by the relevance-weighted DPP (Eq. 2-4), by relevance alone
(FlexOlmo's rule), or at random. Writes RUN/public/, RUN/clients/NAME/private/ and RUN/clients/NAME/selection/RULE/.
"""

import argparse
import io
import os
from pathlib import Path

import numpy as np

import dpp
import tasks
from backbones import PRESETS, load_backbone
from rundir import UserError, atomic, check_client, finished, open_run, read_json, read_records, run_main, write_json, write_records

RULES = ("dpp", "similarity", "random")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="folder of this run; made here, read by every later stage")
    parser.add_argument("--backbone", help=f"seed model and its presets: {', '.join(PRESETS)} (default: the run's, for a new run smollm2-135m)")
    parser.add_argument("--seed-model", help="load the seed from this hub id or local folder instead of the backbone's own")
    parser.add_argument("--clients", nargs="+", help=f"clients of the run, out of {', '.join(tasks.CLIENTS)} (default: all)")
    parser.add_argument("--client", help="select for this one alone (default: every client of the run)")
    parser.add_argument("--seed", type=int, help="of the splits and of every random choice (default 0)")
    parser.add_argument("--train-size", type=int, help="private training samples a client (default: the backbone's preset, like all below)")
    parser.add_argument("--validation-size", type=int, help="private validation samples a client")
    parser.add_argument("--test-size", type=int, help="test samples a client")
    parser.add_argument("--public-size", type=int, help="public samples, |D_0|")
    parser.add_argument("--candidates", type=int, help="n: most relevant public samples that the DPP chooses from")
    parser.add_argument("--proxies", type=int, help="m: proxies a client")
    parser.add_argument("--selection", choices=RULES, default="dpp", help="rule that chooses the proxies (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where the hardware computes in it")
    parser.add_argument("--force", action="store_true", help="redo everything from the embeddings on, where this selection was made with other settings")
    return parser.parse_args()


def start_run(args):
    """RUN/run.json: made from the flags and the backbone's preset, or checked against them."""
    if (run_file := Path(args.run_dir) / "run.json").exists():
        backbone = read_json(run_file)["backbone"]
    else:
        backbone = args.backbone or "smollm2-135m"
    if (args.backbone or backbone) not in PRESETS:
        raise UserError(f"--backbone {args.backbone}: unknown, choose from {', '.join(PRESETS)}")
    for name in args.clients or []:
        if name not in tasks.CLIENTS:
            raise UserError(f"--clients {name}: unknown, choose from {', '.join(tasks.CLIENTS)}")
    settings = {"backbone": args.backbone, "seed_model": args.seed_model, "seed": args.seed, "clients": args.clients}
    settings |= {key: getattr(args, key) for key in ("train_size", "validation_size", "test_size", "public_size", "candidates", "proxies")}
    if not run_file.exists():
        defaults = PRESETS[backbone] | {"backbone": backbone, "seed_model": "", "seed": 0, "clients": list(tasks.CLIENTS)}
        settings = {key: defaults[key] if value is None else value for key, value in settings.items()}
    sizes = settings if not run_file.exists() else read_json(run_file)
    # the relevance head needs 2 samples of each class for its folds, and two halves of D_0
    for key, least in {"train_size": 2, "validation_size": 0, "test_size": 1, "public_size": 4, "candidates": 1, "proxies": 1}.items():
        if sizes[key] < least:
            raise UserError(f"--{key.replace('_', '-')} {sizes[key]}: must be at least {least}")
    if not 0 <= sizes["seed"] < 2**32:
        raise UserError(f"--seed {sizes['seed']}: must lie in 0 to 4294967295")
    if len(set(sizes["clients"])) < len(sizes["clients"]):
        raise UserError(f"--clients {' '.join(sizes['clients'])}: each client once")
    if args.client:
        check_client(sizes, args.client)
    if sizes["proxies"] > sizes["candidates"]:
        raise UserError(f"--proxies {sizes['proxies']} is more than --candidates {sizes['candidates']}: m must be at most n")
    if sizes["candidates"] > sizes["public_size"]:
        raise UserError(f"--candidates {sizes['candidates']} is more than --public-size {sizes['public_size']}: n must be at most |D_0|")
    return open_run(args.run_dir, create=False, **settings)  # not before the data and the seed model are there


def prepare_data(run_dir, run):
    """Write run.json, D_0 and every client's parts once. In a real federation each party holds its own; here one archive does."""
    folders = [run_dir / "public"] + [run_dir / "clients" / name / "private" for name in run["clients"]]
    if all((folder / "done.json").exists() for folder in folders):
        return
    sizes = {part: run[f"{part}_size"] for part in ("train", "validation", "test")}
    public, parts = tasks.load_bigbench(run["clients"], sizes, run["public_size"], run["seed"])
    open_run(run_dir, **run)
    for name in run["clients"]:
        with atomic(run_dir / "clients" / name / "private") as folder:
            for part, records in parts[name].items():
                write_records(folder / f"{part}.jsonl", records)
            write_json(folder / "done.json", {"seed": run["seed"], **sizes})
    with atomic(run_dir / "public") as folder:
        write_records(folder / "records.jsonl", public)
        write_json(folder / "done.json", {"records": len(public)})


def public_features(run_dir, backbone, records):
    """RUN/public/features.npy, memory-mapped: D_0's embeddings (|D_0|, d) float32, computed once for all clients."""
    path = run_dir / "public" / "features.npy"
    if not path.exists():
        with atomic(path) as temporary:
            shape = (len(records), backbone.model.config.hidden_size)
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk ends here, not in a SIGBUS half-way through
                with open(temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            backbone.features(records, out, label="embedding D_0")
            out.flush()
    return np.load(path, mmap_mode="r")


def relevance(public, private, seed):
    """g(x, D_p) of Eq. 7 for every public sample: the calibrated probability that x is from the client, (|D_0|,) in (0, 1).

    Logistic regression on frozen features. Two heads, each with the negatives of one half of D_0 (10,000 at most), score
    the other half, so no sample is scored by a head that was told it is a negative; each is calibrated (Platt) on its
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
    order = np.random.default_rng([seed, 7]).permutation(len(public))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    scores = np.zeros(len(public))
    for fit, score in (halves, halves[::-1]):
        negatives = public[np.sort(fit[:10_000])]
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        split = StratifiedKFold(min(folds, len(negatives)), shuffle=True, random_state=seed)
        head = CalibratedClassifierCV(head, method="sigmoid", cv=split, ensemble=False)
        head.fit(np.concatenate([private, negatives]), np.repeat([1, 0], [len(private), len(negatives)]))
        scores[score] = head.predict_proba(public[score])[:, 1]
    return scores


def choose(rule, features, scores, run, client):
    """Indices into D_0 of the client's proxies, in the order they were chosen."""
    m = run["proxies"]
    candidates = np.argsort(-scores, kind="stable")[: run["candidates"]]  # C_p, Algorithm 1 line 5
    if rule == "similarity":
        return candidates[:m]
    if rule == "random":
        rng = np.random.default_rng([run["seed"], 11, run["clients"].index(client)])
        return rng.choice(len(scores), m, replace=False)
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
    run = start_run(args)
    names = [args.client] if args.client else run["clients"]
    settings = {key: run[key] for key in ("seed", "candidates", "proxies")} | {"selection": args.selection, "dtype": args.dtype}
    folders = {name: run_dir / "clients" / name / "selection" / args.selection for name in names}
    todo = [name for name in names if not finished(folders[name], settings, args.force)]
    if args.force and todo:
        for stale in [run_dir / "public" / "features.npy"] + [folders[name].parent / "relevance.npy" for name in todo]:
            stale.unlink(missing_ok=True)
    for name in names:
        if name not in todo:
            print(f"select_proxies: {name}: {args.selection} selection is there already, skipped")
    if not todo:
        return
    backbone = load_backbone(run["backbone"], run["seed_model"], args.device, args.dtype)
    prepare_data(run_dir, run)
    public = read_records(run_dir / "public" / "records.jsonl")
    features = public_features(run_dir, backbone, public)
    for name in todo:
        cached = run_dir / "clients" / name / "selection" / "relevance.npy"
        if not cached.exists():  # the same for every rule
            private = backbone.features(read_records(run_dir / "clients" / name / "private" / "train.jsonl"), label=f"embedding {name}")
            np.save(buffer := io.BytesIO(), relevance(features, private, run["seed"]))
            with atomic(cached) as temporary:  # NumPy's own write to a full disk raises an OSError without errno
                temporary.write_bytes(buffer.getvalue())
        scores = np.load(cached)
        proxies = choose(args.selection, features, scores, run, name)
        terms = describe(args.selection, features, scores, proxies, run["proxies"])
        with atomic(folders[name]) as folder:
            folder.mkdir(parents=True)
            write_json(folder / "selection.json", {"proxies": proxies.tolist(), **terms})
            write_json(folder / "done.json", settings)
        print(
            f"select_proxies: {name}: {len(proxies)} of {len(public)} by {args.selection}: 2 sum log r = {terms['relevance_term']:.1f}, "
            f"log det L_S = {terms['diversity_term']:.1f}, Jaccard with the most relevant = {terms['jaccard_similarity']:.2f}"
        )
        for index in proxies[:3]:
            print(f"    r = {scores[index]:.3f}  {public[index]['prompt']!r} -> {public[index]['answer']!r}")


if __name__ == "__main__":
    run_main(main)
