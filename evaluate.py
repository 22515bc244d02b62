"""Stage 4: score every model on every client's test set and print the paper's table.

Rows: ZeroShot, each private-only expert, BTM, ModelSoup, BTX, FlexOlmo, MetaMoE, UnrestrictedMoE, then the paper's ablations
and any other model under RUN/moe/. Each model is scored once; its choices' scores are kept in RUN/scores/. Writes
RUN/results.json and RUN/results.md (no clock in them: same seed, same bytes; the paper's numbers beside its own backbones'),
RUN/timings.json and RUN/timings.md (the cost tables) and, with --figure, Figure 2 with the coverage it shows. Given several
evaluated run directories, it prints their tables instead: mean and standard deviation over the runs, differences with
intervals over all their samples.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np

import moe
from backbones import PRESETS, load_backbone, processes
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
    "What the DPP chooses from": {"metamoe": "the most relevant candidates", "metamoe-dpp-all": "the whole public set"},
    "Context-aware router (Tables 6, 7)": {"metamoe-no-context": "token alone", "metamoe": "with context"},
    "Proxy-aligned experts (Tables 8, 9, 13)": {
        "metamoe-private-experts": "private data alone", "metamoe-proxy-experts": "proxies alone", "metamoe": "private data and proxies",
        "flexolmo": "FlexOlmo's router, private data alone", "flexolmo-aligned": "FlexOlmo's router, private data and proxies",
    },
    "Final training (Table 14)": {"metamoe-untrained": "none", "metamoe": "router and experts"},
    "Start of the routing vectors": {"metamoe-random-init": "random", "metamoe": "uploaded means"},
    "Weights of the chosen experts": {"metamoe-literal": "pi (Eq. 5)", "metamoe-renormalized": "pi / sum", "metamoe": "pi / stop_gradient(sum)"},
}
# The paper's accuracies in percent (Tables 1-9, 13, 14): backbone -> model -> (each client's, ..., average), or the average alone.
PAPER_CLIENTS = {"vit-b-32": ["pets", "flowers", "eurosat"], "vit-b-16": ["pets", "flowers", "eurosat"],
                 "llama-3.2-3b": ["commonsenseqa", "cosmosqa", "socialiqa"], "llama-3.1-8b": ["commonsenseqa", "cosmosqa", "socialiqa"]}
PAPER = {
    "vit-b-32": {
        "unrestricted": (92.45, 96.43, 98.15, 95.68), "zeroshot": (85.77, 61.59, 29.81, 59.06), "expert-pets": (92.40, 59.03, 22.74, 58.06),
        "expert-flowers": (84.25, 96.91, 27.21, 69.46), "expert-eurosat": (82.64, 52.42, 97.91, 77.66), "btm": (90.81, 85.10, 95.07, 90.33),
        "soup": (87.90, 70.52, 64.19, 74.20), "btx": (88.44, 75.07, 59.38, 74.30), "flexolmo": (91.36, 90.62, 96.79, 92.92),
        "metamoe": (91.91, 93.67, 97.98, 94.52), "flexolmo-dpp": (93.20,), "metamoe-similarity": (94.12,),
        "metamoe-no-context": (91.69, 93.18, 96.90, 93.92), "metamoe-private-experts": (91.44, 91.92, 95.57, 92.98),
        "metamoe-proxy-experts": (78.60, 42.63, 12.98, 44.74), "metamoe-untrained": (86.78, 80.35, 81.86, 83.00),
    },
    "vit-b-16": {
        "unrestricted": (94.30, 97.73, 98.23, 96.75), "zeroshot": (88.53, 68.09, 34.00, 63.54), "expert-pets": (94.44, 65.69, 30.10, 63.41),
        "expert-flowers": (85.99, 98.13, 24.05, 69.39), "expert-eurosat": (86.56, 60.05, 98.43, 81.68), "btm": (93.21, 84.65, 97.38, 91.75),
        "soup": (89.94, 74.18, 74.14, 79.42), "btx": (89.89, 78.52, 75.20, 81.20), "flexolmo": (94.09, 89.40, 97.11, 93.53),
        "metamoe": (94.22, 97.08, 97.41, 96.24), "flexolmo-dpp": (94.38,), "metamoe-similarity": (95.39,),
        "metamoe-no-context": (93.95, 96.71, 97.16, 95.94), "metamoe-private-experts": (94.22, 90.70, 97.35, 94.09),
    },
    "llama-3.2-3b": {
        "unrestricted": (75.51, 78.39, 71.80, 75.23), "zeroshot": (62.49, 62.68, 56.19, 60.45), "expert-commonsenseqa": (74.94, 70.18, 60.54, 68.55),
        "expert-cosmosqa": (63.06, 78.69, 58.96, 66.90), "expert-socialiqa": (65.44, 68.04, 72.42, 68.63), "btm": (74.61, 75.44, 68.17, 72.74),
        "soup": (73.71, 75.24, 71.75, 73.57), "btx": (69.62, 72.06, 71.75, 71.14), "flexolmo": (73.30, 73.33, 70.88, 72.50),
        "metamoe": (74.94, 76.05, 72.26, 74.42), "flexolmo-dpp": (73.35,), "metamoe-similarity": (73.60,),
        "metamoe-no-context": (73.63, 72.16, 72.06, 72.62), "metamoe-private-experts": (74.77, 71.56, 71.80, 72.71),
    },
    "llama-3.1-8b": {
        "unrestricted": (81.90, 85.70, 76.41, 81.34), "zeroshot": (69.37, 75.98, 57.57, 67.64), "expert-commonsenseqa": (81.24, 77.29, 69.19, 75.91),
        "expert-cosmosqa": (71.42, 86.23, 67.86, 75.17), "expert-socialiqa": (73.63, 76.98, 78.10, 76.24), "btm": (81.24, 80.84, 77.28, 79.79),
        "soup": (80.26, 84.25, 77.02, 80.51), "btx": (75.76, 81.04, 73.39, 76.73), "flexolmo": (75.18, 81.11, 76.10, 77.46),
        "metamoe": (81.33, 85.80, 77.64, 81.59), "flexolmo-dpp": (79.78,), "metamoe-similarity": (80.32,),
        "metamoe-no-context": (80.51, 80.34, 77.38, 79.41), "metamoe-private-experts": (80.75, 84.89, 77.33, 80.99),
    },
}
# Its costs on the authors' GPU. Table 10: minutes a client by similarity and by DPP, D_0's embedding in them.
# Tables 15, 16: seconds to unify (BTM: none), samples/s.
PAPER_SELECTION = {"vit-b-32": (6.41, 6.61), "vit-b-16": (15.70, 15.91), "llama-3.2-3b": (1.91, 2.17), "llama-3.1-8b": (4.21, 4.54)}
PAPER_COSTS = {
    "vit-b-32": {"btm": (0, 606), "soup": (5.72, 1813), "btx": (11.13, 1758), "flexolmo": (11.93, 1767), "metamoe": (12.15, 1751)},
    "vit-b-16": {"btm": (0, 249), "soup": (5.72, 743), "btx": (19.72, 715), "flexolmo": (18.24, 719), "metamoe": (19.88, 710)},
    "llama-3.2-3b": {"btm": (0, 17.44), "soup": (8.24, 43.46), "btx": (118.21, 42.12), "flexolmo": (119.90, 41.59), "metamoe": (114.46, 40.67)},
    "llama-3.1-8b": {"btm": (0, 8.20), "soup": (11.25, 22.86), "btx": (223.37, 21.41), "flexolmo": (206.28, 21.95), "metamoe": (205.42, 20.05)},
}
SCORINGS = {"letters": "scored by the letters' logits", "generate": "scored by the generated letter", "likelihood": "scored by the answers' likelihood"}
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, nargs="+", help="folder of the run; several: print the table over runs of different seeds")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="part of the clients' data to score on; settings are chosen on validation (default: %(default)s)")
    parser.add_argument("--scoring", choices=["letters", "generate", "likelihood"], help="language models, multiple choice: logits of the choices' letters from one forward pass; the first stand-alone letter in 16 generated tokens; likelihood of the choices' texts (default: the backbone's preset)")
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


def suffix(run, scoring):
    """What distinguishes the files of a scoring that is not the backbone's own."""
    return "" if scoring == PRESETS[run["backbone"]].get("scoring") else f".{scoring}"


