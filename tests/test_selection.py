"""select_proxies.py through its command line: the run directory, the rules, the settings that it refuses."""

import re

import drive
import numpy as np
import pytest
import tiny
import torch
from tiny import CLIENTS, SIZES, refused, stage, synthetic_archive

import select_proxies
from dpp import relevance_weighted_dpp
from metamoe.data import bigbench
from metamoe.data.registry import FAMILIES
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
SIZE_FLAGS = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]


def proxies(run_dir, client, rule):
    path = run_dir / "clients" / client / "selection" / rule / "selection.json"
    return read_json(path)["proxies"]


def test_the_fixtures_layout_is_that_of_write_data(tmp_path, seed_model, pristine, monkeypatch):
    """The run directory of these tests is what select_proxies.py makes of a (here synthetic) archive."""
    synthetic_archive(monkeypatch)
    run_dir = tmp_path / "run"
    assert stage("select_proxies", run_dir, "--seed-model", seed_model, *SIZE_FLAGS).code == 0
    later = re.compile(r"selection|^settings/|(features.npy|features.npy.json|unreadable.json|timing.json)$")
    made = {path for path in drive.snapshot(run_dir) if not later.search(path)}
    assert made == set(drive.snapshot(pristine))
    ours, theirs = read_json(pristine / "run.json"), read_json(run_dir / "run.json")
    assert ours.pop("public")["records"] == theirs.pop("public")["records"] and ours == theirs
    for path in made:
        if path.endswith("done.json"):
            assert read_json(pristine / path).keys() == read_json(run_dir / path).keys()


def test_without_the_pre_filter_the_dpp_chooses_from_all(run, tmp_path, seed_model):
    """The rule dpp-all of a run with candidates, and the rule dpp of a run without (--pool 0)."""
    whole = tmp_path / "whole"
    tiny.make_run(whole, seed_model, candidates=0)
    assert stage("select_proxies", run, "--selection", "dpp-all").code == 0
    assert stage("select_proxies", whole, "--pool", "0").code == 0
    features, m, differs = np.load(run / "public" / "features.npy"), SIZES["proxies"], False
    readable = np.delete(np.arange(len(features)), 7)
    for name in CLIENTS:
        relevance = np.load(run / "clients" / name / "selection" / "relevance.npy")
        want = relevance_weighted_dpp(features, relevance, m).tolist()
        assert proxies(run, name, "dpp-all") == want == proxies(whole, name, "dpp")
        filtered = select_proxies.RULES["dpp"](features, relevance, range(len(features)), m, m, None)
        differs |= set(filtered.tolist()) != set(want)
        # an unreadable sample has no features and no relevance
        holey, zeroed = features.copy(), relevance.copy()
        holey[7], zeroed[7] = np.nan, 0
        chosen = select_proxies.RULES["dpp-all"](holey, zeroed, readable, m, 0, None)
        want = readable[relevance_weighted_dpp(features[readable], relevance[readable], m)]
        assert chosen.tolist() == want.tolist()
    assert differs  # a pre-filter would have shown
    assert stage("train_expert", run, "--selection", "dpp-all", "--epochs", "1").code == 0
    name = "metamoe-dpp-all"
    assert stage("unify_moe", run, "--method=metamoe", "--selection=dpp-all", "--name", name).code == 0
    assert stage("evaluate", run, "--models", name).code == 0
    assert "| the whole public set |" in (run / "results.md").read_text()


def test_the_weight_of_relevance_makes_a_selection_of_its_own(run):
    """From the same candidates, through every later stage; Eq. 4's own is as it was."""
    before = drive.snapshot(run / "clients", "timing.json")
    features, m, n = np.load(run / "public" / "features.npy"), SIZES["proxies"], SIZES["candidates"]
    for weight, folder in (("0", "dpp-w0"), ("-0", "dpp-w0"), ("0.5", "dpp-w0.5"), ("1e6", "dpp-w1000000")):
        assert stage("select_proxies", run, f"--relevance-weight={weight}").code == 0
        for name in CLIENTS:
            relevance = np.load(run / "clients" / name / "selection" / "relevance.npy")
            candidates = np.argsort(-relevance, kind="stable")[:n]
            used = {"dpp-w0": np.ones(n), "dpp-w0.5": relevance[candidates] ** 0.5}.get(folder)
            want = candidates[:m]  # the most relevant
            if used is not None:
                want = candidates[relevance_weighted_dpp(features[candidates], used, m)]
            assert proxies(run, name, folder) == want.tolist(), (folder, name)
    assert stage("select_proxies", run, "--selection=dpp-all", "--relevance-weight=0").code == 0
    relevance = np.ones(len(features))
    assert proxies(run, "hotels", "dpp-all-w0") == relevance_weighted_dpp(features, relevance, m).tolist()
    assert stage("select_proxies", run, "--relevance-weight=1.0").out.count("skipped") == 3
    assert drive.snapshot(run / "clients", "timing.json").items() >= before.items()
    assert "relevance_weight" not in read_json(run / "clients/hotels/selection/dpp/done.json")
    assert stage("train_expert", run, "--selection=dpp-w0", "--epochs=1").code == 0
    assert stage("unify_moe", run, "--method=metamoe", "--selection=dpp-w0", "--name=w0").code == 0
    assert stage("evaluate", run, "--models", "w0", "--figure").code == 0
    assert {"dpp", "dpp-w0", "dpp-w0.5", "dpp-all-w0"} <= read_json(run / "results.json")["coverage"][
        "hotels"
    ].keys()
    missing = refused("train_expert", run, "--selection", "dpp-w7")
    assert "select_proxies.py --selection dpp --relevance-weight 7" in missing
    for weight, say in (("-1", "must be"), ("nan", "must be"), ("inf", "must be"), ("2", "random")):
        message = refused("select_proxies", run, f"--relevance-weight={weight}", "--selection=random")
        assert "--relevance-weight" in message and say in message


