"""The stages under `accelerate launch`: two processes on the CPU (gloo) do what one does."""

import json
import shutil
import socket
import subprocess
import sys

import drive
import numpy as np
import pytest
import tiny
from safetensors.torch import load_file
from tiny import CLIENTS, COMMON

from metamoe.rundir import read_json

# 18 samples: the last batch holds 3
FEW = ["--epochs", "3", "--lr", "0.01", "--batch-size", "5", "--warmup-steps", "2"]


def launch(*command, kind="--multi_gpu", **extra):
    """`accelerate launch` a script in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        kind,
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    return subprocess.run(
        [*launcher, *map(str, command)],
        env=tiny.environment(**extra),
        capture_output=True,
        text=True,
        timeout=600,
    )


def commands(run_dir):
    run = ["--run-dir", str(run_dir), *COMMON]
    return [
        ["select_proxies", *run],
        ["train_expert", *run, *FEW],
        ["unify_moe", *run, "--method", "metamoe", "--batch-size", "5", "--epochs", "4", "--seed-expert"],
    ]


def in_two(jobs, tmp_path, **extra):
    (tmp_path / "job.json").write_text(
        json.dumps({"commands": jobs, "report": str(tmp_path / "report.json")})
    )
    done = launch(tiny.REPO / "tests" / "drive.py", tmp_path / "job.json", **extra)
    assert done.returncode == 0 and json.loads((tmp_path / "report.json").read_text())["code"] == 0, (
        done.stderr
    )
    return done


@pytest.fixture(scope="module")
def one(tmp_path_factory, seed_model):
    """What one process makes."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    tiny.make_run(run_dir, seed_model, loss="text")
    for command in commands(run_dir):
        result = drive.call(*command)
        assert result.code == 0, result.err
    return run_dir


def same(one, two):
    """The same files, proxies exactly, losses to 1e-4, weights nearly."""
    assert drive.snapshot(one).keys() == drive.snapshot(two).keys()
    np.testing.assert_array_equal(
        np.load(one / "public" / "features.npy"), np.load(two / "public" / "features.npy")
    )
    folders = ["moe/metamoe"]
    for name in CLIENTS:
        path = f"clients/{name}/selection/dpp/selection.json"
        assert (one / path).read_bytes() == (two / path).read_bytes()
        folders.append(f"clients/{name}/experts/aligned-dpp")
    for folder in folders:
        ours, theirs = (read_json(run / folder / "losses.json") for run in (one, two))
        assert (
            len(ours) >= 10
            and ours[:10] == pytest.approx(theirs[:10], abs=1e-4)
            and ours[0] - ours[-1] > 0.05
        )
        for path in (one / folder).rglob("*.safetensors"):
            other = load_file(two / path.relative_to(one))
            for key, tensor in load_file(path).items():
                assert (tensor - other[key]).abs().max() < 2e-3, (path, key)


def test_two_processes_do_what_one_does(one, tmp_path, seed_model):
    tiny.make_run(tmp_path / "run", seed_model, loss="text")
    done = in_two(commands(tmp_path / "run"), tmp_path)
    same(one, tmp_path / "run")
    assert done.stdout.count("train_expert: intent:") == 1 and done.stdout.count("unify_moe: metamoe:") == 1
    assert done.stdout.count("steps, loss ") == 4


@pytest.mark.slow
def test_fsdp_shards_the_frozen_weights_and_trains_alike(one, tmp_path):
    shutil.copytree(one, tmp_path / "run")
    for folder in [
        *(tmp_path / "run").glob("clients/*/experts"),
        *(tmp_path / "run").glob("clients/*/upload"),
        tmp_path / "run" / "moe",
    ]:
        shutil.rmtree(folder)
    in_two(commands(tmp_path / "run")[1:], tmp_path, kind="--use_fsdp")
    same(one, tmp_path / "run")


def test_an_error_is_one_line_and_ends_all_processes(one, tmp_path):
    """One that the main process alone meets, while the other waits for it."""
    shutil.copytree(one, tmp_path / "run")
    damaged = tmp_path / "run" / "clients" / "intent" / "experts" / "aligned-dpp" / "done.json"
    damaged.write_text("{")
    before = drive.snapshot(tmp_path / "run")
    done = launch(tiny.REPO / "train_expert.py", "--run-dir", tmp_path / "run", *COMMON)
    assert done.returncode != 0 and "by peer" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(damaged) in errors[0]
    assert drive.snapshot(tmp_path / "run") == before
