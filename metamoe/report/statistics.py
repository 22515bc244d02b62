"""Accuracies, their intervals, and paired differences."""

import math

import numpy as np


def is_choice(records):
    """Multiple choice, scored by accuracy; else instruction data, scored by the answers' perplexity."""
    return "choices" in records[0]


def is_right(scores, records):
    """1.0 where the answer's text is the likeliest choice, else 0.0; also 0.0 where no letter was
    generated."""
    return np.array(
        [
            float(len(values) > 0 and record["choices"][int(np.argmax(values))] == record["answer"])
            for values, record in zip(scores, records, strict=True)
        ]
    )


def perplexity(scores):
    """exp of the mean negative log-probability of the answers' tokens."""
    return math.exp(-np.concatenate(scores).mean())


def wilson(successes, n, z=1.959964):
    """Wilson's 95% interval of a proportion, in percent."""
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)]


def paired_bootstrap(ours, theirs, seed, resamples=10_000):
    """MetaMoE's average minus another row's, in points, and its 95% interval: test samples resampled within
    each client."""
    rng, draws = np.random.default_rng(seed), []
    differences = [ours[name] - theirs[name] for name in ours]
    for values in differences:
        draws.append(values[rng.integers(len(values), size=(resamples, len(values)))].mean(1))
    low, high = np.percentile(100 * np.mean(draws, 0), [2.5, 97.5])
    return {
        "difference": 100 * float(np.mean([values.mean() for values in differences])),
        "interval": [float(low), float(high)],
    }


def shares(counts):
    """Share of the tokens each expert got: (L, K) counts -> (L, K)."""
    counts = np.asarray(counts, float)
    return (counts / counts.sum(1, keepdims=True)).tolist()
