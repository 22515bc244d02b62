"""Relevance-weighted DPP proxy selection by greedy MAP (MetaMoE, Sec. 3.2 and App. B).

A determinantal point process prefers subsets whose kernel has a large determinant: relevant items that
differ from one another. A client scores public samples for relevance r and keeps the k whose kernel
L~ = Diag(r) L Diag(r), with L_ij = cos(z_i, z_j), has (greedily) the largest log-determinant:

    indices = relevance_weighted_dpp(features, relevance, k)    # features (n, d), relevance (n,)

This file needs numpy and torch alone and may be copied on its own. Equation numbers are the paper's.
The incremental Cholesky factor is that of Chen, Zhang & Zhou, "Fast Greedy MAP Inference for Determinantal
Point Process to Improve Recommendation Diversity" (NeurIPS 2018).
"""

import warnings

import numpy as np
import torch


def relevance_weighted_dpp(features, relevance, k, return_gains=False):
    """Greedily pick k items that maximise log det(L~_S), without forming the n x n kernel.

        L~_ij = r_i cos(z_i, z_j) r_j                                 (Eq. 2-3)
        log det(L~_S) = 2 sum_{i in S} log r_i + log det(L_S)         (Eq. 4)

    Each step takes the item of largest gain 2 log r_i + log rho_i, where rho_i is the part of the unit
    vector z_i / |z_i| that the items chosen so far leave unexplained. The scale of r is therefore
    irrelevant. O(n (d + k)) time a step and O(n (d + k)) memory.

    Args:
        features: (n, d), one embedding a row; only the direction counts. NumPy array, list or torch tensor.
        relevance: (n,), at least 0, of the same kind as features.
        k: how many items to pick, 1 <= k <= n.
        return_gains: also return each step's gain; the gains add up to log det(L~_S).

    Returns:
        indices (k,), int64, in the order of selection; with return_gains, (indices, gains), gains (k,).
        NumPy for NumPy input, else torch on the device of features. All is computed in float64 (float32 on mps).

    Order: gains closer than eps^(2/3) (4e-11 in float64) are ties and go to the lowest index. An item is
    spent once rho_i <= eps^(2/3): it adds no direction. When all are spent, the rest is filled by relevance
    (highest first, then lowest index). Items of relevance 0 come after all others, by rho while that lasts.
    Such fillers have gain -inf, for then det(L~_S) = 0, and cause one RuntimeWarning.

    Raises:
        ValueError: k is not an integer in 1..n; NaN or inf; a shape that does not fit; a zero feature row;
            negative or all-zero relevance.
        TypeError: a torch tensor together with an array or a list.

    Source: MetaMoE, Sec. 3.2 (Eq. 2-4) and App. B.
    """
    if isinstance(features, torch.Tensor) != isinstance(relevance, torch.Tensor):
        raise TypeError("features and relevance must be both torch tensors or both NumPy arrays (or lists)")
    z = _to_tensor(features, "features")
    r = _to_tensor(relevance, "relevance").to(z)
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"features must have shape (n, d) with d >= 1, got {tuple(z.shape)}")
    if r.shape != z.shape[:1]:
        raise ValueError(f"relevance must have shape ({len(z)},) to match features, got {tuple(r.shape)}")
    _check_k(k, len(z))
    if (r < 0).any():
        raise ValueError("relevance must not be negative")
    if not r.any():
        raise ValueError("relevance is zero for every item")
    largest = z.abs().amax(1, keepdim=True)
    if not largest.all():
        raise ValueError(f"features has a zero row ({int((largest == 0).int().argmax())}), whose cosine is undefined")
    z = z / largest  # first, so that squares of huge or tiny entries neither overflow nor vanish
    z /= torch.linalg.vector_norm(z, dim=1, keepdim=True)

    order, gains = _greedy(lambda j: z @ z[j], 2 * r.log(), k, torch.finfo(r.dtype).eps)
    return _like(features, order, gains, return_gains)


