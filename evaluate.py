"""Stage 4: score every model on every client's test set and print the paper's table.

Rows: the methods of metamoe/methods.py, ZeroShot, each private-only expert, and any other model under
RUN/moe/. Each model is scored once; its choices' scores are kept in RUN/scores/. Writes RUN/results.json and
RUN/results.md (no clock in them: same random seed, same bytes; the paper's numbers beside its own
backbones'), RUN/routing.png, RUN/losses.png, RUN/timings.json and RUN/timings.md (the cost tables) and, with
--figure, Figure 2 with the coverage it shows. Given several evaluated run directories, it prints their tables
instead: mean and standard deviation over the runs, differences with intervals over all their samples.
"""

from functools import partial
from pathlib import Path

import select_proxies
from metamoe.agreement import check_here, read_local
from metamoe.atomic import atomic
from metamoe.audit import report as audit_report
from metamoe.audit.audit import audit
from metamoe.backbones import run_backbone
from metamoe.backbones.base import dtype_name, machine
from metamoe.backbones.distributed import processes
from metamoe.cli import add_machine_flags, announce, save_settings, stage_parser
from metamoe.errors import UserError, run_main
from metamoe.flag_values import count
from metamoe.presets import PRESETS
from metamoe.records import read_records
from metamoe.report.costs import cost_tables
from metamoe.report.evaluation import Evaluation, scoring_suffix
from metamoe.report.figures import coverage, losses_figure, routing_figure
from metamoe.report.models import list_models, scored_variant
from metamoe.report.parties import check_model, read_reports, reports_table, write_reports
from metamoe.report.pooled import pool
from metamoe.report.results import (
    chance,
    collect_timings,
    exchanged_bytes,
    mark_private_data,
    result_rows,
    uploaded_bytes,
)
from metamoe.report.tables import markdown
from metamoe.rundir import open_run, write_json
from metamoe.uploads import ffn_shapes


def parse_args():
    several = "folder of the run; several: print the table over runs of different random seeds"
    parser = stage_parser(__doc__, nargs="+", help=several)
    flag = parser.add_argument
    split = "part of the clients' data to score on; settings are chosen on validation (default: %(default)s)"
    flag("--split", choices=["test", "validation"], default="test", help=split)
    scoring = (
        "language models, multiple choice: logits of the choices' letters from one forward pass; the first "
        "stand-alone letter in 16 generated tokens; likelihood of the choices' texts (default: the preset's)"
    )
    flag("--scoring", choices=["letters", "generate", "likelihood"], help=scoring)
    rows = "score these rows alone (zeroshot, expert-NAME, or a folder of RUN/moe/; default: all there are)"
    flag("--models", nargs="+", metavar="ROW", help=rows)
    sent = (
        "score this unified model, a folder that the server sent, alone, and write RUN/reports/: one to send"
    )
    flag("--model", metavar="FOLDER", help=sent)
    reports = "print the table of these reports of clients, and write RUN/reports.md"
    flag("--reports", nargs="+", metavar="FILE", help=reports)
    figure = (
        "also draw Figure 2 (t-SNE, a PNG a client) and measure how the proxies of each selection cover the "
        "private test data"
    )
    flag("--figure", action="store_true", help=figure)
    opt_out = "also score these MoEs (default: metamoe) with each client's expert left out in turn"
    flag("--opt-out", nargs="*", metavar="MODEL", help=opt_out)
    attacked = "attack what CLIENT (default: the first) sends, and the unified model; writes RUN/privacy.md"
    flag("--audit", nargs="?", const=True, metavar="CLIENT", help=attacked)
    inserted = "its records that get a random answer for the audit (default: %(default)s)"
    flag("--canaries", type=count, default=80, metavar="M", help=inserted)
    add_machine_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    run_dir = Path(args.run_dir[0])
    agreement, local = open_run(run_dir, backbone=None), read_local(run_dir)
    if args.reports:
        tabulate_reports(args.reports, run_dir, agreement)
        return
    run = {**agreement, "clients": check_here(run_dir, agreement, local["clients"], local)}
    if processes(args.device).num_processes > 1:
        raise UserError("evaluate.py is one process: start it with python, not under accelerate launch")
    scoring = pick_scoring(args, run)
    stem = "results" if args.split == "test" else f"results.{args.split}"
    stem += scoring_suffix(run, scoring)
    if len(args.run_dir) > 1 and not args.print_config:
        pool(args.run_dir, f"{stem}.json")
        return
    settings = {"split": args.split, "scoring": scoring or "class prompts", "figure": args.figure}
    settings = announce(args, "evaluate", settings | {"models": args.models, "opt_out": args.opt_out})
    if args.audit is not None:
        write_audit(args, run_dir, run, local)
        return
    evaluation = open_evaluation(args, run_dir, run, local, scoring)
    if args.model:
        score_given(args.model, evaluation, agreement)
        return
    folders = list_models(run_dir, run, args.models)
    left_out = evaluation.check_opt_out(opt_out_models(args))
    save_settings(run_dir, "evaluate", stem, settings)
    scores = evaluation.score_all(folders)
    results = tabulate(evaluation, folders, scores, args.figure, left_out)
    results["own_seed_model"] = local["seed_model"] not in ("", PRESETS[run["backbone"]].get("seed_model"))
    write_json(run_dir / f"{stem}.json", results)
    text = markdown(results, run)
    write_text(run_dir / f"{stem}.md", text)
    if args.split == "test":
        routing_figure(run_dir / "routing.png", run, results["rows"])
        losses_figure(run_dir / "losses.png", run_dir, run)
    timings = collect_timings(run_dir, run, folders, scores)
    write_json(run_dir / "timings.json", timings)
    write_text(run_dir / "timings.md", cost_tables(run, results["rows"], [timings]))
    print(text)
    print(
        f"evaluate: {len(folders)} models on {len(run['clients'])} clients; {run_dir / stem}.json, "
        f"{stem}.md and timings.md written"
    )


