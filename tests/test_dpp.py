"""dpp.py: every greedy step against determinants, the order of ties and fillers, and the errors."""

import re
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch.utils._python_dispatch import TorchDispatchMode

import dpp
from dpp import greedy_map, relevance_weighted_dpp

pytestmark = pytest.mark.filterwarnings("error")  # a call warns only where a test says so


def problem(seed, n, d):
    """Random features and relevances that span three decades."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 10 ** rng.uniform(-3, 0, n)


def kernel_of(features, relevance):
    """L~ of Eq. 2-3, formed outright."""
    z = np.asarray(features, dtype=np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return np.diag(relevance) @ (z @ z.T) @ np.diag(relevance)


def log_det(kernel, subset):
    sign, value = np.linalg.slogdet(kernel[np.ix_(subset, subset)])
    assert sign > 0
    return value


def naive_greedy(kernel, k):
    """(indices, gains) with a fresh determinant for each candidate: App. B, 'Naive Computation'."""
    chosen, gains, total = [], [], 0.0
    for _ in range(k):
        values = {i: log_det(kernel, chosen + [i]) for i in range(len(kernel)) if i not in chosen}
        best = max(values, key=values.get)
        chosen.append(best)
        gains.append(values[best] - total)
        total = values[best]
    return chosen, gains


def warned(function, *args):
    """(indices, gains) of a call that must warn that the rank is used up, once, pointing at this file."""
    with pytest.warns(RuntimeWarning, match="rank is used up") as record:
        result = function(*args, return_gains=True)
    assert len(record) == 1 and record[0].filename == __file__
    return result


def assert_same(found, expected, atol=1e-8):
    """Two (indices, gains): the same items in the same order, the gains close."""
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=atol)


@pytest.mark.parametrize("seed, n, d, k", [*((n, n, n + 2, n) for n in range(5, 13)), (0, 80, 64, 30)])
def test_every_step_is_the_best_by_brute_force_determinants(seed, n, d, k):
    features, relevance = problem(seed, n, d)
    kernel = kernel_of(features, relevance)
    expected = naive_greedy(kernel, k)
    assert_same(relevance_weighted_dpp(features, relevance, k, True), expected)
    assert_same(greedy_map(kernel, k, True), expected)
    kernel = kernel_of(features, np.logspace(-4, 4, n))  # a diagonal of 16 decades
    assert_same(greedy_map(kernel, k, True), naive_greedy(kernel, k))


@pytest.mark.parametrize("seed", range(3))
def test_gains_add_up_to_eq_4_and_never_rise(seed):
    features, relevance = problem(seed, 300, 64)
    kernel = kernel_of(features, relevance)
    indices, gains = relevance_weighted_dpp(features, relevance, 60, True)
    left = log_det(kernel, indices)
    right = 2 * np.log(relevance[indices]).sum() + log_det(kernel_of(features, np.ones(300)), indices)
    assert left == pytest.approx(right, abs=1e-9)
    assert gains.sum() == pytest.approx(left, abs=1e-9)
    assert (np.diff(gains) <= 1e-12).all()  # log det is submodular
    assert_same(greedy_map(kernel, 60, True), (indices, gains), 1e-9)


@pytest.mark.parametrize("seed, weight", enumerate([0, 0.5, 1, 3]))
def test_the_weight_multiplies_the_relevance_term(seed, weight):
    features, relevance = problem(seed, 12, 14)
    expected = naive_greedy(kernel_of(features, relevance**weight), 9)
    found = relevance_weighted_dpp(features, relevance, 9, True, weight)
    assert_same(found, expected)
    terms = 2 * np.log(relevance[found[0]]).sum(), log_det(kernel_of(features, np.ones(12)), found[0])
    assert found[1].sum() == pytest.approx(weight * terms[0] + terms[1], abs=1e-9)


def test_the_weight_goes_from_diversity_to_relevance():
    features, relevance = problem(4, 200, 40)
    same, most = np.ones(200), np.argsort(-relevance)[:30].tolist()
    diverse = relevance_weighted_dpp(features, relevance, 30, weight=0)
    assert diverse.tolist() == relevance_weighted_dpp(features, same, 30).tolist() != most
    assert relevance_weighted_dpp(features, relevance, 30, weight=1e6).tolist() == most  # r^W would be 0
    shares = [
        len({*relevance_weighted_dpp(features, relevance, 30, weight=w)} & {*most}) for w in (0, 0.3, 9)
    ]
    assert shares[0] < shares[1] < shares[2]
    relevance[most[0]] = 0  # excluded, not the first
    assert most[0] not in relevance_weighted_dpp(features, relevance, 30, weight=0)
    for bad in (-0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="weight"):
            relevance_weighted_dpp(features, relevance, 30, weight=bad)


@pytest.mark.parametrize("seed, constant", enumerate([1e-300, 1e-9, 1e-3, 7.0, 1e300]))
def test_what_leaves_the_choice_as_it_is(seed, constant):
    """Fewer items to choose, another order of them, features of any length, relevances in another unit."""
    rng = np.random.default_rng(100 + seed)
    features, relevance = problem(seed, 100, 24)
    expected = warned(relevance_weighted_dpp, features, relevance, 50)
    assert expected[0][0] == relevance.argmax()
    for k in 1, 7, 20:
        np.testing.assert_array_equal(relevance_weighted_dpp(features, relevance, k), expected[0][:k])

    moved, lengths = rng.permutation(100), 10.0 ** rng.integers(-200, 200, 100)[:, None]
    given = (lengths * features)[moved], constant * relevance[moved]
    indices, gains = warned(relevance_weighted_dpp, *given, 50)
    assert_same((moved[indices], gains - 2 * np.log(constant)), expected)
    kernel = kernel_of(features, relevance)[np.ix_(moved, moved)]
    indices, gains = warned(greedy_map, constant * kernel, 50)
    assert_same((moved[indices], gains - np.log(constant)), expected)

    relevance[::10], relevance[5] = relevance[0], 0.0  # ties, and an item without relevance
    indices, gains = warned(relevance_weighted_dpp, features, constant * relevance, 100)
    expected = warned(relevance_weighted_dpp, features, relevance, 100)
    assert_same((indices, gains - 2 * np.log(constant)), expected)


def test_accuracy_with_many_nearly_parallel_items():
    rng = np.random.default_rng(4)
    features = 1 + 1e-3 * rng.normal(size=(200, 50))  # cosines of 1 - 1e-6
    indices, gains = relevance_weighted_dpp(features, np.ones(200), 50, True)
    unit = features[indices] / np.linalg.norm(features[indices], axis=1, keepdims=True)
    assert gains.sum() == pytest.approx(2 * np.log(np.linalg.svd(unit, compute_uv=False)).sum(), abs=1e-6)


def test_diversity_beats_top_k_on_near_duplicates():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(5), 20)
    features = np.eye(16)[group] + 0.01 * rng.normal(size=(100, 16))
    relevance = np.array([0.95, 0.9, 0.85, 0.8, 0.75])[group] + rng.uniform(0, 0.01, 100)
    top = np.argsort(-relevance)[:5]
    chosen = relevance_weighted_dpp(features, relevance, 5).tolist()
    assert set(group[top]) == {0} and group[chosen].tolist() == [0, 1, 2, 3, 4]
    kernel = kernel_of(features, relevance)
    assert log_det(kernel, chosen) > log_det(kernel, top) + 20


TURN = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
CASES = [  # (features, relevance, the items in their order)
    # After item 0, the gain of item 1 (cosine 0.8, rho 0.36) is 2 log r_1 + log 0.36, of item 2 2 log r_2:
    (TURN, [1.0, 0.9, 0.53], [0, 1]),  # the balance is at r_2 = 0.9 * 0.6 = 0.54
    (TURN, [1.0, 0.9, 0.55], [0, 2]),
    # however small the relevance, diversity counts
    (np.repeat(np.eye(4), 3, axis=0), [1e-9] * 12, [0, 3, 6, 9]),
    (np.repeat(np.eye(4), 3, axis=0), [1e-300] * 12, [0, 3, 6, 9]),
    # ties go to the lowest index, and of two duplicates the more relevant one wins
    (np.eye(6), [0.3] * 6, [0, 1, 2, 3, 4, 5]),
    (np.eye(4), [0.5, 0.7, 0.5, 0.7], [1, 3, 0, 2]),
    (np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [0.5, 0.6, 0.1], [1, 2]),
    # items of relevance 0 come last
    (np.array([[0, 0, 1.0], [1, 0, 0], [1, 0, 0], [0, 1, 0]]), [0.0, 0.5, 0.0, 0.1], [1, 3]),
]


@pytest.mark.parametrize("features, relevance, items", CASES)
def test_what_is_chosen_in_small_cases(features, relevance, items):
    assert relevance_weighted_dpp(features, relevance, len(items)).tolist() == items


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cosine, dtype", [(0, np.float32), *((c, np.float64) for c in (0, 0.1, 0.9, 0.999))])
def test_rounding_does_not_break_the_ties_of_equiangular_features(cosine, dtype, seed):
    kernel = np.full((80, 80), cosine) + (1 - cosine) * np.eye(80)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(80, 80)))[0]
    features = np.linalg.cholesky(kernel) @ rotation  # unit vectors, each pair at this cosine
    features = 3 * features.astype(dtype)
    assert relevance_weighted_dpp(features, np.full(80, 0.7), 80).tolist() == [*range(80)]
    assert greedy_map(kernel, 80).tolist() == [*range(80)]


@pytest.mark.parametrize("factors", [(1, 1, 1, 1), (1, 1 / 3, 0.7)])
def test_duplicates_give_the_lowest_index_and_come_again_only_as_fillers(factors):
    base, relevance = problem(8, 10, 64)
    # rounded to float32: a scaled duplicate's cosine is not quite 1
    features = np.concatenate([base.astype(np.float32) * np.float32(factor) for factor in factors])
    relevance = np.tile(relevance, len(factors))
    indices, gains = warned(relevance_weighted_dpp, features, relevance, len(features))
    assert sorted(indices[:10] % 10) == list(range(10))
    if set(factors) == {1}:
        assert max(indices[:10]) == 9  # the lowest index of each
    assert_fillers(indices, gains, 10, relevance)


def assert_fillers(indices, gains, rank, weight):
    """Each item once; after the first `rank`, those that are left by weight, then index, with gain -inf."""
    assert np.isfinite(gains[:rank]).all() and (gains[rank:] == -np.inf).all()
    rest = set(range(len(weight))) - set(indices[:rank])
    assert indices[rank:].tolist() == sorted(rest, key=lambda i: (-weight[i], i))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_exhausted_rank_warns_and_fills_by_relevance_or_by_the_diagonal(dtype):
    for rank in 1, 3, 20:
        rng = np.random.default_rng(rank)
        # rank only up to rounding
        features = (rng.normal(size=(80, rank)) @ rng.normal(size=(rank, 50))).astype(dtype)
        relevance = rng.integers(1, 6, 80) / 5  # many ties
        relevance_weighted_dpp(features, relevance, rank)
        assert_fillers(*warned(relevance_weighted_dpp, features, relevance, 80), rank, relevance)
    # the guard must be relative to the own diagonal
    a = np.random.default_rng(10).normal(size=(40, 6)) * np.logspace(-8, 0, 40)[:, None]
    a[7] = 0
    kernel = a.astype(dtype) @ a.astype(dtype).T
    indices, gains = warned(greedy_map, kernel, 40)
    assert_fillers(indices, gains, 6, kernel.diagonal())
    assert indices[-1] == 7


def test_rank_guard_ignores_relevance():
    # A residual of 1e-4 squared is real in float64, however small the relevance; 1e-8 squared is not.
    given = [1.0, 1e-150], 2, True
    gains = relevance_weighted_dpp(np.array([[1.0, 0.0], [1.0, 1e-4]]), *given)[1]
    assert gains[1] == pytest.approx(2 * np.log(1e-150) + np.log(1e-8), abs=1e-5)
    gains = warned(relevance_weighted_dpp, np.array([[1.0, 0.0], [1.0, 1e-8]]), *given[:2])[1]
    assert gains[1] == -np.inf


def test_items_of_weight_zero_come_after_spent_ones_by_residual_then_by_index():
    features = np.array([[0, 0, 1.0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    expected = [1, 3, 2, 0], [2 * np.log(0.5), 2 * np.log(0.1), -np.inf, -np.inf]
    assert_same(warned(relevance_weighted_dpp, features, [0.0, 0.5, 0.4, 0.1], 4), expected)
    features = np.array([[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]])
    expected = [1, 3, 4, 0, 2], [2 * np.log(0.5), *[-np.inf] * 4]
    assert_same(warned(relevance_weighted_dpp, features, [0, 0.5, 0, 0, 0], 5), expected)
    expected = [3, 1, 0, 2], [np.log(5), np.log(1e-12), -np.inf, -np.inf]
    assert_same(warned(greedy_map, np.diag([0.0, 1e-12, 0.0, 5.0]), 4), expected)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_chosen_twice(seed):
    rng = np.random.default_rng(seed)
    features = rng.integers(-1, 2, size=(60, 4)) + np.array([0, 0, 0, 0.5])  # many duplicates, low rank
    relevance = rng.integers(0, 3, 60) / 2
    assert sorted(warned(relevance_weighted_dpp, features, relevance, 60)[0]) == list(range(60))
    assert sorted(warned(greedy_map, kernel_of(features, relevance), 60)[0]) == list(range(60))


GOOD = np.eye(3) + 0.1, np.array([0.1, 0.2, 0.3])


def replaced(array, index, value):
    array = array.copy()
    array[index] = value
    return array


BAD = [
    ("features", replaced(GOOD[0], (1, 2), np.nan), "NaN"),
    ("features", replaced(GOOD[0], (1, 2), np.inf), "inf"),
    ("features", replaced(GOOD[0], 1, 0.0), r"zero row \(1\)"),
    ("features", GOOD[0][0], "shape"),
    ("features", GOOD[0][None], "shape"),
    ("features", np.zeros((3, 0)), "shape"),
    ("relevance", [0.1, np.nan, 0.2], "NaN"),
    ("relevance", [0.1, np.inf, 0.2], "inf"),
    ("relevance", [0.1, -1e-9, 0.2], "negative"),
    ("relevance", [0, 0, 0], "zero"),
    ("relevance", [0.1, 0.2], "shape"),
    ("relevance", [[0.1], [0.2], [0.3]], "shape"),
    ("relevance", 0.5, "shape"),
    ("kernel", replaced(np.eye(3), (0, 1), np.nan), "NaN"),
    ("kernel", replaced(np.eye(3), (0, 0), np.inf), "inf"),
    ("kernel", np.ones((3, 2)), "square"),
    ("kernel", np.ones(3), "square"),
    ("kernel", np.ones((1, 3, 3)), "square"),
    ("kernel", replaced(np.eye(3), (0, 1), 0.5), "symmetric"),
    ("kernel", replaced(np.eye(3), (0, 1), 1e-4), "symmetric"),
    ("kernel", replaced(np.eye(3), (1, 1), -1e-12), "negative diagonal"),
    ("kernel", np.diag([1.0, 1e-12, 1e-12]) + replaced(np.zeros((3, 3)), (1, 2), 1e-13), "symmetric"),
    *(("k", k, "must be") for k in (0, -1, 4, 1.0, 1.5, "2", None, True, np.True_, np.float64(2))),
]


@pytest.mark.parametrize("name, value, message", BAD)
def test_bad_input_is_named(name, value, message):
    good = {relevance_weighted_dpp: {"features": GOOD[0], "relevance": GOOD[1], "k": 1}}
    good[greedy_map] = {"kernel": np.eye(3), "k": 1}
    for function, given in good.items():
        if name in given:
            with pytest.raises(ValueError, match=f"^{name} .*{message}"):
                function(**given | {name: value})


@pytest.mark.parametrize("mixed", [(torch.eye(3), GOOD[1]), (GOOD[0], torch.ones(3))])
def test_mixing_numpy_and_torch_is_a_type_error(mixed):
    with pytest.raises(TypeError, match="features and relevance"):
        relevance_weighted_dpp(*mixed, 1)


@pytest.mark.parametrize(
    "features", (np.ma.masked_array(np.eye(3)), csr_array(np.eye(3)), torch.eye(3).to_sparse())
)
def test_masked_and_sparse_features_are_a_type_error(features):
    relevance = torch.ones(3) if isinstance(features, torch.Tensor) else np.ones(3)
    with pytest.raises(TypeError, match="dense and without a mask"):
        relevance_weighted_dpp(features, relevance, 1)
    with pytest.raises(TypeError, match="dense and without a mask"):
        greedy_map(features, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_numpy_in_numpy_out(dtype):
    features, relevance = (10 * np.random.default_rng(0).normal(size=(20, 8))).astype(dtype), np.arange(1, 21)
    kernel = (np.eye(8) + 1).astype(dtype)
    for result in relevance_weighted_dpp(features, relevance, 5, True), greedy_map(kernel, 5, True):
        assert [type(x) for x in result] == [np.ndarray] * 2
        assert [x.dtype for x in result] == [np.int64, np.float64] and [x.shape for x in result] == [(5,)] * 2
    assert isinstance(relevance_weighted_dpp(features, relevance, 5), np.ndarray)  # without gains: no tuple


def test_what_else_is_accepted():
    """Lists, views, read-only arrays, NumPy's integers, and a kernel's rounding errors."""
    features, relevance = problem(11, 10, 4)
    expected = relevance_weighted_dpp(features, relevance, np.int32(4))
    assert relevance_weighted_dpp(features.tolist(), relevance.tolist(), 4).tolist() == expected.tolist()
    assert relevance_weighted_dpp(features[::-1], relevance[::-1], 4).tolist() == (9 - expected).tolist()
    features.flags.writeable = relevance.flags.writeable = False
    assert relevance_weighted_dpp(features, relevance, 4).tolist() == expected.tolist()
    assert greedy_map(replaced(np.eye(3), (0, 1), 1e-6), np.int64(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out_on_its_device(device, dtype):
    """Also: no gradient is tracked, and no input changed."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    data = [torch.tensor(x, dtype=dtype, device=device, requires_grad=True) for x in problem(12, 100, 32)]
    features, relevance = (x.detach().double() for x in data)
    expected = relevance_weighted_dpp(features.cpu().numpy(), relevance.cpu().numpy(), 30, True)
    unit = torch.nn.functional.normalize(features, dim=1) * relevance[:, None]
    kernel = (unit @ unit.T).requires_grad_()
    before = [x.detach().clone() for x in (*data, kernel)]
    for result in relevance_weighted_dpp(*data, 30, True), greedy_map(kernel, 30, True):
        assert [x.dtype for x in result] == [torch.int64, torch.float64]
        assert all(x.device == features.device and not x.requires_grad for x in result)
        assert_same([x.cpu() for x in result], expected, 1e-9)  # so all was upcast before any arithmetic
    assert all(torch.equal(x, y) for x, y in zip((*data, kernel), before, strict=True))


