"""Bad settings of the later stages: one line, exit code 2, nothing written."""

import shutil
import subprocess
import sys

import pytest
import tiny
from drive import call
from tiny import refused

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
def test_what_is_no_choice_is_refused(kept, command):
    name, *flags = command.split()
    assert (flags or ["--method"])[0] in refused(name, kept, *flags)


NUMBERS = "1e400 inf -inf nan 1e999 -1 0 x 1e10 " + "9" * 400
WHOLE = f"{10**30} -1 1.5 1e3 inf nan x " + "9" * 5000
BAD_VALUES = {
    "train_expert --lr": NUMBERS,
    "train_expert --weight-decay": NUMBERS.replace(" 0 ", " "),
    "train_expert --alpha": WHOLE + " 0 1e999",
    "train_expert --rank": WHOLE + " 0 20000",
    "train_expert --epochs": WHOLE + " 0",
    "train_expert --batch-size": WHOLE + " 0",
    "train_expert --warmup-steps": WHOLE,
    "train_expert --workers": WHOLE + " 100000",
    "unify_moe --method=metamoe --lr": NUMBERS,
    "unify_moe --method=metamoe --lambda-lr": NUMBERS,
    "unify_moe --method=metamoe --lambda-init": NUMBERS.replace(" 0 ", " ") + " 1.5",
    "unify_moe --method=metamoe --routing-loss": NUMBERS.replace(" 0 ", " "),
    "unify_moe --method=metamoe --top-k": WHOLE + " 0",
    "evaluate --workers": WHOLE,
    "evaluate --device": "mps meta xpu vulkan cuda:99 cuda:-1 cuda:x cpu:x CPU gpu 0",
    "select_proxies --device": "mps meta",
    "select_proxies --candidates": WHOLE,
    "select_proxies --proxies": WHOLE + " 0",
    "select_proxies --train-size": WHOLE,
    "select_proxies --public-size": WHOLE,
    "select_proxies --seed": WHOLE + f" {2**32}",
    "select_proxies --max-length": WHOLE + " 0 7",
    "select_proxies --backbone=llama-3.1-8b --dataset": "commonsenseqa= =x commonsenseqa =",
    "select_proxies --client": "own= =x =",
    "select_proxies --join": "own= =x =",
}


@pytest.mark.parametrize("command", BAD_VALUES)
def test_a_value_out_of_range_is_refused_in_one_line(tmp_path, kept, command):
    """In a run that is there; select_proxies.py in a folder that is not."""
    name, *flags = command.split()
    run_dir = tmp_path / "new" if name == "select_proxies" else kept
    for value in BAD_VALUES[command].split():
        line = refused(name, run_dir, *flags, value)
        assert flags[-1] in line and (value[:12] in line or value[0] == "-"), line
        assert len(line) < 300


PLACES = (
    "--backbone --public --seed-model --architecture --data-root --dataset --client --clients --join --device"
)
EMPTY = {
    "select_proxies": PLACES,
    "train_expert": "--client --selection --device",
    "unify_moe": "--name --without --extend --export --selection",
    "evaluate": "--models --opt-out",
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_value_is_refused_and_not_taken_for_none(tmp_path, kept, name):
    method = ["--method", "metamoe"] if name == "unify_moe" else []
    for flag in EMPTY[name].split():
        for value in ("", " ", "a\udcff"):  # the last is how Python reads bytes that are not UTF-8
            run_dir = tmp_path / "new" if name == "select_proxies" else kept
            assert flag in refused(name, run_dir, *method, flag, value)
    result = call(name, "--run-dir", "", *method)
    assert result.code == 2 and result.err.startswith("error: --run-dir ") and result.err.count("\n") == 1


def test_a_refusal_reaches_the_shell(tmp_path):
    """Exit code and stderr of a real process, not of `drive.call`."""
    command = [sys.executable, tiny.REPO / "unify_moe.py", "--run-dir", tmp_path / "none", "--method", "btm"]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not any(tmp_path.iterdir())
