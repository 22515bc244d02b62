"""Stage 1, at each client: choose proxies for its private data out of the public set (Sec. 3.2, Algorithm 1,
lines 2-8).

Embeds D_0 once for all clients with the seed model, trains each client's relevance head (Eq. 7), keeps the n
most relevant public samples as candidates and takes m of them: by the relevance-weighted DPP (Eq. 2-4), by
relevance alone (FlexOlmo's rule), or at random. Clients are the paper's, the embedded default's, or the
user's own files. Writes RUN/public/, RUN/clients/NAME/private/ and RUN/clients/NAME/selection/RULE/.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np

import dpp
from metamoe.agreement import shown
from metamoe.atomic import locked_run
from metamoe.backbones.base import dtype_name
from metamoe.backbones.distributed import processes
from metamoe.backbones.embedding import keep_array, private_features, public_features, read_array
from metamoe.cli import add_machine_flags, announce, save_settings, stage_parser
from metamoe.data.overlap import warn_of_overlap
from metamoe.errors import UserError, run_main
from metamoe.federation import start_run
from metamoe.party import open_party, write_data
from metamoe.privacy.flags import add_privacy_flags, privacy_terms, relevance_settings
from metamoe.privacy.ledger import open_budget
from metamoe.privacy.parts import relevance_under, settle_relevance
from metamoe.records import read_records, usable_public
from metamoe.report.statistics import selection_terms
from metamoe.run_flags import add_client_flags, add_rule_flags, add_setting_flags, rule_settings
from metamoe.run_settings import check_sizes
from metamoe.rundir import finished, finished_file, inside, making, versions, write_json


def most_relevant(features, relevance, usable, m, n, rng):
    """FlexOlmo's rule: the m most relevant."""
    return np.argsort(-relevance, kind="stable")[:m]


def at_random(features, relevance, usable, m, n, rng):
    return rng.choice(usable, m, replace=False)


def dpp_of_candidates(features, relevance, usable, m, n, rng, weight=1.0):
    """MetaMoE's rule: the relevance-weighted DPP on the n most relevant; n = 0: on all."""
    if not n:
        return dpp_of_all(features, relevance, usable, m, n, rng, weight)
    C = np.argsort(-relevance, kind="stable")[:n]  # C_p, Algorithm 1 line 5
    return C[dpp.relevance_weighted_dpp(features[C], relevance[C], m, weight=weight)]


def dpp_of_all(features, relevance, usable, m, n, rng, weight=1.0):
    """The DPP without the pre-filter."""
    if len(usable) == len(relevance):
        return dpp.relevance_weighted_dpp(features, relevance, m, weight=weight)  # from the disk, uncopied
    usable = np.asarray(usable)
    return usable[dpp.relevance_weighted_dpp(features[usable], relevance[usable], m, weight=weight)]


# A rule(features, relevance, usable, m, n, rng) gives m indices into D_0, in the order they are chosen.
# features: (|D_0|, d). relevance: (|D_0|,), g of Eq. 7. usable: indices of the readable samples. rng: a
# random generator of the client's own.
RULES = {
    "dpp": dpp_of_candidates,  # MetaMoE
    "similarity": most_relevant,  # FlexOlmo
    "random": at_random,
    "dpp-all": dpp_of_all,
}


def parse_args():
    parser = stage_parser(__doc__, help="folder of this run; made here, read by every later stage")
    add_client_flags(parser)
    add_setting_flags(parser)
    add_rule_flags(parser, RULES)
    add_privacy_flags(parser)
    add_machine_flags(parser)
    again = "redo all from the embeddings on, where this selection was made with other settings"
    parser.add_argument("--force", action="store_true", help=again)
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


def client_relevance(run_dir, run, name, backbone, features, usable, made_from, force, budget):
    """The client's g over D_0, computed once for all rules; None in processes that are not the main one."""
    score = partial(relevance_under, budget) if budget and budget.covers("relevance") else relevance
    cached, start = inside(run_dir / "clients" / name, "selection") / "relevance.npy", time.perf_counter()
    settings = {"dtype": dtype_name(backbone.dtype)} | relevance_settings(budget and budget.terms)
    with processes().main_process_first():
        there = finished_file(cached, settings, force, made_from)
    every = score is not relevance
    private = None if there else private_features(run_dir, run, backbone, name, every)
    if not processes().is_main_process:
        return None
    if not there:
        scores = score(features, private, run["seed"], usable)
        keep_array(cached, scores, settings, made_from)
        write_json(cached.with_name("timing.json"), {"relevance_seconds": time.perf_counter() - start})
    settle_relevance(budget)
    return read_array(cached, len(features))