def greedy_map(kernel, k, return_gains=False):
    """Greedily pick k items that maximise log det(kernel_S), for an explicit kernel.

        log det(L_{S + i}) - log det(L_S) = log L_ii + log rho_i      (App. B: sigma^2 = L_ii rho_i)

    where rho_i is the share of L_ii that the items chosen so far leave unexplained. O(nk) time a step.

    Args:
        kernel: (n, n), symmetric and positive semidefinite (the latter is not checked), such as L~ of Eq. 3.
            NumPy array, list or torch tensor.
        k: how many items to pick, 1 <= k <= n.
        return_gains: also return each step's gain; the gains add up to log det(kernel_S).

    Returns:
        As relevance_weighted_dpp, with the same order and warning; L_ii stands in for the relevance, and eps is that
        of the kernel's own dtype. Items with L_ii = 0 come last.

    Raises:
        ValueError: k is not an integer in 1..n; kernel has NaN or inf, is not square, not symmetric (beyond 1e-5
            of sqrt(L_ii L_jj)) or has a negative diagonal.

    Source: MetaMoE, Eq. 1, Eq. 8 and App. B.
    """
    c = _to_tensor(kernel, "kernel")
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"kernel must be square, got shape {tuple(c.shape)}")
    _check_k(k, len(c))
    diagonal = c.diagonal()
    if (diagonal < 0).any():
        raise ValueError("kernel has a negative diagonal entry, so it is not positive semidefinite")
    # Scaled to unit diagonal, the kernel splits as Eq. 3 does, and one rank guard suits items of any size.
    scale = torch.where(diagonal > 0, diagonal.sqrt(), 1.0)
    c = c / scale / scale[:, None]
    if ((c - c.T).abs() > 1e-5).any():  # room for a kernel that was multiplied out in float32
        raise ValueError("kernel must be symmetric")

    # The entries of a float32 kernel stay that coarse when upcast, and so does rho. (float32 features are no such
    # trouble: an error e in a vector is one of e^2, about 1e-14, in its rho.)
    eps = max(torch.finfo(c.dtype).eps, _eps(kernel))
    order, gains = _greedy(lambda j: c[j], diagonal.log(), k, eps)
    return _like(kernel, order, gains, return_gains)


def _greedy(row, log_weight, k, eps):
    """Greedy MAP for Diag(w) C Diag(w): row(j) gives row j of C (unit diagonal), log_weight is 2 log w, both (n,).

    eps is the rounding error of C. Returns indices (k,) and gains (k,).
    """
    # Dividing by sqrt(rho_j) magnifies rounding to eps / sqrt(rho_j) at worst. With no pivot below eps^(2/3) that
    # stays under eps^(2/3), so whatever lies below is noise.
    tol = eps ** (2 / 3)
    rho = torch.ones_like(log_weight)  # the diagonal of C, less what the chosen items explain
    factor = rho.new_empty(k, len(rho))  # row t: entry t of y (App. B) for each of the n items, chosen or not
    order = torch.empty(k, dtype=torch.int64, device=rho.device)
    gains = torch.full_like(factor[:, 0], -torch.inf)
    free = torch.ones_like(rho, dtype=torch.bool)
    positive = log_weight > -torch.inf
    finite_weight = torch.where(positive, log_weight, 0.0)  # items of weight 0 compete by rho alone
    picked = rank = 0

    for group in positive, ~positive:
        while picked < k:
            live = free & group & (rho > tol)
            gain = torch.where(live, finite_weight + rho.log(), -torch.inf)  # Eq. 4 with i minus Eq. 4 without
            best = gain.max()
            if best == -torch.inf:
                break
            j = int((gain >= best - tol).int().argmax())  # the lowest index among the ties
            order[picked] = j
            gains[picked] = log_weight[j] + rho[j].log()
            free[j] = False
            y = (row(j) - factor[:rank, j] @ factor[:rank]) / rho[j].sqrt()  # App. B: P y = k, its last line
            rho -= y * y  # App. B: sigma^2 = L_xx - |y|^2
            factor[rank] = y
            picked, rank = picked + 1, rank + 1
        # What is left of the group adds no direction, hence leaves every rho as it is: no need to go one by one.
        rest = (free & group).nonzero()[:, 0]
        rest = rest[finite_weight[rest].argsort(descending=True, stable=True)][: k - picked]
        order[picked : picked + len(rest)] = rest
        picked += len(rest)

    fillers = int((gains == -torch.inf).sum())
    if fillers:
        warnings.warn(
            f"the kernel's numerical rank is used up: {fillers} of the {k} items add nothing to the determinant and "
            "were filled in by relevance (by the diagonal, for an explicit kernel)", RuntimeWarning, stacklevel=3)
    return order, gains


def _to_tensor(x, name):
    """x as a float64 tensor (float32 on mps, which has no float64), cut from any autograd graph."""
    if not isinstance(x, torch.Tensor):
        x = torch.from_numpy(np.array(x, dtype=np.float64))
    x = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)
    if not x.isfinite().all():
        raise ValueError(f"{name} contains NaN or inf")
    return x


def _eps(x):
    """The rounding error that x arrives with: that of its dtype, 0 for integers."""
    if isinstance(x, torch.Tensor):
        return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    dtype = np.asarray(x).dtype
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0


def _check_k(k, n):
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
        raise ValueError(f"k must be an integer between 1 and n = {n}, got {k!r}")


def _like(x, order, gains, return_gains):
    """The results in the kind of the input x."""
    if not isinstance(x, torch.Tensor):
        order, gains = order.numpy(), gains.numpy()
    return (order, gains) if return_gains else order
