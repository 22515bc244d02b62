"""Relevance-weighted DPP proxy selection by greedy MAP (MetaMoE, Sec. 3.2 and App. B).

A determinantal point process prefers subsets whose kernel has a large determinant: relevant items that
differ from one another. A client scores public samples for relevance r and keeps the k whose kernel
L~ = Diag(r) L Diag(r), with L_ij = cos(z_i, z_j), has (greedily) the largest log-determinant:

    indices = relevance_weighted_dpp(features, relevance, k)    # features (n, d), relevance (n,)

Features may be float16 on disk (np.load(..., mmap_mode="r")) and n a million: the search is exact, yet lazy (it
looks again only at items that could be next) and blocked (matrix products, no n x n kernel, no n x k factor).

This file needs numpy and torch alone and may be copied on its own. Equation numbers are the paper's.
Sources: the incremental Cholesky factor is that of Chen, Zhang & Zhou, "Fast Greedy MAP Inference for Determinantal
Point Process to Improve Recommendation Diversity" (NeurIPS 2018); gains of earlier steps as bounds, that of Hemmi,
Oki, Sakaue, Fujii & Iwata, "Lazy and Fast Greedy MAP Inference for Determinantal Point Process" (NeurIPS 2022).
"""

import math
import warnings

import numpy as np
import torch

POOL = 128  # items that compete at a time: more of them, fewer rounds of larger matrices
ROWS = 256  # features in memory at a time, in float64


def relevance_weighted_dpp(features, relevance, k, return_gains=False):
    """Greedily pick k items that maximise log det(L~_S), without forming the n x n kernel.

        L~_ij = r_i cos(z_i, z_j) r_j                                 (Eq. 2-3)
        log det(L~_S) = 2 sum_{i in S} log r_i + log det(L_S)         (Eq. 4)

    Each step takes the item of largest gain 2 log r_i + log rho_i, where rho_i is the part of the unit
    vector z_i / |z_i| that the items chosen so far leave unexplained. The scale of r is therefore
    irrelevant. At most O(n d) time a step (far less where r or z set items apart), O(n + k d) memory beside features.

    Args:
        features: (n, d), one embedding a row; only the direction counts. NumPy array (also a memory map), list or torch
            tensor; float16, bfloat16 and float32 stay as they are and are read in stretches.
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
    z = features.detach() if isinstance(features, torch.Tensor) else np.asarray(features)
    if z.dtype not in (np.float16, np.float32, torch.float16, torch.bfloat16, torch.float32):
        z = _to_tensor(z, "features")
    r = _to_tensor(relevance, "relevance")
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"features must have shape (n, d) with d >= 1, got {tuple(z.shape)}")
    if r.shape != z.shape[:1]:
        raise ValueError(f"relevance must have shape ({len(z)},) to match features, got {tuple(r.shape)}")
    _check_k(k, len(z))
    if (r < 0).any():
        raise ValueError("relevance must not be negative")
    if not r.any():
        raise ValueError("relevance is zero for every item")

    def rows(index):
        x = z[index] if isinstance(z, torch.Tensor) else torch.from_numpy(z[index.numpy()])
        # exact, and a quick way to float64
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    for part in torch.arange(len(z), device=r.device).split(ROWS):
        largest = rows(part).abs().amax(1)
        if not largest.isfinite().all():
            raise ValueError("features contains NaN or inf")
        if not largest.all():
            raise ValueError(
                f"features has a zero row ({int(part[largest == 0][0])}), whose cosine is undefined"
            )

    def unit(index):
        """The unit vectors z_i / |z_i|, (len(index), d)."""
        x = rows(index)
        if x.dtype == r.dtype:  # first, so that squares of huge or tiny entries neither overflow nor vanish
            x = x / x.abs().amax(1, keepdim=True)
        x = x.to(r.dtype)
        return x.mul_(1 / torch.linalg.vector_norm(x, dim=1, keepdim=True))  # quicker than a division

    tol = _tolerance(torch.finfo(r.dtype).eps)
    order, gains = _with_fillers(
        lambda log_weight: _lazy_greedy(unit, log_weight, k, tol), 2 * r.log(), k, tol
    )
    return _like(features, order, gains, return_gains)


def greedy_map(kernel, k, return_gains=False):
    """Greedily pick k items that maximise log det(kernel_S), for an explicit kernel.

        log det(L_{S + i}) - log det(L_S) = log L_ii + log rho_i      (App. B: sigma^2 = L_ii rho_i)

    where rho_i is the share of L_ii that the items chosen so far leave unexplained. O(nk) time a step, on the CPU.

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
    tol = _tolerance(max(torch.finfo(c.dtype).eps, _eps(kernel)))
    order, gains = _with_fillers(
        lambda log_weight: _greedy(c, torch.ones_like(diagonal), log_weight, k, tol)[:2],
        diagonal.log(),
        k,
        tol,
    )
    return _like(kernel, order, gains, return_gains)