def select(folder, run_dir, run, name, settings, made_from, features, scores, usable, public):
    """Choose the client's m proxies by the rule and write them."""
    rule, m, start = settings["selection"], run["proxies"], time.perf_counter()
    rng = np.random.default_rng([run["seed"], 11, run["clients"].index(name)])
    weight = {"weight": settings["relevance_weight"]} if "rule" in settings else {}
    proxies = RULES[settings.get("rule", rule)](features, scores, usable, m, run["candidates"], rng, **weight)
    seconds, terms = time.perf_counter() - start, selection_terms(features, scores, proxies, m)
    with making(folder, settings, run_dir, made_from) as part:
        write_json(part / "selection.json", {"proxies": proxies.tolist(), **terms})
        write_json(part / "timing.json", {"selection_seconds": seconds})
    print(
        f"select_proxies: {name}: {len(proxies)} of {len(public)} by {rule}: 2 sum log r = "
        f"{terms['relevance_term']:.1f}, log det L_S = {terms['diversity_term']:.1f}, Jaccard with the most "
        f"relevant = {terms['jaccard_similarity']:.2f}"
    )
    for index in proxies[:3]:
        what = public[index].get("prompt", public[index].get("image"))
        print(f"    r = {scores[index]:.3f}  {what!r} -> {public[index]['answer']!r}")


def sources(run_dir, name):
    """The versions of the files that a client's relevance and selections are made from."""
    private = f"clients/{name}/private/train.jsonl"
    return versions(run_dir, "public/records.jsonl", "public/features.npy", private)


def unfinished(run_dir, folders, settings, force):
    """The clients of {name: folder of its selection} that are to do."""
    todo = []
    with processes().main_process_first():
        for name, folder in folders.items():
            if finished(folder, settings, force, sources(run_dir, name)):
                print(f"select_proxies: {name}: {settings['selection']} selection is there already, skipped")
            else:
                todo.append(name)
    return todo


def selection_settings(args, run):
    """The settings that a selection is made with."""
    candidates = 0 if args.selection == "dpp-all" else run["candidates"]
    sizes = {"candidates": candidates, "proxies": run["proxies"], **relevance_settings(privacy_terms(args))}
    return {"seed": run["seed"], "dtype": args.dtype, **rule_settings(args), **sizes}


def select_all(args):
    """Make the run, or check it, and choose the proxies of its clients."""
    run_dir = Path(args.run_dir)
    main_first = processes(args.device).main_process_first  # of several processes, under `accelerate launch`
    with main_first():
        run, local, names = start_run(args)
    resolved = announce(args, "select_proxies", shown(run, local) | rule_settings(args))
    settings = selection_settings(args, run)
    budgets = {name: open_budget(run_dir / "clients" / name, privacy_terms(args)) for name in names}
    folders = {name: run_dir / "clients" / name / "selection" / settings["selection"] for name in names}
    todo = unfinished(run_dir, folders, settings, args.force)
    if not todo and (run_dir / "public" / "done.json").exists():
        if processes().is_main_process:
            write_data(run_dir, run, local, None, None, {})  # a client whose work is there joins (again)
        return
    backbone, run = open_party(args, run_dir, run, local)
    if not names:
        who = ", ".join(run["clients"])
        print(f"select_proxies: {run_dir / 'run.json'} is the agreement of {who}: D_0 and seed model fit it")
        return
    save_settings(run_dir, "select_proxies", settings["selection"], resolved | shown(run, local))
    settings = selection_settings(args, run)
    public = read_records(run_dir / "public" / "records.jsonl")
    features = public_features(run_dir, backbone, public, args.force)  # once for all clients
    usable = usable_public(run_dir, public)
    check_sizes(run, len(usable), "readable public samples")
    with main_first():
        backbone.public_classes(run_dir / "public")  # their text features, once for all stages
    for name in todo:
        if processes().is_main_process:
            warn_of_overlap(name, run_dir / "clients" / name / "private", public, run.get("loss") == "text")
        made_from = sources(run_dir, name)
        known = backbone, features, usable, made_from, args.force, budgets[name]
        scores = client_relevance(run_dir, run, name, *known)
        if scores is not None:
            select(folders[name], run_dir, run, name, settings, made_from, features, scores, usable, public)
    processes().wait_for_everyone()


def main():
    args = parse_args()
    with locked_run(args.run_dir):
        select_all(args)


if __name__ == "__main__":
    run_main(main)