def score(row, folder, backbone_of, run_dir, run, args, records, scoring, without=None):
    """What backbone.scores gives, {client: [[...], ...]}, routing counts (L, K) a client, and samples/s; scored once.
    without: an expert to leave out."""
    identity = {"dtype": args.dtype, "model": "seed"}
    if scoring not in (None, "likelihood"):
        identity["scoring"] = scoring
    if folder is not None:
        identity["model"] = sha256(folder / ("manifest.json" if row.startswith("expert-") else "done.json"))
    path = run_dir / "scores" / f"{row}{f'.without.{without}' if without else ''}.{args.split}{suffix(run, scoring)}.json"
    if path.exists() and (found := read_json(path))["identity"] == identity and found["scores"].keys() >= set(run["clients"]):
        return found  # unless a client has joined since
    backbone = backbone_of()
    model = backbone.model
    if folder is not None:
        model = moe.load(folder, model) if (folder / "moe_config.json").exists() else backbone.with_adapter(folder)
    if without:
        moe.disable_expert(model, without)
    routed = hasattr(model, "routing") and scoring != "generate"  # a prompt's tokens go through once, not once a generated token
    found, seconds = {"identity": identity, "scores": {}, "routing": {}}, 0.0
    for name in run["clients"]:
        if routed:
            model.routing.record = True
            moe.reset_counts(model)
        start = time.perf_counter()
        found["scores"][name] = [values.tolist() for values in backbone.scores(model, records[name], label=f"{row} on {name}", scoring=scoring)]
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


