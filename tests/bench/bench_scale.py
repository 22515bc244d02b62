"""Federations of more clients, from runs that evaluate.py has scored: a table and a figure against K.

    for K in 3 8 16: bash run_all.sh --clients K --run-dir RUN-K     # see docs/results-clients.md
    python tests/bench/bench_scale.py --out clients.png RUN-3 RUN-8 RUN-16

Own share: the tokens of a client's test prompts that its own expert gets, mean over layers and clients.
Confused: for each client whose own expert gets under half of its tokens, the expert that gets most of them.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from common import command_line, header, row

from metamoe.atomic import atomic
from metamoe.report.models import title
from metamoe.rundir import folder_bytes, read_json

ROWS = ("zeroshot", "btm", "soup", "flexolmo", "metamoe", "metamoe-unit")


def shares(entry):
    """{client: {expert: its share of the client's tokens, mean over layers}} of a MoE's row."""
    found = {}
    for client, layers in entry.get("routing", {}).items():
        found[client] = dict(zip(entry["experts"], np.mean(layers, 0), strict=True))
    return found


def megabytes(folder):
    return f"{folder_bytes(folder) / 1e6:.1f}" if folder.is_dir() else "-"


def describe(run_dir, curves):
    """Print a run's lines of the table; add its accuracies to {row: {K: average}}."""
    results, timings = (read_json(run_dir / f"{name}.json") for name in ("results", "timings"))
    names = results["run"]["clients"]
    uploads = np.mean([sum(sizes_of(results, name)) for name in names]) / 1e6
    entries = {entry["model"]: entry for entry in results["rows"]}
    confused = {}
    for name in (name for name in ROWS if name in entries):
        entry, own = entries[name], shares(entries[name])
        first = np.mean([entry["clients"][client]["accuracy"] for client in names[:3]])
        share = f"{100 * np.mean([own[client][client] for client in names]):.1f}" if own else "-"
        curves[name][len(names)] = entry["average"]
        cost = timings.get(name, {})
        costs = [
            f"{cost[key]:.1f}" if key in cost else "-" for key in ("unify_seconds", "samples_per_second")
        ]
        accuracy = f"{entry['average']:.2f}", f"{first:.2f}"
        label = title(name, results["run"])
        row(len(names), label, *accuracy, share, *costs, megabytes(run_dir / "moe" / name), f"{uploads:.1f}")
        confused[label] = [
            f"{client} -> {max(other, key=other.get)} ({100 * max(other.values()):.0f}%)"
            for client, other in own.items()
            if other[client] < 0.5
        ]
    return confused


def sizes_of(results, client):
    """Bytes of each of the client's uploads."""
    return [size for key, size in results["uploaded_bytes"].items() if key.startswith(f"{client}/")]


def draw(path, curves):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name, found in curves.items():
        label = title(name, {})
        axes.plot(list(found), list(found.values()), marker="o", label=label)
    axes.set(xlabel="clients K", ylabel="average accuracy, %", xticks=sorted(next(iter(curves.values()))))
    axes.legend(fontsize=8)
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main():
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", default="clients.png", help="the figure")
    args = parser.parse_args()
    columns = "K | row | average | average of the first three | own share, % | unify, s | samples/s"
    header(f"{columns} | model, MB | uploads of a client, MB", "rlrrrrrrr")
    curves, lines = defaultdict(dict), []
    for run_dir in args.runs:
        for label, pairs in describe(run_dir, curves).items():
            if pairs:
                lines.append(f"K = {run_dir.name}, {label}: {', '.join(pairs)}")
    print("\nConfused:", *lines, sep="\n", flush=True)
    draw(args.out, curves)


if __name__ == "__main__":
    main()
