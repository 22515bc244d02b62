"""The whole pipeline on a tiny model and synthetic data: its files, its bytes, and that it learns."""

import shutil
from pathlib import Path

import drive
import numpy as np
import pytest
import tiny
from safetensors.torch import load_file
from tiny import CLIENTS, CLOCKS, METHODS, SIZES

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_expected_file_is_written(finished):
    run_dir, _ = finished
    for name in CLIENTS:
        client = run_dir / "clients" / name
        assert np.load(client / "selection" / "relevance.npy").shape == (SIZES["public_size"],)
        for rule in ("similarity", "dpp", "random"):
            chosen = read_json(client / "selection" / rule / "selection.json")["proxies"]
            assert len(chosen) == len(set(chosen)) == SIZES["proxies"] and all(
                0 <= i < SIZES["public_size"] for i in chosen
            )
        for variant in ("private-similarity", "aligned-dpp", "proxies-random"):
            upload = client / "upload" / variant
            assert sorted(drive.snapshot(upload)) == [
                "adapter/adapter_config.json",
                "adapter/adapter_model.safetensors",
                "manifest.json",
                "proxies.json",
                "router.safetensors",
            ]
            assert load_file(upload / "router.safetensors")["vectors"].shape == (2, 32)
        assert sorted(p.name for p in (client / "experts").iterdir()) == [
            "aligned-dpp",
            "private",
            "proxies-random",
        ]
    expected = {
        method: ["done.json", "losses.json", "moe.safetensors", "moe_config.json", "timing.json"]
        for method in (*METHODS, "from-proxies")
    }
    expected["soup"] = [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "done.json",
        "timing.json",
    ]
    expected["btm"] = ["done.json", "timing.json"]
    assert {folder.name: sorted(drive.snapshot(folder)) for folder in (run_dir / "moe").iterdir()} == expected
    assert {p.name for p in run_dir.iterdir()} == {
        "run.json",
        "settings",
        "public",
        "clients",
        "moe",
        "scores",
        "results.json",
        "results.md",
        "timings.json",
        "timings.md",
    }


def test_nothing_is_pickled_and_nothing_half_written_is_left(finished):
    names = [p.name for p in finished[0].rglob("*")]
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) or ".part" in n]
    for path in finished[0].rglob("*.npy"):
        np.load(path, allow_pickle=False)


def test_training_on_separable_data_helps(finished):
    """Experts (each on its own data) and MetaMoE (on all) are far above the random seed model: the stages do learn."""
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
    # these hold samples/s
    differ = [path for path in ours if ours[path] != theirs[path] and not path.startswith("scores/")]
    assert not differ
    for path in (p for p in ours if p.startswith("scores/")):
        a, b = read_json(finished[0] / path), read_json(other / path)
        assert a | {"samples_per_second": 0} == b | {"samples_per_second": 0}


@pytest.mark.slow
def test_another_seed_gives_another_model(tmp_path, seed_model, finished):
    tiny.make_run(tmp_path / "run", seed_model, seed=1)
    for command in tiny.commands(tmp_path / "run")[:5]:
        assert drive.call(*command).code == 0
    upload = Path("clients/intent/upload/aligned-dpp/adapter/adapter_model.safetensors")
    assert (tmp_path / "run" / upload).read_bytes() != (finished[0] / upload).read_bytes()
