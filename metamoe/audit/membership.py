"""Membership tests: how well a score tells the records that were used from others like them."""

import math

import numpy as np

RESAMPLES = 1000


def auc(members, others):
    """P(score of a member > score of another), ties counted by half."""
    others = np.sort(others)
    below = np.searchsorted(others, members, "left") + np.searchsorted(others, members, "right")
    return float(below.mean() / 2 / len(others))


def true_positives(members, others, rate):
    """The share of members above a threshold that at most this share of the others is above."""
    threshold = np.sort(others)[::-1][math.floor(rate * len(others))]
    return float((members > threshold).mean())


def membership(members, others, seed, rate=0.01):
    """The row of a membership test: AUC and the true positives at a rate of false ones, with 95% intervals.

    members, others: their scores, higher for "a member". Intervals: bootstrap over both, by a random seed.
    """
    members, others = np.asarray(members, float), np.asarray(others, float)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        a, b = (values[rng.integers(len(values), size=len(values))] for values in (members, others))
        draws.append((auc(a, b), true_positives(a, b, rate)))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {
        "members": len(members),
        "others": len(others),
        "auc": auc(members, others),
        "auc_interval": [float(low[0]), float(high[0])],
        "tpr": true_positives(members, others, rate),
        "tpr_interval": [float(low[1]), float(high[1])],
    }


def answer_losses(backbone, model, records, label):
    """-log p(answer | prompt) of each record, (n,); of an image over the classes."""
    if "image" in records[0]:
        logits = backbone.scores(model, records, label=label)
        right = [record["choices"].index(record["answer"]) for record in records]
        rows = [values - values.max() for values in logits]
        return np.array([np.log(np.exp(row).sum()) - row[i] for row, i in zip(rows, right, strict=True)])
    forms = [backbone.form(record) for record in records]
    plain = [{key: value for key, value in form.items() if key != "choices"} for form in forms]
    return np.array([-tokens.sum() for tokens in backbone.scores(model, plain, label=label)])
