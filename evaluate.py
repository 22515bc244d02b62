"""Stage 4: score every model on every client's test set and print the paper's table.

Rows: ZeroShot, each private-only expert, BTM, ModelSoup, BTX, FlexOlmo, MetaMoE, UnrestrictedMoE, then the paper's ablations
and any other model under RUN/moe/. Each model is scored once; its choices' scores are kept in RUN/scores/. Writes
RUN/results.json and RUN/results.md (no clock in them: same seed, same bytes), RUN/timings.json and, with --figure, Figure 2
with the coverage it shows. Given several evaluated run directories, it prints their tables instead: mean and standard
deviation over the runs, differences with intervals over all their samples.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np

import moe
from backbones import load_backbone
from rundir import UserError, atomic, folder_bytes, open_run, read_json, read_manifest, read_records, run_main, sha256, usable_public, write_json

TITLES = {
    "unrestricted": "UnrestrictedMoE", "zeroshot": "ZeroShot", "btm": "BTM", "soup": "ModelSoup", "btx": "BTX",
    "flexolmo": "FlexOlmo", "metamoe": "MetaMoE",
}
# The paper's ablations: title -> {model: label}, printed where a model beside the main ones is there.
ABLATIONS = {
    "Proxy selection (Table 5)": {
        "flexolmo-random": "FlexOlmo, random", "flexolmo": "FlexOlmo, similarity", "flexolmo-dpp": "FlexOlmo, DPP",
        "metamoe-random": "MetaMoE, random", "metamoe-similarity": "MetaMoE, similarity", "metamoe": "MetaMoE, DPP",
    },
    "Context-aware router (Tables 6, 7)": {"metamoe-no-context": "token alone", "metamoe": "with context"},
    "Proxy-aligned experts (Tables 8, 9, 13)": {
        "metamoe-private-experts": "private data alone", "metamoe-proxy-experts": "proxies alone", "metamoe": "private data and proxies",
        "flexolmo": "FlexOlmo's router, private data alone", "flexolmo-aligned": "FlexOlmo's router, private data and proxies",
    },
    "Final training (Table 14)": {"metamoe-untrained": "none", "metamoe": "router and experts"},
    "Start of the routing vectors": {"metamoe-random-init": "random", "metamoe": "uploaded means"},
    "Weights of the chosen experts": {"metamoe-literal": "pi (Eq. 5)", "metamoe-renormalized": "pi / sum", "metamoe": "pi / stop_gradient(sum)"},
}
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, nargs="+", help="folder of the run; several: print the table over runs of different seeds")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="part of the clients' data to score on; settings are chosen on validation (default: %(default)s)")
    parser.add_argument("--models", nargs="+", help="score these rows alone (zeroshot, expert-NAME, or a folder of RUN/moe/; default: all there are)")
    parser.add_argument("--figure", action="store_true", help="also draw Figure 2 (t-SNE, a PNG a client) and measure how the proxies of each selection cover the private test data")
    parser.add_argument("--opt-out", nargs="*", metavar="MODEL", help="also score these MoEs (default: metamoe) with each client's expert left out in turn")
    parser.add_argument("--workers", type=int, help="processes that decode images (default: one a core with CUDA, else none)")
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


def score(row, folder, backbone_of, run_dir, run, args, records, without=None):
    """Log-likelihoods of every choice {client: [[...], ...]}, routing counts (L, K) a client, and samples/s; scored once.
    without: an expert to leave out."""
    identity = {"dtype": args.dtype, "model": "seed"}
    if folder is not None:
        identity["model"] = sha256(folder / ("manifest.json" if row.startswith("expert-") else "done.json"))
    path = run_dir / "scores" / f"{row}{f'.without.{without}' if without else ''}.{args.split}.json"
    if path.exists() and (found := read_json(path))["identity"] == identity:
        return found
    backbone = backbone_of()
    model = backbone.model
    if folder is not None:
        model = moe.load(folder, model) if (folder / "moe_config.json").exists() else backbone.with_adapter(folder)
    if without:
        moe.disable_expert(model, without)
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


def sections(rows):
    """[(title, [(label, row)])]: the main table's rows and those of no ablation, then each ablation that has rows of its own."""
    by_name = {row["model"]: row for row in rows}
    main = {name for name in by_name if name in TITLES or name.startswith("expert-")}
    found = [(title, [(label, by_name[name]) for name, label in table.items() if name in by_name])
             for title, table in ABLATIONS.items() if any(name in by_name and name not in main for name in table)]
    ablated = {row["model"] for _, table in found for _, row in table}
    return [("", [(row["title"], row) for row in rows if row["model"] in main or row["model"] not in ablated]), *found]