def ensemble(experts, instruction=()):
    """BTM: the mean of the private-only experts' probabilities over the choices, {client: [[...], ...]}; for the clients of `instruction` data
    the logarithm of their mean probability of each token."""
    mixed = {}
    for name in experts[0]["scores"]:
        if name in instruction:
            mixed[name] = [np.logaddexp.reduce(tokens) - math.log(len(experts)) for tokens in zip(*(expert["scores"][name] for expert in experts))]
        else:
            mixed[name] = [np.mean(ps, 0) for ps in zip(*(probabilities(expert["scores"][name]) for expert in experts))]
    return mixed


def is_choice(records):
    """Multiple choice, scored by accuracy; else instruction data, scored by the answers' perplexity."""
    return "choices" in records[0]


def is_right(scores, records):
    """1.0 where the answer's text is the likeliest choice, else 0.0; also 0.0 where no letter was generated."""
    return np.array([float(len(values) > 0 and record["choices"][int(np.argmax(values))] == record["answer"]) for values, record in zip(scores, records)])


def perplexity(scores):
    """exp of the mean negative log-probability of the answers' tokens."""
    return math.exp(-np.concatenate(scores).mean())


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


def paper_numbers(run, model):
    """The paper's accuracies of this row, {client or "average": percent}; empty where it has none."""
    names, numbers = PAPER_CLIENTS.get(run["backbone"], []), PAPER.get(run["backbone"], {}).get(model, ())
    if set(run["clients"]) != set(names):
        return {}  # another federation
    return dict(zip(names, numbers[:-1])) | ({"average": numbers[-1]} if numbers else {})


