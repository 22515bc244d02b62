"""The stages under `accelerate launch`: two processes on the CPU (gloo) do what one does."""

import json
import shutil
import socket
import subprocess
import sys

import drive
import pytest
import tiny
from safetensors.torch import load_file
from tiny import CLIENTS, COMMON

from metamoe.rundir import read_json

# 18 samples: the last batch holds 3
FEW = ["--epochs", "3", "--lr", "0.01", "--batch-size", "5", "--warmup-steps", "2"]
TWO = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


def launch(*command, kind="--multi_gpu"):
    """`accelerate launch` a script in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", kind, *TWO.split()]
    command = [*launcher, "--main_process_port", port, *map(str, command)]
    return subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=600)


def commands(run_dir):
    run = ["--run-dir", str(run_dir), *COMMON]
    return [
        ["select_proxies", *run],
        ["train_expert", *run, *FEW],
        ["unify_moe", *run, "--method", "metamoe", "--batch-size", "5", "--epochs", "4", "--seed-expert"],
    ]


def in_two(jobs, tmp_path, **options):
    job, report = tmp_path / "job.json", tmp_path / "report.json"
    job.write_text(json.dumps({"commands": jobs, "report": str(report)}))
    done = launch(tiny.REPO / "tests" / "drive.py", job, **options)
    assert done.returncode == 0 and read_json(report)["code"] == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory, seed_model):
    """What one process makes."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    tiny.make_run(run_dir, seed_model, loss="text")
    assert drive.all_of(commands(run_dir))[0] == 0
    return run_dir


def same(one, two):
    """The same files, features and proxies exactly, losses to 1e-4, weights nearly."""
    files = drive.snapshot(one), drive.snapshot(two)
    assert files[0].keys() == files[1].keys()
    proxies = [f"clients/{name}/selection/dpp/selection.json" for name in CLIENTS]
    assert all(files[0][path] == files[1][path] for path in ("public/features.npy", *proxies))
    for folder in ("moe/metamoe", *(f"clients/{name}/experts/aligned-dpp" for name in CLIENTS)):
        ours, theirs = (read_json(run / folder / "losses.json") for run in (one, two))
        assert len(ours) >= 10 and ours[0] - ours[-1] > 0.05
        assert ours[:10] == pytest.approx(theirs[:10], abs=1e-4)
        for path in (one / folder).rglob("*.safetensors"):
            other = load_file(two / path.relative_to(one))
            for key, tensor in load_file(path).items():
                assert (tensor - other[key]).abs().max() < 2e-3, (path, key)


def test_two_processes_do_what_one_does(one, tmp_path, seed_model):
    tiny.make_run(tmp_path / "run", seed_model, loss="text")
    out = in_two(commands(tmp_path / "run"), tmp_path)
    same(one, tmp_path / "run")
    assert out.count("train_expert: intent:") == 1 and out.count("unify_moe: metamoe: 3 experts") == 1
    assert out.count("steps, loss ") == 4


@pytest.mark.slow
def test_fsdp_shards_the_frozen_weights_and_trains_alike(one, tmp_path):
    shutil.copytree(one, tmp_path / "run", ignore=shutil.ignore_patterns("experts", "upload", "moe"))
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
