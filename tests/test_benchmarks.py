"""tests/bench/gpu.sh at toy sizes: what runs on a GPU once a year must at least run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def gpu_script(**environment):
    environment = os.environ | {"TOY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(ROOT / "tests" / "bench" / "gpu.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_of_the_gpu_script_prints_its_table():
    done = gpu_script()
    assert done.returncode == 0, done.stdout + done.stderr
    heads = ("| check |", "| tokens | K |", "| toy, 2 x 8 tokens |", "| embedding, images/s |", "| model |")
    assert [head for head in heads if head not in done.stdout] == []
    assert done.stdout.count("| ok |") == 8 and "FAILED" not in done.stdout


def test_the_gpu_script_leaves_out_what_the_time_is_up_for_and_reports_failure(tmp_path):
    done = gpu_script(LIMIT="0")
    assert done.returncode == 0 and done.stdout.count("left out") == 3
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    done = gpu_script(PYTHON=str(broken))
    assert done.returncode == 1 and done.stdout.count("FAILED (exit code 3)") == 3