def markdown(results, run):
    """The paper's Table 3 layout: accuracy in percent; then ablations, intervals, differences, routing shares, coverage, bytes."""
    clients, scoring = run["clients"], results.get("scoring")
    perplexities = [name for name in clients if "perplexity" in results["rows"][0]["clients"][name]]
    heads = [f"{name} (perplexity)" if name in perplexities else name for name in clients]
    lines = [f"# {run['backbone']}, seed {run['seed']}, {results['split']} split" + (f", {SCORINGS[scoring]}" if scoring else ""), "", "Accuracy in percent."]
    if paper_numbers(run, "metamoe"):
        changed = [key for key, value in PRESETS[run["backbone"]].items() if run.get(key, value) != value and key != "seed_model"]
        changed += ["seed_model"] if run["seed_model"] else []
        lines[-1] = "Accuracy in percent, behind it in brackets the paper's." + f" This run's {', '.join(changed)} are not the paper's." * bool(changed)
    if perplexities:
        lines[-1] += f" Of {', '.join(perplexities)} the perplexity of the answers: lower is better, and it is in no average and no difference."
    if scoring == "generate" and any(row["model"] == "btm" for row in results["rows"]):
        lines[-1] += " BTM combines the probabilities of the letters: its row is that of `--scoring letters`."
    for heading, rows in sections(results["rows"]):
        lines += ["", f"## {heading}", ""] if heading else [""]
        lines += ["| | " + " | ".join(heads) + " | Average |", "|---|" + "---:|" * (len(clients) + 1)]
        for label, row in rows:
            paper = paper_numbers(run, row["model"])
            measured = {name: row["clients"][name]["perplexity" if name in perplexities else "accuracy"] for name in clients} | {"average": row["average"]}
            cells = ["" if value is None else f"{value:.2f}" + (f" ({paper[key]:.2f})" if key in paper else "") for key, value in measured.items()]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "## Intervals"]
    lines += ["", "Wilson 95% intervals; MetaMoE's average minus the row's, in points, with a paired bootstrap 95% interval.", "",
              "| | " + " | ".join(f"{name} (n = {results['n'][name]})" for name in clients) + " | MetaMoE minus this |", "|---|" + "---:|" * (len(clients) + 1)]
    for row in results["rows"]:
        cells = ["" if name in perplexities else "{:.1f} to {:.1f}".format(*row["clients"][name]["wilson"]) for name in clients]
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
                  "| left out | " + " | ".join(heads) + " | Average |", "|---|" + "---:|" * (len(clients) + 1)]
        for without, values in table.items():
            accuracy = [values[name] for name in clients if name not in perplexities]
            cells = [f"{values[name]:.2f}" for name in clients] + [f"{np.mean(accuracy):.2f}" if accuracy else ""]
            lines.append(f"| {without or 'none'} | " + " | ".join(cells) + " |")
    if "coverage" in results:
        lines += ["", "How the proxies cover a client's private test data: mean distance (1 - cosine) of a test sample to its nearest proxy, and log det L_S of the proxies.", "",
                  "| | " + " | ".join(f"{name}: distance | log det" for name in clients) + " |", "|---|" + "---:|" * (2 * len(clients))]
        for rule in results["coverage"][clients[0]]:
            cells = (f"{found['distance']:.4f} | {found['log_det']:.1f}" for found in (results["coverage"][name][rule] for name in clients))
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    lines += ["", "Uploaded, in bytes: " + ", ".join(f"{name} {size:,}" for name, size in results["uploaded_bytes"].items()) + "."]
    return "\n".join(lines) + "\n"


