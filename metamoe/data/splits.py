"""Splits of a client's data: random, by class, and without a text in two parts."""

import hashlib
import zlib
from collections import Counter

import numpy as np

from metamoe.errors import UserError


def rng_of(seed, name):
    """The random generator of what is called `name` (a client, a part of its data) under a random seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def digest(text):
    """A 64-bit number that stands for a text."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def grouped(keys, rng):
    """(rows in a random order, those of equal keys together (n,), a number for each row's key (n,))."""
    number = np.unique(np.asarray(keys, np.uint64), return_inverse=True)[1]
    number = rng.permutation(len(number))[number]
    return np.argsort(number, kind="stable"), number


def hold_out(order, keys, size):
    """(the first `size` rows of `order`, those of the others that share no key with them)."""
    out, left = order[:size], order[size:]
    return out, left[~np.isin(keys[left], keys[out])]


def balanced(labels, n, rng):
    """Sorted indices of `n` random items, as many of each label as possible; fewer are a subset of more."""
    order, seen, turn = rng.permutation(len(labels)), Counter(), []
    for i in order:  # the first of every class, then the second of every class, ...
        turn.append(seen[labels[i]])
        seen[labels[i]] += 1
    return np.sort(order[np.argsort(turn, kind="stable")[:n]]).tolist()


def stratified(labels, share, rng):
    """Mask over `labels` of about `share` of each class: at least one of its items and never all."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        mask[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return mask


def public_subset(count, size, has):
    """Sorted rows of a public set, `size` of `count` (0: all); the same for every random seed."""
    if size > count:
        raise UserError(f"--public-size {size}: {has}: lower it (0: all)")
    return np.sort(np.random.default_rng(0).permutation(count)[: size or count])
