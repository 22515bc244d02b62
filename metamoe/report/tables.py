"""The results of one run as Markdown: accuracies, ablations, intervals, routing, opting out, coverage."""

import numpy as np

from metamoe.methods import METHODS, ablations
from metamoe.presets import PRESETS
from metamoe.report.models import title
from metamoe.report.paper import paper_numbers

SCORINGS = {
    "letters": "scored by the letters' logits",
    "generate": "scored by the generated letter",
    "likelihood": "scored by the answers' likelihood",
}
PERPLEXITY = "the perplexity of the answers: lower is better, and it is in no average and no difference."
INTERVALS = "Wilson 95% intervals; MetaMoE's average minus the row's, in points, with a paired bootstrap 95% "
INTERVALS += "interval."
ROUTING = (
    "Share of a client's prompt tokens that its own expert gets, mean over the layers (least and most of a "
    "layer), percent; every layer and expert is in results.json."
)
OPT_OUT = "with one client's expert left out, without training: accuracy in percent."
COVERAGE = (
    "How the proxies cover a client's private test data: mean distance (1 - cosine) of a test sample to its "
    "nearest proxy, and log det L_S of the proxies."
)


def grid(heads, rows, corner=""):
    """A Markdown table. rows: [(name, cells)]; corner: the head above the names."""
    first = f" {corner} " if corner else " "
    lines = [f"|{first}| " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]
    return "\n".join(lines)


def sections(rows):
    """[(heading, [(label, row)])]: the main table, then each ablation table that has a row of its own."""
    by_name = {row["model"]: row for row in rows}
    found, ablated = [], set()
    for heading, labels in ablations().items():
        table = [(label, by_name[name]) for name, label in labels.items() if name in by_name]
        own = {row["model"] for _, row in table if not METHODS[row["model"]].title}
        if own:
            found.append((heading, table))
            ablated |= own
    main = [(row["title"], row) for row in rows if row["model"] not in ablated]
    return [("", main), *found]


def measures(run, rows):
    """{client: "accuracy", or "perplexity" for instruction data}."""
    cells = rows[0]["clients"]
    return {name: "perplexity" if "perplexity" in cells[name] else "accuracy" for name in run["clients"]}


def client_heads(measured):
    return [name if measure == "accuracy" else f"{name} (perplexity)" for name, measure in measured.items()]


def gap_cell(gap):
    """A paired difference and its interval; empty where there is none."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(gap["difference"], *gap["interval"]) if gap else ""


def markdown(results, run):
    """RUN/results.md: the paper's Table 3 layout, then ablations, intervals, routing, coverage, bytes."""
    rows, clients = results["rows"], run["clients"]
    measured = measures(run, rows)
    heading = f"# {run['backbone']}, seed {run['seed']}, {results['split']} split"
    if results.get("scoring"):
        heading += f", {SCORINGS[results['scoring']]}"
    blocks = [heading, explanation(results, run, measured)]
    for section, labelled in sections(rows):
        if section:
            blocks.append(f"## {section}")
        blocks.append(accuracy_table(labelled, run, measured))
    blocks += ["## Intervals", INTERVALS, interval_table(results, measured)]
    routed = [row for row in rows if "routing" in row]
    if routed:
        blocks += [ROUTING, routing_table(routed, clients)]
    for model, table in results.get("opt_out", {}).items():
        blocks.append(f"{title(model, run)} {OPT_OUT}")
        blocks.append(opt_out_table(table, measured))
    if "coverage" in results:
        blocks += [COVERAGE, coverage_table(results["coverage"], clients)]
    sizes = ", ".join(f"{name} {size:,}" for name, size in results["uploaded_bytes"].items())
    return "\n\n".join([*blocks, f"Uploaded, in bytes: {sizes}."]) + "\n"


def explanation(results, run, measured):
    """What the numbers are, above the first table."""
    text = "Accuracy in percent."
    if paper_numbers(run, "metamoe"):
        text = "Accuracy in percent, behind it in brackets the paper's."
        changed = changed_settings(run)
        if changed:
            text += f" This run's {', '.join(changed)} are not the paper's."
    perplexities = ", ".join(name for name, measure in measured.items() if measure == "perplexity")
    if perplexities:
        text += f" Of {perplexities} {PERPLEXITY}"
    if results.get("scoring") == "generate" and any(row["model"] == "btm" for row in results["rows"]):
        text += " BTM combines the probabilities of the letters: its row is that of `--scoring letters`."
    return text


def changed_settings(run):
    """The settings of the run that are not its preset's."""
    preset = PRESETS[run["backbone"]] | {"seed_model": ""}
    return [key for key in preset if run.get(key, preset[key]) != preset[key]]


def accuracy_table(rows, run, measured):
    lines = []
    for label, row in rows:
        paper = paper_numbers(run, row["model"])
        values = {name: row["clients"][name][measure] for name, measure in measured.items()}
        values["average"] = row["average"]
        lines.append((label, [number(value, paper.get(name)) for name, value in values.items()]))
    return grid([*client_heads(measured), "Average"], lines)


def number(value, paper):
    """A number and, where there is one, the paper's in brackets."""
    if value is None:
        return ""
    return f"{value:.2f}" if paper is None else f"{value:.2f} ({paper:.2f})"


def interval_table(results, measured):
    lines = []
    for row in results["rows"]:
        found = [row["clients"][name].get("wilson") for name in measured]
        cells = ["{:.1f} to {:.1f}".format(*wilson) if wilson else "" for wilson in found]
        lines.append((row["title"], [*cells, gap_cell(row.get("metamoe_minus"))]))
    return grid([*(f"{name} (n = {results['n'][name]})" for name in measured), "MetaMoE minus this"], lines)


def routing_table(rows, clients):
    lines = []
    for row in rows:
        cells = [own_share(row, name) for name in clients]
        lines.append((row["title"], [*cells, f"{np.mean(row['lambda']):.3f}"]))
    return grid([*clients, "lambda, mean"], lines)


def own_share(row, client):
    """Percent of the client's tokens that its own expert gets: mean, least and most of a layer."""
    if client not in row["experts"]:
        return "no expert"
    own = row["experts"].index(client)
    shares = [100 * layer[own] for layer in row["routing"][client]]
    return f"{np.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})"


def opt_out_table(table, measured):
    lines = []
    for without, values in table.items():
        accuracy = [values[name] for name, measure in measured.items() if measure == "accuracy"]
        average = float(np.mean(accuracy)) if accuracy else None
        cells = [number(value, None) for value in [*(values[name] for name in measured), average]]
        lines.append((without or "none", cells))
    return grid([*client_heads(measured), "Average"], lines, corner="left out")


def coverage_table(coverage, clients):
    lines = []
    for rule in sorted(set().union(*coverage.values())):  # of all clients, by name
        cells = []
        for name in clients:
            found = coverage[name].get(rule)
            cells += [f"{found['distance']:.4f}", f"{found['log_det']:.1f}"] if found else ["", ""]
        lines.append((rule, cells))
    return grid([head for name in clients for head in (f"{name}: distance", "log det")], lines)
