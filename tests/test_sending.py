"""What a client's routing vectors give away: attacks that solved exact means for the number of samples, the
private mean and a single record still solve those, and fail on what is sent."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import CLIENTS

from metamoe import backbones, sending
from metamoe.records import read_records, write_records

pytestmark = pytest.mark.usefixtures("one_thread")
N = 24


@pytest.fixture(scope="module")
def backbone(seed_model):
    return backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")


def records(count, seed, private=True):
    rng = random.Random(seed)
    return [tiny.record("hotels", rng, private) for _ in range(count)]


def layer0(backbone, rows):
    """Each record's vector in layer 0, which no expert changes: (n, d)."""
    return np.stack([backbone.routing_vectors(backbone.model, [row])[0].double().numpy() for row in rows])


def sent(backbone, folder, rows):
    """What a client sends of layer 0 for these private records."""
    folder.mkdir(exist_ok=True)
    write_records(folder / "train.jsonl", rows)
    half = sending.private_half(folder / "train.jsonl", rows)
    return backbone.routing_vectors(backbone.model, half)[0].bfloat16().double().numpy()


def solved_count(private, mixed, proxies):
    """N of mixed = (N private + m mean(proxies)) / (N + m), in least squares."""
    a, b = mixed - private, proxies.mean(0) - mixed
    return len(proxies) * (a @ b) / (a @ a) if (a @ a) > 0 else np.inf


def rank_of(record, others, difference):
    """The place of the record among the others, by the cosine to what was solved for; 1: first."""
    rows = np.stack([record, *others])
    rows = rows - rows.mean(0)
    cosines = rows @ difference / np.linalg.norm(rows, axis=1) / np.linalg.norm(difference)
    return 1 + int((cosines > cosines[0]).sum())


def test_two_variants_cannot_be_solved_for_the_count(finished, backbone):
    """layer 0's vectors of a client's two uploads, and its proxies, which the server knows."""
    run = finished[0]
    public = read_records(run / "public" / "records.jsonl")
    for name in CLIENTS:
        uploads = run / "clients" / name / "upload"
        first, second = (
            load_file(uploads / variant / "router.safetensors")["vectors"]
            for variant in ("private-similarity", "aligned-dpp")
        )
        assert first.dtype == torch.bfloat16 and torch.equal(first[0], second[0])
        assert not torch.equal(first[1:], second[1:])  # two experts
        chosen = json.loads((uploads / "aligned-dpp" / "proxies.json").read_text())
        proxies = layer0(backbone, [public[i] for i in chosen])
        private = layer0(backbone, read_records(run / "clients" / name / "private" / "train.jsonl"))
        count, vectors = len(private), (first[0].double().numpy(), second[0].double().numpy())
        assert not abs(solved_count(*vectors, proxies) - count) < count / 2
        # the attack is right on exact means over private data, and over these and proxies
        mixed = np.concatenate([private, proxies]).mean(0)
        assert round(solved_count(private.mean(0), mixed, proxies)) == count
        # nor is what is sent the private mean
        assert np.linalg.norm(vectors[0] - private.mean(0)) > 0.05 * np.linalg.norm(private.mean(0))


def test_one_record_more_cannot_be_solved_for(backbone, tmp_path):
    """Two uploads of data that differ in one record, by an attacker who even knows how many there are."""
    rows, others = records(N, seed=1), layer0(backbone, records(300, seed=2))
    mean, ranks = layer0(backbone, rows).mean(0), []
    first = sent(backbone, tmp_path / "a", rows)
    for extra in records(8, seed=3):
        vector = layer0(backbone, [extra])[0]
        exact = (N * mean + vector) / (N + 1)
        assert rank_of(vector, others, (N + 1) * exact - N * mean - others.mean(0)) == 1
        second = sent(backbone, tmp_path / "b", [*rows, extra])
        ranks.append(rank_of(vector, others, (N + 1) * second - N * first - others.mean(0)))
    assert np.median(ranks) > 30 and min(ranks) > 1, ranks


def test_the_half_is_the_datas_own(tmp_path):
    """The same data give the same half, in the data's order; another file another one."""
    rows = records(N + 1, seed=4)
    write_records(tmp_path / "train.jsonl", rows)
    half = sending.private_half(tmp_path / "train.jsonl", rows)
    assert half == sending.private_half(tmp_path / "train.jsonl", rows) and len(half) == N // 2 + 1
    assert [row for row in rows if row in half] == half
    write_records(tmp_path / "train.jsonl", rows[:-1])
    other = sending.private_half(tmp_path / "train.jsonl", rows[:-1])
    assert len(other) == N // 2 and 2 < sum(row in half for row in other) < N // 2 - 2
    write_records(tmp_path / "train.jsonl", rows[:1])
    assert sending.private_half(tmp_path / "train.jsonl", rows[:1]) == rows[:1]
