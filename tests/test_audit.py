"""evaluate.py --audit: its statistics against independent formulas, its rehearsal by the command line."""

import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from scipy.stats import beta
from sklearn.metrics import roc_auc_score, roc_curve
from tiny import COMMON, refused, stage

from metamoe.audit import canaries, extraction, membership, rehearsal, vectors
from metamoe.records import read_records
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def test_auc_and_true_positives_are_scikit_learns():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 300).round(1), rng.normal(0, 1, 250).round(1)  # with ties
    found = membership.membership(members, others, seed=0, rate=0.05)
    truth, scores = np.repeat([1, 0], [300, 250]), np.concatenate([members, others])
    assert found["auc"] == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found["tpr"] == pytest.approx(true[false <= 0.05].max())
    low, high = found["auc_interval"]
    assert low < found["auc"] < high < low + 0.12


def test_a_score_that_knows_nothing_is_at_chance():
    rng, misses = np.random.default_rng(1), 0
    for trial in range(20):
        low, high = membership.membership(*rng.normal(size=(2, 150)), seed=trial)["auc_interval"]
        misses += not low < 0.5 < high
    assert misses <= 4


def test_the_canaries_bound_is_the_papers():
    """The ceilings that were computed for it elsewhere; without delta the one of Clopper and Pearson."""
    assert canaries.lower_bound(200, 200, 200, 1e-3) == pytest.approx(3.57, abs=0.01)
    assert canaries.lower_bound(180, 200, 200, 1e-3) == pytest.approx(1.74, abs=0.01)
    assert canaries.lower_bound(100, 200, 200, 1e-3) == 0
    for right in (120, 150, 199):
        p = beta.ppf(0.05, right, 200 - right + 1)
        bound = canaries.lower_bound(right, 200, 200, 0.0)
        assert bound == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
        assert canaries.lower_bound(right, 200, 200, 1e-3) < bound


def test_canaries_are_guessed_by_their_scores():
    coins = np.array([True, False, True, True, False, False])
    assert canaries.guess([5, 1, 4, 3, 2, 0], coins) == 6
    assert canaries.guess([0, 5, 1, 2, 4, 3], coins) == 0


def test_similarity_is_levenshteins():
    assert extraction.similarity("kitten", list("sitting")) == pytest.approx(1 - 3 / 7)
    assert extraction.similarity([1, 2, 3], [1, 2, 3]) == 1
    assert extraction.similarity([], [1]) == 0 == extraction.similarity([1, 1], [2, 2])


def test_vectors_tell_less_of_more_records():
    """Independent records: the prediction of a known distribution, which the attack stays below."""
    pool = np.random.default_rng(2).normal(size=(600, 3, 40)).astype(np.float32)
    found = vectors.attack(pool, counts=(25, 100, 300))
    measured = [found[count]["mean"] for count in (25, 100, 300)]
    assert measured[0] > 0.9 and measured == sorted(measured, reverse=True) and measured[2] > 0.52
    for count, row in found.items():
        m_x = math.sqrt(3 * 40)
        assert row["predicted"] == pytest.approx(0.5 + 0.5 * math.erf(m_x / math.sqrt(count) / 2), abs=0.02)
        assert row["sent"] < row["mean"] < row["predicted"] + 0.02
    alike = vectors.attack(
        np.repeat(pool[:300], 2, 0)[np.random.default_rng(3).permutation(600)], counts=(100,)
    )
    assert alike[100]["mean"] < found[100]["mean"]  # half of the others have a twin among the members


@pytest.mark.parametrize("count", (5, 9, 12))
def test_a_few_records_are_enough_for_the_attack(count):
    """With them the covariance of a layer is of one or two records."""
    pool = np.random.default_rng(4).normal(size=(count, 2, 30)).astype(np.float32)
    (row,) = vectors.attack(pool).values()
    assert 0 <= row["sent"] <= 1 and 0 <= row["mean"] <= 1


