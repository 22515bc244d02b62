"""BTM: no model; the mean of the private-only experts' predictions."""

import math

import numpy as np


def merge(uploads, folder):
    """BTM keeps the uploads as they are: there is no model to write."""


def probabilities(scores):
    """Softmax over the choices of each record."""
    return [np.exp(values - np.logaddexp.reduce(values)) for values in map(np.asarray, scores)]


def ensemble(experts, instruction=()):
    """BTM: the mean of the private-only experts' probabilities over the choices, {client: [[...], ...]}; for
    the clients of `instruction` data the logarithm of their mean probability of each token."""
    mixed = {}
    for name in experts[0]["scores"]:
        if name in instruction:
            mixed[name] = [
                np.logaddexp.reduce(tokens) - math.log(len(experts))
                for tokens in zip(*(expert["scores"][name] for expert in experts), strict=True)
            ]
        else:
            mixed[name] = [
                np.mean(ps, 0)
                for ps in zip(*(probabilities(expert["scores"][name]) for expert in experts), strict=True)
            ]
    return mixed
