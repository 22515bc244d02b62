"""Relevance-weighted DPP proxy selection by greedy MAP (MetaMoE, Sec. 3.2 and App. B).

A determinantal point process prefers subsets whose kernel has a large determinant: relevant items that differ
from one another. Choose 50 of 3,000 items, each with a feature vector z_i and a relevance r_i:

    import numpy as np
    from dpp import relevance_weighted_dpp

    features = np.random.default_rng(0).normal(size=(3000, 64))
    relevance = np.random.default_rng(1).uniform(size=3000)
    indices = relevance_weighted_dpp(features, relevance, k=50)  # (50,), in the order of selection

`greedy_map` is the algorithm of App. B. `relevance_weighted_dpp` picks the same items without the n x n
kernel, by a lazy search, which comes last. This file needs numpy and torch alone. Equations are the paper's.
Sources: Chen, Zhang & Zhou, "Fast Greedy MAP Inference for Determinantal Point Process to Improve
Recommendation Diversity" (NeurIPS 2018); for bounds from earlier steps, Hemmi, Oki, Sakaue, Fujii & Iwata,
"Lazy and Fast Greedy MAP Inference for Determinantal Point Process" (NeurIPS 2022).
"""

import math
import warnings
from functools import partial

import numpy as np
import torch

POOL = 128  # items that compete at a time: more of them, fewer rounds of larger matrices
ROWS = 256  # features in memory at a time, in float64


def greedy_map(kernel, k, return_gains=False):
    """Greedily pick k items that maximise log det(kernel_S) (Eq. 1), O(n k) time a step.

    kernel: (n, n), symmetric and positive semidefinite (the latter is not checked), such as L~ of Eq. 3.
    What goes in and comes out is as for relevance_weighted_dpp, with L_ii for the relevance.
    Raises ValueError: k is not an integer in 1..n; kernel has NaN or inf, is not square, is not symmetric
    (to 1e-5 of sqrt(L_ii L_jj)) or has a negative diagonal.
    """
    given = _to_tensor(kernel)
    c = _double(given, "kernel")
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
    # A float32 kernel stays that coarse when upcast, and a step magnifies the error by up to 1 / sqrt(tol).
    tol = torch.finfo((given if given.is_floating_point() else c).dtype).eps ** (2 / 3)
    return _select(partial(_greedy, c, k, tol), diagonal.log(), k, tol, kernel, return_gains)


def _greedy(c, k, tol, log_weight, floor=-math.inf):
    """App. B for the kernel Diag(w) C Diag(w), 2 log w = log_weight: indices (t,), gains (t,), all y (t, n).

    Ends after k items, when all are spent, or when the best gain after the first is not above floor by tol.
    """
    device, c, log_weight = c.device, c.cpu().numpy(), log_weight.cpu().numpy()
    rho = c.diagonal()  # becomes what the items chosen so far leave of C_ii: sigma_i^2 = w_i^2 rho_i
    y = np.empty((min(k, len(c)), len(c)), c.dtype)  # column i: the y of item i, one entry more a step
    order, gains = [], []
    for t in range(len(y)):
        gain = np.where(rho > tol, log_weight + np.log(np.maximum(rho, tol)), -np.inf)
        best = gain.max()  # of log sigma^2 = log det(L~_{S + i}) - log det(L~_S)
        if best == -np.inf or (order and best <= floor + tol):
            break
        j = int((gain >= best - tol).argmax())  # the lowest index among the ties
        y[t] = (c[j] - y[:t, j] @ y[:t]) / math.sqrt(rho[j])  # P y = k, its last line
        rho = rho - y[t] * y[t]  # sigma^2 = L~_xx - |y|^2
        rho[j] = 0  # exactly, and never again
        order.append(j)
        gains.append(gain[j])
    found = np.array(order, np.int64), np.array(gains, c.dtype), y[: len(order)]
    return [torch.as_tensor(x, device=device) for x in found]