def cost_tables(run, rows, timings):
    """The paper's Tables 10, 15 and 16 as Markdown, means over the runs: `rows` of one run, `timings` of each."""

    def mean(get):
        return np.mean([get(found) for found in timings])

    clients, paper = run["clients"], PAPER_COSTS.get(run["backbone"], {})
    lines = ["Proxy selection (Table 10): seconds a client", "", "| | " + " | ".join(clients) + " |", "|---|" + "---:|" * len(clients)]
    if all("embedding_seconds" in found for found in timings):
        lines.append("| embedding D_0, once for all clients |" + f" {mean(lambda t: t['embedding_seconds']):.2f} |" * len(clients))
    for label, key, rule in (("private features and relevance head", "relevance_seconds", None), ("random", "selection_seconds", "random"),
                             ("similarity", "selection_seconds", "similarity"), ("DPP", "selection_seconds", "dpp"), ("DPP, whole public set", "selection_seconds", "dpp-all")):
        values = [[found.get(key, {}).get(name) if rule is None else found[key][name].get(rule) for found in timings] for name in clients]
        if all(value is not None for found in values for value in found):
            lines.append(f"| {label} | " + " | ".join(f"{np.mean(found):.3f}" for found in values) + " |")
    if run["backbone"] in PAPER_SELECTION:
        lines += ["", "The paper, D_0's embedding in both: {} min by similarity, {} min by DPP.".format(*PAPER_SELECTION[run["backbone"]])]
    lines += ["", "Unification and inference (Tables 15, 16)", "", "| | unify, s | samples/s |" + " paper: unify, s | samples/s |" * bool(paper),
              "|---|---:|---:|" + "---:|---:|" * bool(paper)]
    for row in rows:
        model = row["model"]
        seconds = f"{mean(lambda t: t[model]['unify_seconds']):.2f}" if all("unify_seconds" in found[model] for found in timings) else ""
        cells = [row["title"], seconds, f"{mean(lambda t: t[model]['samples_per_second']):.1f}"]
        cells += [f"{paper[model][0]:.2f}", f"{paper[model][1]:.2f}"] if model in paper else ["", ""] if paper else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def coverage_identity(run_dir, run):
    """What the coverage was measured on: {client: {rule: hash of its selection}}."""
    paths = {name: (run_dir / "clients" / name / "selection").glob("*/selection.json") for name in run["clients"]}
    return {name: {path.parent.name: sha256(path) for path in sorted(found)} for name, found in paths.items()}


