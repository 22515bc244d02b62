"""select_proxies.py through its command line: the run directory, the rules, the settings that it refuses."""

import drive
import numpy as np
import pytest
import tiny
import torch
from tiny import CLIENTS, SIZES, refused, stage, synthetic_archive

import select_proxies
from dpp import relevance_weighted_dpp
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_fixtures_layout_is_that_of_write_data(tmp_path, seed_model, pristine, monkeypatch):
    """The run directory of these tests is what select_proxies.py makes of an archive (here a synthetic one)."""
    synthetic_archive(monkeypatch)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    result = stage("select_proxies", tmp_path / "run", "--seed-model", seed_model, *sizes)
    assert result.code == 0, result.err
    made = {
        p
        for p in drive.snapshot(tmp_path / "run")
        if "selection" not in p
        and not p.startswith("settings/")
        and not p.endswith(("features.npy", "unreadable.json", "timing.json"))
    }
    assert made == set(drive.snapshot(pristine))
    ours, theirs = read_json(pristine / "run.json"), read_json(tmp_path / "run" / "run.json")
    assert ours == theirs
    for path in made:
        if path.endswith("done.json"):
            assert read_json(pristine / path).keys() == read_json(tmp_path / "run" / path).keys()


def test_without_the_pre_filter_the_dpp_chooses_from_all(fresh, tmp_path, seed_model):
    """The rule dpp-all of a run with candidates, and the rule dpp of a run without (--pool 0)."""
    assert (
        stage("select_proxies", fresh).code
        == stage("select_proxies", fresh, "--selection", "dpp-all").code
        == 0
    )
    tiny.make_run(tmp_path / "whole", seed_model, candidates=0)
    assert stage("select_proxies", tmp_path / "whole", "--pool", "0").code == 0
    features, differs = np.load(fresh / "public" / "features.npy"), False
    for name in CLIENTS:
        relevance = np.load(fresh / "clients" / name / "selection" / "relevance.npy")
        want = relevance_weighted_dpp(features, relevance, SIZES["proxies"]).tolist()
        found = {
            folder.name: read_json(folder / "selection.json")["proxies"]
            for folder in (fresh / "clients" / name / "selection").glob("dpp*")
        }
        assert (
            found["dpp-all"]
            == want
            == read_json(tmp_path / "whole" / "clients" / name / "selection" / "dpp" / "selection.json")[
                "proxies"
            ]
        )
        m, usable = SIZES["proxies"], range(len(features))
        pre_filtered = select_proxies.RULES["dpp"](features, relevance, usable, m, m, None)
        differs |= set(pre_filtered.tolist()) != set(want)
        # an unreadable sample has no features and no relevance
        features[7], relevance[7] = np.nan, 0
        usable = [i for i in range(len(features)) if i != 7]
        chosen = select_proxies.RULES["dpp-all"](features, relevance, usable, m, 0, None).tolist()
        assert chosen == [
            usable[i] for i in relevance_weighted_dpp(features[usable], relevance[usable], SIZES["proxies"])
        ]
        features = np.load(fresh / "public" / "features.npy")
    assert differs  # a pre-filter would have shown
    for command in (
        ["train_expert", "--selection", "dpp-all", "--epochs", "1"],
        ["unify_moe", "--method", "metamoe", "--selection", "dpp-all", "--name", "metamoe-dpp-all"],
        ["evaluate", "--models", "metamoe-dpp-all"],
    ):
        result = stage(command[0], fresh, *command[1:])
        assert result.code == 0, result.err
    assert "| the whole public set |" in (fresh / "results.md").read_text()


@pytest.mark.parametrize(
    "flags, say",
    [
        (["--backbone", "gpt-9"], "gpt-9"),
        (["--clients", "intent", "nobody"], "nobody"),
        (["--clients", "intent", "intent"], "intent"),
        (["--client", "nobody"], "nobody"),
        (["--proxies", "9", "--candidates", "8", "--public-size", "48"], "m must be at most n"),
        (["--candidates", "99", "--public-size", "48"], "n must be at most |D_0|"),
        (["--pool", "0", "--proxies", "49", "--public-size", "48"], "m must be at most |D_0|"),
        (["--pool", "-1"], "--candidates -1"),
        (["--train-size", "1"], "--train-size"),
        (["--train-size", "0"], "--train-size"),
        (["--test-size", "0"], "--test-size"),
        (["--validation-size", "-1"], "--validation-size"),
        (["--public-size", "1", "--candidates", "1", "--proxies", "1"], "--public-size"),
        (["--seed", "-1"], "--seed"),
        (["--seed-model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--device", "abacus"], "abacus"),
        pytest.param(
            ["--device", "cuda"],
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (
            ["--train-size", "40", "--validation-size", "11", "--test-size", "10"],
            "60 distinct usable records, 61 asked for",
        ),
        (["--public-size", "100000"], "usable public records"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_setting_of_a_new_run_leaves_nothing(tmp_path, seed_model, monkeypatch, flags, say):
    """Not even run.json: the run directory is free for the corrected command, which then works."""
    synthetic_archive(monkeypatch)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    assert say in refused(
        "select_proxies", tmp_path / "run", "--seed-model", seed_model, *sizes, *flags, watch=tmp_path
    )


def test_the_corrected_command_works_in_the_same_folder(tmp_path, seed_model, monkeypatch):
    synthetic_archive(monkeypatch)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    refused("select_proxies", tmp_path / "run", *sizes, "--seed-model", "/nowhere", watch=tmp_path)
    refused(
        "select_proxies",
        tmp_path / "run",
        *sizes,
        "--seed-model",
        seed_model,
        "--test-size",
        "100",
        watch=tmp_path,
    )
    assert stage("select_proxies", tmp_path / "run", *sizes, "--seed-model", seed_model).code == 0


def test_a_foreign_folder_is_left_alone(tmp_path, seed_model):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run directory" in refused("select_proxies", tmp_path, "--seed-model", seed_model)


def test_a_file_as_run_dir_is_refused(tmp_path, seed_model):
    (tmp_path / "file").write_text("not a folder")
    assert "name another folder" in refused(
        "select_proxies", tmp_path / "file", "--seed-model", seed_model, watch=tmp_path
    )


def test_another_seed_for_the_same_run_is_refused(run):
    message = refused("select_proxies", run, "--selection", "dpp", "--seed", "1")
    assert "seed 0" in message and "1" in message and "--run-dir" in message


@pytest.mark.parametrize(
    "flags, say",
    [
        (["--train-size", "13"], "train_size 12"),
        (["--clients", "hotels"], "clients"),
        (["--proxies", "5"], "proxies 6"),
    ],
)
def test_other_run_settings_are_refused(run, flags, say):
    assert say in refused("select_proxies", run, *flags)
