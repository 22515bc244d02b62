"""Bad settings of the later stages: one line, exit code 2, nothing written."""

import shutil
import subprocess
import sys

import drive
import pytest
import tiny
from tiny import refused, stage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kept(tmp_path_factory, finished):
    """A copy of the finished run that no test changes."""
    folder = tmp_path_factory.mktemp("refusals") / "run"
    shutil.copytree(finished[0], folder)
    return folder


@pytest.mark.parametrize("command", ["train_expert", "unify_moe --method btm", "evaluate"])
def test_a_later_stage_needs_a_run(tmp_path, command):
    name, *flags = command.split()
    assert "run select_proxies.py first" in refused(name, tmp_path / "empty", *flags, watch=tmp_path)


@pytest.mark.parametrize(
    "command, say",
    [
        ("select_proxies --client nobody", "nobody"),
        ("train_expert --client nobody", "nobody"),
        ("train_expert --lr 0", "--lr"),
        ("train_expert --lr nan", "--lr"),
        ("train_expert --rank 0", "--rank"),
        ("train_expert --epochs 0", "--epochs"),
        ("train_expert --batch-size -4", "--batch-size"),
        ("train_expert --warmup-steps -1", "--warmup-steps"),
        ("unify_moe --method metamoe --lambda-init 1.5", "--lambda-init"),
        ("unify_moe --method metamoe --lambda-init nan", "--lambda-init"),
        ("unify_moe --method metamoe --top-k 0", "--top-k"),
        ("unify_moe --method metamoe --top-k 4", "--top-k"),
        ("unify_moe --method metamoe --lr 0", "--lr"),
        ("unify_moe --method metamoe --lr nan", "--lr"),
        ("unify_moe --method metamoe --name ../../outside", "--name"),
        ("unify_moe --method metamoe --name btm", "--name"),
        ("unify_moe --method metamoe --name zeroshot", "--name"),
        ("unify_moe --method metamoe --name expert-hotels", "--name"),
        ("unify_moe --method metamoe --selection random", "upload"),
        ("evaluate --models nobody", "nobody"),
    ],
)
def test_a_bad_setting_of_a_later_stage_changes_nothing(kept, command, say):
    name, *flags = command.split()
    assert say in refused(name, kept, *flags)


@pytest.mark.parametrize(
    "command",
    [
        "train_expert --data public",
        "unify_moe --method voting",
        "unify_moe",
        "select_proxies --selection luck",
    ],
)
def test_argparse_refuses_what_is_no_choice(kept, command):
    before = drive.snapshot(kept)
    name, *flags = command.split()
    result = stage(name, kept, *flags)
    assert result.code == 2 and "usage:" in result.err and "Traceback" not in result.err
    assert drive.snapshot(kept) == before


def test_a_refusal_reaches_the_shell(tmp_path):
    """Exit code and stderr of a real process, not of `drive.call`."""
    command = [sys.executable, tiny.REPO / "unify_moe.py", "--run-dir", tmp_path / "none", "--method", "btm"]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not any(tmp_path.iterdir())
