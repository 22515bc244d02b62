"""The results as Markdown tables: accuracies, ablations, costs; of one run or of several."""

from pathlib import Path

import numpy as np

from metamoe import methods
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.report.paper import PAPER_COSTS, PAPER_SELECTION, paper_numbers
from metamoe.report.statistics import paired_bootstrap
from metamoe.rundir import read_json

SCORINGS = {
    "letters": "scored by the letters' logits",
    "generate": "scored by the generated letter",
    "likelihood": "scored by the answers' likelihood",
}


ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]


def title(row, run):
    if row.startswith("expert-"):
        name = row.removeprefix("expert-")
        number = run["clients"].index(name)
        return f"Expert {ROMAN[number] if number < len(ROMAN) else number + 1} ({name})"
    return "ZeroShot" if row == "zeroshot" else methods.title(row)


def sections(rows):
    """[(title, [(label, row)])]: the main table's rows and those of no ablation, then each ablation that has
    rows of its own."""
    by_name = {row["model"]: row for row in rows}
    main = {
        name
        for name in by_name
        if name == "zeroshot" or name in methods.main_rows() or name.startswith("expert-")
    }
    found = [
        (title, [(label, by_name[name]) for name, label in table.items() if name in by_name])
        for title, table in methods.ablations().items()
        if any(name in by_name and name not in main for name in table)
    ]
    ablated = {row["model"] for _, table in found for _, row in table}
    return [
        ("", [(row["title"], row) for row in rows if row["model"] in main or row["model"] not in ablated]),
        *found,
    ]


