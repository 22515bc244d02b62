"""Canaries: records with random answers, each used or not by the toss of a coin, and what guessing tells.

"Privacy Auditing with One (1) Training Run", Steinke, Nasr & Jagielski (NeurIPS 2023, arXiv 2305.08846).
"""

import numpy as np
from scipy.stats import binom


def make_canaries(records, rng):
    """Copies of records, each with a random one of its choices as answer; without choices with another's."""
    canaries, order = [], rng.permutation(len(records))
    for i, record in enumerate(records):
        if "choices" in record:
            number = int(rng.integers(len(record["choices"])))
            changed = {"answer": record["choices"][number]}
            changed |= {"number": number} if "number" in record else {}
        else:
            changed = {"answer": records[order[i]]["answer"]}
        canaries.append(record | changed)
    return canaries


def guess(scores, used):
    """How many of m guesses are right: the m / 2 canaries of the highest scores are guessed used, others not.

    scores: (m,), higher for "used". used: (m,) bool, the coins.
    """
    guesses = np.zeros(len(scores), bool)
    guesses[np.argsort(-np.asarray(scores), kind="stable")[: len(scores) // 2]] = True
    return int((guesses == np.asarray(used)).sum())


def p_value(epsilon, delta, right, guesses, canaries):
    """The most likely that an (epsilon, delta)-private training lets so many of the guesses be right.

    The paper's bound for approximate privacy: P(V >= v) <= beta + alpha 2 m delta, beta = P(V* >= v) and
    alpha = max over i of P(v - i <= V* < v) / i, with V* ~ Binomial(r, e^eps / (e^eps + 1)).
    """
    q = 1 / (1 + np.exp(-epsilon))
    beta = binom.sf(right - 1, guesses, q)
    below = np.cumsum(binom.pmf(right - np.arange(1, right + 1), guesses, q))
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, float(beta) + alpha * 2 * canaries * delta)


def lower_bound(right, guesses, canaries, delta, confidence=0.95):
    """The largest epsilon that so many right guesses refute, at this delta and confidence; 0: none."""
    low, high = 0.0, 20.0
    if p_value(low, delta, right, guesses, canaries) > 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        refuted = p_value(middle, delta, right, guesses, canaries) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low