def coverage(run_dir, run, backbone, records, split):
    """{client: {rule: {"distance", "log_det"}}} of the selections there are, and Figure 2: RUN/figure2-NAME.png
    (of another split than test, figure2-NAME.SPLIT.png).

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
        paths = {rule: run_dir / "clients" / name / "selection" / rule / "selection.json" for rule in ("random", "similarity", "dpp", "dpp-all")}
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
            label = {"random": "random", "similarity": "most relevant", "dpp": "relevance-weighted DPP", "dpp-all": "DPP, whole public set"}[rule]
            axis.set_title(label + "\ndistance {distance:.3f}, log det {log_det:.0f}".format(**found[name][rule]))
            axis.set_xticks([]), axis.set_yticks([])
        figure.suptitle(f"{run['backbone']}: proxies for {name} (m = {run['proxies']}), t-SNE of the seed's features")
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, markerscale=2, frameon=False)
        with atomic(run_dir / f"figure2-{name}{'' if split == 'test' else '.' + split}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return found


def unit(features):
    """Rows scaled to length 1, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def pool(run_dirs, file):
    """The table over runs that differ in their seed, from the results in `file` of each: mean and standard deviation, MetaMoE's paired
    differences over all samples."""
    for run_dir in run_dirs:
        if not (Path(run_dir) / file).exists():
            raise UserError(f"--run-dir {run_dir}: holds no {file}: evaluate it alone first")
    runs = [read_json(Path(run_dir) / file) for run_dir in run_dirs]
    first = runs[0]["run"]
    for run_dir, found in zip(run_dirs, runs):
        if {**found["run"], "seed": 0} != {**first, "seed": 0} or [r["model"] for r in found["rows"]] != [r["model"] for r in runs[0]["rows"]]:
            raise UserError(f"--run-dir {run_dir}: made with other settings or models than {run_dirs[0]}; only the seed may differ")
    clients = first["clients"]
    perplexities = [name for name in clients if "perplexity" in runs[0]["rows"][0]["clients"][name]]
    choices = [name for name in clients if name not in perplexities]
    heads = " | ".join(f"{name} (perplexity)" if name in perplexities else name for name in clients)
    right = {}  # row -> {(client, seed): 0/1 array}
    for found in runs:
        for row in found["rows"]:
            right.setdefault(row["model"], {}).update({(name, found["run"]["seed"]): np.array([int(c) for c in row["clients"][name]["right"]], float) for name in choices})
    for tables in zip(*(sections(found["rows"]) for found in runs)):  # the same table of each run
        if tables[0][0]:
            print(f"\n{tables[0][0]}\n")
        print("| | " + heads + " | Average | MetaMoE minus this |\n|---|" + "---:|" * (len(clients) + 2))
        for labelled in zip(*(rows for _, rows in tables)):
            (label, first_row), rows = labelled[0], [row for _, row in labelled]
            columns = [[row["clients"][name]["perplexity" if name in perplexities else "accuracy"] for row in rows] for name in clients]
            columns += [[row["average"] for row in rows]] if choices else []
            cells = [f"{np.mean(c):.2f} ± {np.std(c, ddof=1) if len(c) > 1 else 0:.2f}" for c in columns]
            gap = ""
            if right.get("metamoe") and first_row["model"] != "metamoe":
                found = paired_bootstrap(right["metamoe"], right[first_row["model"]], 0)
                gap = "{:+.2f} ({:+.2f} to {:+.2f})".format(found["difference"], *found["interval"])
            print(f"| {label} | " + " | ".join(cells + [""] * (not choices)) + f" | {gap} |")
    if all("coverage" in found for found in runs):
        print("\nDistance of a private test sample to its nearest proxy; log det L_S\n")
        print("| | " + " | ".join(clients) + " |\n|---|" + "---:|" * len(clients))
        for rule in runs[0]["coverage"][clients[0]]:
            values = [[[found["coverage"][name][rule][key] for found in runs] for key in ("distance", "log_det")] for name in clients]
            cells = [f"{np.mean(d):.4f} ± {np.std(d, ddof=1):.4f}; {np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for d, v in values]
            print(f"| {rule} | " + " | ".join(cells) + " |")
    timings = [read_json(path) for run_dir in run_dirs if (path := Path(run_dir) / "timings.json").exists()]
    if len(timings) == len(runs) and all(row["model"] in found for row in runs[0]["rows"] for found in timings):
        print("\n" + cost_tables(first, runs[0]["rows"], timings), end="")


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
    records = {name: read_records(run_dir / "clients" / name / "private" / f"{args.split}.jsonl") for name in run["clients"]}
    if not all(records.values()):
        raise UserError(f"--split {args.split}: a client has no samples in it; make the run with --{args.split}-size of at least 1")
    folders = list_models(run_dir, run, args.models)
    left_out = opt_outs(args, run_dir, run)

    def backbone_of():  # only for a model that is not scored yet; PEFT and the MoE change a model in place
        return load_backbone(run["backbone"], run["seed_model"], args.device, args.dtype, args.workers, run.get("answers"), run.get("loss"))

    found = {row: score(row, folder, backbone_of, run_dir, run, args, records, scoring) for row, folder in folders.items() if row != "btm"}
    if "btm" in folders:
        combined = "letters" if scoring == "generate" else scoring  # probabilities, not letters
        experts = [score(f"expert-{name}", run_dir / "clients" / name / "upload" / expert_variant(run_dir), backbone_of, run_dir, run, args, records, combined) for name in run["clients"]]
        found["btm"] = {"scores": ensemble(experts, [name for name in run["clients"] if not is_choice(records[name])]), "samples_per_second": 1 / sum(1 / expert["samples_per_second"] for expert in experts)}
    right = {row: {name: is_right(found[row]["scores"][name], records[name]) for name in run["clients"] if is_choice(records[name])} for row in folders}
    rows = []
    for row in folders:
        per_client = {}
        for name, values in right[row].items():
            per_client[name] = {"correct": int(values.sum()), "n": len(values), "accuracy": 100 * float(values.mean()), "wilson": wilson(values.sum(), len(values))}
            per_client[name]["right"] = "".join("01"[int(value)] for value in values)  # a digit a sample, in order: for paired tests
        average = float(np.mean([c["accuracy"] for c in per_client.values()])) if per_client else None
        for name in run["clients"]:
            if not is_choice(records[name]):
                scores = found[row]["scores"][name]
                per_client[name] = {"perplexity": perplexity(scores), "tokens": sum(map(len, scores)), "n": len(records[name])}
        rows.append({"model": row, "title": title(row, run), "clients": per_client, "average": average})
        if right.get("metamoe") and row != "metamoe":
            rows[-1]["metamoe_minus"] = paired_bootstrap(right["metamoe"], right[row], run["seed"])
        if found[row].get("routing"):
            rows[-1] |= {"experts": found[row]["experts"], "lambda": found[row]["lambda"], "routing": {name: shares(counts) for name, counts in found[row]["routing"].items()}}
    uploaded = {}
    for name in run["clients"]:
        for upload in sorted((run_dir / "clients" / name / "upload").glob("[!.]*")):
            uploaded[f"{name}/{upload.name}"] = folder_bytes(upload)
    results = {"run": run, "split": args.split, "n": {name: len(r) for name, r in records.items()}, "rows": rows, "uploaded_bytes": uploaded}
    if scoring and (scoring, own) != ("likelihood", "likelihood"):
        results["scoring"] = scoring
    measured, identity = run_dir / "scores" / f"coverage.{args.split}.json", coverage_identity(run_dir, run)
    if args.figure:
        write_json(measured, {"identity": identity, "coverage": coverage(run_dir, run, backbone_of(), records, args.split)})
    if measured.exists() and (kept := read_json(measured))["identity"] == identity:
        results["coverage"] = kept["coverage"]
    if left_out:
        results["opt_out"] = {}
    for row, names in left_out.items():
        scores = {name: score(row, run_dir / "moe" / row, backbone_of, run_dir, run, args, records, scoring, name)["scores"] for name in ["", *names]}
        results["opt_out"][row] = {
            without: {name: 100 * float(is_right(found[name], records[name]).mean()) if is_choice(records[name]) else perplexity(found[name]) for name in run["clients"]}
            for without, found in scores.items()
        }
    write_json(run_dir / f"{stem}.json", results)
    text = markdown(results, run)
    with atomic(run_dir / f"{stem}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    timings = {row: {"samples_per_second": found[row]["samples_per_second"]} for row in folders}
    for row, folder in folders.items():
        if folder is not None and (folder / "timing.json").exists():
            timings[row] |= read_json(folder / "timing.json")
    selections = {name: run_dir / "clients" / name / "selection" for name in run["clients"]}
    timings["selection_seconds"] = {name: {path.parent.name: read_json(path)["selection_seconds"] for path in sorted(folder.glob("*/timing.json"))}
                                    for name, folder in selections.items()}
    timings["relevance_seconds"] = {name: read_json(folder / "timing.json")["relevance_seconds"] for name, folder in selections.items() if (folder / "timing.json").exists()}
    if (run_dir / "public" / "timing.json").exists():
        timings |= read_json(run_dir / "public" / "timing.json")
    write_json(run_dir / "timings.json", timings)
    with atomic(run_dir / "timings.md") as temporary:
        temporary.write_text(cost_tables(run, rows, [timings]), encoding="utf-8")
    print(text)
    print(f"evaluate: {len(rows)} models on {len(records)} clients; {run_dir / stem}.json, {stem}.md and timings.md written")


if __name__ == "__main__":
    run_main(main)
