"""Stage 4: score every model on every client's test set and print the paper's table.

Rows: ZeroShot, each private-only expert, BTM, ModelSoup, BTX, FlexOlmo, MetaMoE, UnrestrictedMoE, then the
paper's ablations and any other model under RUN/moe/. Each model is scored once; its choices' scores are kept
in RUN/scores/. Writes RUN/results.json and RUN/results.md (no clock in them: same seed, same bytes; the
paper's numbers beside its own backbones'), RUN/timings.json and RUN/timings.md (the cost tables) and, with
--figure, Figure 2 with the coverage it shows. Given several evaluated run directories, it prints their tables
instead: mean and standard deviation over the runs, differences with intervals over all their samples.
"""

import argparse
import time
from pathlib import Path

import moe
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.cli import add_machine_flags
from metamoe.errors import UserError, run_main
from metamoe.presets import PRESETS
from metamoe.records import read_records
from metamoe.report.figures import coverage, coverage_identity
from metamoe.report.results import collect_timings, opt_out_row, result_rows, uploaded_bytes
from metamoe.report.statistics import is_choice
from metamoe.report.tables import cost_tables, markdown, pool
from metamoe.rivals.btm import ensemble
from metamoe.rundir import atomic, open_run, read_json, sha256, write_json
from metamoe.uploads import read_manifest


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run-dir",
        required=True,
        nargs="+",
        help="folder of the run; several: print the table over runs of different seeds",
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation"],
        default="test",
        help="part of the clients' data to score on; settings are chosen on validation (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--scoring",
        choices=["letters", "generate", "likelihood"],
        help="language models, multiple choice: logits of the choices' letters from one forward pass; the "
        "first stand-alone letter in 16 generated tokens; likelihood of the choices' texts (default: "
        "the backbone's preset)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help="score these rows alone (zeroshot, expert-NAME, or a folder of RUN/moe/; default: all there "
        "are)",
    )
    parser.add_argument(
        "--figure",
        action="store_true",
        help="also draw Figure 2 (t-SNE, a PNG a client) and measure how the proxies of each selection "
        "cover the private test data",
    )
    parser.add_argument(
        "--opt-out",
        nargs="*",
        metavar="MODEL",
        help="also score these MoEs (default: metamoe) with each client's expert left out in turn",
    )
    add_machine_flags(parser)
    return parser.parse_args()


def list_models(run_dir, run, only):
    """Rows in the paper's order: {row: folder of the model, None for the seed}. BTM's row is made of the
    experts'."""
    made = [path.name for path in sorted((run_dir / "moe").glob("[!.]*")) if (path / "done.json").exists()]
    rows = [row for row in ("unrestricted",) if row in made] + ["zeroshot"]
    rows += [f"expert-{name}" for name in run["clients"]]
    rows += [row for row in ("btm", "soup", "btx", "flexolmo", "metamoe") if row in made]
    rows += [row for row in made if row not in rows]
    for row in only or []:
        if row not in rows:
            raise UserError(
                f"--models {row}: there is no such model in {run_dir}; there are {', '.join(rows)}"
            )
    folders = {}
    for row in rows if not only else [row for row in rows if row in only]:
        if row.startswith("expert-"):
            folders[row] = (
                run_dir / "clients" / row.removeprefix("expert-") / "upload" / expert_variant(run_dir)
            )
            read_manifest(folders[row])
        else:
            folders[row] = None if row == "zeroshot" else run_dir / "moe" / row
    return folders


def expert_variant(run_dir):
    """Which uploads are the 'private-only experts': those that BTM combines."""
    btm = run_dir / "moe" / "btm" / "done.json"
    return read_json(btm)["variant"] if btm.exists() else "private-similarity"


def suffix(run, scoring):
    """What distinguishes the files of a scoring that is not the backbone's own."""
    return "" if scoring == PRESETS[run["backbone"]].get("scoring") else f".{scoring}"


def score(row, folder, backbone_of, run_dir, run, args, records, scoring, without=None):
    """What backbone.scores gives, {client: [[...], ...]}, routing counts (L, K) a client, and samples/s;
    scored once. without: an expert to leave out."""
    identity = {"dtype": args.dtype, "model": "seed"}
    if scoring not in (None, "likelihood"):
        identity["scoring"] = scoring
    if folder is not None:
        identity["model"] = sha256(folder / ("manifest.json" if row.startswith("expert-") else "done.json"))
    path = (
        run_dir
        / "scores"
        / f"{row}{f'.without.{without}' if without else ''}.{args.split}{suffix(run, scoring)}.json"
    )
    if (
        path.exists()
        and (found := read_json(path))["identity"] == identity
        and found["scores"].keys() >= set(run["clients"])
    ):
        return found  # unless a client has joined since
    backbone = backbone_of()
    model = backbone.model
    if folder is not None:
        model = (
            moe.load(folder, model)
            if (folder / "moe_config.json").exists()
            else backbone.with_adapter(folder)
        )
    if without:
        moe.disable_expert(model, without)
    # a prompt's tokens go through once, not once a generated token
    routed = hasattr(model, "routing") and scoring != "generate"
    found, seconds = {"identity": identity, "scores": {}, "routing": {}}, 0.0
    for name in run["clients"]:
        if routed:
            model.routing.record = True
            moe.reset_counts(model)
        start = time.perf_counter()
        found["scores"][name] = [
            values.tolist()
            for values in backbone.scores(model, records[name], label=f"{row} on {name}", scoring=scoring)
        ]
        seconds += time.perf_counter() - start
        if routed:
            found["routing"][name] = moe.counts(model).tolist()
            found["experts"] = model.moe_config["names"]
    found["samples_per_second"] = sum(map(len, records.values())) / seconds
    if routed:
        found["lambda"] = [lam.item() for lam in moe.lambda_parameters(model)]
    write_json(path, found)
    return found


