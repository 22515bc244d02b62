"""Membership by routing vectors: their product with a sample's own vectors, against the number of samples."""

import math

import numpy as np
from scipy.stats import norm
from sklearn.covariance import LedoitWolf

from metamoe.audit.membership import auc

COUNTS = (25, 50, 100, 200, 400)  # N
CUTS = 10  # random cuts into reference, members and others


def sample_vectors(backbone, model, records, label):
    """Each record's token mean of each FFN's input, (n, L, d) float32."""
    out = np.empty((len(records), len(backbone.ffn_names), backbone.width), np.float32)
    for indices, vectors in backbone.sample_vectors(model, records, label):
        out[indices] = vectors.float().cpu().numpy()
    return out


def whitened(vectors, reference):
    """(n, L d): every layer's vectors in the units of its reference: mean 0, covariance 1 (Ledoit-Wolf)."""
    parts = []
    for layer in range(vectors.shape[1]):
        found = LedoitWolf().fit(reference[:, layer])
        values, axes = np.linalg.eigh(found.covariance_.astype(float))
        least = 1e-6 * values.mean() + 1e-12  # two records leave the covariance singular
        root = axes / np.sqrt(values.clip(least))  # x S^-1 y = (x root) (y root)
        parts.append((vectors[:, layer] - found.location_) @ root)
    return np.concatenate(parts, 1)


def attack(vectors, counts=COUNTS, cuts=CUTS, seed=0):
    """{N: {"sent": AUC, "mean": AUC, "predicted": AUC}}, means over cuts, and intervals of the first two.

    vectors: (n, L, d) of one client's records. The score of a record is its Mahalanobis product with what is
    sent, added up over the layers; mean and covariance are those of a fifth of the records, which are
    neither members nor others. sent: the mean of half of the N members, as of sending.private_half, but not
    rounded. mean: of all. predicted: of `mean`, from m_x / sqrt(N), the distance of members and others in
    standard deviations, where m_x is that of N = 1.
    """
    rng, found, known = np.random.default_rng(seed), {}, max(2, len(vectors) // 5)
    most = int(0.85 * (len(vectors) - known))
    usable = [count for count in counts if count <= most] or [most]
    for _ in range(cuts):
        order = rng.permutation(len(vectors))
        reference, rest = np.split(order, [known])
        z = whitened(vectors[rest], vectors[reference])
        products = z @ z.T
        own, cross = products.diagonal().mean(), products[~np.eye(len(z), dtype=bool)]
        distance = (own - cross.mean()) / cross.std()  # m_x
        for count in usable:
            row = found.setdefault(count, {"sent": [], "mean": [], "predicted": []})
            members, others = z[:count], z[count:]
            for name, used in (("sent", members[: (count + 1) // 2]), ("mean", members)):
                vector = used.mean(0)
                row[name].append(auc(members @ vector, others @ vector))
            row["predicted"].append(float(norm.cdf(distance / math.sqrt(2 * count))))
    return {count: summary(row) for count, row in found.items()}


def summary(row):
    """Means over the cuts, with a 95% interval of the mean for what was measured."""
    out = {name: float(np.mean(values)) for name, values in row.items()}
    for name in ("sent", "mean"):
        half = 1.96 * np.std(row[name], ddof=1) / math.sqrt(len(row[name]))
        out[f"{name}_interval"] = [out[name] - half, out[name] + half]
    return out
