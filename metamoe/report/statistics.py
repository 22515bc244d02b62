"""Accuracies, their intervals, and paired differences; the geometry of a set of features."""

import math

import numpy as np


def is_choice(records):
    """Multiple choice, scored by accuracy; else instruction data, scored by the answers' perplexity."""
    return "choices" in records[0]


def is_right(scores, records):
    """1.0 where the likeliest choice has the answer's text, else 0.0, also where no letter was generated."""
    right = []
    for values, record in zip(scores, records, strict=True):
        best = int(np.argmax(values)) if len(values) else -1
        if "number" in record:  # two choices have the same text
            right.append(best == record["number"])
        else:
            right.append(best >= 0 and record["choices"][best] == record["answer"])
    return np.array(right, float)


def perplexity(scores):
    """exp of the mean negative log-probability of the answers' tokens."""
    return math.exp(-np.concatenate(scores).mean())


def wilson(successes, n, z=1.959964):
    """Wilson's 95% interval of a proportion, in percent."""
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)]


def paired_bootstrap(ours, theirs, seed, resamples=10_000):
    """MetaMoE's average minus another row's, in points, and its 95% interval.

    ours, theirs: {client: 1.0 or 0.0 a test sample}; samples are resampled within each client.
    """
    rng, draws = np.random.default_rng(seed), []
    differences = [ours[name] - theirs[name] for name in ours]
    for values in differences:
        draws.append(values[rng.integers(len(values), size=(resamples, len(values)))].mean(1))
    interval = np.percentile(100 * np.mean(draws, 0), [2.5, 97.5]).tolist()
    return {"difference": 100 * float(np.mean([v.mean() for v in differences])), "interval": interval}


def shares(counts):
    """Share of the tokens each expert got: (L, K) counts -> (L, K)."""
    counts = np.asarray(counts, float)
    return (counts / counts.sum(1, keepdims=True)).tolist()


def unit(features):
    """Rows scaled to length 1, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def log_det(z):
    """log det L_S of a set of unit vectors z (m, d), Eq. 4's diversity."""
    return float(np.linalg.slogdet(z @ z.T)[1])


def selection_terms(features, scores, proxies, m):
    """Both terms of Eq. 4 for the chosen set, and its overlap with the m most relevant."""
    top = set(np.argsort(-scores, kind="stable")[:m].tolist())
    chosen = set(proxies.tolist())
    return {
        "relevance_term": float(2 * np.log(scores[proxies]).sum()),  # Eq. 4, first term
        "diversity_term": log_det(unit(features[proxies])),  # Eq. 4, second term
        "jaccard_similarity": len(chosen & top) / len(chosen | top),
    }
