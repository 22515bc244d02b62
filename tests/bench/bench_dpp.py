"""dpp.py against other ways to the same selection; prints tables (5 minutes on two cores; --big: 10 more).

The features are those of 300 clusters. Relevance "as a client's" is sigmoid(-9 + 4 s), s a standardised
linear score of the features: the clients' logits on the two embedded defaults have means of -10.7 to -7.6 and
deviations of 2.2 to 5.3. "Of the bandwidth": the time that reading what the method must read at least would
take, as a share of its time (above 100% where the caches hold it).
"""

import multiprocessing
import re
import tempfile
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import MACHINE, command_line, header, row, timed

from dpp import relevance_weighted_dpp


def clustered(n, d, dtype=np.float32):
    """(features (n, d), {name: relevance (n,)}), made in stretches."""
    rng = np.random.default_rng(0)
    centres, direction = rng.normal(size=(300, d)).astype(np.float32), rng.normal(size=d).astype(np.float32)
    features, score = np.empty((n, d), dtype), np.empty(n)
    for start in range(0, n, 65_536):
        rows, count = slice(start, start + 65_536), min(65_536, n - start)
        z = centres[rng.integers(300, size=count)] + 0.7 * rng.standard_normal((count, d), dtype=np.float32)
        features[rows], score[rows] = z, z @ direction
    client = 1 / (1 + np.exp(9 - 4 * (score - score.mean()) / score.std()))
    # uniform but for the first item: else rounding says which item a method begins with
    return features, {"as a client's": client, "uniform": np.array([1.001, *np.ones(n - 1)])}


def weighted(features, relevance, dtype=np.float64):
    """(n, d), whose inner products are the kernel."""
    z = np.asarray(features, dtype)
    return z * (relevance / relevance.max() / np.linalg.norm(z, axis=1)).astype(dtype)[:, None]


def naive(features, relevance, k):
    """A fresh determinant for every candidate and step."""
    z, chosen = weighted(features, relevance), []
    kernel = z @ z.T
    for _ in range(k):
        rest = [i for i in range(len(z)) if i not in chosen]
        subsets = ([*chosen, i] for i in rest)
        log_dets = [np.linalg.slogdet(kernel[np.ix_(subset, subset)])[1] for subset in subsets]
        chosen.append(rest[np.argmax(log_dets)])
    return np.array(chosen)


def cholesky(kernel_row, left, k):
    """The incremental Cholesky loop; left (n,): the kernel's diagonal."""
    rows, chosen = np.zeros((k, len(left)), left.dtype), []
    for t in range(k):
        j = int(left.argmax())
        chosen.append(j)
        rows[t] = (kernel_row(j) - rows[:t, j] @ rows[:t]) / np.sqrt(left[j])
        left -= rows[t] ** 2
        left[chosen] = -np.inf  # the authors' release does without this
    return np.array(chosen)


def kernel_loop(features, relevance, k, dtype=np.float32):
    """As the authors' release: the n x n kernel first, in float32 or in dpp.py's float64; O(n m) a step."""
    z = weighted(features, relevance, dtype)
    kernel = z @ z.T
    return cholesky(kernel.__getitem__, kernel.diagonal().copy(), k)


def plain(features, relevance, k):
    """Without the kernel, whose row is made at each step: O(n (d + t)) at step t."""
    z = weighted(features, relevance)
    return cholesky(lambda j: z @ z[j], (z * z).sum(1), k)


FLOAT64 = "kernel loop float64"
METHODS = {"naive": naive, "kernel loop": kernel_loop, "plain": plain}
METHODS[FLOAT64] = partial(kernel_loop, dtype=np.float64)


def best_of(repeats, function, *args):
    """(result, shortest of the seconds)."""
    return min((timed(function, *args) for _ in range(repeats)), key=lambda found: found[1])


def compare(n, d, k, methods, rate):
    """Rows of one problem: each method against dpp.py."""
    features, relevances = clustered(n, d)
    factor = n * k * k / 2  # read at every step, as the features are by plain; all others read theirs once
    least = {"naive": 8 * n * n, "plain": 8 * (n * d * k + factor), "lazy": 4 * n * d}
    least |= {"kernel loop": 4 * (n * n + factor), FLOAT64: 8 * (n * n + factor)}
    for name, r in relevances.items():
        want, lazy = best_of(5 if n < 10_000 else 3, relevance_weighted_dpp, features, r, k)
        found = {m: best_of(5 if n < 10_000 else 1, METHODS[m], features, r, k) for m in methods}
        for method, (items, seconds) in (found | {"lazy": (want, lazy)}).items():
            same = "yes" if np.array_equal(items, want) else f"{len(set(items) & set(want))} of {k}"
            speed = f"{seconds:.3f}", f"{seconds / lazy:.1f}x", f"{least[method] / rate / seconds:.0%}"
            row(f"{n:,}", k, name, method, *speed, same)


def growth(sizes):
    """A table of the seconds of dpp.py."""
    columns, times = ["relevance"], {"as a client's": [], "uniform": []}
    for n, k in sizes:
        columns.append(f"n = {n:,}, m = {k}")
        features, relevances = clustered(n, 768)
        for name, r in relevances.items():
            times[name].append(f"{timed(relevance_weighted_dpp, features, r, k)[1]:.2f}")
    header(" | ".join(columns), "l" + "r" * len(sizes))
    for name, found in times.items():
        row(name, *found)


def measured(folder, k):
    """(seconds, GB beside the features) of a selection from the files of a folder."""
    features, relevance = np.load(f"{folder}/features.npy", mmap_mode="r"), np.load(f"{folder}/relevance.npy")
    used, done = [], threading.Event()

    def watch():
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            used.append(int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 2**20)

    threading.Thread(target=watch, daemon=True).start()
    done.wait(0.1)
    seconds = timed(relevance_weighted_dpp, features, relevance, k)[1]
    return seconds, max(used) - used[0]


def big(n, d, k):
    """Time and memory beside the features, float16 on disk, in a process of its own."""
    header("n | d | m | relevance | s | GB beside the features", "rrrlrr")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        features, relevances = clustered(n, d, np.float16)
        np.save(f"{folder}/features.npy", features)
        del features
        for name, r in relevances.items():
            np.save(f"{folder}/relevance.npy", r)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, memory = pool.apply(measured, (folder, k))
            row(f"{n:,}", d, k, name, f"{seconds:.1f}", f"{memory:.2f}")


if __name__ == "__main__":
    parser = command_line(__doc__)
    text = "also n = 1,280,000, d = 768, m = 500 with float16 features on disk (2 GB, here)"
    parser.add_argument("--big", action="store_true", help=text)
    args = parser.parse_args()
    warnings.simplefilter("error")  # a used-up rank would make the tables say nothing
    x = torch.ones(2**27, dtype=torch.float64)
    rate = 8 * len(x) / best_of(5, x.sum)[1]
    print(f"{MACHINE}, memory bandwidth {rate / 1e9:.1f} GB/s (a sum over 1 GB); d = 768\n")
    columns = "n | m | relevance | method | s | against lazy | of the bandwidth | the same items"
    header(columns, "rrllrrrl")
    compare(200, 768, 20, ["naive", FLOAT64, "plain"], rate)
    compare(3_000, 768, 500, ["kernel loop", FLOAT64, "plain"], rate)
    compare(50_000, 768, 700, ["plain"], rate)
    print("\nHow the time of lazy grows, s\n")
    growth([(n, 500) for n in (3_000, 12_500, 50_000, 200_000)] + [(50_000, k) for k in (100, 300, 700)])
    if args.big:
        print()
        big(1_280_000, 768, 500)
