"""Figure 2, coverage of a client's data by the proxies, routing shares, losses."""

import numpy as np

from metamoe.records import usable_public
from metamoe.report.statistics import log_det, unit
from metamoe.rundir import atomic, inside, read_json, sha256, write_json

# The selection rules in the order of the figure, with their names in the cost tables and above a panel of
# Figure 2. Another rule is called by its folder and comes after these.
RULES = {
    "random": ("random", "random"),
    "similarity": ("similarity", "most relevant"),
    "dpp": ("DPP", "relevance-weighted DPP"),
    "dpp-all": ("DPP, whole public set", "DPP, whole public set"),
}


def known_first(rules):
    """The rules of RULES in its order, then the others by name."""
    return [rule for rule in RULES if rule in rules] + sorted(set(rules) - RULES.keys())


def selections(run_dir, client):
    """{rule: the selection.json of this client}."""
    folder = run_dir / "clients" / client / "selection"
    rules = [path.parent.name for path in folder.glob("[!.]*/selection.json")]
    return {rule: folder / rule / "selection.json" for rule in known_first(rules)}


def coverage(evaluation, draw):
    """{client: {rule: {"distance", "log_det"}}}, kept in RUN/scores/; None where it was not measured yet.

    draw: measure it now, and draw Figure 2.
    """
    path = evaluation.run_dir / "scores" / f"coverage.{evaluation.split}.json"
    identity = {}
    for name in evaluation.records:
        files = selections(evaluation.run_dir, name)
        identity[name] = {rule: sha256(file) for rule, file in files.items()}
    if draw:
        backbone = evaluation.load_backbone()
        found = {name: cover_client(evaluation, backbone, name) for name in evaluation.records}
        inside(evaluation.run_dir, "scores")
        write_json(path, {"identity": identity, "coverage": found})
    kept = read_json(path) if path.exists() else {"identity": None}
    return kept["coverage"] if kept["identity"] == identity else None


def cover_client(evaluation, backbone, client):
    """{rule: {"distance", "log_det"}} of the client's selections; draws its Figure 2.

    distance: mean over private test samples of 1 - cosine to the nearest proxy, on the seed model's features.
    """
    public = np.load(evaluation.run_dir / "public" / "features.npy", mmap_mode="r")
    private = unit(backbone.features(evaluation.records[client], label=f"embedding {client}"))
    proxies, found = {}, {}
    for rule, path in selections(evaluation.run_dir, client).items():
        proxies[rule] = np.array(read_json(path)["proxies"])
        z = unit(public[np.sort(proxies[rule])])
        distance = float((1 - (private @ z.T).max(1)).mean())
        found[rule] = {"distance": distance, "log_det": log_det(z)}
    figure2(evaluation, client, private, public, proxies, found)
    return found


def figure2(evaluation, client, private, public, proxies, found):
    """RUN/figure2-CLIENT.png (of another split than test, figure2-CLIENT.SPLIT.png), a panel a rule.

    One t-SNE of private test data, up to 2,000 of D_0 and all proxies, so that the panels share their axes.
    """
    plt = pyplot()
    run_dir, run = evaluation.run_dir, evaluation.run
    order = np.random.default_rng(run["seed"]).permutation(usable_public(run_dir, public))
    shown = np.union1d(order[:2000], np.concatenate(list(proxies.values())))
    plane = project(np.concatenate([private, unit(public[shown])]), run["seed"])
    own, others = plane[: len(private)], plane[len(private) :]
    size = (5 * len(proxies), 5.4)
    figure, axes = plt.subplots(1, len(proxies), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, (rule, chosen) in zip(axes[0], proxies.items(), strict=True):
        red = others[np.searchsorted(shown, chosen)]
        axis.scatter(*others.T, s=4, c="#c8c8c8", linewidths=0, label="public set")
        axis.scatter(*own.T, s=9, c="#1f77b4", linewidths=0, label=f"{client}, private test data")
        axis.scatter(*red.T, s=18, c="#d62728", edgecolors="white", linewidths=0.4, label="proxies")
        _, label = RULES.get(rule, (rule, rule))
        axis.set_title(label + "\ndistance {distance:.3f}, log det {log_det:.0f}".format(**found[rule]))
        axis.set(xticks=[], yticks=[])
    what = f"proxies for {client} (m = {run['proxies']}), t-SNE of the seed model's features"
    figure.suptitle(f"{run['backbone']}: {what}")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    legend = axes[0][0].get_legend_handles_labels()
    figure.legend(*legend, loc="lower center", ncols=3, markerscale=2, frameon=False)
    suffix = "" if evaluation.split == "test" else f".{evaluation.split}"
    save_figure(figure, run_dir / f"figure2-{client}{suffix}.png")


def routing_figure(path, run, rows):
    """Heat maps of the shares of a client's tokens: layers x experts, a panel a client, a line a model."""
    rows = [row for row in rows if "routing" in row]
    if not rows:
        return
    plt = pyplot()
    size = 1.2 + 1.6 * len(run["clients"]), 0.6 + 2.2 * len(rows)
    shape = len(rows), len(run["clients"])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for line, row in zip(axes, rows, strict=True):
        for axis, name in zip(line, run["clients"], strict=True):
            image = axis.imshow(row["routing"][name], vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axis.set_xticks(range(len(row["experts"])), row["experts"], rotation=45, ha="right", fontsize=6)
            axis.set_title(f"{row['title']}: {name}", fontsize=7)
            axis.tick_params(axis="y", labelsize=6)
        line[0].set_ylabel("layer", fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the client's tokens", fraction=0.05)
    save_figure(figure, path)


def losses_figure(path, run_dir, run):
    """The training losses: a panel for the clients' experts, one for the final trainings."""
    folders = {}
    for name in run["clients"]:
        for folder in sorted((run_dir / "clients" / name / "experts").glob("[!.]*")):
            folders[folder] = 0, f"{name}, {folder.name}"
    for folder in sorted((run_dir / "moe").glob("[!.]*")):
        folders[folder] = 1, folder.name
    files = {folder: folder / "losses.json" for folder in folders}
    found = {folder: read_json(file) for folder, file in files.items() if file.exists()}
    if not any(found.values()):
        return
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for folder, losses in found.items():
        panel, label = folders[folder]
        window = max(1, len(losses) // 20)
        if losses:
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes[panel].plot(np.arange(len(smooth)) + window, smooth, label=label, linewidth=1)
    for axis, title in zip(axes, ("experts", "final training"), strict=True):
        axis.set(title=f"{title}: mean loss of the last steps (a twentieth of all)", xlabel="step")
        if axis.lines:
            axis.legend(fontsize=6)
    figure.tight_layout()
    save_figure(figure, path)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path):
    """Write a PNG, the same bytes for the same figure."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)


def project(points, seed):
    """t-SNE of unit vectors on the plane, (N, d) -> (N, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)