def relevance_weighted_dpp(features, relevance, k, return_gains=False, weight=1.0):
    """Greedily pick k items that maximise log det(L~_S), without forming the n x n kernel.

        L~_ij = r_i cos(z_i, z_j) r_j                                 (Eq. 2-3)
        log det(L~_S) = 2 sum_{i in S} log r_i + log det(L_S)         (Eq. 4)

    Each step takes the item of largest gain 2 log r_i + log rho_i; rho_i is the part of the unit vector
    z_i / |z_i| that the items chosen so far leave unexplained. So the scale of r does not matter.
    At most O(n d) time a step and O(n + k d) memory beside features, in float64 (float32 on mps).

    features: (n, d); relevance: (n,), at least 0; both arrays (also memory maps) or lists, or both tensors.
    weight: W, with r^W in the place of r: 0 is diversity alone, a large one takes the most relevant.
    Returns indices (k,), int64, in the order of selection; with return_gains also gains (k,), whose sum is
    log det(L~_S). They are NumPy arrays, or for tensors, tensors on the device of features.
    Gains closer than eps^(2/3) (4e-11 in float64) are ties and go to the lowest index. An item is spent once
    rho_i <= eps^(2/3): it adds no direction. When all are spent, the rest is filled by relevance, then index.
    Items of relevance 0 come last, by rho. They and the fillers have gain -inf and cause one RuntimeWarning.
    Raises ValueError: k is not an integer in 1..n; NaN or inf; a shape that does not fit; a zero feature row;
    all-zero relevance; what is negative. TypeError: a tensor with an array or list; sparse or masked input.
    """
    if isinstance(features, torch.Tensor) != isinstance(relevance, torch.Tensor):
        raise TypeError("features and relevance must be both torch tensors or both NumPy arrays (or lists)")
    z, r = _to_tensor(features), _double(_to_tensor(relevance), "relevance")
    _check(z, r, k, weight)
    tol, log_r = torch.finfo(r.dtype).eps ** (2 / 3), (weight or 1e-30) * r.log()  # 0 * -inf is NaN
    return _select(_LazySearch(z, k, tol).run, 2 * log_r, k, tol, features, return_gains)


def _check(z, r, k, weight):
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"features must have shape (n, d) with d >= 1, got {tuple(z.shape)}")
    if r.shape != z.shape[:1]:
        raise ValueError(f"relevance must have shape ({len(z)},) to match features, got {tuple(r.shape)}")
    _check_k(k, len(z))
    if (r < 0).any() or not 0 <= weight < math.inf:
        raise ValueError("relevance must not be negative, nor its weight, which must be finite")
    if not r.any():
        raise ValueError("relevance is zero for every item")
    largest = torch.cat([part.abs().amax(1) for part in z.split(ROWS)])
    if not largest.isfinite().all():
        raise ValueError("features contains NaN or inf")
    if not largest.all():
        raise ValueError(f"features has a zero row ({int(largest.argmin())}), whose cosine is undefined")


def _check_k(k, n):
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
        raise ValueError(f"k must be an integer between 1 and n = {n}, got {k!r}")


def _to_tensor(x):
    """x without its autograd graph; an array in half or single precision as it is, any other in float64."""
    if isinstance(x, np.ma.MaskedArray) or hasattr(x, "tocsr") or getattr(x, "is_sparse", False):
        raise TypeError(f"features and relevance must be dense and without a mask, not {type(x).__name__}")
    if isinstance(x, torch.Tensor):
        return x.detach()
    x = np.asarray(x)
    with warnings.catch_warnings(action="ignore"):  # read-only arrays are fine: nothing here writes to them
        return torch.from_numpy(np.asarray(x, x.dtype if x.dtype in (np.float16, np.float32) else float, "C"))


def _double(x, name):
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # mps has no float64
    if not x.isfinite().all():
        raise ValueError(f"{name} contains NaN or inf")
    return x


def _select(search, log_weight, k, tol, given, return_gains):
    """What search(log_weight) finds, then fillers by weight up to k items; tensors if `given` is one."""
    positive = log_weight > -torch.inf
    # A gain is above log weight + log tol: below the lowest of these, items of weight 0 compete by rho alone.
    lowest = log_weight[positive].min() if positive.any() else 0.0
    order, gains, *_ = search(torch.where(positive, log_weight, lowest + math.log(tol) - 1))
    gains = gains[positive[order]]
    fillers = k - len(gains)
    if fillers:
        rest = log_weight.argsort(descending=True, stable=True)
        order = torch.cat([order, rest[~torch.isin(rest, order)]])
        order = torch.cat([order[positive[order]], order[~positive[order]]])[:k]
        gains = torch.cat([gains, gains.new_full((fillers,), -torch.inf)])
        message = f"the kernel's numerical rank is used up: {fillers} of the {k} items add nothing to the "
        message += "determinant and were filled in by relevance (by the diagonal, for an explicit kernel)"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    if not isinstance(given, torch.Tensor):
        order, gains = order.numpy(), gains.numpy()
    return (order, gains) if return_gains else order


