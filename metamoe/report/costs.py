"""The paper's cost tables (Tables 10, 15 and 16) as Markdown, of one run or as means over several."""

import numpy as np

from metamoe.report.figures import RULES, known_first
from metamoe.report.paper import PAPER_COSTS, PAPER_SELECTION
from metamoe.report.tables import grid


def cost_tables(run, rows, timings):
    """RUN/timings.md: means over the runs. rows: of one run's results.json; timings: timings.json of each."""
    blocks = ["Proxy selection (Table 10): seconds a client", selection_table(run["clients"], timings)]
    if run["backbone"] in PAPER_SELECTION:
        similarity, dpp = PAPER_SELECTION[run["backbone"]]
        blocks.append(
            f"The paper, D_0's embedding in both: {similarity} min by similarity, {dpp} min by DPP."
        )
    paper = PAPER_COSTS.get(run["backbone"], {})
    blocks += ["Unification and inference (Tables 15, 16)", speed_table(rows, timings, paper)]
    return "\n\n".join(blocks) + "\n"


def selection_table(clients, timings):
    """A line is there where every client of every run has its seconds."""
    lines = []
    if all("embedding_seconds" in found for found in timings):
        seconds = np.mean([found["embedding_seconds"] for found in timings])
        lines.append(("embedding D_0, once for all clients", [f"{seconds:.2f}"] * len(clients)))
    heads = [found.get("relevance_seconds", {}) for found in timings]
    if all(name in found for found in heads for name in clients):
        cells = [f"{np.mean([found[name] for found in heads]):.3f}" for name in clients]
        lines.append(("private features and relevance head", cells))
    selections = [found["selection_seconds"] for found in timings]
    common = set.intersection(*(set(found[name]) for found in selections for name in clients))
    for rule in known_first(common):
        label = RULES[rule].short if rule in RULES else rule
        cells = [f"{np.mean([found[name][rule] for found in selections]):.3f}" for name in clients]
        lines.append((label, cells))
    return grid(clients, lines)


def speed_table(rows, timings, paper):
    """Seconds to unify and samples/s of each model. paper: {model: the paper's two numbers}."""
    heads = ["unify, s", "samples/s"]
    if paper:
        heads += ["paper: unify, s", "samples/s"]
    lines = []
    for row in rows:
        measured = [found[row["model"]] for found in timings]
        seconds = ""
        if all("unify_seconds" in found for found in measured):
            seconds = f"{np.mean([found['unify_seconds'] for found in measured]):.2f}"
        speed = np.mean([found["samples_per_second"] for found in measured])
        cells = [seconds, f"{speed:.1f}"]
        if row["model"] in paper:
            cells += [f"{value:.2f}" for value in paper[row["model"]]]
        elif paper:
            cells += ["", ""]
        lines.append((row["title"], cells))
    return grid(heads, lines)
