"""run_all.sh up to its first stage: its backbone, the commands that it will run, what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
DATASETS = ("oxford_pets", "oxford_flowers", "eurosat", "imagenet")
OPTIONS = ("DATA_ROOT", "PUBLIC", "BACKBONE", "QUICK", "METHODS", "RUN_DIR", "SEED", "SEEDS", "METAMOE_VENV")


@pytest.fixture
def run_all(tmp_path):
    """run_all(*words, gpu=False, **environment) = (output, exit code), from an empty folder."""

    def call(*words, gpu=False, **environment):
        (tmp_path / "bin").mkdir(exist_ok=True)
        smi = tmp_path / "bin" / "nvidia-smi"
        says = "echo 'GPU 0: a GPU'" if gpu else "echo 'No devices were found'; exit 6"
        smi.write_text(f"#!/bin/sh\n{says}\n")
        smi.chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if key not in OPTIONS}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = kept | {"PATH": path, "PYTHON": sys.executable} | environment
        command = ["bash", REPO / "run_all.sh", *map(str, words)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        return done.stdout + done.stderr, done.returncode

    return call


@pytest.fixture
def data(tmp_path):
    for name in DATASETS:
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def test_without_a_backbone_the_papers_is_taken_where_it_can_run(run_all, data):
    out, code = run_all("--plan", "--data-root", data, gpu=True)
    assert "taking vit-b-32 (a CUDA GPU and the paper's datasets" in out and str(data) in out and code == 0
    out, _ = run_all("--plan", gpu=True)  # data/ of the folder that the caller stands in
    assert "taking vit-b-32" in out and "--data-root data" in out
    assert "taking smollm2-135m (no CUDA GPU here)" in run_all("--plan", "--data-root", data)[0]


def test_own_data_are_for_the_language_default(run_all, data):
    out, _ = run_all("--plan", "--client", "shop=my shop.jsonl", "--data-root", data, gpu=True)
    assert "taking smollm2-135m (--client" in out and "--client 'shop=my shop.jsonl'" in out


@pytest.mark.parametrize("missing", DATASETS)
def test_a_missing_dataset_is_the_reason(run_all, data, missing):
    (data / missing).rmdir()
    out, _ = run_all("--plan", "--data-root", data, gpu=True)
    assert "taking smollm2-135m (" in out and missing in out
    if missing == "imagenet":  # it may be elsewhere
        assert (
            "taking vit-b-32" in run_all("--plan", "--data-root", data, "--public", "/elsewhere", gpu=True)[0]
        )


@pytest.mark.parametrize(
    "words, message",
    (
        (["--nope"], "unknown option --nope"),
        (["a", "b"], "one backbone at a time"),
        (["smollm"], "smollm: unknown"),
        (["smollm2-135m", "--methods", "metamoe", "nope"], "--methods nope: unknown"),
        (["--clients", "--quick"], "--clients"),
        (["--seed"], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--seeds", "1", "2", "--run-dir", "here"], "--seeds"),
        (["--client", "shop"], "--client shop"),
    ),
)
def test_what_is_wrong_ends_in_one_line_before_anything_is_installed(run_all, tmp_path, words, message):
    environment = tmp_path / "python"  # it would need a .venv, which nobody makes
    environment.write_text(f'#!/bin/sh\n[ "$1" = - ] && exit 1\nexec {sys.executable} "$@"\n')
    environment.chmod(0o755)
    out, code = run_all("smollm2-135m", *words) if message.startswith("--client ") else run_all(*words)
    assert run_all(*words, PYTHON=str(environment))[1] == 2
    last = out.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last and "Traceback" not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "python"]


def commands(out):
    return [line.split() for line in out.splitlines() if ".py" in line]


def test_the_plan_is_the_stages_in_order(run_all):
    out, _ = run_all(
        "glyph-clip", "--plan", "--methods", "soup", "metamoe", "--train-expert=--warmup-steps 5"
    )
    plan = commands(out)
    stages = [words[0].removesuffix(".py") for words in plan]
    assert stages == [*["select_proxies"] * 2, *["train_expert"] * 2, *["unify_moe"] * 2, "evaluate"]
    assert all(("--warmup-steps" in words) == (words[0] == "train_expert.py") for words in plan)
    assert all("runs/glyph-clip-seed0" in words for words in plan)


def test_variables_are_options_and_several_random_seeds_end_in_one_table(run_all):
    out, _ = run_all("glyph-clip", "--plan", SEEDS="3 4", METHODS="soup", QUICK="1", TRAIN_SIZE="30")
    plan, folders = commands(out), [f"runs/glyph-clip-quick-seed{seed}" for seed in (3, 4)]
    assert plan[-1] == ["evaluate.py", "--run-dir", *folders]
    sizes = [words[words.index("--train-size") + 1] for words in plan if "--train-size" in words]
    assert sizes == ["30", "30"] and "--figure" in out
    assert [words[words.index("--seed") + 1] for words in plan if "--seed" in words] == ["3", "4"]


def test_a_size_of_0_is_passed_on(run_all):
    out, _ = run_all("--plan", "--quick", "--candidates", "0", "--workers", "0", "--methods", "soup")
    assert all("--workers 0" in " ".join(words) for words in commands(out))
    assert "--candidates 0" in " ".join(commands(out)[0])


def test_the_scripts_run_under_bash_3():
    for script in ("run_all.sh", "metamoe/environment.sh"):
        text = (REPO / script).read_text()
        assert not re.search(r"mapfile|readarray|declare -A|\$\{\w+(\^|,)|\|&|&>>|printf -v", text)


def test_the_callers_python_is_used_as_it_is_where_it_says_so(tmp_path):
    bare = tmp_path / "python"  # without any package
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    environment = os.environ | {"PYTHON": str(bare), "METAMOE_VENV": "never"}
    command = ["bash", "-c", 'source "$1" && echo "takes $PYTHON"', "-", REPO / "metamoe/environment.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"takes {bare}\n" and "torch none (" in done.stderr