def _lazy_greedy(unit, log_weight, k, tol):
    """Greedy MAP for Diag(w) C Diag(w), C_ij = unit(i) unit(j)^T, log_weight = 2 log w (n,). Returns indices and gains, at most k.

    With Q (t, d) an orthonormal basis of the t items chosen so far, rho_i = 1 - |Q unit(i)|^2. It can only fall, and the
    gain with it, so the gain of an earlier step bounds today's. A round (1) brings the best bounds up to date until
    the best POOL of them are gains, (2) runs the plain greedy among those for as long as no other item's bound is in its way,
    and (3) extends Q by what was chosen.
    """
    bound = log_weight.clone()  # of each item's gain
    rho = torch.ones_like(bound)
    # the rows of Q that rho takes into account, 0 .. seen - 1
    seen = torch.zeros_like(bound, dtype=torch.int64)
    order, gains = seen[:0], bound[:0]
    basis = unit(order).new_empty(k, unit(order).shape[1])  # Q

    def settle(index, value):
        alive = value > tol
        rho[index], seen[index] = value, torch.where(alive, len(order), k)  # k: never out of date
        bound[index] = torch.where(alive, log_weight[index] + value.log(), -torch.inf)

    while len(order) < k:
        q = basis[: len(order)]
        width = POOL
        while True:
            value, best = bound.topk(min(width, len(bound)))
            front = best[:POOL]
            # ties, and there may be more: the lowest indices come first
            if value[len(front) - 1] >= value[0] - tol:
                front = best = (bound >= value[0] - tol).nonzero()[:, 0]
            if (seen[front] >= len(q)).all():
                break
            stale = best[seen[best] < len(q)].sort().values
            # those that lack the same rows together
            for part in stale[seen[stale].argsort(stable=True)].split(ROWS):
                first = seen[part]
                new = torch.arange(int(first[0]), len(q), device=part.device)
                y = (q[new[0] :] @ unit(part).T) * (new[:, None] >= first)
                settle(part, rho[part] - (y * y).sum(0))
            width *= 2  # so that few searches are enough also where all must be looked at
        if value[0] == -torch.inf:
            break

        pool = front[:POOL].sort().values
        bound[pool] = -torch.inf
        z = unit(pool)
        y = z @ q.T
        chosen, gained, left, factor = _greedy(
            z @ z.T - y @ y.T, 1 - (y * y).sum(1), log_weight[pool], k - len(q), tol, float(bound.max())
        )
        # log rho of the least that was left
        new, least = (z[chosen] - y[chosen] @ q, (gained - log_weight[pool[chosen]]).min())
        if least > -5:
            # Gram-Schmidt: the first i rows span the first i chosen
            new = torch.linalg.solve_triangular(factor[:, chosen].T, new, upper=False)
        else:  # the same, slower, and orthogonal whatever the factor's condition
            new = torch.linalg.qr(new.T)[0].T
            if least < -10:  # what little is left, scaled up, is not quite orthogonal
                new -= (new @ q.T) @ q
        basis[len(q) : len(q) + len(new)] = new
        order, gains = torch.cat([order, pool[chosen]]), torch.cat([gains, gained])
        settle(pool, left)
    return order, gains


def _greedy(c, rho, log_weight, k, tol, floor=-math.inf):
    """Greedy MAP for Diag(w) C Diag(w), c = C (n, n), of diagonal rho, log_weight = 2 log w, both (n,).

    Ends after k items, when all are spent, or when the best gain after the first is not above floor by tol.
    Returns indices (t <= k,), gains, what rho has become (0 where spent), and the factor (t, n), on the device of c; computed on the CPU.
    """
    device, (c, rho, log_weight) = c.device, (x.cpu().numpy() for x in (c, rho, log_weight))
    rho = np.where(rho > tol, rho, 0)
    # row t: entry t of y (App. B) for each of the n items, chosen or not
    factor = np.empty((min(k, len(rho)), len(rho)), rho.dtype)
    order, gains = [], []
    with np.errstate(divide="ignore"):  # log 0 of the spent
        while len(order) < len(factor):
            gain = log_weight + np.log(rho)  # Eq. 4 with i minus Eq. 4 without
            best = gain.max()
            if best == -np.inf or order and best <= floor + tol:
                break
            j, t = int((gain >= best - tol).argmax()), len(order)  # the lowest index among the ties
            y = (c[j] - factor[:t, j] @ factor[:t]) / math.sqrt(rho[j])  # App. B: P y = k, its last line
            rho -= y * y  # App. B: sigma^2 = L_xx - |y|^2
            rho[rho <= tol] = 0
            rho[j] = 0
            factor[t] = y
            order.append(j)
            gains.append(gain[j])
    return tuple(
        torch.as_tensor(x, device=device)
        for x in (np.array(order, np.int64), np.array(gains, rho.dtype), rho, factor[: len(order)])
    )


def _with_fillers(greedy, log_weight, k, tol):
    """greedy(log_weight) with items of weight 0 after all others and, where that ends before k items, the rest by weight; warns then."""
    positive = log_weight > -torch.inf
    lowest = log_weight[positive].min() if positive.any() else 0.0
    # A gain is above its log weight + log tol: below the lowest of these, items of weight 0 compete by rho alone.
    order, gains = greedy(torch.where(positive, log_weight, lowest + math.log(tol) - 1))
    gains = gains[positive[order]]
    fillers = k - len(gains)
    if fillers:
        rest = torch.ones_like(positive)
        rest[order] = False
        rest = rest.nonzero()[:, 0]
        rest = rest[log_weight[rest].argsort(descending=True, stable=True)]
        order = torch.cat([x[positive[x] == sign] for sign in (True, False) for x in (order, rest)])[:k]
        gains = torch.cat([gains, gains.new_full((fillers,), -torch.inf)])
        warnings.warn(
            f"the kernel's numerical rank is used up: {fillers} of the {k} items add nothing to the determinant and "
            "were filled in by relevance (by the diagonal, for an explicit kernel)",
            RuntimeWarning,
            stacklevel=3,
        )
    return order, gains


def _tolerance(eps):
    """Below which rho is noise, eps being the rounding error of the kernel's entries.

    Dividing by sqrt(rho_j) magnifies rounding to eps / sqrt(rho_j) at worst. With no pivot below eps^(2/3) that stays under
    eps^(2/3), so whatever lies below is noise.
    """
    return eps ** (2 / 3)


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
