"""The results of one run as Markdown: accuracies, ablations, intervals, routing, opting out, coverage."""

import numpy as np

from metamoe.methods import METHODS, ablations
from metamoe.presets import PRESETS
from metamoe.report.models import title
from metamoe.report.paper import paper_numbers
from metamoe.serving.members import expert_of

SCORINGS = {
    "letters": "scored by the letters' logits",
    "generate": "scored by the generated letter",
    "likelihood": "scored by the answers' likelihood",
}
PERPLEXITY = "the perplexity of the answers: lower is better, and it is in no average and no difference."
INTERVALS = "Wilson 95% intervals; MetaMoE's average minus the row's, in points, with a paired bootstrap 95% "
INTERVALS += "interval: where it holds 0, the two rows tie."
ROUTING = (
    "Share of a client's {} tokens that its own expert gets, mean over the layers (least and most of a "
    "layer), percent: 100 means that the router knows the client. Every layer and expert is in results.json, "
    "and drawn in routing.png."
)
OPT_OUT = "with one client's expert left out, without training: accuracy in percent."
SIMULATED = (
    "simulated federations: the clients' weights are averaged in every round, and this run read all clients' "
    "private training records in one process. They are there for comparison."
)
PERSONAL = "has a model for each client, which is scored on that client's records alone."
EXCHANGED = (
    "Bytes that one client sends and receives while the model is made. In every round it sends the factors "
    "that are averaged and receives their mean; MetaMoE's client sends one upload and receives the model."
)
COVERAGE = (
    "How the proxies cover a client's private test data: mean distance (1 - cosine) of a test sample to its "
    "nearest proxy (smaller is closer), and log det L_S of the proxies (larger is more diverse)."
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
    heading = f"# {run['backbone']}, random seed {run['seed']}, {results['split']} split"
    if results.get("scoring"):
        heading += f", {SCORINGS[results['scoring']]}"
    blocks = [heading, explanation(results, run, measured)]
    for section, labelled in sections(rows):
        if section:
            blocks.append(f"## {section}")
        best = None if section else best_private(labelled)
        blocks.append(accuracy_table(labelled, run, measured, best))
        if not section:
            blocks += notes(rows)
            if "exchanged" in results:
                blocks += [EXCHANGED, exchange_table(results, run)]
    blocks += ["## Intervals", INTERVALS, interval_table(results, measured)]
    routed = [row for row in rows if "routing" in row]
    if routed:
        tokens = "image" if PRESETS[run["backbone"]]["kind"] == "clip" else "prompt"
        blocks += [ROUTING.format(tokens), routing_table(routed, clients)]
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
        changed = changed_settings(run, results.get("own_seed_model"))
        if changed:
            text += f" This run's {', '.join(changed)} are not the paper's."
    if results.get("chance"):
        guesses = ", ".join(f"{name} {value:.1f}" for name, value in results["chance"].items())
        average = np.mean(list(results["chance"].values()))
        text += f" Chance level: {guesses}; {average:.1f} on average."
    text += not_private(results, run)
    text += " The best average of a private merged model is bold."
    if any(row["model"].startswith("expert-") for row in results["rows"]):
        text += f" The clients' own experts are those of the uploads {results['experts']}."
    perplexities = ", ".join(name for name, measure in measured.items() if measure == "perplexity")
    if perplexities:
        text += f" Of {perplexities} {PERPLEXITY}"
    if results.get("scoring") == "generate" and any(row["model"] == "btm" for row in results["rows"]):
        text += " BTM combines the probabilities of the letters: its row is that of `--scoring letters`."
    return text


def not_private(results, run):
    """What is said of the rows that saw private data, and of those that exchange weights in every round."""
    pooled, text = [row["title"] for row in results["rows"] if sees_private_data(row)], ""
    if pooled:
        text = f" {', '.join(pooled)}: trained on the clients' private data, NOT private. All others are."
    rows = {row: found for row, found in exchanges(results).items() if row != "metamoe"}
    if rows:
        text += f" {', '.join(title(row, run) for row in rows)}: {SIMULATED}"
    personal = [title(row, run) for row, found in rows.items() if found["personal"]]
    return text + "".join(f" {name} {PERSONAL}" for name in personal)


def changed_settings(run, own_seed_model):
    """The settings of the run that are not its preset's."""
    preset = {key: value for key, value in PRESETS[run["backbone"]].items() if key != "seed_model"}
    changed = [key for key in preset if run.get(key, preset[key]) != preset[key]]
    return changed + (["seed_model"] if own_seed_model else [])


def sees_private_data(row):
    """Whether the server trains the row's model on the clients' data."""
    return row.get("private_data", False)


def is_private_model(row):
    """Whether the server makes the row's model of uploads alone."""
    found = METHODS.get(row["model"])
    return found is not None and not found.rounds and not sees_private_data(row)


def best_private(labelled):
    """The best average of the models that the server makes of uploads alone; None without one."""
    merged = [row for _, row in labelled if is_private_model(row)]
    averages = [row["average"] for row in merged if row["average"] is not None]
    return max(averages) if len(averages) > 1 else None


def notes(rows):
    """A line for each model that gives nearly all samples of a client one choice."""
    found = []
    for row in rows:
        for name, cell in row["clients"].items():
            if "one_choice" in cell:
                share, choice = 100 * cell["one_choice"]["share"], cell["one_choice"]["choice"]
                found.append(f"- {row['title']} answers {choice!r} to {share:.0f}% of {name}.")
    return ["\n".join(found)] if found else []


def accuracy_table(rows, run, measured, best=None):
    """best: the average that is set in bold."""
    lines = []
    for label, row in rows:
        paper = paper_numbers(run, row["model"])
        values = {name: row["clients"][name][measure] for name, measure in measured.items()}
        values["average"] = row["average"]
        cells = [number(value, paper.get(name)) for name, value in values.items()]
        if best is not None and row["average"] == best and is_private_model(row):
            cells[-1] = f"**{cells[-1]}**"
        lines.append((label, cells))
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
    shares = own_shares(row, client)
    return f"{np.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})" if shares else "no expert"


def own_shares(row, client):
    """Percent of the client's tokens that its own expert gets in each layer; empty where there is none."""
    name = expert_of(client, row["experts"])
    if name is None:
        return []
    own = row["experts"].index(name)
    return [100 * layer[own] for layer in row["routing"][client]]


def exchanges(results):
    """{row: what exchange.json holds}, in the order of the rows."""
    found = results.get("exchanged", {})
    return {row["model"]: found[row["model"]] for row in results["rows"] if row["model"] in found}


def exchange_table(results, run):
    lines = []
    for row, found in exchanges(results).items():
        lines.append((title(row, run), [f"{found[key]:,}" for key in ("rounds", "sent", "received")]))
    return grid(["exchanges", "bytes sent", "bytes received"], lines)


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
