"""dpp.py against other ways to the same selection: `python tests/bench/bench_dpp.py` prints tables (5 minutes on two cores; --big: 10 more).

The features are those of 300 clusters. Relevance "as a client's" is sigmoid(-9 + 4 s), s a standardised linear score of the features: of the
logits of the clients of the two embedded defaults the means are -10.7 to -7.6 and the deviations 2.2 to 5.3. Methods: `naive`, a fresh
determinant for every candidate and step; `kernel loop`, the n x n kernel and the incremental Cholesky loop over it that the paper's
authors run, O(n m) a step (in float32, numpy's way with float32 features, and in float64, which dpp.py computes in); `plain`, the same loop with a kernel
row made from the features when it is wanted; `lazy`, dpp.py. "Of the bandwidth": the time that reading what the method must read at least would
take, as a share of its time (above 100% where the caches hold it).
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dpp import relevance_weighted_dpp  # noqa: E402


def clustered(n, d, seed=0, dtype=np.float32):
    """(features (n, d), relevance (n,) as a client's), made in stretches."""
    rng = np.random.default_rng(seed)
    centres, direction = rng.normal(size=(300, d)).astype(np.float32), rng.normal(size=d).astype(np.float32)
    features, score = np.empty((n, d), dtype), np.empty(n)
    for start in range(0, n, 65_536):
        rows = slice(start, min(start + 65_536, n))
        z = centres[rng.integers(300, size=rows.stop - start)] + 0.7 * rng.standard_normal(
            (rows.stop - start, d), dtype=np.float32
        )
        features[rows], score[rows] = z, z @ direction
    return features, 1 / (1 + np.exp(9 - 4 * (score - score.mean()) / score.std()))


def uniform(n):
    """All alike, but for the first: else rounding says which of the methods begins with which item."""
    return np.array([1.001, *np.ones(n - 1)])


def units(features):
    z = np.asarray(features, np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def naive(features, relevance, k):
    z = units(features)
    kernel, chosen = relevance[:, None] * (z @ z.T) * relevance, []
    for _ in range(k):
        rest = [i for i in range(len(z)) if i not in chosen]
        chosen.append(
            max(rest, key=lambda i: np.linalg.slogdet(kernel[np.ix_(chosen + [i], chosen + [i])])[1])
        )
    return np.array(chosen)


def kernel_loop(features, relevance, k, dtype=np.float32):
    """As the authors' release, in numpy: the whole kernel first; chosen items masked, which theirs are not."""
    z = np.asarray(features, dtype)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    weight = (relevance / relevance.max()).astype(dtype)
    kernel = weight[:, None] * (z @ z.T) * weight
    left, rows, chosen = kernel.diagonal().copy(), np.zeros((k, len(z)), dtype), []
    for t in range(k):
        j = int(left.argmax())
        chosen.append(j)
        rows[t] = (kernel[j] - rows[:t, j] @ rows[:t]) / np.sqrt(left[j])
        left -= rows[t] ** 2
        left[chosen] = -np.inf
    return np.array(chosen)


def kernel_loop_float64(features, relevance, k):
    return kernel_loop(features, relevance, k, np.float64)


def plain(features, relevance, k, tol=2.0 ** (-52 * 2 / 3)):
    """Matrix-free greedy MAP in float64: a row of the kernel a step, O(n (d + t)) at step t; ties as dpp.py."""
    z, rho = torch.from_numpy(units(features)), torch.ones(len(features), dtype=torch.float64)
    log_weight, rows, chosen = (
        2 * torch.from_numpy(np.asarray(relevance, np.float64)).log(),
        torch.empty(k, len(z), dtype=torch.float64),
        [],
    )
    for t in range(k):
        gain = torch.where(rho > tol, log_weight + rho.log(), -torch.inf)
        j = int((gain >= gain.max() - tol).nonzero()[0])
        chosen.append(j)
        rows[t] = (z @ z[j] - rows[:t, j] @ rows[:t]) / rho[j].sqrt()
        rho -= rows[t] ** 2
        rho[j] = 0
    return np.array(chosen)


def bandwidth(gigabytes=1):
    """Bytes a second that a sum over an array far larger than the caches reads, the best of five."""
    x, best = torch.ones(int(gigabytes * 2**27), dtype=torch.float64), np.inf
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return 8 * len(x) / best


def timed(function, *args, repeats=1):
    """(result, shortest of the seconds)."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*args)
        best = min(best, time.perf_counter() - start)
    return result, best


def least_bytes(method, n, d, k):
    """What a method has to read at least: the features and its factor at every step, the kernel once, or (lazy) the features once."""
    factor = n * k * k / 2
    return {
        "naive": 8 * n * n,
        "kernel_loop": 4 * (n * n + factor),
        "kernel_loop_float64": 8 * (n * n + factor),
        "plain": 8 * (n * d * k + factor),
        "lazy": 4 * n * d,
    }[method]


def compare(n, d, k, methods, rate):
    """Rows of one problem, as a client's and with uniform relevance: each method against dpp.py."""
    features, relevance = clustered(n, d)
    for name, r in (("as a client's", relevance), ("uniform", uniform(n))):
        want, lazy = timed(relevance_weighted_dpp, features, r, k, repeats=5 if n < 10_000 else 3)
        found = {
            method.__name__: timed(method, features, r, k, repeats=5 if n < 10_000 else 1)
            for method in methods
        }
        for method, (items, seconds) in (found | {"lazy": (want, lazy)}).items():
            same = "yes" if np.array_equal(items, want) else f"{len(set(items) & set(want))} of {k}"
            share = 100 * least_bytes(method, n, d, k) / rate / seconds
            print(
                f"| {n:,} | {k} | {name} | {method.replace('_', ' ')} | {seconds:.3f} | {seconds / lazy:.1f}x | {share:.0f}% | {same} |",
                flush=True,
            )


BIG = """
import resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from dpp import relevance_weighted_dpp
features, relevance, k = np.load(sys.argv[2] + "/features.npy", mmap_mode="r"), np.load(sys.argv[2] + "/relevance.npy"), int(sys.argv[3])
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 2**20
before, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
chosen = relevance_weighted_dpp(features, relevance, k)
print(time.perf_counter() - start, before, peak[0])
"""


def big(n, d, k):
    """Time and memory beside the features, float16 on disk, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        features, relevance = clustered(n, d, dtype=np.float16)
        np.save(f"{folder}/features.npy", features)
        del features
        for name, r in (("as a client's", relevance), ("uniform", uniform(n))):
            np.save(f"{folder}/relevance.npy", r)
            done = subprocess.run(
                [sys.executable, "-c", BIG, str(Path(__file__).resolve().parents[2]), folder, str(k)],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds, before, peak = map(float, done.stdout.split())
            print(f"| {n:,} | {d} | {k} | {name} | {seconds:.1f} | {peak - before:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--big",
        action="store_true",
        help="also n = 1,280,000, d = 768, m = 500 with float16 features on disk (2 GB, here)",
    )
    args = parser.parse_args()
    warnings.simplefilter("error")  # a used-up rank would make the tables say nothing
    rate = bandwidth()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, memory bandwidth {rate / 1e9:.1f} GB/s (a sum over 1 GB); d = 768\n"
    )
    print(
        "| n | m | relevance | method | s | against lazy | of the bandwidth | the same items |\n|---:|---:|---|---|---:|---:|---:|---|"
    )
    compare(200, 768, 20, [naive, kernel_loop_float64, plain], rate)
    compare(3_000, 768, 500, [kernel_loop, kernel_loop_float64, plain], rate)
    compare(50_000, 768, 700, [plain], rate)
    sizes = [
        (3_000, 500),
        (12_500, 500),
        (50_000, 500),
        (200_000, 500),
        (50_000, 100),
        (50_000, 300),
        (50_000, 700),
    ]
    print(
        "\nHow the time of lazy grows, s\n\n| relevance | "
        + " | ".join(f"n = {n:,}, m = {k}" for n, k in sizes)
        + " |\n|---|"
        + "---:|" * len(sizes)
    )
    times = {"as a client's": [], "uniform": []}
    for n, k in sizes:
        features, relevance = clustered(n, 768)
        for (name, found), r in zip(times.items(), (relevance, uniform(n)), strict=False):
            found.append(timed(relevance_weighted_dpp, features, r, k)[1])
    for name, found in times.items():
        print(f"| {name} | " + " | ".join(f"{seconds:.2f}" for seconds in found) + " |", flush=True)
    if args.big:
        print("\n| n | d | m | relevance | s | GB beside the features |\n|---:|---:|---:|---|---:|---:|")
        big(1_280_000, 768, 500)
