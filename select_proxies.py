"""Stage 1, at each client: choose proxies for its private data out of the public set (Sec. 3.2, Algorithm 1,
lines 2-8).

Embeds D_0 once for all clients with the seed model, trains each client's relevance head (Eq. 7), keeps the n
most relevant public samples as candidates and takes m of them: by the relevance-weighted DPP (Eq. 2-4), by
relevance alone (FlexOlmo's rule), or at random. Clients are the paper's, the embedded default's, or the
user's own files. Writes RUN/public/, RUN/clients/NAME/private/ and RUN/clients/NAME/selection/RULE/.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np

import dpp
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.backbones.embedding import public_features
from metamoe.cli import add_machine_flags
from metamoe.data.bigbench import CLIENTS
from metamoe.data.glyphs import world
from metamoe.data.questions import CLIENTS as TEXT_CLIENTS
from metamoe.errors import UserError, run_main
from metamoe.federation import check_sizes, read_data, start_run, write_data
from metamoe.presets import PRESETS
from metamoe.records import read_records, usable_public
from metamoe.rundir import atomic, finished, write_json

RULES = ("dpp", "similarity", "random", "dpp-all")
MOST_PRIVATE = 20_000  # private samples that a relevance head is fitted on


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run-dir", required=True, help="folder of this run; made here, read by every later stage"
    )
    parser.add_argument(
        "--backbone",
        help=f"seed model and its presets: {', '.join(PRESETS)} (default: the run's, for a new run "
        "smollm2-135m)",
    )
    parser.add_argument(
        "--seed-model",
        "--pretrained",
        help="load the seed from this hub id, local folder or (CLIP) checkpoint instead of the backbone's "
        "own",
    )
    parser.add_argument(
        "--clients",
        nargs="+",
        help="clients of the run (default: those of --client NAME=PATH, else all of the backbone's: "
        f"{', '.join(CLIENTS)}; "
        f"{', '.join(TEXT_CLIENTS)}; pets, flowers, eurosat; {', '.join(world.CLIENTS)})",
    )
    parser.add_argument(
        "--client",
        action="append",
        metavar="NAME[=PATH]",
        help="NAME=PATH, once for each: a client of the run with data of your own, JSON lines with `prompt`, "
        "`choices`, `answer` (a choice's text, or its index from 0) or with `prompt`, `response`; for CLIP "
        "a folder CLASS/IMAGE. NAME: select for this one alone",
    )
    parser.add_argument(
        "--join",
        metavar="NAME[=PATH]",
        help="add this client to a run that is there, prepare its data (PATH: as for --client) and select "
        "its proxies; the others' work stays",
    )
    parser.add_argument(
        "--skip-bad-records",
        action="store_true",
        help="leave out and count what is wrong in own data, instead of ending at the first of it",
    )
    parser.add_argument(
        "--data-root",
        help="folder of the paper's datasets: oxford_pets/, oxford_flowers/, eurosat/ in CoOp's layout; "
        "commonsenseqa/, cosmosqa/, socialiqa/, alpaca/",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="NAME=SOURCE",
        help="this client's copy of the paper's dataset: a folder, or a Hugging Face dataset (hub id or "
        "local copy)",
    )
    parser.add_argument(
        "--public",
        metavar="PATH",
        help="public set. Text: JSON lines as for --client, or Alpaca (hub id, local copy, "
        "alpaca_data.json; default: the backbone's own). "
        "CLIP: ImageNet, a folder CLASS/IMAGE or a Hugging Face dataset (hub id or local copy)",
    )
    parser.add_argument("--seed", type=int, help="of the splits and of every random choice (default 0)")
    parser.add_argument(
        "--train-size",
        type=int,
        help="private training samples a client (default: the backbone's preset, like all below; 0, also "
        "below: all; own data: default and 0 are 80/10/10 of it)",
    )
    parser.add_argument("--validation-size", type=int, help="private validation samples a client")
    parser.add_argument("--test-size", type=int, help="test samples a client")
    parser.add_argument("--public-size", type=int, help="public samples, |D_0|")
    parser.add_argument(
        "--candidates",
        "--pool",
        type=int,
        help="n: most relevant public samples that the DPP chooses from (0: all of them, no pre-filter)",
    )
    parser.add_argument("--proxies", type=int, help="m: proxies a client")
    parser.add_argument(
        "--answers",
        choices=["text", "letters"],
        help="language models, multiple choice: train on the answer's text, or list the choices in the "
        "prompt and train on the answer's letter (default: the backbone's preset, also below)",
    )
    parser.add_argument(
        "--loss",
        choices=["answer", "text"],
        help="language models: loss on the answer (router context: the prompt's mean) or on the whole text "
        "(context: the mean so far)",
    )
    parser.add_argument(
        "--selection",
        choices=RULES,
        default="dpp",
        help="rule that chooses the proxies; dpp-all: the DPP without the pre-filter (default: %(default)s)",
    )
    add_machine_flags(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="redo everything from the embeddings on, where this selection was made with other settings",
    )
    return parser.parse_args()


def relevance(public, private, seed, usable=None):
    """g(x, D_p) of Eq. 7 for every public sample: the calibrated probability that x is from the client,
    (|D_0|,) in (0, 1).

    Logistic regression on frozen features. Two heads, each with the negatives of one half of D_0 (10,000 at
    most), score the other half (of `usable`, the rest gets 0), so no sample is scored by a head that was told
    it is a negative; each is calibrated (Platt) on its own out-of-fold predictions, so that r and with it Eq.
    4's balance of relevance and diversity are probabilities.
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
    settings = {key: run[key] for key in ("seed", "candidates", "proxies")} | {
        "selection": args.selection,
        "dtype": args.dtype,
    }
    settings |= {"candidates": 0} if args.selection == "dpp-all" else {}
    folders = {name: run_dir / "clients" / name / "selection" / args.selection for name in names}
    with main_first():
        todo = [name for name in names if not finished(folders[name], settings, args.force)]
    if args.force and todo and processes().is_main_process:
        for stale in [run_dir / "public" / name for name in ("features.npy", ".features.npy")] + [
            folders[name].parent / "relevance.npy" for name in todo
        ]:
            stale.unlink(missing_ok=True)
    for name in names:
        if name not in todo:
            print(f"select_proxies: {name}: {args.selection} selection is there already, skipped")
    if not todo:
        if processes().is_main_process:
            write_data(run_dir, run, None, {})  # a client whose work is there joins (again)
        return
    # what is wrong in it shows before the seed is loaded
    data = read_data(run_dir, run, args.skip_bad_records) if processes().is_main_process else None
    backbone = run_backbone(run, args)
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
            with atomic(
                cached
            ) as temporary:  # NumPy's own write to a full disk raises an OSError without errno
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
            f"select_proxies: {name}: {len(proxies)} of {len(public)} by {args.selection}: 2 sum log r = "
            f"{terms['relevance_term']:.1f}, "
            f"log det L_S = {terms['diversity_term']:.1f}, Jaccard with the most relevant = "
            f"{terms['jaccard_similarity']:.2f}"
        )
        for index in proxies[:3]:
            what = public[index].get("prompt", public[index].get("image"))
            print(f"    r = {scores[index]:.3f}  {what!r} -> {public[index]['answer']!r}")
    processes().wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