def markdown(results, run):
    """The paper's Table 3 layout: accuracy in percent; then ablations, intervals, differences, routing
    shares, coverage, bytes."""
    clients, scoring = run["clients"], results.get("scoring")
    perplexities = [name for name in clients if "perplexity" in results["rows"][0]["clients"][name]]
    heads = [f"{name} (perplexity)" if name in perplexities else name for name in clients]
    lines = [
        f"# {run['backbone']}, seed {run['seed']}, {results['split']} split"
        + (f", {SCORINGS[scoring]}" if scoring else ""),
        "",
        "Accuracy in percent.",
    ]
    if paper_numbers(run, "metamoe"):
        changed = [
            key
            for key, value in PRESETS[run["backbone"]].items()
            if run.get(key, value) != value and key != "seed_model"
        ]
        changed += ["seed_model"] if run["seed_model"] else []
        lines[-1] = (
            "Accuracy in percent, behind it in brackets the paper's."
            + f" This run's {', '.join(changed)} are not the paper's." * bool(changed)
        )
    if perplexities:
        lines[-1] += (
            f" Of {', '.join(perplexities)} the perplexity of the answers: lower is better, and it is in "
            "no average and no difference."
        )
    if scoring == "generate" and any(row["model"] == "btm" for row in results["rows"]):
        lines[-1] += " BTM combines the probabilities of the letters: its row is that of `--scoring letters`."
    for heading, rows in sections(results["rows"]):
        lines += ["", f"## {heading}", ""] if heading else [""]
        lines += ["| | " + " | ".join(heads) + " | Average |", "|---|" + "---:|" * (len(clients) + 1)]
        for label, row in rows:
            paper = paper_numbers(run, row["model"])
            measured = {
                name: row["clients"][name]["perplexity" if name in perplexities else "accuracy"]
                for name in clients
            } | {"average": row["average"]}
            cells = [
                "" if value is None else f"{value:.2f}" + (f" ({paper[key]:.2f})" if key in paper else "")
                for key, value in measured.items()
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "## Intervals"]
    lines += [
        "",
        "Wilson 95% intervals; MetaMoE's average minus the row's, in points, with a paired bootstrap 95% "
        "interval.",
        "",
        "| | "
        + " | ".join(f"{name} (n = {results['n'][name]})" for name in clients)
        + " | MetaMoE minus this |",
        "|---|" + "---:|" * (len(clients) + 1),
    ]
    for row in results["rows"]:
        cells = [
            "" if name in perplexities else "{:.1f} to {:.1f}".format(*row["clients"][name]["wilson"])
            for name in clients
        ]
        gap = row.get("metamoe_minus")
        cells.append(
            "{:+.2f} ({:+.2f} to {:+.2f})".format(gap["difference"], *gap["interval"]) if gap else ""
        )
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    routed = [row for row in results["rows"] if "routing" in row]
    if routed:
        lines += [
            "",
            "Share of a client's prompt tokens that its own expert gets, mean over the layers (least and "
            "most of a layer), percent; every layer and expert is in results.json.",
            "",
            "| | " + " | ".join(clients) + " | lambda, mean |",
            "|---|" + "---:|" * (len(clients) + 1),
        ]
        for row in routed:
            own = [
                [100 * layer[row["experts"].index(name)] for layer in row["routing"][name]]
                if name in row["experts"]
                else []
                for name in clients
            ]
            cells = [f"{np.mean(s):.1f} ({min(s):.1f} to {max(s):.1f})" if s else "no expert" for s in own]
            lines.append(f"| {row['title']} | " + " | ".join(cells) + f" | {np.mean(row['lambda']):.3f} |")
    for model, table in results.get("opt_out", {}).items():
        lines += [
            "",
            f"{title(model, run)} with one client's expert left out, without training: accuracy in percent.",
            "",
            "| left out | " + " | ".join(heads) + " | Average |",
            "|---|" + "---:|" * (len(clients) + 1),
        ]
        for without, values in table.items():
            accuracy = [values[name] for name in clients if name not in perplexities]
            cells = [f"{values[name]:.2f}" for name in clients] + [
                f"{np.mean(accuracy):.2f}" if accuracy else ""
            ]
            lines.append(f"| {without or 'none'} | " + " | ".join(cells) + " |")
    if "coverage" in results:
        lines += [
            "",
            "How the proxies cover a client's private test data: mean distance (1 - cosine) of a test "
            "sample to its nearest proxy, and log det L_S of the proxies.",
            "",
            "| | " + " | ".join(f"{name}: distance | log det" for name in clients) + " |",
            "|---|" + "---:|" * (2 * len(clients)),
        ]
        for rule in results["coverage"][clients[0]]:
            cells = (
                f"{found['distance']:.4f} | {found['log_det']:.1f}"
                for found in (results["coverage"][name][rule] for name in clients)
            )
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Uploaded, in bytes: "
        + ", ".join(f"{name} {size:,}" for name, size in results["uploaded_bytes"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def cost_tables(run, rows, timings):
    """The paper's Tables 10, 15 and 16 as Markdown, means over the runs: `rows` of one run, `timings` of
    each."""

    def mean(get):
        return np.mean([get(found) for found in timings])

    clients, paper = run["clients"], PAPER_COSTS.get(run["backbone"], {})
    lines = [
        "Proxy selection (Table 10): seconds a client",
        "",
        "| | " + " | ".join(clients) + " |",
        "|---|" + "---:|" * len(clients),
    ]
    if all("embedding_seconds" in found for found in timings):
        lines.append(
            "| embedding D_0, once for all clients |"
            + f" {mean(lambda t: t['embedding_seconds']):.2f} |" * len(clients)
        )
    for label, key, rule in (
        ("private features and relevance head", "relevance_seconds", None),
        ("random", "selection_seconds", "random"),
        ("similarity", "selection_seconds", "similarity"),
        ("DPP", "selection_seconds", "dpp"),
        ("DPP, whole public set", "selection_seconds", "dpp-all"),
    ):
        values = [
            [
                found.get(key, {}).get(name) if rule is None else found[key][name].get(rule)
                for found in timings
            ]
            for name in clients
        ]
        if all(value is not None for found in values for value in found):
            lines.append(f"| {label} | " + " | ".join(f"{np.mean(found):.3f}" for found in values) + " |")
    if run["backbone"] in PAPER_SELECTION:
        lines += [
            "",
            "The paper, D_0's embedding in both: {} min by similarity, {} min by DPP.".format(
                *PAPER_SELECTION[run["backbone"]]
            ),
        ]
    lines += [
        "",
        "Unification and inference (Tables 15, 16)",
        "",
        "| | unify, s | samples/s |" + " paper: unify, s | samples/s |" * bool(paper),
        "|---|---:|---:|" + "---:|---:|" * bool(paper),
    ]
    for row in rows:
        model = row["model"]
        measured = [found[model] for found in timings]
        seconds = ""
        if all("unify_seconds" in found for found in measured):
            seconds = f"{np.mean([found['unify_seconds'] for found in measured]):.2f}"
        speed = np.mean([found["samples_per_second"] for found in measured])
        cells = [row["title"], seconds, f"{speed:.1f}"]
        if model in paper:
            cells += [f"{paper[model][0]:.2f}", f"{paper[model][1]:.2f}"]
        elif paper:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pool(run_dirs, file):
    """The table over runs that differ in their seed, from the results in `file` of each: mean and standard
    deviation, MetaMoE's paired differences over all samples."""
    for run_dir in run_dirs:
        if not (Path(run_dir) / file).exists():
            raise UserError(f"--run-dir {run_dir}: holds no {file}: evaluate it alone first")
    runs = [read_json(Path(run_dir) / file) for run_dir in run_dirs]
    first = runs[0]["run"]
    for run_dir, found in zip(run_dirs, runs, strict=True):
        if {**found["run"], "seed": 0} != {**first, "seed": 0} or [r["model"] for r in found["rows"]] != [
            r["model"] for r in runs[0]["rows"]
        ]:
            raise UserError(
                f"--run-dir {run_dir}: made with other settings or models than {run_dirs[0]}; only the "
                "seed may differ"
            )
    clients = first["clients"]
    perplexities = [name for name in clients if "perplexity" in runs[0]["rows"][0]["clients"][name]]
    choices = [name for name in clients if name not in perplexities]
    heads = " | ".join(f"{name} (perplexity)" if name in perplexities else name for name in clients)
    right = {}  # row -> {(client, seed): 0/1 array}
    for found in runs:
        for row in found["rows"]:
            right.setdefault(row["model"], {}).update(
                {
                    (name, found["run"]["seed"]): np.array(
                        [int(c) for c in row["clients"][name]["right"]], float
                    )
                    for name in choices
                }
            )
    # the same table of each run
    for tables in zip(*(sections(found["rows"]) for found in runs), strict=True):
        if tables[0][0]:
            print(f"\n{tables[0][0]}\n")
        print("| | " + heads + " | Average | MetaMoE minus this |\n|---|" + "---:|" * (len(clients) + 2))
        for labelled in zip(*(rows for _, rows in tables), strict=True):
            (label, first_row), rows = labelled[0], [row for _, row in labelled]
            columns = [
                [row["clients"][name]["perplexity" if name in perplexities else "accuracy"] for row in rows]
                for name in clients
            ]
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
            values = [
                [[found["coverage"][name][rule][key] for found in runs] for key in ("distance", "log_det")]
                for name in clients
            ]
            cells = [
                f"{np.mean(d):.4f} ± {np.std(d, ddof=1):.4f}; {np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}"
                for d, v in values
            ]
            print(f"| {rule} | " + " | ".join(cells) + " |")
    timings = [read_json(path) for run_dir in run_dirs if (path := Path(run_dir) / "timings.json").exists()]
    if len(timings) == len(runs) and all(
        row["model"] in found for row in runs[0]["rows"] for found in timings
    ):
        print("\n" + cost_tables(first, runs[0]["rows"], timings), end="")