@pytest.mark.parametrize(
    "flags, say",
    [
        ("--backbone gpt-9", "gpt-9"),
        ("--selection similarity --relevance-weight 2", "similarity"),
        ("--clients intent nobody", "nobody"),
        ("--clients intent intent", "intent"),
        ("--clients 0", "--clients 0"),
        ("--clients 99", "--clients 99"),
        ("--client nobody", "nobody"),
        ("--proxies 9 --candidates 8 --public-size 48", "m must be at most n"),
        ("--candidates 99 --public-size 48", "n must be at most |D_0|"),
        ("--pool 0 --proxies 49 --public-size 48", "m must be at most |D_0|"),
        ("--pool -1", "--candidates -1"),
        ("--train-size 1", "--train-size"),
        ("--train-size 0", "--train-size"),
        ("--test-size 0", "--test-size"),
        ("--validation-size -1", "--validation-size"),
        ("--public-size 1 --candidates 1 --proxies 1", "--public-size"),
        ("--seed -1", "--seed"),
        ("--seed-model /nowhere/at/all", "/nowhere/at/all"),
        ("--device abacus", "abacus"),
        pytest.param("--device cuda", "cuda", marks=no_cuda),
        ("--train-size 40 --validation-size 11 --test-size 10", "60 distinct usable records, 61 asked for"),
        ("--public-size 100000", "usable public records"),
    ],
)
def test_a_bad_setting_of_a_new_run_leaves_nothing(tmp_path, seed_model, monkeypatch, flags, say):
    """Not even run.json: the run directory is free for the corrected command (next test)."""
    synthetic_archive(monkeypatch)
    bad = ["--seed-model", seed_model, *SIZE_FLAGS, *flags.split()]
    assert say in refused("select_proxies", tmp_path / "run", *bad, watch=tmp_path)


def test_the_corrected_command_works_in_the_same_folder(tmp_path, seed_model, monkeypatch):
    synthetic_archive(monkeypatch)
    good = ["--seed-model", seed_model, *SIZE_FLAGS]
    for bad in (["--seed-model", "/nowhere"], ["--test-size", "100"]):
        refused("select_proxies", tmp_path / "run", *good, *bad, watch=tmp_path)
    assert stage("select_proxies", tmp_path / "run", *good).code == 0


def test_a_number_of_clients_takes_the_first_and_the_default_three(tmp_path, seed_model, monkeypatch):
    """A larger federation's D_0 is without the texts of every data set, a smaller one's as by default."""
    synthetic_archive(monkeypatch)
    three, kept_out = ["intent", "hotels", "question"], []
    source = bigbench.read_archive
    family = FAMILIES["bigbench"]._replace(
        source=lambda s, sets: kept_out.append(list(sets)) or source(s, sets)
    )
    monkeypatch.setitem(FAMILIES, "bigbench", family)
    known = [*bigbench.CLIENTS, *bigbench.MORE_CLIENTS]
    wanted = {"2": known[:2], "5": known[:5], "": three}
    for number, clients in wanted.items():
        flags = ["--clients", number] if number else []
        made = stage(
            "select_proxies", tmp_path / f"run{number}", "--seed-model", seed_model, *SIZE_FLAGS, *flags
        )
        assert made.code == 0, made.err
        assert read_json(tmp_path / f"run{number}" / "run.json")["clients"] == clients
    assert kept_out == [three, known, three]


def test_a_foreign_folder_or_file_is_left_alone(tmp_path, seed_model):
    file = tmp_path / "thesis.tex"
    file.write_text("years of work")
    assert "not a run directory" in refused("select_proxies", tmp_path, "--seed-model", seed_model)
    message = refused("select_proxies", file, "--seed-model", seed_model, watch=tmp_path)
    assert "name another folder" in message


@pytest.mark.parametrize(
    "flags, say",
    [
        ("--selection dpp --seed 1", ["seed 0", "1", "--run-dir"]),
        ("--train-size 13", ["train_size 12"]),
        ("--clients hotels", ["clients"]),
        ("--proxies 5", ["proxies 6"]),
    ],
)
def test_other_run_settings_are_refused(finished, flags, say):
    message = refused("select_proxies", finished[0], *flags.split())
    assert all(part in message for part in say)