def family(kind, seed, n=600, d=48):
    """(features (n, d), relevance (n,), how many to choose) of one kind of data."""
    rng = np.random.default_rng(seed)
    features, relevance, k = rng.normal(size=(n, d)), np.exp(rng.normal(size=n).round(1)), 40
    if kind == "clustered":
        features = rng.normal(size=(30, d))[rng.integers(30, size=n)] + 0.2 * features
    if kind == "near-duplicates":
        features = features[rng.integers(n // 10, size=n)] + 1e-3 * rng.normal(size=(n, d))
    if kind == "rank-deficient":
        features, k = features[:, :30] @ rng.normal(size=(30, d)), 29
    if kind == "skewed":  # as a client's, and far beyond
        relevance = 1 / (1 + np.exp(9 - rng.choice([1, 4, 20]) * features[:, 0]))
    if kind == "uniform":
        relevance = np.full(n, 0.3)
    if kind == "few dimensions":
        features, k = features[:, :6], 6
    if kind == "several rounds":  # more than compete at a time, to the end of the rank
        features, k = rng.normal(size=(n, 270)), 265
    if kind == "many ties":
        features, relevance, k = np.tile(rng.normal(size=(200, 250)), (n // 200, 1)), np.ones(n), 199
    return features, relevance, k


KINDS = ["random", "clustered", "near-duplicates", "rank-deficient", "skewed", "uniform", "few dimensions"]


@pytest.mark.parametrize("kind", [*KINDS, "several rounds", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_the_lazy_search_finds_what_the_plain_one_finds(kind, seed, tmp_path):
    """With features on disk in any of the types."""
    features, relevance, k = family(kind, seed)
    for dtype in (np.float64, np.float32, np.float16):
        np.save(tmp_path / "features.npy", features.astype(dtype))
        on_disk = np.load(tmp_path / "features.npy", mmap_mode="r")
        expected = greedy_map(kernel_of(on_disk, relevance), k, True)
        assert_same(relevance_weighted_dpp(on_disk, relevance, k, True), expected, 1e-6)


def test_memory_is_linear_in_n():
    n, k = 30_000, 6  # n x n would take 7 GB
    features, relevance = problem(15, n, 8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            copied = function is not torch.ops.aten.lift_fresh.default
            if copied and isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        indices = relevance_weighted_dpp(features.astype(np.float16), relevance, k).tolist()
    assert largest == n  # a number an item: no n x k, no second copy of the features
    assert len(set(indices)) == k and indices[0] == relevance.argmax()


def test_speed_at_the_papers_size():
    features, relevance = problem(16, 3000, 768)
    start = time.thread_time()  # not the wall clock, so that a busy machine does not matter
    relevance_weighted_dpp(features, relevance, 500, True)
    # about 0.7 s on one core; a fresh factorisation a step, minutes or hours
    assert time.thread_time() - start < 20


def test_the_file_alone_runs_its_own_example(tmp_path):
    shutil.copy(dpp.__file__, tmp_path)
    example = "".join(re.findall(r"^    .*\n|^\n", dpp.__doc__, flags=re.M))
    script = textwrap.dedent(example) + "print(len(set(indices)))\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("50\n", "")
