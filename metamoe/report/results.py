"""The rows of results.json and timings.json, built from each model's scores."""

from collections import Counter

import numpy as np

from metamoe.report.models import title
from metamoe.report.statistics import is_choice, is_right, paired_bootstrap, perplexity, shares, wilson
from metamoe.rundir import folder_bytes, read_json, settings_of

ONE_CHOICE = 0.9  # a model that gives one choice for more of a client's samples is noted


def client_result(scores, records):
    """A client's entry of a row."""
    if not is_choice(records):
        return {"perplexity": perplexity(scores), "tokens": sum(map(len, scores)), "n": len(records)}
    right, most = is_right(scores, records), most_given(scores, records)
    return {
        "correct": int(right.sum()),
        "n": len(right),
        "accuracy": 100 * float(right.mean()),
        "wilson": wilson(right.sum(), len(right)),
        "right": "".join("01"[int(value)] for value in right),  # a digit a sample, for paired tests
        **({"one_choice": most} if most["share"] > ONE_CHOICE else {}),
    }


def most_given(scores, records):
    """The choice that the model gives most often: {"choice", "share"}."""
    given = Counter(
        record["choices"][int(np.argmax(values))].strip()
        for values, record in zip(scores, records, strict=True)
        if len(values)
    )
    choice, count = given.most_common(1)[0] if given else ("", 0)
    return {"choice": choice, "share": count / len(records)}


def chance(records):
    """{client: the accuracy of a guess, in percent}, of the clients with choices."""
    guess = {}
    for name, own in records.items():
        if is_choice(own):
            guess[name] = 100 * float(np.mean([1 / len(record["choices"]) for record in own]))
    return guess


def right_of(row, clients):
    """{client: 1.0 or 0.0 a test sample} of a row of results.json."""
    return {name: np.array(list(row["clients"][name]["right"]), float) for name in clients}


def result_rows(run, found, records):
    """The rows of results.json: found is {row: its scores}, in the table's order."""
    choices = [name for name in run["clients"] if is_choice(records[name])]
    rows = []
    for name, scored in found.items():
        scores = scored["scores"]
        cells = {client: client_result(scores[client], records[client]) for client in run["clients"]}
        average = float(np.mean([cells[client]["accuracy"] for client in choices])) if choices else None
        row = {"model": name, "title": title(name, run), "clients": cells, "average": average}
        if scored.get("routing"):
            row |= {"experts": scored["experts"], "lambda": scored["lambda"]}
            row["routing"] = {client: shares(counts) for client, counts in scored["routing"].items()}
        rows.append(row)
    right = {row["model"]: right_of(row, choices) for row in rows}
    for row in rows:
        if right.get("metamoe") and row["model"] != "metamoe":
            row["metamoe_minus"] = paired_bootstrap(right["metamoe"], right[row["model"]], run["seed"])
    return rows


def mark_private_data(rows, folders):
    """Set "private_data" in the rows of models that the server trained on the clients' data, by any name."""
    for row in rows:
        folder = folders[row["model"]]
        if folder and (folder / "done.json").exists() and settings_of(folder).get("samples") == "private":
            row["private_data"] = True


def uploaded_bytes(run_dir, run):
    """{CLIENT/UPLOAD: its size}."""
    found = {}
    for name in run["clients"]:
        for upload in sorted((run_dir / "clients" / name / "upload").glob("[!.]*")):
            found[f"{name}/{upload.name}"] = folder_bytes(upload)
    return found


def exchanged_bytes(run_dir, run, folders):
    """{row: {"rounds", "sent", "received"}}, bytes of one client, of the rows that exchange weights in every
    round; with them MetaMoE's one upload, the mean over clients, and its model. Empty without such rows."""
    paths = {row: folder / "exchange.json" for row, folder in folders.items() if folder}
    found = {row: read_json(path) for row, path in paths.items() if path.exists()}
    if found and "metamoe" in folders:
        folder, sizes = folders["metamoe"], uploaded_bytes(run_dir, run)
        variant = settings_of(folder)["variant"]
        sent = round(np.mean([sizes[f"{name}/{variant}"] for name in run["clients"]]))
        received = sum((folder / file).stat().st_size for file in ("moe.safetensors", "moe_config.json"))
        found["metamoe"] = {"rounds": 1, "sent": sent, "received": received}
    return found


def collect_timings(run_dir, run, folders, found):
    """What timings.json holds: each model's costs, and those of the selection."""
    timings, selection, relevance = {}, {}, {}
    for row, folder in folders.items():
        timings[row] = {"samples_per_second": found[row]["samples_per_second"]} | read_timing(folder)
    for name in run["clients"]:
        folder = run_dir / "clients" / name / "selection"
        rules = [path.parent for path in folder.glob("[!.]*/timing.json")]
        selection[name] = {rule.name: read_timing(rule)["selection_seconds"] for rule in rules}
        if (folder / "timing.json").exists():
            relevance[name] = read_timing(folder)["relevance_seconds"]
    timings |= {"selection_seconds": selection, "relevance_seconds": relevance}
    return timings | read_timing(run_dir / "public")


def read_timing(folder):
    """The timing.json of a folder; empty where there is none (None: no folder)."""
    there = folder is not None and (folder / "timing.json").exists()
    return read_json(folder / "timing.json") if there else {}
