"""Noisy sums of clipped rows, and what is computed of them: relevance and routing vectors.

D_0 is public: centres, scales, lengths to clip at and covariances all come from it. Only the noisy sums and
the noisy count have seen private records; all that follows is post-processing.
"""

import math
import os

import numpy as np
import torch

RIDGE = 0.1  # of the covariance's mean eigenvalue: the noise is as large in the directions of little variance
PUBLIC_ROWS = 10_000  # of D_0 that its moments are taken over
PUBLIC_SAMPLES = 256  # of D_0 that give routing vectors and gradients their scale


def secret_generator():
    """A generator that nobody else can repeat: noise of a known random seed could be subtracted."""
    return np.random.default_rng(int.from_bytes(os.urandom(32)))


def clip_factors(lengths, bound):
    """The factors that make rows of these lengths at most `bound` long; 0 for a row that is not finite."""
    factors = (bound / lengths).clamp(max=1.0)
    return torch.where(lengths.isfinite(), factors, 0.0)


def noisy_sum(rows, noise, rng):
    """The sum of rows (n, d), each at most 1 long, with Gaussian noise of this multiplier: (d,)."""
    return np.nan_to_num(rows).sum(0) + noise * rng.standard_normal(rows.shape[1])


def public_sample(public, usable, seed, count=PUBLIC_SAMPLES):
    """`count` random records of D_0; seed: the random seed."""
    chosen = np.random.default_rng([seed, 23]).permutation(usable)[:count]
    return [public[i] for i in np.sort(chosen)]


def private_relevance(public, private, count, noise, seed, usable, rng):
    """g(x, D_p) of Eq. 7 for every public sample (|D_0|,) from a noisy mean of unit private features.

    Features are standardised by D_0 and scaled to length 1, so a record changes their sum (d,) by at most 1.
    Linear discriminant analysis against D_0's mean and covariance scores D_0. In its model the posterior is
    the logistic function of the score; the prior is count : negatives, as for select_proxies.relevance.
    """
    usable = np.arange(len(public)) if usable is None else np.asarray(usable)
    sample = public[np.sort(np.random.default_rng([seed, 7]).permutation(usable)[:PUBLIC_ROWS])]
    mean, scale = sample.mean(0, dtype=np.float64), sample.std(0, dtype=np.float64) + 1e-6

    def units(rows):
        rows = (rows - mean) / scale
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)

    known = units(sample)
    shift = noisy_sum(units(private), noise, rng) / count - known.mean(0)  # (d,)
    covariance = np.cov(known.T)
    covariance += RIDGE * np.trace(covariance) / len(mean) * np.eye(len(mean))
    direction = np.linalg.solve(covariance, shift)
    # The noise alone makes this longer by its variance over each direction's.
    distance = direction @ shift - (noise / count) ** 2 * np.trace(np.linalg.inv(covariance))
    distance = math.sqrt(max(distance, 0.1))
    along = known @ direction
    odds = math.log(count / min(PUBLIC_ROWS, len(usable) // 2))
    scores = np.zeros(len(public))
    for start in range(0, len(usable), 65_536):  # of a memory map: a stretch at a time
        rows = usable[start : start + 65_536]
        place = (units(public[rows]) @ direction - along.mean()) / along.std()
        scores[rows] = 1 / (1 + np.exp(distance**2 / 2 - odds - distance * place))
    return scores


def public_scale(backbone, model, sample):
    """(centre (L, d), length (L,)): mean of the samples' vectors in each layer, median distance to it."""
    rows = [[] for _ in backbone.ffn_names]

    def keep(layer, values):
        rows[layer].append(values)
        return values

    centre = backbone.input_sums(model, sample, "routing vectors of D_0", backbone.width, keep) / len(sample)
    centre = centre.float()
    pairs = zip(rows, centre.to(backbone.device), strict=True)
    lengths = [(torch.cat(own) - middle).norm(dim=1).median() for own, middle in pairs]
    return centre, torch.stack(lengths).cpu()


def private_vectors(backbone, model, records, sample, count, noise, rng):
    """(routing vectors (L, d), the length that each layer's differences to D_0 were clipped at).

    Each record's vectors v_l = (h_l - centre_l) / length_l are clipped to 1 a layer, so that one record
    changes the sum (L, d) by at most sqrt(L). Without noise nothing is clipped.
    """
    centre, length = public_scale(backbone, model, sample)
    on_device = [tensor.to(backbone.device) for tensor in (centre, length)]

    def clipped(layer, rows):  # (b, d)
        rows = (rows - on_device[0][layer]) / on_device[1][layer]
        factors = clip_factors(rows.norm(dim=1), 1.0 if noise else math.inf)
        return torch.nan_to_num(rows) * factors[:, None]

    total = backbone.input_sums(model, records, "routing vectors", backbone.width, clipped)
    total += noise * math.sqrt(len(centre)) * torch.from_numpy(rng.standard_normal(total.shape))
    return (centre + length[:, None] * (total / count)).float(), length.tolist()