def markdown(results, run):
    """The paper's Table 3 layout: accuracy in percent; then ablations, intervals, differences, routing shares, coverage, bytes."""
    clients = run["clients"]
    lines = [f"# {run['backbone']}, seed {run['seed']}, {results['split']} split", "", "Accuracy in percent."]
    for heading, rows in sections(results["rows"]):
        lines += ["", f"## {heading}", ""] if heading else [""]
        lines += ["| | " + " | ".join(clients) + " | Average |", "|---|" + "---:|" * (len(clients) + 1)]
        for label, row in rows:
            cells = [f"{row['clients'][name]['accuracy']:.2f}" for name in clients]
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {row['average']:.2f} |")
    lines += ["", "## Intervals"]
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
            own = [[100 * layer[row["experts"].index(name)] for layer in row["routing"][name]] if name in row["experts"] else [] for name in clients]
            cells = [f"{np.mean(s):.1f} ({min(s):.1f} to {max(s):.1f})" if s else "no expert" for s in own]
            lines.append(f"| {row['title']} | " + " | ".join(cells) + f" | {np.mean(row['lambda']):.3f} |")
    for model, table in results.get("opt_out", {}).items():
        lines += ["", f"{title(model, run)} with one client's expert left out, without training: accuracy in percent.", "",
                  "| left out | " + " | ".join(clients) + " | Average |", "|---|" + "---:|" * (len(clients) + 1)]
        for without, accuracy in table.items():
            lines.append(f"| {without or 'none'} | " + " | ".join(f"{accuracy[name]:.2f}" for name in clients) + f" | {np.mean(list(accuracy.values())):.2f} |")
    if "coverage" in results:
        lines += ["", "How the proxies cover a client's private test data: mean distance (1 - cosine) of a test sample to its nearest proxy, and log det L_S of the proxies.", "",
                  "| | " + " | ".join(f"{name}: distance | log det" for name in clients) + " |", "|---|" + "---:|" * (2 * len(clients))]
        for rule in results["coverage"][clients[0]]:
            cells = (f"{found['distance']:.4f} | {found['log_det']:.1f}" for found in (results["coverage"][name][rule] for name in clients))
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    lines += ["", "Uploaded, in bytes: " + ", ".join(f"{name} {size:,}" for name, size in results["uploaded_bytes"].items()) + "."]
    return "\n".join(lines) + "\n"


