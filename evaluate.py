"""Stage 4: score every model on every client's test set and print the paper's table.

Rows: ZeroShot, each private-only expert, BTM, ModelSoup, BTX, FlexOlmo, MetaMoE, UnrestrictedMoE, then any other model
under RUN/moe/. Each model is scored once; its choices' log-likelihoods are kept in RUN/scores/. Writes RUN/results.json and
RUN/results.md (no clock in them: same seed, same bytes) and RUN/timings.json. Given several evaluated run directories, it
prints their table instead: mean and standard deviation over the runs, differences with intervals over all their samples.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np

import moe
from backbones import load_backbone
from rundir import UserError, atomic, folder_bytes, open_run, read_json, read_manifest, read_records, run_main, sha256, write_json

TITLES = {
    "unrestricted": "UnrestrictedMoE", "zeroshot": "ZeroShot", "btm": "BTM", "soup": "ModelSoup", "btx": "BTX",
    "flexolmo": "FlexOlmo", "metamoe": "MetaMoE",
}
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, nargs="+", help="folder of the run; several: print the table over runs of different seeds")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="part of the clients' data to score on; settings are chosen on validation (default: %(default)s)")
    parser.add_argument("--models", nargs="+", help="score these rows alone (zeroshot, expert-NAME, or a folder of RUN/moe/; default: all there are)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where the hardware computes in it")
    return parser.parse_args()


def list_models(run_dir, run, only):
    """Rows in the paper's order: {row: folder of the model, None for the seed}. BTM's row is made of the experts'."""
    made = [path.name for path in sorted((run_dir / "moe").glob("[!.]*")) if (path / "done.json").exists()]
    rows = [row for row in ("unrestricted",) if row in made] + ["zeroshot"]
    rows += [f"expert-{name}" for name in run["clients"]]
    rows += [row for row in ("btm", "soup", "btx", "flexolmo", "metamoe") if row in made]
    rows += [row for row in made if row not in rows]
    for row in only or []:
        if row not in rows:
            raise UserError(f"--models {row}: there is no such model in {run_dir}; there are {', '.join(rows)}")
    folders = {}
    for row in rows if not only else [row for row in rows if row in only]:
        if row.startswith("expert-"):
            folders[row] = run_dir / "clients" / row.removeprefix("expert-") / "upload" / expert_variant(run_dir)
            read_manifest(folders[row])
        else:
            folders[row] = None if row == "zeroshot" else run_dir / "moe" / row
    return folders


def expert_variant(run_dir):
    """Which uploads are the 'private-only experts': those that BTM combines."""
    btm = run_dir / "moe" / "btm" / "done.json"
    return read_json(btm)["variant"] if btm.exists() else "private-similarity"


def score(row, folder, backbone_of, run_dir, run, args, records):
    """Log-likelihoods of every choice {client: [[...], ...]}, routing counts (L, K) a client, and samples/s; scored once."""
    identity = {"dtype": args.dtype, "model": "seed"}
    if folder is not None:
        identity["model"] = sha256(folder / ("manifest.json" if row.startswith("expert-") else "done.json"))
    path = run_dir / "scores" / f"{row}.{args.split}.json"
    if path.exists() and (found := read_json(path))["identity"] == identity:
        return found
    backbone = backbone_of()
    model = backbone.model
    if folder is not None:
        model = moe.load(folder, model) if (folder / "moe_config.json").exists() else backbone.with_adapter(folder)
    routed = hasattr(model, "routing")
    found, seconds = {"identity": identity, "scores": {}, "routing": {}}, 0.0
    for name in run["clients"]:
        if routed:
            model.routing.record = True
            moe.reset_counts(model)
        start = time.perf_counter()
        found["scores"][name] = [values.tolist() for values in backbone.scores(model, records[name], label=f"{row} on {name}")]
        seconds += time.perf_counter() - start
        if routed:
            found["routing"][name] = moe.counts(model).tolist()
            found["experts"] = model.moe_config["names"]
    found["samples_per_second"] = sum(map(len, records.values())) / seconds
    if routed:
        found["lambda"] = [lam.item() for lam in moe.lambda_parameters(model)]
    write_json(path, found)
    return found


def probabilities(scores):
    """Softmax over the choices of each record."""
    return [np.exp(values - np.logaddexp.reduce(values)) for values in map(np.asarray, scores)]


def ensemble(experts):
    """BTM: the mean of the private-only experts' probabilities over the choices, {client: [[...], ...]}."""
    return {name: [np.mean(ps, 0) for ps in zip(*(probabilities(expert["scores"][name]) for expert in experts))] for name in experts[0]["scores"]}