def opt_outs(args, run_dir, run):
    """{model: its experts that can be left out} of the MoEs of --opt-out."""
    found = {}
    for row in (args.opt_out or ["metamoe"]) if args.opt_out is not None else []:
        if not (run_dir / "moe" / row / "moe_config.json").exists():
            raise UserError(f"--opt-out {row}: there is no such MoE in {run_dir / 'moe'}")
        names = read_json(run_dir / "moe" / row / "moe_config.json")["names"]
        if len(names) == 1:
            raise UserError(f"--opt-out {row}: it has one expert alone, which cannot be left out")
        found[row] = [name for name in names if name in run["clients"]]
    return found


def main():
    args = parse_args()
    run_dir = Path(args.run_dir[0])
    run = open_run(run_dir, backbone=None)
    if processes(args.device).num_processes > 1:
        raise UserError("evaluate.py is one process: start it with python, not under accelerate launch")
    own = PRESETS[run["backbone"]].get("scoring")
    if args.scoring and own is None:
        raise UserError(f"--scoring is for language models: {run['backbone']} is scored by its class prompts")
    scoring = args.scoring or own
    stem = ("results" if args.split == "test" else f"results.{args.split}") + suffix(run, scoring)
    if len(args.run_dir) > 1:
        return pool(args.run_dir, f"{stem}.json")
    records = {
        name: read_records(run_dir / "clients" / name / "private" / f"{args.split}.jsonl")
        for name in run["clients"]
    }
    if not all(records.values()):
        raise UserError(
            f"--split {args.split}: a client has no samples in it; make the run with --{args.split}-size "
            "of at least 1"
        )
    folders = list_models(run_dir, run, args.models)
    left_out = opt_outs(args, run_dir, run)

    def backbone_of():  # only for a model that is not scored yet; PEFT and the MoE change a model in place
        return run_backbone(run, args)

    found = {
        row: score(row, folder, backbone_of, run_dir, run, args, records, scoring)
        for row, folder in folders.items()
        if row != "btm"
    }
    if "btm" in folders:
        combined = "letters" if scoring == "generate" else scoring  # probabilities, not letters
        experts = [
            score(
                f"expert-{name}",
                run_dir / "clients" / name / "upload" / expert_variant(run_dir),
                backbone_of,
                run_dir,
                run,
                args,
                records,
                combined,
            )
            for name in run["clients"]
        ]
        found["btm"] = {
            "scores": ensemble(experts, [name for name in run["clients"] if not is_choice(records[name])]),
            "samples_per_second": 1 / sum(1 / expert["samples_per_second"] for expert in experts),
        }
    found = {row: found[row] for row in folders}
    rows = result_rows(run, found, records)
    results = {
        "run": run,
        "split": args.split,
        "n": {name: len(r) for name, r in records.items()},
        "rows": rows,
        "uploaded_bytes": uploaded_bytes(run_dir, run),
    }
    if scoring and (scoring, own) != ("likelihood", "likelihood"):
        results["scoring"] = scoring
    measured, identity = run_dir / "scores" / f"coverage.{args.split}.json", coverage_identity(run_dir, run)
    if args.figure:
        write_json(
            measured,
            {"identity": identity, "coverage": coverage(run_dir, run, backbone_of(), records, args.split)},
        )
    if measured.exists() and (kept := read_json(measured))["identity"] == identity:
        results["coverage"] = kept["coverage"]
    if left_out:
        results["opt_out"] = {}
    for row, names in left_out.items():
        scores = {
            name: score(row, run_dir / "moe" / row, backbone_of, run_dir, run, args, records, scoring, name)[
                "scores"
            ]
            for name in ["", *names]
        }
        results["opt_out"][row] = opt_out_row(run, scores, records)
    write_json(run_dir / f"{stem}.json", results)
    text = markdown(results, run)
    with atomic(run_dir / f"{stem}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    timings = collect_timings(run_dir, run, folders, found)
    write_json(run_dir / "timings.json", timings)
    with atomic(run_dir / "timings.md") as temporary:
        temporary.write_text(cost_tables(run, rows, [timings]), encoding="utf-8")
    print(text)
    print(
        f"evaluate: {len(rows)} models on {len(records)} clients; {run_dir / stem}.json, {stem}.md and "
        "timings.md written"
    )


if __name__ == "__main__":
    run_main(main)
