"""Tests of dpp.py: every greedy step against determinants, the order of ties and fillers, and the errors."""

import re
import shutil
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpp
from dpp import greedy_map, relevance_weighted_dpp


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
    """Greedy MAP with a fresh determinant for each candidate: App. B, 'Naive Computation'."""
    chosen, gains, total = [], [], 0.0
    for _ in range(k):
        values = {i: log_det(kernel, chosen + [i]) for i in range(len(kernel)) if i not in chosen}
        best = max(values, key=values.get)
        chosen.append(best)
        gains.append(values[best] - total)
        total = values[best]
    return chosen, gains


def silent(function, *args, **kwargs):
    """The call, with any warning turned into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


def warned(function, *args, **kwargs):
    """The call, which must warn that the rank is used up, once, pointing at this file."""
    with pytest.warns(RuntimeWarning, match="rank is used up") as record:
        result = function(*args, **kwargs)
    assert len(record) == 1 and record[0].filename == __file__
    return result


def assert_gains(found, expected, atol=1e-8):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- against determinants


@pytest.mark.parametrize("seed, n, d, k", [*((n, n, n + 2, n) for n in range(5, 13)), (0, 120, 64, 30)])
def test_every_step_is_the_best_by_brute_force_determinants(seed, n, d, k):
    features, relevance = problem(seed, n, d)
    kernel = kernel_of(features, relevance)
    expected, expected_gains = naive_greedy(kernel, k)
    for indices, gains in (
        silent(relevance_weighted_dpp, features, relevance, k, return_gains=True),
        silent(greedy_map, kernel, k, return_gains=True),
    ):
        assert indices.tolist() == expected
        assert_gains(gains, expected_gains)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_map_on_kernels_that_are_no_cosines(seed):
    a = np.random.default_rng(seed).normal(size=(12, 15)) * np.logspace(-4, 4, 12)[:, None]
    indices, gains = silent(greedy_map, a @ a.T, 12, return_gains=True)
    expected, expected_gains = naive_greedy(a @ a.T, 12)
    assert indices.tolist() == expected
    assert_gains(gains, expected_gains)


@pytest.mark.parametrize("seed", range(3))
def test_gains_add_up_to_eq_4_and_never_rise(seed):
    features, relevance = problem(seed, 300, 64)
    kernel = kernel_of(features, relevance)
    indices, gains = silent(relevance_weighted_dpp, features, relevance, 60, return_gains=True)
    left = log_det(kernel, indices)
    right = 2 * np.log(relevance[indices]).sum() + log_det(kernel_of(features, np.ones(300)), indices)
    assert left == pytest.approx(right, abs=1e-9)
    assert gains.sum() == pytest.approx(left, abs=1e-9)
    assert (np.diff(gains) <= 1e-12).all()  # log det is submodular
    same_indices, same_gains = silent(greedy_map, kernel, 60, return_gains=True)
    np.testing.assert_array_equal(indices, same_indices)
    assert_gains(gains, same_gains, 1e-9)


def test_smaller_k_gives_a_prefix():
    features, relevance = problem(3, 100, 20)
    longest = warned(relevance_weighted_dpp, features, relevance, 50)
    for k in 1, 7, 20:
        np.testing.assert_array_equal(silent(relevance_weighted_dpp, features, relevance, k), longest[:k])


def test_accuracy_with_many_nearly_parallel_items():
    rng = np.random.default_rng(4)
    features = 1 + 1e-3 * rng.normal(size=(200, 50))  # cosines of 1 - 1e-6
    indices, gains = silent(relevance_weighted_dpp, features, np.ones(200), 50, return_gains=True)
    unit = features[indices] / np.linalg.norm(features[indices], axis=1, keepdims=True)
    assert gains.sum() == pytest.approx(2 * np.log(np.linalg.svd(unit, compute_uv=False)).sum(), abs=1e-6)


# --- what it is for


def test_first_pick_is_the_highest_relevance():
    for seed in range(10):
        features, relevance = problem(seed, 50, 8)
        assert relevance_weighted_dpp(features, relevance, 1).tolist() == [relevance.argmax()]


def test_diversity_beats_top_k_on_near_duplicates():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(5), 20)
    features = np.eye(16)[group] + 0.01 * rng.normal(size=(100, 16))
    relevance = np.array([0.95, 0.9, 0.85, 0.8, 0.75])[group] + rng.uniform(0, 0.01, 100)
    top = np.argsort(-relevance)[:5]
    chosen = silent(relevance_weighted_dpp, features, relevance, 5)
    assert set(group[top]) == {0} and group[chosen].tolist() == [0, 1, 2, 3, 4]
    kernel = kernel_of(features, relevance)
    assert log_det(kernel, chosen) > log_det(kernel, top) + 20


def test_relevance_outweighs_diversity_where_it_should():
    # After item 0, the gain of item 1 (cosine 0.8, rho 0.36) is 2 log r_1 + log 0.36, of item 2 2 log r_2.
    features = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    for r2, second in (0.53, 1), (0.55, 2):  # the balance is at r_2 = 0.9 * 0.6 = 0.54
        assert relevance_weighted_dpp(features, [1.0, 0.9, r2], 2).tolist() == [0, second]


def test_only_the_direction_of_a_feature_counts():
    features, relevance = problem(5, 80, 16)
    lengths = 10.0 ** np.random.default_rng(5).integers(-200, 200, 80)[:, None]
    indices, gains = silent(relevance_weighted_dpp, features, relevance, 16, return_gains=True)
    scaled_indices, scaled_gains = silent(relevance_weighted_dpp, features * lengths, relevance, 16, True)
    np.testing.assert_array_equal(indices, scaled_indices)
    assert_gains(scaled_gains, gains, 1e-9)


@pytest.mark.parametrize("constant", [1e-300, 1e-9, 1e-3, 7.0, 1e300])
def test_scaling_all_relevances_or_the_kernel_changes_nothing(constant):
    features, relevance = problem(6, 120, 30)
    relevance[::10] = relevance[0]  # some ties in relevance too
    kernel = kernel_of(features, relevance)
    np.testing.assert_array_equal(warned(greedy_map, kernel, 60), warned(greedy_map, constant * kernel, 60))
    relevance[5] = 0.0
    indices, gains = warned(relevance_weighted_dpp, features, relevance, 120, return_gains=True)
    scaled_indices, scaled_gains = warned(relevance_weighted_dpp, features, constant * relevance, 120, True)
    np.testing.assert_array_equal(indices, scaled_indices)
    assert_gains(scaled_gains[:30] - 2 * np.log(constant), gains[:30])


@pytest.mark.parametrize("relevance", [1e-9, 1e-300])
def test_tiny_relevances_keep_the_diversity(relevance):
    features = np.repeat(np.eye(4), 3, axis=0)
    assert silent(relevance_weighted_dpp, features, np.full(12, relevance), 4).tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("seed", range(5))
def test_permutation_equivariance(seed):
    features, relevance = problem(seed, 150, 24)
    permutation = np.random.default_rng(100 + seed).permutation(150)
    indices = warned(relevance_weighted_dpp, features, relevance, 60)
    moved = warned(relevance_weighted_dpp, features[permutation], relevance[permutation], 60)
    np.testing.assert_array_equal(permutation[moved], indices)
    kernel = kernel_of(features, relevance)
    moved = warned(greedy_map, kernel[np.ix_(permutation, permutation)], 60)
    np.testing.assert_array_equal(permutation[moved], indices)


# --- ties and duplicates


def test_ties_go_to_the_lowest_index():
    assert silent(relevance_weighted_dpp, np.eye(6), np.full(6, 0.3), 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert silent(relevance_weighted_dpp, np.eye(4), [0.5, 0.7, 0.5, 0.7], 4).tolist() == [1, 3, 0, 2]
    assert silent(greedy_map, np.diag([2.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_does_not_break_ties_of_orthonormal_features(seed, dtype):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(60, 60)))[0].astype(dtype)
    assert silent(relevance_weighted_dpp, q * 3, np.full(60, 0.1), 60).tolist() == list(range(60))


@pytest.mark.parametrize("cosine", [0.1, 0.9, 0.999])
def test_rounding_does_not_break_ties_of_equiangular_features(cosine):
    kernel = np.full((100, 100), cosine) + (1 - cosine) * np.eye(100)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))[0]
    features = np.linalg.cholesky(kernel) @ rotation  # unit vectors, each pair at this cosine
    assert silent(relevance_weighted_dpp, features, np.full(100, 0.7), 100).tolist() == list(range(100))
    assert silent(greedy_map, kernel, 100).tolist() == list(range(100))


def test_exact_duplicates_give_the_lowest_index_and_come_again_only_as_fillers():
    base, relevance = problem(8, 10, 32)
    features, relevance = np.tile(base, (4, 1)).astype(np.float32), np.tile(relevance, 4)
    indices, gains = warned(relevance_weighted_dpp, features, relevance, 40, return_gains=True)
    np.testing.assert_array_equal(np.sort(indices[:10]), np.arange(10))
    assert np.isfinite(gains[:10]).all() and (gains[10:] == -np.inf).all()
    fillers = np.arange(10, 40)
    np.testing.assert_array_equal(indices[10:], fillers[np.argsort(-relevance[10:], kind="stable")])


def test_scaled_float32_duplicates_count_as_duplicates():
    base = np.random.default_rng(9).normal(size=(10, 64)).astype(np.float32)
    # rounded: cosine not quite 1
    features = np.concatenate([base, base * np.float32(1 / 3), base * np.float32(0.7)])
    indices, gains = warned(relevance_weighted_dpp, features, np.ones(30), 11, return_gains=True)
    assert len(set(indices[:10] % 10)) == 10 and np.isfinite(gains[:10]).all() and gains[10] == -np.inf


def test_the_more_relevant_of_two_duplicates_wins():
    features = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert silent(relevance_weighted_dpp, features, [0.5, 0.6, 0.1], 2).tolist() == [1, 2]


# --- the end of the rank, and zeros


def assert_fillers(indices, gains, rank, weight):
    """Each item once; after the first `rank`, those that are left by weight, then index, with gain -inf."""
    assert np.isfinite(gains[:rank]).all() and (gains[rank:] == -np.inf).all()
    rest = set(range(len(weight))) - set(indices[:rank])
    assert indices[rank:].tolist() == sorted(rest, key=lambda i: (-weight[i], i))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_rank_exhaustion_warns_and_fills_by_relevance(rank, dtype):
    rng = np.random.default_rng(rank)
    # rank only up to rounding
    features = (rng.normal(size=(80, rank)) @ rng.normal(size=(rank, 50))).astype(dtype)
    relevance = rng.integers(1, 6, 80) / 5  # many ties
    silent(relevance_weighted_dpp, features, relevance, rank)
    assert_fillers(*warned(relevance_weighted_dpp, features, relevance, 80, True), rank, relevance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rank_exhaustion_of_an_explicit_kernel_fills_by_diagonal(dtype):
    # the guard must be relative to the own diagonal
    a = np.random.default_rng(10).normal(size=(40, 6)) * np.logspace(-8, 0, 40)[:, None]
    a[7] = 0
    kernel = a.astype(dtype) @ a.astype(dtype).T
    indices, gains = warned(greedy_map, kernel, 40, return_gains=True)
    assert_fillers(indices, gains, 6, kernel.diagonal())
    assert indices[-1] == 7


def test_rank_guard_ignores_relevance():
    # A residual of 1e-4 squared is real in float64, however small the relevance; 1e-8 squared is not.
    for epsilon, gain in (1e-4, 2 * np.log(1e-150) + np.log(1e-8)), (1e-8, -np.inf):
        features = np.array([[1.0, 0.0], [1.0, epsilon]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gains = relevance_weighted_dpp(features, [1.0, 1e-150], 2, return_gains=True)[1]
        assert gains[1] == pytest.approx(gain, abs=1e-5)


def test_zero_relevance_comes_last_even_after_spent_items():
    features = np.array([[0, 0, 1.0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    indices, gains = warned(relevance_weighted_dpp, features, [0.0, 0.5, 0.4, 0.1], 4, return_gains=True)
    assert indices.tolist() == [1, 3, 2, 0]
    np.testing.assert_allclose(gains, [2 * np.log(0.5), 2 * np.log(0.1), -np.inf, -np.inf])
    assert silent(relevance_weighted_dpp, features, [0.0, 0.5, 0.0, 0.1], 2).tolist() == [1, 3]


def test_zero_relevance_items_go_by_residual_then_by_index():
    s = np.sqrt(0.5)
    features = np.array([[1.0, 0, 0], [1, 0, 0], [s, s, 0], [0, 0, 1], [0, 1, 0]])
    indices, gains = warned(relevance_weighted_dpp, features, [0, 0.5, 0, 0, 0], 5, return_gains=True)
    assert indices.tolist() == [1, 3, 4, 0, 2] and (gains[1:] == -np.inf).all()


def test_zero_diagonal_items_come_last():
    indices, gains = warned(greedy_map, np.diag([0.0, 1e-12, 0.0, 5.0]), 4, return_gains=True)
    assert indices.tolist() == [3, 1, 0, 2]
    np.testing.assert_allclose(gains, [np.log(5), np.log(1e-12), -np.inf, -np.inf])


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_chosen_twice(seed):
    rng = np.random.default_rng(seed)
    features = rng.integers(-1, 2, size=(60, 4)) + np.array([0, 0, 0, 0.5])  # many duplicates, low rank
    relevance = rng.integers(0, 3, 60) / 2
    found = warned(relevance_weighted_dpp, features, relevance, 60)
    np.testing.assert_array_equal(np.sort(found), np.arange(60))
    found = warned(greedy_map, kernel_of(features, relevance), 60)
    np.testing.assert_array_equal(np.sort(found), np.arange(60))


# --- errors

GOOD = np.eye(3) + 0.1, np.array([0.1, 0.2, 0.3])


def replaced(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize("k", [0, -1, 4, 1.0, 1.5, "2", None, True, np.True_, np.float64(2)])
def test_bad_k_is_named(k):
    for function, *args in (relevance_weighted_dpp, *GOOD), (greedy_map, np.eye(3)):
        with pytest.raises(ValueError, match="^k must be"):
            function(*args, k)


def test_numpy_integer_k_is_fine():
    assert len(relevance_weighted_dpp(*GOOD, np.int32(2))) == len(greedy_map(np.eye(3), np.int64(2))) == 2


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
]


@pytest.mark.parametrize("name, value, message", BAD)
def test_bad_input_is_named(name, value, message):
    with pytest.raises(ValueError, match=f"^{name} .*{message}"):
        if name == "kernel":
            greedy_map(value, 1)
        else:
            relevance_weighted_dpp(**{"features": GOOD[0], "relevance": GOOD[1], name: value}, k=1)


def test_asymmetry_of_float32_size_is_accepted():
    assert greedy_map(replaced(np.eye(3), (0, 1), 1e-6), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("mixed", [(torch.eye(3), GOOD[1]), (GOOD[0], torch.ones(3))])
def test_mixing_numpy_and_torch_is_a_type_error(mixed):
    with pytest.raises(TypeError, match="features and relevance"):
        relevance_weighted_dpp(*mixed, 1)


# --- types and devices


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_numpy_in_numpy_out(dtype):
    features, relevance = (10 * np.random.default_rng(0).normal(size=(20, 8))).astype(dtype), np.arange(1, 21)
    for result in (
        relevance_weighted_dpp(features, relevance, 5, return_gains=True),
        greedy_map((np.eye(8) + 1).astype(dtype), 5, return_gains=True),
    ):
        assert [type(x) for x in result] == [np.ndarray] * 2
        assert [x.dtype for x in result] == [np.int64, np.float64] and [x.shape for x in result] == [(5,)] * 2
    assert isinstance(relevance_weighted_dpp(features, relevance, 5), np.ndarray)  # without gains: no tuple


def test_lists_and_awkward_arrays_are_accepted():
    features, relevance = problem(11, 10, 4)
    expected = relevance_weighted_dpp(features, relevance, 4)
    np.testing.assert_array_equal(relevance_weighted_dpp(features.tolist(), relevance.tolist(), 4), expected)
    np.testing.assert_array_equal(relevance_weighted_dpp(features[::-1], relevance[::-1], 4), 9 - expected)
    features.flags.writeable = relevance.flags.writeable = False
    np.testing.assert_array_equal(silent(relevance_weighted_dpp, features, relevance, 4), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out_on_its_device(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    features, relevance = (torch.tensor(x, dtype=dtype, device=device) for x in problem(12, 100, 32))
    arrays = (x.cpu().double().numpy() for x in (features, relevance))
    expected = relevance_weighted_dpp(*arrays, 30, return_gains=True)
    unit = torch.nn.functional.normalize(features.double(), dim=1) * relevance.double()[:, None]
    for result in (
        silent(relevance_weighted_dpp, features, relevance, 30, return_gains=True),
        silent(greedy_map, unit @ unit.T, 30, return_gains=True),
    ):
        assert [x.dtype for x in result] == [torch.int64, torch.float64]
        assert all(x.device == features.device for x in result)
        # so float32 was upcast before any arithmetic
        np.testing.assert_array_equal(result[0].cpu(), expected[0])
        assert_gains(result[1].cpu(), expected[1], 1e-9)


def test_no_gradient_is_tracked_and_no_input_changed():
    features, relevance = (torch.tensor(x, requires_grad=True) for x in problem(13, 20, 8))
    inputs = features, relevance, torch.diag(relevance)
    before = [x.detach().clone() for x in inputs]
    for _, gains in relevance_weighted_dpp(*inputs[:2], 8, True), greedy_map(inputs[2], 8, True):
        assert not gains.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# --- the lazy search and its cost


def family(kind, seed, n=1000, d=48):
    """(features (n, d), relevance (n,), how many to choose) of one kind of data."""
    rng = np.random.default_rng(seed)
    features, relevance, k = rng.normal(size=(n, d)), np.exp(rng.normal(size=n)), 40
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
    return features, relevance, k


KINDS = ["random", "clustered", "near-duplicates", "rank-deficient", "skewed", "uniform", "few dimensions"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_lazy_search_finds_what_the_plain_one_finds(kind, seed):
    features, relevance, k = family(kind, seed)
    for dtype in (np.float64, np.float32, np.float16):
        stored = features.astype(dtype)
        order, gains = silent(relevance_weighted_dpp, stored, relevance, k, return_gains=True)
        expected, expected_gains = greedy_map(kernel_of(stored, relevance), k, return_gains=True)
        assert order.tolist() == expected.tolist()
        assert_gains(gains, expected_gains, 1e-6)


def test_more_items_than_compete_at_a_time(tmp_path):
    """Several rounds, among them some of many ties, and to the end of the rank; features on disk."""
    rng = np.random.default_rng(0)
    features, relevance = rng.normal(size=(1000, 400)), np.exp(rng.normal(size=1000).round(1))
    many = np.tile(features[:300], (3, 1))
    for z, r, k in ((features, relevance, 395), (many, np.ones(900), 299)):
        np.save(tmp_path / "features.npy", z.astype(np.float16))
        on_disk = np.load(tmp_path / "features.npy", mmap_mode="r")
        expected = greedy_map(kernel_of(on_disk, r), k).tolist()
        assert silent(relevance_weighted_dpp, on_disk, r, k).tolist() == expected


def test_memory_is_linear_in_n():
    n, k = 100_000, 6  # n x n would take 80 GB
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
        indices = silent(relevance_weighted_dpp, features.astype(np.float16), relevance, k)
    assert largest == n  # a number an item: no n x k, no second copy of the features
    assert len(set(indices.tolist())) == k and indices[0] == relevance.argmax()


def test_speed_at_the_papers_size():
    features, relevance = problem(16, 3000, 768)
    start = time.thread_time()  # not the wall clock, so that a busy machine does not matter
    silent(relevance_weighted_dpp, features, relevance, 500)
    # about 0.7 s on one core; a fresh factorisation a step, minutes or hours
    assert time.thread_time() - start < 20


def test_the_file_alone_runs_its_own_example(tmp_path):
    shutil.copy(dpp.__file__, tmp_path)
    example = "".join(re.findall(r"^    .*\n|^\n", dpp.__doc__, flags=re.M))
    script = textwrap.dedent(example) + "print(len(set(indices)))\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("50\n", "")