def is_right(scores, records):
    """1.0 where the answer's text is the likeliest choice, else 0.0."""
    return np.array([float(record["choices"][int(np.argmax(values))] == record["answer"]) for values, record in zip(scores, records)])


def wilson(successes, n, z=1.959964):
    """Wilson's 95% interval of a proportion, in percent."""
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)]


def paired_bootstrap(ours, theirs, seed, resamples=10_000):
    """MetaMoE's average minus another row's, in points, and its 95% interval: test samples resampled within each client."""
    rng, draws = np.random.default_rng(seed), []
    differences = [ours[name] - theirs[name] for name in ours]
    for values in differences:
        draws.append(values[rng.integers(len(values), size=(resamples, len(values)))].mean(1))
    low, high = np.percentile(100 * np.mean(draws, 0), [2.5, 97.5])
    return {"difference": 100 * float(np.mean([values.mean() for values in differences])), "interval": [float(low), float(high)]}


def shares(counts):
    """Share of the tokens each expert got: (L, K) counts -> (L, K)."""
    counts = np.asarray(counts, float)
    return (counts / counts.sum(1, keepdims=True)).tolist()


def title(row, run):
    if row.startswith("expert-"):
        name = row.removeprefix("expert-")
        number = run["clients"].index(name)
        return f"Expert {ROMAN[number] if number < len(ROMAN) else number + 1} ({name})"
    return TITLES.get(row, row)


def markdown(results, run):
    """The paper's Table 3 layout: accuracy in percent; then intervals, differences, routing shares, bytes."""
    clients = run["clients"]
    lines = [f"# {run['backbone']}, seed {run['seed']}, {results['split']} split", "",
             "Accuracy in percent.", "", "| | " + " | ".join(clients) + " | Average |", "|---|" + "---:|" * (len(clients) + 1)]
    for row in results["rows"]:
        cells = [f"{row['clients'][name]['accuracy']:.2f}" for name in clients]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + f" | {row['average']:.2f} |")
    lines += ["", "Wilson 95% intervals; MetaMoE's average minus the row's, in points, with a paired bootstrap 95% interval.", "",
              "| | " + " | ".join(f"{name} (n = {results['n'][name]})" for name in clients) + " | MetaMoE minus this |", "|---|" + "---:|" * (len(clients) + 1)]
    for row in results["rows"]:
        cells = ["{:.1f} to {:.1f}".format(*row["clients"][name]["wilson"]) for name in clients]
        gap = row.get("metamoe_minus")
        cells.append("{:+.2f} ({:+.2f} to {:+.2f})".format(gap["difference"], *gap["interval"]) if gap else "")
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    routed = [row for row in results["rows"] if "routing" in row]
    if routed:
        lines += ["", "Share of a client's prompt tokens that its own expert gets, mean over the layers (least and most of a layer), percent; every layer and expert is in results.json.", "",
                  "| | " + " | ".join(clients) + " | lambda, mean |", "|---|" + "---:|" * (len(clients) + 1)]
        for row in routed:
            own = [[100 * layer[row["experts"].index(name)] for layer in row["routing"][name]] for name in clients]
            lines.append(f"| {row['title']} | " + " | ".join(f"{np.mean(s):.1f} ({min(s):.1f} to {max(s):.1f})" for s in own) + f" | {np.mean(row['lambda']):.3f} |")
    lines += ["", "Uploaded, in bytes: " + ", ".join(f"{name} {size:,}" for name, size in results["uploaded_bytes"].items()) + "."]
    return "\n".join(lines) + "\n"


