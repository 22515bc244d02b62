"""Figure 2, and how the proxies of each selection cover a client's data."""

import numpy as np

from metamoe.records import usable_public
from metamoe.rundir import atomic, read_json, sha256


def coverage_identity(run_dir, run):
    """What the coverage was measured on: {client: {rule: hash of its selection}}."""
    paths = {
        name: (run_dir / "clients" / name / "selection").glob("*/selection.json") for name in run["clients"]
    }
    return {name: {path.parent.name: sha256(path) for path in sorted(found)} for name, found in paths.items()}


def coverage(run_dir, run, backbone, records, split):
    """{client: {rule: {"distance", "log_det"}}} of the selections there are, and Figure 2:
    RUN/figure2-NAME.png (of another split than test, figure2-NAME.SPLIT.png).

    distance: mean over private test samples of 1 - cosine to the nearest proxy, on the seed's features.
    log_det: log det L_S of the proxies, Eq. 4's diversity. The figure is one t-SNE of private test data, up
    to 2,000 of D_0 and all proxies, so that its panels share their axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    public = np.load(run_dir / "public" / "features.npy", mmap_mode="r")
    found = {}
    for name in run["clients"]:
        paths = {
            rule: run_dir / "clients" / name / "selection" / rule / "selection.json"
            for rule in ("random", "similarity", "dpp", "dpp-all")
        }
        proxies = {
            rule: np.array(read_json(path)["proxies"]) for rule, path in paths.items() if path.exists()
        }
        private = unit(backbone.features(records[name], label=f"embedding {name}"))
        found[name] = {}
        for rule, chosen in proxies.items():
            z = unit(public[np.sort(chosen)])
            found[name][rule] = {
                "distance": float((1 - (private @ z.T).max(1)).mean()),
                "log_det": float(np.linalg.slogdet(z @ z.T)[1]),
            }
        rng = np.random.default_rng(run["seed"])
        shown = np.union1d(
            rng.permutation(usable_public(run_dir, public))[:2000], np.concatenate(list(proxies.values()))
        )
        points = np.concatenate([private, unit(public[shown])])
        plane = TSNE(
            metric="cosine", init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=run["seed"]
        ).fit_transform(points)
        own, others = plane[: len(private)], plane[len(private) :]
        figure, axes = plt.subplots(
            1, len(proxies), figsize=(5 * len(proxies), 5.4), sharex=True, sharey=True, squeeze=False
        )
        for axis, (rule, chosen) in zip(axes[0], proxies.items(), strict=True):
            axis.scatter(*others.T, s=4, c="#c8c8c8", linewidths=0, label="public set")
            axis.scatter(*own.T, s=9, c="#1f77b4", linewidths=0, label=f"{name}, private test data")
            axis.scatter(
                *others[np.searchsorted(shown, chosen)].T,
                s=18,
                c="#d62728",
                edgecolors="white",
                linewidths=0.4,
                label="proxies",
            )
            label = {
                "random": "random",
                "similarity": "most relevant",
                "dpp": "relevance-weighted DPP",
                "dpp-all": "DPP, whole public set",
            }[rule]
            axis.set_title(
                label + "\ndistance {distance:.3f}, log det {log_det:.0f}".format(**found[name][rule])
            )
            axis.set_xticks([]), axis.set_yticks([])
        figure.suptitle(
            f"{run['backbone']}: proxies for {name} (m = {run['proxies']}), t-SNE of the seed's features"
        )
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, markerscale=2, frameon=False
        )
        with atomic(run_dir / f"figure2-{name}{'' if split == 'test' else '.' + split}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return found


def unit(features):
    """Rows scaled to length 1, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
