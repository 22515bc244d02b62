"""The whole pipeline on a tiny model and synthetic data: its files, its bytes, and that it learns."""

import shutil

import drive
import numpy as np
import pytest
import tiny
from safetensors.torch import load_file
from tiny import CLIENTS, CLOCKS, METHODS, SIZES

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTER = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_every_expected_file_is_written(finished):
    run_dir, _ = finished
    for name in CLIENTS:
        client = run_dir / "clients" / name
        assert np.load(client / "selection" / "relevance.npy").shape == (SIZES["public_size"],)
        for rule in ("similarity", "dpp", "random"):
            chosen = read_json(client / "selection" / rule / "selection.json")["proxies"]
            assert len(chosen) == len(set(chosen)) == SIZES["proxies"]
            assert 0 <= min(chosen) and max(chosen) < SIZES["public_size"]
        for variant in ("private-similarity", "aligned-dpp", "proxies-random"):
            upload = client / "upload" / variant
            files = [*ADAPTER, "manifest.json", "proxies.json", "router.safetensors"]
            assert sorted(drive.snapshot(upload)) == files
            assert load_file(upload / "router.safetensors")["vectors"].shape == (2, 32)
        experts = sorted(path.name for path in (client / "experts").iterdir())
        assert experts == ["aligned-dpp", "private", "proxies-random"]
    moe = ["done.json", "losses.json", "moe.safetensors", "moe_config.json", "routing.json", "timing.json"]
    expected = dict.fromkeys((*METHODS, "from-proxies"), moe)
    expected |= {"soup": [*ADAPTER, "done.json", "timing.json"], "btm": ["done.json", "timing.json"]}
    assert {folder.name: sorted(drive.snapshot(folder)) for folder in (run_dir / "moe").iterdir()} == expected
    folders = {"settings", "public", "clients", "moe", "scores"}
    files = {
        "run.json",
        "local.json",
        "results.json",
        "results.md",
        "timings.json",
        "timings.md",
        "routing.png",
        "losses.png",
    }
    assert {path.name for path in run_dir.iterdir()} == folders | files


def test_nothing_is_pickled_and_nothing_half_written_is_left(finished):
    assert finished[1]["unpickled"] == []
    pickled = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    for path in finished[0].rglob("*"):
        assert not path.name.endswith(pickled) and ".part" not in path.name
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def test_training_on_separable_data_helps(finished):
    """Experts (each on its own data) and MetaMoE (on all) are far above the untrained seed model."""
    rows = {row["model"]: row for row in read_json(finished[0] / "results.json")["rows"]}
    for name in CLIENTS:
        losses = read_json(finished[0] / "clients" / name / "experts" / "private" / "losses.json")
        assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    own = np.mean([rows[f"expert-{name}"]["clients"][name]["accuracy"] for name in CLIENTS])
    assert min(own, rows["metamoe"]["average"]) > rows["zeroshot"]["average"] + 20


@pytest.mark.slow
def test_a_second_run_in_another_folder_gives_the_same_bytes(tmp_path, pristine, finished):
    """Also with another PYTHONHASHSEED, which every process draws: no set's order reaches a file."""
    other = tmp_path / "elsewhere" / "another run"
    shutil.copytree(pristine, other)
    assert tiny.drive(commands=tiny.commands(other))["code"] == 0
    ours, theirs = drive.snapshot(finished[0], *CLOCKS), drive.snapshot(other, *CLOCKS)
    assert ours.keys() == theirs.keys()
    for path in ours:
        if path.startswith("scores/"):  # these hold samples/s
            a, b = read_json(finished[0] / path), read_json(other / path)
            assert a | {"samples_per_second": 0} == b | {"samples_per_second": 0}
        else:
            assert ours[path] == theirs[path], path


@pytest.mark.slow
def test_another_random_seed_gives_another_expert(tmp_path, seed_model, finished):
    tiny.make_run(tmp_path / "run", seed_model, seed=1)
    for command in tiny.commands(tmp_path / "run"):
        if command[0] == "select_proxies" and "dpp" in command:
            assert drive.call(*command).code == 0
        if command[0] == "train_expert" and "dpp" in command:
            assert drive.call(*command, "--client", "intent").code == 0
    upload = "clients/intent/upload/aligned-dpp/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / upload).read_bytes() != (finished[0] / upload).read_bytes()