def coverage(run_dir, run, backbone, records):
    """{client: {rule: {"distance", "log_det"}}} of the selections there are, and Figure 2: RUN/figure2-NAME.png.

    distance: mean over private test samples of 1 - cosine to the nearest proxy, on the seed's features. log_det:
    log det L_S of the proxies, Eq. 4's diversity. The figure is one t-SNE of private test data, up to 2,000 of D_0 and all
    proxies, so that its panels share their axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    public = np.load(run_dir / "public" / "features.npy", mmap_mode="r")
    found = {}
    for name in run["clients"]:
        paths = {rule: run_dir / "clients" / name / "selection" / rule / "selection.json" for rule in ("random", "similarity", "dpp")}
        proxies = {rule: np.array(read_json(path)["proxies"]) for rule, path in paths.items() if path.exists()}
        private = unit(backbone.features(records[name], label=f"embedding {name}"))
        found[name] = {}
        for rule, chosen in proxies.items():
            z = unit(public[np.sort(chosen)])
            found[name][rule] = {"distance": float((1 - (private @ z.T).max(1)).mean()), "log_det": float(np.linalg.slogdet(z @ z.T)[1])}
        rng = np.random.default_rng(run["seed"])
        shown = np.union1d(rng.permutation(usable_public(run_dir, public))[:2000], np.concatenate(list(proxies.values())))
        points = np.concatenate([private, unit(public[shown])])
        plane = TSNE(metric="cosine", init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=run["seed"]).fit_transform(points)
        own, others = plane[: len(private)], plane[len(private) :]
        figure, axes = plt.subplots(1, len(proxies), figsize=(5 * len(proxies), 5.4), sharex=True, sharey=True, squeeze=False)
        for axis, (rule, chosen) in zip(axes[0], proxies.items()):
            axis.scatter(*others.T, s=4, c="#c8c8c8", linewidths=0, label="public set")
            axis.scatter(*own.T, s=9, c="#1f77b4", linewidths=0, label=f"{name}, private test data")
            axis.scatter(*others[np.searchsorted(shown, chosen)].T, s=18, c="#d62728", edgecolors="white", linewidths=0.4, label="proxies")
            axis.set_title({"random": "random", "similarity": "most relevant", "dpp": "relevance-weighted DPP"}[rule])
            axis.set_xlabel("distance {distance:.3f}, log det {log_det:.0f}".format(**found[name][rule]))
            axis.set_xticks([]), axis.set_yticks([])
        figure.suptitle(f"{run['backbone']}: proxies for {name} (m = {run['proxies']}), t-SNE of the seed's features")
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, markerscale=2, frameon=False)
        with atomic(run_dir / f"figure2-{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return found


def unit(features):
    """Rows scaled to length 1, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


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
    for tables in zip(*(sections(found["rows"]) for found in runs)):  # the same table of each run
        if tables[0][0]:
            print(f"\n{tables[0][0]}\n")
        print("| | " + " | ".join(clients) + " | Average | MetaMoE minus this |\n|---|" + "---:|" * (len(clients) + 2))
        for labelled in zip(*(rows for _, rows in tables)):
            (label, first_row), rows = labelled[0], [row for _, row in labelled]
            columns = [[row["clients"][name]["accuracy"] for row in rows] for name in clients] + [[row["average"] for row in rows]]
            cells = [f"{np.mean(c):.2f} ± {np.std(c, ddof=1) if len(c) > 1 else 0:.2f}" for c in columns]
            gap = ""
            if "metamoe" in right and first_row["model"] != "metamoe":
                found = paired_bootstrap(right["metamoe"], right[first_row["model"]], 0)
                gap = "{:+.2f} ({:+.2f} to {:+.2f})".format(found["difference"], *found["interval"])
            print(f"| {label} | " + " | ".join(cells) + f" | {gap} |")
    if all("coverage" in found for found in runs):
        print("\nDistance of a private test sample to its nearest proxy; log det L_S\n")
        print("| | " + " | ".join(clients) + " |\n|---|" + "---:|" * len(clients))
        for rule in runs[0]["coverage"][clients[0]]:
            values = [[[found["coverage"][name][rule][key] for found in runs] for key in ("distance", "log_det")] for name in clients]
            cells = [f"{np.mean(d):.4f} ± {np.std(d, ddof=1):.4f}; {np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for d, v in values]
            print(f"| {rule} | " + " | ".join(cells) + " |")


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
    left_out = opt_outs(args, run_dir, run)

    def backbone_of():  # only for a model that is not scored yet; PEFT and the MoE change a model in place
        return load_backbone(run["backbone"], run["seed_model"], args.device, args.dtype, args.workers)

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
    if args.figure:
        results["coverage"] = coverage(run_dir, run, backbone_of(), records)
    if left_out:
        results["opt_out"] = {}
    for row, names in left_out.items():
        scores = {name: score(row, run_dir / "moe" / row, backbone_of, run_dir, run, args, records, name)["scores"] for name in ["", *names]}
        results["opt_out"][row] = {
            without: {name: 100 * float(is_right(found[name], records[name]).mean()) for name in run["clients"]} for without, found in scores.items()
        }
    stem = "results" if args.split == "test" else f"results.{args.split}"
    write_json(run_dir / f"{stem}.json", results)
    text = markdown(results, run)
    with atomic(run_dir / f"{stem}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    timings = {row: {"samples_per_second": found[row]["samples_per_second"]} for row in folders}
    for row, folder in folders.items():
        if folder is not None and (folder / "timing.json").exists():
            timings[row] |= read_json(folder / "timing.json")
    timings["selection_seconds"] = {  # Table 10
        name: {path.parent.name: read_json(path)["selection_seconds"] for path in sorted((run_dir / "clients" / name / "selection").glob("*/timing.json"))}
        for name in run["clients"]
    }
    write_json(run_dir / "timings.json", timings)
    print(text)
    print(f"evaluate: {len(rows)} models on {len(records)} clients; {run_dir / stem}.json, {stem}.md and timings.json written")


if __name__ == "__main__":
    run_main(main)
