"""The rows of results.json and timings.json, built from each model's scores."""

import numpy as np

from metamoe.report.models import title
from metamoe.report.statistics import is_choice, is_right, paired_bootstrap, perplexity, shares, wilson
from metamoe.rundir import folder_bytes, read_json


def accuracy_of(values):
    """A client's entry of a row, from 1.0 or 0.0 a test sample."""
    return {
        "correct": int(values.sum()),
        "n": len(values),
        "accuracy": 100 * float(values.mean()),
        "wilson": wilson(values.sum(), len(values)),
        "right": "".join("01"[int(value)] for value in values),  # a digit a sample, for paired tests
    }


def perplexity_of(scores, records):
    """As accuracy_of, for instruction data."""
    return {"perplexity": perplexity(scores), "tokens": sum(map(len, scores)), "n": len(records)}


def result_rows(run, found, records):
    """The rows of results.json: found is {row: its scores}, in the table's order."""
    choices = [name for name in run["clients"] if is_choice(records[name])]
    right = {
        row: {name: is_right(scored["scores"][name], records[name]) for name in choices}
        for row, scored in found.items()
    }
    rows = []
    for row, scored in found.items():
        per_client = {name: accuracy_of(values) for name, values in right[row].items()}
        average = float(np.mean([c["accuracy"] for c in per_client.values()])) if per_client else None
        for name in run["clients"]:
            if name not in choices:
                per_client[name] = perplexity_of(scored["scores"][name], records[name])
        rows.append({"model": row, "title": title(row, run), "clients": per_client, "average": average})
        if right.get("metamoe") and row != "metamoe":
            rows[-1]["metamoe_minus"] = paired_bootstrap(right["metamoe"], right[row], run["seed"])
        if scored.get("routing"):
            rows[-1] |= {
                "experts": scored["experts"],
                "lambda": scored["lambda"],
                "routing": {name: shares(counts) for name, counts in scored["routing"].items()},
            }
    return rows


def uploaded_bytes(run_dir, run):
    """{CLIENT/UPLOAD: its size}."""
    found = {}
    for name in run["clients"]:
        for upload in sorted((run_dir / "clients" / name / "upload").glob("[!.]*")):
            found[f"{name}/{upload.name}"] = folder_bytes(upload)
    return found


def opt_out_row(run, found, records):
    """{expert left out: {client: accuracy in percent, or perplexity}} from {expert left out: scores}."""
    table = {}
    for without, scores in found.items():
        table[without] = {}
        for name in run["clients"]:
            if is_choice(records[name]):
                value = 100 * float(is_right(scores[name], records[name]).mean())
            else:
                value = perplexity(scores[name])
            table[without][name] = value
    return table


def collect_timings(run_dir, run, folders, found):
    """What timings.json holds: each model's costs, and those of the selection."""
    timings = {row: {"samples_per_second": found[row]["samples_per_second"]} for row in folders}
    for row, folder in folders.items():
        if folder is not None:
            timings[row] |= read_timing(folder)
    timings["selection_seconds"], timings["relevance_seconds"] = {}, {}
    for name in run["clients"]:
        folder = run_dir / "clients" / name / "selection"
        timings["selection_seconds"][name] = {
            path.parent.name: read_json(path)["selection_seconds"]
            for path in folder.glob("[!.]*/timing.json")
        }
        relevance = read_timing(folder)
        if relevance:
            timings["relevance_seconds"][name] = relevance["relevance_seconds"]
    return timings | read_timing(run_dir / "public")


def read_timing(folder):
    """The timing.json of a folder; empty where there is none."""
    path = folder / "timing.json"
    return read_json(path) if path.exists() else {}