def pool(run_dirs, split):
    """The table over runs that differ in their seed: mean and standard deviation, MetaMoE's paired differences over all samples."""
    stem = "results.json" if split == "test" else f"results.{split}.json"
    for run_dir in run_dirs:
        if not (Path(run_dir) / stem).exists():
            raise UserError(f"--run-dir {run_dir}: holds no {stem}: evaluate it alone first")
    runs = [read_json(Path(run_dir) / stem) for run_dir in run_dirs]
    first = runs[0]["run"]
    for run_dir, found in zip(run_dirs, runs):
        if {**found["run"], "seed": 0} != {**first, "seed": 0} or [r["model"] for r in found["rows"]] != [r["model"] for r in runs[0]["rows"]]:
            raise UserError(f"--run-dir {run_dir}: made with other settings or models than {run_dirs[0]}; only the seed may differ")
    clients = first["clients"]
    right = {}  # row -> {(client, seed): 0/1 array}
    for found in runs:
        for row in found["rows"]:
            right.setdefault(row["model"], {}).update({(name, found["run"]["seed"]): np.array([int(c) for c in row["clients"][name]["right"]], float) for name in clients})
    lines = ["| | " + " | ".join(clients) + " | Average | MetaMoE minus this |", "|---|" + "---:|" * (len(clients) + 2)]
    for rows in zip(*(found["rows"] for found in runs)):
        columns = [[row["clients"][name]["accuracy"] for row in rows] for name in clients] + [[row["average"] for row in rows]]
        cells = [f"{np.mean(c):.2f} ± {np.std(c, ddof=1) if len(c) > 1 else 0:.2f}" for c in columns]
        gap = ""
        if "metamoe" in right and rows[0]["model"] != "metamoe":
            found = paired_bootstrap(right["metamoe"], right[rows[0]["model"]], 0)
            gap = "{:+.2f} ({:+.2f} to {:+.2f})".format(found["difference"], *found["interval"])
        lines.append(f"| {rows[0]['title']} | " + " | ".join(cells) + f" | {gap} |")
    print("\n".join(lines))


def main():
    args = parse_args()
    if len(args.run_dir) > 1:
        return pool(args.run_dir, args.split)
    run_dir = Path(args.run_dir[0])
    run = open_run(run_dir, backbone=None)
    records = {name: read_records(run_dir / "clients" / name / "private" / f"{args.split}.jsonl") for name in run["clients"]}
    if not all(records.values()):
        raise UserError(f"--split {args.split}: a client has no samples in it; make the run with --{args.split}-size of at least 1")
    folders = list_models(run_dir, run, args.models)

    def backbone_of():  # only for a model that is not scored yet; PEFT and the MoE change a model in place
        return load_backbone(run["backbone"], run["seed_model"], args.device, args.dtype)

    found = {row: score(row, folder, backbone_of, run_dir, run, args, records) for row, folder in folders.items() if row != "btm"}
    if "btm" in folders:
        experts = [found[f"expert-{name}"] if f"expert-{name}" in found else score(f"expert-{name}", run_dir / "clients" / name / "upload" / expert_variant(run_dir), backbone_of, run_dir, run, args, records) for name in run["clients"]]
        found["btm"] = {"scores": ensemble(experts), "samples_per_second": 1 / sum(1 / expert["samples_per_second"] for expert in experts)}
    right = {row: {name: is_right(found[row]["scores"][name], records[name]) for name in run["clients"]} for row in folders}
    rows = []
    for row in folders:
        per_client = {}
        for name, values in right[row].items():
            per_client[name] = {"correct": int(values.sum()), "n": len(values), "accuracy": 100 * float(values.mean()), "wilson": wilson(values.sum(), len(values))}
            per_client[name]["right"] = "".join("01"[int(value)] for value in values)  # a digit a sample, in order: for paired tests
        rows.append({"model": row, "title": title(row, run), "clients": per_client, "average": float(np.mean([c["accuracy"] for c in per_client.values()]))})
        if "metamoe" in right and row != "metamoe":
            rows[-1]["metamoe_minus"] = paired_bootstrap(right["metamoe"], right[row], run["seed"])
        if found[row].get("routing"):
            rows[-1] |= {"experts": found[row]["experts"], "lambda": found[row]["lambda"], "routing": {name: shares(counts) for name, counts in found[row]["routing"].items()}}
    uploaded = {}
    for name in run["clients"]:
        for upload in sorted((run_dir / "clients" / name / "upload").glob("[!.]*")):
            uploaded[f"{name}/{upload.name}"] = folder_bytes(upload)
    results = {"run": run, "split": args.split, "n": {name: len(r) for name, r in records.items()}, "rows": rows, "uploaded_bytes": uploaded}
    stem = "results" if args.split == "test" else f"results.{args.split}"
    write_json(run_dir / f"{stem}.json", results)
    text = markdown(results, run)
    with atomic(run_dir / f"{stem}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    timings = {row: {"samples_per_second": found[row]["samples_per_second"]} for row in folders}
    for row, folder in folders.items():
        if folder is not None and (folder / "timing.json").exists():
            timings[row] |= read_json(folder / "timing.json")
    write_json(run_dir / "timings.json", timings)
    print(text)
    print(f"evaluate: {len(rows)} models on {len(records)} clients; {run_dir / stem}.json, {stem}.md and timings.json written")


if __name__ == "__main__":
    run_main(main)
