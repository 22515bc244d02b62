"""The tables over runs that differ in their random seed: means and standard deviations."""

from pathlib import Path

import numpy as np

from metamoe.errors import UserError
from metamoe.report.costs import cost_tables
from metamoe.report.results import right_of
from metamoe.report.statistics import paired_bootstrap
from metamoe.report.tables import (
    EXCHANGED,
    client_heads,
    exchange_table,
    gap_cell,
    grid,
    measures,
    not_private,
    own_shares,
    sections,
)
from metamoe.rundir import read_json


def pool(run_dirs, file):
    """Print the tables over these runs, from the results in `file` of each."""
    runs = read_runs(run_dirs, file)
    run, rows = runs[0]["run"], runs[0]["rows"]
    measured = measures(run, rows)
    gaps = paired_gaps(runs, [name for name, measure in measured.items() if measure == "accuracy"])
    blocks = []
    for tables in zip(*(sections(found["rows"]) for found in runs), strict=True):  # the same of each run
        heading = tables[0][0]
        if heading:
            blocks.append(heading)
        blocks.append(accuracy_table([labelled for _, labelled in tables], measured, gaps))
        if not heading:
            blocks += privacy_blocks(runs[0])
    if any("routing" in row for row in rows):
        blocks.append("Percent of a client's tokens that its own expert gets, mean over the layers")
        blocks.append(routing_table([found["rows"] for found in runs], run["clients"]))
    if all("coverage" in found for found in runs):
        blocks.append("Distance of a private test sample to its nearest proxy; log det L_S")
        blocks.append(coverage_table([found["coverage"] for found in runs], run["clients"]))
    paths = [Path(run_dir) / "timings.json" for run_dir in run_dirs]
    timings = [read_json(path) for path in paths if path.exists()]
    timed = all(row["model"] in found for row in rows for found in timings)
    if len(timings) == len(runs) and timed:
        blocks.append(cost_tables(run, rows, timings).rstrip("\n"))
    print("\n\n".join(blocks))


def privacy_blocks(results):
    """Which rows saw private data, and the bytes of those that exchange weights in every round."""
    run = results["run"]
    blocks = [not_private(results, run).strip()]
    if "exchanged" in results:
        blocks += [EXCHANGED, exchange_table(results, run)]
    return [block for block in blocks if block]


def read_runs(run_dirs, file):
    """The results of each run; UserError unless they differ in their random seed alone."""
    for run_dir in run_dirs:
        if not (Path(run_dir) / file).exists():
            raise UserError(f"--run-dir {run_dir}: holds no {file}: evaluate it alone first")
    runs = [read_json(Path(run_dir) / file) for run_dir in run_dirs]
    made = [(found["run"] | {"seed": 0}, [row["model"] for row in found["rows"]]) for found in runs]
    for run_dir, settings in zip(run_dirs, made, strict=True):
        if settings != made[0]:
            other = f"other settings or models than {run_dirs[0]}; only the random seed may differ"
            raise UserError(f"--run-dir {run_dir}: made with {other}")
    return runs


def paired_gaps(runs, clients):
    """{row: MetaMoE's difference to it} over the samples of all runs, as in statistics.paired_bootstrap."""
    right = {}  # row -> {(client, random seed): 0.0 or 1.0 a sample}
    for found in runs:
        for row in found["rows"]:
            for name, values in right_of(row, clients).items():
                right.setdefault(row["model"], {})[name, found["run"]["seed"]] = values
    ours = right.pop("metamoe", None)
    return {row: paired_bootstrap(ours, theirs, 0) for row, theirs in right.items() if ours}


def accuracy_table(runs, measured, gaps):
    """runs: [(label, row)] of each run."""
    lines = []
    for labelled in zip(*runs, strict=True):
        label, rows = labelled[0][0], [row for _, row in labelled]
        cells = [spread([r["clients"][name][kind] for r in rows], 2) for name, kind in measured.items()]
        cells.append(spread([row["average"] for row in rows], 2))
        lines.append((label, [*cells, gap_cell(gaps.get(rows[0]["model"]))]))
    return grid([*client_heads(measured), "Average", "MetaMoE minus this"], lines)


def routing_table(runs, clients):
    """runs: the rows of each run."""
    lines = []
    for rows in zip(*runs, strict=True):
        if "routing" in rows[0]:
            lines.append((rows[0]["title"], [share_cell(rows, client) for client in clients]))
    return grid(clients, lines)


def share_cell(rows, client):
    """rows: one model's of each run."""
    shares = [own_shares(row, client) for row in rows]
    return spread([np.mean(each) for each in shares], 1) if all(shares) else "no expert"


def coverage_table(runs, clients):
    """runs: the coverage of each run."""
    lines = []
    for rule in sorted(set().union(*runs[0].values())):
        cells = []
        for name in clients:
            found = [coverage[name].get(rule, {}) for coverage in runs]
            distance = spread([each.get("distance") for each in found], 4)
            log_det = spread([each.get("log_det") for each in found], 1)
            cells.append(f"{distance}; {log_det}" if distance else "")
        lines.append((rule, cells))
    return grid(clients, lines)


def spread(values, digits):
    """Mean and standard deviation over the runs; empty where one has none."""
    if None in values:
        return ""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