def test_the_cut_takes_every_record_once():
    records = [tiny.record("intent", random.Random(i), True) | {"number": i} for i in range(100)]
    for row in records:
        row.pop("number")
    members, others, changed, coins = rehearsal.cut(records, 20, seed=0)
    assert (len(members), len(others), len(changed), len(coins)) == (40, 40, 20, 20) and 4 < coins.sum() < 16
    prompts = [row["prompt"] for row in members + others + changed]
    assert sorted(prompts) == sorted(row["prompt"] for row in records)
    assert all(row["answer"] in row["choices"] for row in changed)
    kept = {row["prompt"]: row["answer"] for row in records}
    assert 5 < sum(kept[row["prompt"]] != row["answer"] for row in changed) < 20
    again = rehearsal.cut(records, 20, seed=1)[0]
    assert 5 < sum(row in members for row in again) < 35


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def test_an_audit_through_the_command_line(run):
    """Only members and the coins' canaries are trained on; a second call makes nothing again."""
    flags = ["--audit", "hotels", "--canaries", "8"]
    result = stage("evaluate", run, *flags)
    assert result.code == 0, result.err
    found, audit = read_json(run / "privacy.json"), run / "audit"
    for name in ("privacy.md", "privacy-roc.png", "privacy-vectors.png"):
        assert (run / name).stat().st_size > 500
    assert set(found["membership"]) == {"seed model", "expert", "unified model"}
    members, others, changed, coins = rehearsal.cut(rehearsal.all_records(run, "hotels"), 8, 0)
    assert found["membership"]["expert"]["members"] == len(members) == 12
    trained = list(read_records(audit / "clients" / "hotels" / "private" / "train.jsonl"))
    assert trained == members + [row for row, coin in zip(changed, coins, strict=True) if coin]
    assert not any(row in trained for row in others)
    assert [path.name for path in audit.glob("clients/*/private")] == ["private"]  # no other's data
    assert oct(audit.stat().st_mode)[-3:] == "700"
    made = {path: path.stat().st_mtime_ns for path in audit.rglob("done.json")}
    again = stage("evaluate", run, *flags)
    assert again.code == 0 and read_json(run / "privacy.json") == found
    assert {path: path.stat().st_mtime_ns for path in audit.rglob("done.json")} == made
    _, parts = rehearsal.prepare(
        run, read_json(run / "run.json"), "hotels", 6
    )  # another cut is another rehearsal
    assert len(parts[0]) == 13 and not (audit / "moe").exists()


REFUSED = {"--audit nobody": "nobody", "--audit hotels --canaries 20": "at most a third"}


@pytest.mark.parametrize("flags", REFUSED)
def test_refusals(run, flags):
    assert REFUSED[flags] in refused("evaluate", run, *flags.split())
    assert not (run / "audit").exists() and not (run / "privacy.json").exists()


def test_a_private_client_is_audited_as_private(run, monkeypatch):
    """The rehearsal's selection and expert have the budget of the client's own."""
    flags = ["--epsilon", "4", "--delta", "0.001", "--private-parts", "vectors", "expert"]
    shutil.rmtree(run / "clients" / "hotels" / "experts" / "aligned-dpp")
    train = ["--client", "hotels", "--rank", "4", "--epochs", "1", "--fixed-a", *flags]
    assert stage("train_expert", run, *train).code == 0
    calls = []
    monkeypatch.setattr(rehearsal, "stage", lambda script, folder, given: calls.append((script, given)))
    folder, _ = rehearsal.prepare(run, read_json(run / "run.json"), "hotels", 6)
    machine = SimpleNamespace(device="cpu", dtype="float32")
    assert rehearsal.stages(run, folder, "hotels", "metamoe", machine) is None  # nothing was made
    given = dict(calls)
    assert list(given) == ["select_proxies.py", "train_expert.py"]
    for script, own in given.items():
        assert " ".join(flags) in " ".join(own).replace("4.0", "4"), script
    assert "--fixed-a" in given["train_expert.py"] and "None" not in given["train_expert.py"]


def test_without_an_expert_there_is_nothing_to_audit(run):
    shutil.rmtree(run / "clients" / "hotels" / "experts")
    assert "train_expert.py" in refused("evaluate", run, "--audit", "hotels")


def test_without_the_other_uploads_the_unified_model_is_left_out(run):
    shutil.rmtree(run / "clients" / "intent" / "upload")
    result = stage("evaluate", run, "--audit", "hotels", "--canaries", "0", *COMMON)
    assert result.code == 0 and "of intent is here" in result.out, result.err
    found = read_json(run / "privacy.json")
    assert set(found["membership"]) == {"seed model", "expert"} and not found["canaries"]