def score_given(folder, evaluation, agreement):
    """Score a model that was sent, beside the seed model, and write the clients' reports."""
    weights, name = check_model(folder, list(ffn_shapes(evaluation.run_dir))), Path(folder).name
    evaluation.load_model(name, Path(folder))  # what is wrong with it shows before anything is written
    scores = evaluation.score_all({"zeroshot": None, name: Path(folder)})
    write_reports(evaluation, agreement, folder, weights, scores)


def write_audit(args, run_dir, run, local):
    """Attack what a client sends, and the model that is made of it; write what was found."""
    found = audit(run_dir, run, local, args, choose_proxies)
    scores = found.pop("scores")
    write_json(run_dir / "privacy.json", found)
    text = audit_report.markdown(found, run)
    write_text(run_dir / "privacy.md", text)
    audit_report.roc_figure(run_dir / "privacy-roc.png", scores)
    audit_report.vectors_figure(run_dir / "privacy-vectors.png", found["vectors"])
    print(text)
    print(f"evaluate: {run_dir}/privacy.md, privacy.json, privacy-roc.png and privacy-vectors.png written")


def choose_proxies(features, private, usable, run):
    """The proxies that select_proxies.py chooses by the DPP."""
    scores = select_proxies.relevance(features, private, run["seed"], usable)
    m, n = run["proxies"], run["candidates"]
    return select_proxies.dpp_of_candidates(features, scores, usable, m, n, rng=None)


def tabulate_reports(paths, run_dir, agreement):
    """The server's table of what clients report."""
    text = reports_table(read_reports(paths, agreement), agreement)
    write_text(run_dir / "reports.md", text)
    print(text)
    print(f"evaluate: {len(paths)} reports; {run_dir / 'reports.md'} written")


def pick_scoring(args, run):
    """How multiple choice is scored: --scoring, else the backbone's own way; None for an image model."""
    own = PRESETS[run["backbone"]].get("scoring")
    if args.scoring and own is None:
        raise UserError(f"--scoring is for language models: {run['backbone']} is scored by its class prompts")
    return args.scoring or own


def open_evaluation(args, run_dir, run, local, scoring):
    """The records to score on, and how."""
    records = {}
    for name in run["clients"]:
        records[name] = read_records(run_dir / "clients" / name / "private" / f"{args.split}.jsonl")
    if not all(records.values()):
        raise UserError(
            f"--split {args.split}: a client has no samples in it; make the run with --{args.split}-size "
            "of at least 1"
        )
    dtype = dtype_name(machine(args)[1])
    load = partial(run_backbone, run, local, args)
    return Evaluation(run_dir, run, args.split, scoring, dtype, records, load)


def opt_out_models(args):
    """The MoEs whose experts are left out in turn."""
    if args.opt_out is None:
        return []
    return args.opt_out or ["metamoe"]


def tabulate(evaluation, folders, scores, figure, left_out):
    """The content of RUN/results.json."""
    run, scoring = evaluation.run, evaluation.scoring
    results = {
        "run": run,
        "split": evaluation.split,
        "n": {name: len(records) for name, records in evaluation.records.items()},
        "chance": chance(evaluation.records),
        "rows": result_rows(run, scores, evaluation.records),
        "experts": scored_variant(evaluation.run_dir, run),
        "uploaded_bytes": uploaded_bytes(evaluation.run_dir, run),
    }
    mark_private_data(results["rows"], folders)
    own = PRESETS[run["backbone"]].get("scoring")
    if scoring and (scoring, own) != ("likelihood", "likelihood"):
        results["scoring"] = scoring
    exchanged = exchanged_bytes(evaluation.run_dir, run, folders)
    if exchanged:
        results["exchanged"] = exchanged
    covered = coverage(evaluation, draw=figure)
    if covered:
        results["coverage"] = covered
    if left_out:
        results["opt_out"] = evaluation.score_opt_out(left_out)
    return results


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