class _LazySearch:
    """Greedy MAP for Diag(w) L Diag(w), L_ij = cos(z_i, z_j), from features z (n, d).

    With Q (t, d) an orthonormal basis of the t items chosen so far, rho_i = 1 - |Q u_i|^2, u_i = z_i / |z_i|.
    It can only fall, and the gain with it, so an earlier step's gain bounds today's. A round brings the best
    POOL bounds up to date, runs the plain greedy among them until another bound is in its way, and extends Q.
    """

    def __init__(self, z, k, tol):
        self.z, self.k, self.tol = z, k, tol

    def run(self, log_weight):  # 2 log w (n,)
        self.log_weight, self.bound = log_weight, log_weight.clone()  # bound: of each item's gain
        self.rho = torch.ones_like(log_weight)
        self.seen = torch.zeros_like(log_weight, dtype=torch.int64)  # rows of Q that rho takes into account
        self.q = log_weight.new_empty(0, self.z.shape[1])
        order, gains = self.seen[:0], self.bound[:0]
        while len(self.q) < self.k and len(pool := self.candidates()):
            others = float(self.bound.index_fill(0, pool, -torch.inf).max())
            u, weight = self.unit(pool), log_weight[pool]
            y = u @ self.q.T
            chosen, gain, factor = _greedy(u @ u.T - y @ y.T, self.k - len(self.q), self.tol, weight, others)
            new = u[chosen] - y[chosen] @ self.q
            if (gain - weight[chosen]).min() > -5:  # Gram-Schmidt: the first i rows span the first i chosen
                new = torch.linalg.solve_triangular(factor[:, chosen].T, new, upper=False)
            else:  # log rho is low: the same, slower, and orthogonal whatever the factor's condition
                new = torch.linalg.qr(new.T)[0].T
                new -= (new @ self.q.T) @ self.q  # what little is left, scaled up, is not quite orthogonal
            self.q = torch.cat([self.q, new])
            self.bound[pool[chosen]], self.seen[pool[chosen]] = -torch.inf, self.k  # k: never out of date
            order, gains = torch.cat([order, pool[chosen]]), torch.cat([gains, gain])
        return order, gains

    def unit(self, index):  # z_i / |z_i|, (len(index), d)
        x = self.z.index_select(0, index)
        if x.dtype == self.rho.dtype:  # so that squares of huge or tiny entries neither overflow nor vanish
            x = x / x.abs().amax(1, keepdim=True)
        x = x.float().to(self.rho.dtype) if x.element_size() == 2 else x.to(self.rho.dtype)
        return x.mul_(1 / torch.linalg.vector_norm(x, dim=1, keepdim=True))  # quicker than a division

    def candidates(self):
        """The best POOL items that are not spent, by index, all with rho and bound up to date."""
        width = POOL
        while True:
            value, best = self.bound.topk(min(width, len(self.bound)))
            if value[:POOL][-1] >= value[0] - self.tol:  # ties, maybe more of them: the lowest indices first
                best = (self.bound >= value[0] - self.tol).nonzero()[:, 0]
            front = best[:POOL]
            if (self.seen[front] >= len(self.q)).all():
                return front[self.bound[front] > -torch.inf].sort().values
            stale = best[self.seen[best] < len(self.q)].sort().values
            stale = stale[self.seen[stale].argsort(stable=True)]
            for part in stale.split(ROWS):  # those together that lack the same rows of Q
                first = self.seen[part]
                new = torch.arange(int(first[0]), len(self.q), device=part.device)
                y = (self.q[new[0] :] @ self.unit(part).T) * (new[:, None] >= first)
                rho = self.rho[part] - (y * y).sum(0)
                spent = rho <= self.tol
                self.rho[part], self.seen[part] = rho, torch.where(spent, self.k, len(self.q))
                self.bound[part] = torch.where(spent, -torch.inf, self.log_weight[part] + rho.log())
            width *= 2  # so that few searches are enough also where all must be looked at
