"""The paper's cost tables (Tables 10, 15 and 16) as Markdown, of one run or as means over several."""

import numpy as np

from metamoe.report.figures import RULES, known_first
from metamoe.report.paper import PAPER_COSTS, PAPER_SELECTION
from metamoe.report.tables import grid


def cost_tables(run, rows, timings):
    """RUN/timings.md: means over the runs. rows: of one run's results.json; timings: timings.json of each."""
    blocks = ["Proxy selection (Table 10): seconds a client", selection_table(run["clients"], timings)]
    if run["backbone"] in PAPER_SELECTION:
        minutes = "{} min by similarity, {} min by DPP".format(*PAPER_SELECTION[run["backbone"]])
        blocks.append(f"The paper, D_0's embedding in both: {minutes}.")
    paper = PAPER_COSTS.get(run["backbone"], {})
    blocks += ["Unification and inference (Tables 15, 16)", speed_table(rows, timings, paper)]
    return "\n\n".join(blocks) + "\n"


def mean(found, key, digits):
    """The mean of found[...][key] as text; empty where one lacks it."""
    if not all(key in each for each in found):
        return ""
    return f"{np.mean([each[key] for each in found]):.{digits}f}"


def selection_table(clients, timings):
    """A line is there where every client of every run has its seconds."""
    lines = [("embedding D_0, once for all clients", [mean(timings, "embedding_seconds", 2)] * len(clients))]
    heads = [found.get("relevance_seconds", {}) for found in timings]
    lines.append(("private features and relevance head", [mean(heads, name, 3) for name in clients]))
    selections = {name: [found["selection_seconds"][name] for found in timings] for name in clients}
    for rule in known_first(set().union(*sum(selections.values(), []))):
        label, _ = RULES.get(rule, (rule, rule))
        lines.append((label, [mean(selections[name], rule, 3) for name in clients]))
    return grid(clients, [line for line in lines if all(line[1])])


def speed_table(rows, timings, paper):
    """Seconds to unify and samples/s of each model. paper: {model: the paper's two numbers}."""
    heads, lines = ["unify, s", "samples/s"], []
    if paper:
        heads += ["paper: unify, s", "samples/s"]
    for row in rows:
        measured = [found[row["model"]] for found in timings]
        cells = [mean(measured, "unify_seconds", 2), mean(measured, "samples_per_second", 1)]
        if paper:
            numbers = [f"{value:.2f}" for value in paper.get(row["model"], [])]
            cells += numbers or ["", ""]
        lines.append((row["title"], cells))
    return grid(heads, lines)
