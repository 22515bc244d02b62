"""run_all.sh up to its first stage: which backbone it takes where none is named, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
DATASETS = ("oxford_pets", "oxford_flowers", "eurosat", "imagenet")


def run_all(tmp_path, *args, gpu=False, **environment):
    """Output and exit code. PYTHON does not run: nothing after the choice does. gpu: what nvidia-smi says."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    smi = tmp_path / "bin" / "nvidia-smi"
    says = "echo 'GPU 0: a GPU'" if gpu else "echo 'No devices were found'; exit 6"
    smi.write_text(f"#!/bin/sh\n{says}\n")
    smi.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("DATA_ROOT", "PUBLIC", "BACKBONE")}
    environment = kept | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "false"} | environment
    command = ["bash", REPO / "run_all.sh", *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture
def data(tmp_path):
    for name in DATASETS:
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def test_without_a_backbone_the_papers_is_taken_where_it_can_run(tmp_path, data):
    out, code = run_all(tmp_path, "--data-root", data, gpu=True)
    assert "taking vit-b-32 (a CUDA GPU and the paper's datasets" in out and str(data) in out and code == 2
    assert "taking vit-b-32" in run_all(tmp_path, gpu=True, DATA_ROOT=str(data))[0]
    assert "taking smollm2-135m (no CUDA GPU here)" in run_all(tmp_path, "--data-root", data)[0]


def test_own_data_are_for_the_language_default(tmp_path, data):
    out, _ = run_all(tmp_path, "--client", "shop=shop.jsonl", "--data-root", data, gpu=True)
    assert "taking smollm2-135m (--client" in out


@pytest.mark.parametrize("missing", DATASETS)
def test_a_missing_dataset_is_the_reason(tmp_path, data, missing):
    (data / missing).rmdir()
    out, _ = run_all(tmp_path, "--data-root", data, gpu=True)
    assert "taking smollm2-135m (" in out and missing in out
    if missing == "imagenet":  # it may be elsewhere
        out, _ = run_all(tmp_path, "--data-root", data, "--public", "/elsewhere", gpu=True)
        assert "taking vit-b-32" in out


def test_what_is_unknown_ends_in_one_line(tmp_path):
    for args, message in (
        (["--nope"], "unknown option --nope"),
        (["a", "b"], "one backbone at a time"),
        (["smollm2-135m", "--methods", "metamoe", "nope"], "--methods nope: unknown"),
        (["--clients", "--quick"], "--clients needs a value"),
        (["--seed"], "needs a value"),
    ):
        out, code = run_all(tmp_path, *args, PYTHON=sys.executable)
        assert code == 2 and out.startswith("error: ") and message in out and out.count("\n") == 1
