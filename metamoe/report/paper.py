"""The paper's numbers, read from paper_results.json, and which of them belong to a run."""

import json
from pathlib import Path

NUMBERS = json.loads(Path(__file__).with_name("paper_results.json").read_text(encoding="utf-8"))
PAPER_CLIENTS = NUMBERS["clients"]  # of each backbone, in the order of the accuracies
# Accuracies in percent (Tables 1-9, 13, 14): backbone -> model -> [each client, ..., average] or [average].
PAPER = NUMBERS["accuracy"]
# Costs on the authors' GPU. Table 10: minutes a client by similarity and by DPP, D_0's embedding in them.
PAPER_SELECTION = NUMBERS["selection_minutes"]
PAPER_COSTS = NUMBERS["costs"]  # Tables 15, 16: seconds to unify (BTM: none), samples/s


def paper_numbers(run, model):
    """The paper's accuracies of this row, {client or "average": percent}; empty where it has none."""
    names, numbers = PAPER_CLIENTS.get(run["backbone"], []), PAPER.get(run["backbone"], {}).get(model, [])
    if set(run["clients"]) != set(names) or not numbers:
        return {}  # another federation, or a row that it lacks
    return dict(zip(names, numbers[:-1], strict=False)) | {"average": numbers[-1]}
