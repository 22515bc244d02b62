"""Two processes on one run directory, kills, signals: what is there is whole, and nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import drive
import pytest
import tiny

from metamoe import atomic
from metamoe.rundir import finish, hashes, inside, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = "--epochs 2 --rank 2 --alpha 4 --batch-size 8 --warmup-steps 0".split()


OLD, NEW = {"lr": 1}, {"lr": 2}


def make(folder, settings):
    with atomic.atomic(folder) as part:
        part.mkdir()
        for name in ("a.txt", "b.txt"):
            (part / name).write_text(f"{name} of {settings}")
        finish(part, settings)


def test_two_processes_in_every_order_and_kills_at_every_step_leave_whole_results(tmp_path):
    memory = Path("/dev/shm")  # a flush to a disk takes a moment, and there are thousands
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else tmp_path) as folder:
        command = [sys.executable, tiny.REPO / "tests" / "hands.py", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    tried = json.loads(done.stdout)
    assert tried["interleavings"] >= 300 and tried["kills"] >= 30


# ---------------------------------------------------------------- what locks, names and flushes do


def test_a_lock_dies_with_its_holder_and_is_for_one_result_alone(tmp_path, capfd):
    ready, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        with atomic.locked(tmp_path / "a"):
            os.write(hold, b"x")
            signal.pause()
    os.read(ready, 1)
    with atomic.locked(tmp_path / "a.b"), atomic.locked(tmp_path / "b"):
        assert f"{pid} on " in (tmp_path / ".a.lock").read_text()
    atomic.tidy(tmp_path)  # its holder lives: nothing is removed, nobody waits
    assert (tmp_path / ".a.lock").exists()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with atomic.locked(tmp_path / "a"):
        assert f"{os.getpid()} on " in (tmp_path / ".a.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_another_results_temporary_files_are_left_alone(tmp_path):
    """A model may be called as another one with a point: metamoe, metamoe.2."""
    with atomic.atomic(tmp_path / "a.b") as part:
        part.write_text("x")
        write_json(tmp_path / "a", 1)
        with atomic.locked(tmp_path / "a"):
            assert part.exists()
    assert (tmp_path / "a.b").read_text() == "x"


def test_nothing_is_made_where_the_run_directory_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "run" / "run.json", {})
    with pytest.raises(FileNotFoundError):
        inside(tmp_path / "run", "moe")
    with pytest.raises(FileNotFoundError), atomic.atomic(tmp_path / "run" / "result"):
        pass
    with pytest.raises(FileNotFoundError), atomic.atomic(tmp_path / "result") as part:
        part.mkdir()
        shutil.rmtree(part)
        write_json(part / "a.json", 1)
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    make(tmp_path / "result", OLD)
    fsync, replace, happened = os.fsync, os.replace, []

    def flushed(descriptor):
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        happened.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    make(tmp_path / "result", NEW)
    at = happened.index("rename")
    assert happened.count("rename") == 1 and happened[at + 1 :] == [tmp_path.name]
    for name in ("a.txt", "b.txt", "done.json"):
        assert happened[:at].count(name) == 1


# ---------------------------------------------------------------- real processes


def start(stage, run_dir, *flags):
    command = [sys.executable, tiny.REPO / f"{stage}.py", "--run-dir", run_dir, *tiny.COMMON, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=tiny.environment(), **pipes)


@pytest.fixture
def selected(fresh):
    """A run with selections, before its experts."""
    assert tiny.stage("select_proxies", fresh).code == 0
    return fresh


def test_two_processes_train_one_expert_once(selected):
    both = [start("train_expert", selected, "--client", "hotels", *FEW) for _ in range(2)]
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    text = outs[0][0] + outs[1][0]
    assert text.count("steps, loss") == 1 and text.count("is there already, skipped") == 1
    folder = selected / "clients" / "hotels" / "experts" / "aligned-dpp"
    assert read_json(folder / "done.json")["files"] == hashes(folder)
    assert not [path for path in selected.rglob(".*")]


@pytest.fixture
def heard():
    """Under nohup, or in the background of a script, processes inherit that a signal is ignored."""
    ignored = [number for number in SIGNALS.values() if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


SIGNALS = {"intent": signal.SIGTERM, "hotels": signal.SIGHUP, "question": signal.SIGINT}


def test_a_signal_ends_a_stage_in_one_line_and_leaves_nothing(selected, heard):
    long = [*FEW, "--epochs", "1000000"]
    stages = {name: start("train_expert", selected, "--client", name, *long) for name in SIGNALS}
    before = drive.snapshot(selected, "settings.json")
    for name, process in stages.items():
        assert "train_expert: rank" in process.stdout.readline()
        process.send_signal(SIGNALS[name])
    for name, process in stages.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + SIGNALS[name], err
        assert err == "interrupted; run the same command again to go on\n"
    assert drive.snapshot(selected, "settings.json") == before


def test_a_run_directory_that_vanishes_is_one_line_and_does_not_come_back(selected):
    process = start("train_expert", selected, "--client", "hotels", *FEW)
    process.stdout.readline()
    selected.rename(selected.parent / "moved")  # at once; a removal would race with what the stage writes
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not selected.exists()


STAGE = """#!/bin/sh
# As Python, but a stage is a process that waits, in the project's own frame.
case $1 in
*_*.py) exec {python} -c '
import sys, time
sys.path.insert(0, "{repo}")
from metamoe.errors import run_main
def main():
    print("stage", flush=True)
    time.sleep(60)
run_main(main)' ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_run_all_ends_its_stage_too(tmp_path, number, heard):
    python = tmp_path / "python"
    python.write_text(STAGE.format(python=sys.executable, repo=tiny.REPO))
    python.chmod(0o755)
    environment = tiny.environment(PYTHON=str(python), METAMOE_VENV="never")
    command = ["bash", tiny.REPO / "run_all.sh", "glyph-clip", "--run-dir", tmp_path / "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes, start_new_session=True)
    while process.stdout.readline().strip() != "stage":
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=120)  # ends when the stage, which has these pipes too, has ended
    assert process.returncode == 128 + number
    assert err.splitlines()[-1:] == ["run_all: interrupted; run the same command again to go on"]
    assert "Traceback" not in err and err.count("interrupted") == 1
