"""privacy.md and its figures: what an audit has found, each number beside its chance level."""

import numpy as np

from metamoe.report.figures import pyplot, save_figure
from metamoe.report.tables import grid

HOW = """The client `{client}`'s records were cut again at random: {members} members, whom an expert
({upload}) was trained on, and {others} others from the same distribution, who were not used. `RUN/audit/`
has that expert and the model that the server makes of it. A test that cannot tell members from others has
AUC 0.50, and 1% true positives at 1% false ones. Intervals: 95%."""
MEMBERSHIP = """## Membership by loss

The score is the loss of the answer under the seed model minus that under the model. The seed model's own
row is the control: it has seen nobody's records, so an AUC off 0.50 there means that members and others
differ by themselves."""
VECTORS = """## Membership by the routing vectors

The score is the Mahalanobis product of a record's own FFN inputs with the routing vectors, added up over
the layers; mean and covariance are those of a fifth of the records. Sent: the mean of half of the N
private records. Mean: of all N, as the paper has it. Predicted for the latter: a distance of m_x / sqrt(N),
by an attacker who knows the distribution exactly."""
PROXIES = """## Proxy indices

One private record was left out, {left_out} times another one, and the proxies were chosen again: {changed}
times the selection changed, by {mean:.1f} of {m} proxies in the mean and {most} at most."""
CANARIES = """## Canaries

{canaries} of the client's records got a random answer; the toss of a coin decided which of them were
trained on. An attacker guesses the half with the highest scores to be those. So many right guesses refute
any (epsilon, {delta}) guarantee below the bound, at 95%; the ceiling is what all guesses right would show."""
EXTRACTION = """## Extraction

Given the beginning of {texts} members' texts (32 tokens, or half of it), ten continuations of each were
sampled; it counts as extracted where one is at least 0.9 similar to the true one (Levenshtein, continuation
alone)."""


def span(values, digits=2):
    return "{:.{d}f} to {:.{d}f}".format(*values, d=digits)


def markdown(found, run):
    """The content of privacy.md."""
    blocks = [f"# What an audit of {found['client']} found ({run['backbone']})", HOW.format(**found)]
    blocks += [MEMBERSHIP, membership_table(found["membership"])]
    blocks += [VECTORS, vectors_table(found["vectors"])]
    blocks.append(PROXIES.format(m=found["m"], **found["proxies"]))
    if found["canaries"]:
        first = next(iter(found["canaries"].values()))
        blocks += [CANARIES.format(**first), canary_table(found["canaries"])]
    if found["extraction"]:
        first = next(iter(found["extraction"].values()))
        blocks += [EXTRACTION.format(**first), extraction_table(found["extraction"])]
    return "\n\n".join(blocks) + "\n"


def membership_table(rows):
    lines = []
    for label, row in rows.items():
        auc = f"{row['auc']:.3f} ({span(row['auc_interval'], 3)})"
        low, high = (100 * value for value in row["tpr_interval"])
        lines.append((label, [auc, f"{100 * row['tpr']:.1f} ({low:.1f} to {high:.1f})"]))
    return grid(["AUC", "true positives at 1% false, percent"], lines)


def vectors_table(rows):
    lines = []
    for count, row in rows.items():
        cells = [f"{row[name]:.3f} ({span(row[f'{name}_interval'], 3)})" for name in ("sent", "mean")]
        lines.append((f"N = {count}", [*cells, f"{row['predicted']:.3f}"]))
    return grid(["sent, AUC", "mean, AUC", "predicted"], lines)


def canary_table(rows):
    lines = []
    for label, row in rows.items():
        guesses = f"{row['right']} of {row['canaries']}"
        lines.append((label, [guesses, f"{row['epsilon']:.2f}", f"{row['ceiling']:.2f}"]))
    return grid(["right guesses", "epsilon is at least", "ceiling"], lines)


def extraction_table(rows):
    lines = []
    for label, row in rows.items():
        lines.append((label, [f"{row['extracted']} of {row['texts']}", f"{row['similarity']:.2f}"]))
    return grid(["extracted", "mean similarity of the best"], lines)


def roc_figure(path, scores):
    """ROC of the membership tests, both axes logarithmic. scores: {model: {"members", "others"}}."""
    figure, axes = pyplot().subplots(figsize=(5, 4))
    for label, own in scores.items():
        members, others = np.sort(own["members"])[::-1], np.sort(own["others"])[::-1]
        true = [(members > threshold).mean() for threshold in others]
        axes.step(np.arange(len(others)) / len(others), true, where="post", label=label)
    diagonal = np.geomspace(1e-3, 1, 50)
    axes.plot(diagonal, diagonal, "k:", label="chance")
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.05))
    axes.set(xlabel="false positives", ylabel="true positives")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)


def vectors_figure(path, rows):
    """AUC of the routing vectors' test against N."""
    figure, axes = pyplot().subplots(figsize=(5, 4))
    counts = [int(count) for count in rows]
    for name, style in (("sent", "o-"), ("mean", "s-"), ("predicted", "k--")):
        axes.plot(counts, [row[name] for row in rows.values()], style, label=name)
    axes.axhline(0.5, color="k", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="private records N", ylabel="AUC")
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)
