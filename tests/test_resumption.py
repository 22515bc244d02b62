"""Finished stages are skipped or refused under other settings; killed ones go on to the same results."""

import re
import shutil
from pathlib import Path

import drive
import pytest
import tiny
from tiny import CLOCKS, flags_of, refused, stage

from metamoe import atomic, rundir

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = [  # stage, a word of its command, what it makes, another setting, how the refusal names it
    ("select_proxies", "dpp", "clients/hotels/selection/dpp", "--dtype bfloat16", "dtype 'float32' there"),
    ("train_expert", "aligned", "clients/hotels/experts/aligned-dpp", "--lr 0.5", "lr 0.02 there, 0.5 now"),
    ("unify_moe", "metamoe", "moe/metamoe", "--lambda-init 0.5", "lambda_init 1.0 there, 0.5 now"),
]
# where a stage may write that is redone; a selection is redone from the embeddings on
REDONE = r"clients/\w+/(upload|selection/(relevance|timing))|public/(features|timing)|settings/"


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("name, needed, folder, other, say", STAGES)
def test_a_finished_stage_is_skipped_or_refused_or_redone(run, name, needed, folder, other, say):
    """The same settings, other settings, other settings with --force."""
    flags, other = flags_of(name, run, needed), other.split()
    before = drive.snapshot(run), times(run / folder)
    result = stage(name, run, *flags)
    assert result.code == 0 and "is there already, skipped" in result.out
    assert (drive.snapshot(run), times(run / folder)) == before

    message = refused(name, run, *flags, *other)
    assert say in message and "--force" in message
    result = stage(name, run, *flags, *other, "--force")
    assert result.code == 0, result.err
    before, after = before[0], drive.snapshot(run)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert f"{folder}/done.json" in changed
    allowed = f"{folder.replace('hotels', '[a-z]+')}/|{REDONE}"
    assert [path for path in changed if not re.match(allowed, path)] == []
    assert stage(name, run, *flags, *other).out.count("skipped") >= 1


def test_a_new_upload_makes_the_old_model_stale(run):
    """The unified model knows which uploads it was made of."""
    flags = flags_of("train_expert", run, "aligned")
    assert stage("train_expert", run, *flags, "--client", "hotels", "--lr", "0.5", "--force").code == 0
    assert "uploads" in refused("unify_moe", run, *flags_of("unify_moe", run, "metamoe"))


def test_leftovers_of_a_killed_stage_are_no_rows(run):
    shutil.copytree(run / "moe" / "metamoe", run / "moe" / ".next.part")
    uploads = run / "clients" / "hotels" / "upload"
    shutil.copytree(uploads / "aligned-dpp", uploads / ".next.part")
    before = (run / "results.json").read_bytes()
    assert stage("evaluate", run).code == 0
    assert (run / "results.json").read_bytes() == before


def test_what_a_kill_left_behind_is_removed_by_the_next_run(run):
    """The temporary folder of the stage itself, and the one that moe.save had beside it."""
    shutil.rmtree(run / "moe" / "metamoe")
    for name in (".metamoe.part", ".metamoe.part.x7f3k", ".metamoe.party"):
        (run / "moe" / name).mkdir()
    (run / "moe" / ".metamoe.part.x7f3k" / "moe.safetensors").write_bytes(b"half")
    assert stage("unify_moe", run, *flags_of("unify_moe", run, "metamoe")).code == 0
    assert [p.name for p in (run / "moe").glob(".*")] == [".metamoe.party"]


def lasting(files):
    """Files of a run whose bytes no clock changes."""
    return {p: h for p, h in files.items() if not p.startswith("scores/") and Path(p).name not in CLOCKS}


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_to_the_same_results(tmp_path, pristine, finished):
    """SIGKILL at random times and right before random writes, again and again, then the same command lines
    to the end. Each kill comes early enough that the kills walk through the pipeline once."""
    run_dir, report = finished
    shutil.copytree(pristine, tmp_path / "run")
    killed = tiny.drive(
        run_dir=str(tmp_path / "run"),
        commands=tiny.commands(tmp_path / "run"),
        kills=10,
        seconds=report["seconds"] / 6,
        writes=120,
        seed=3,
    )
    assert killed["code"] == 0, killed["stderr"]
    assert not [path for path in killed["files"] if ".part" in path]
    assert lasting(killed["files"]) == lasting(drive.snapshot(run_dir))
    assert len(killed["left"]) >= 6 and any(killed["left"])  # some kills did hit half-written things


@pytest.mark.parametrize("victim", range(3))
def test_a_kill_while_the_old_folder_is_removed_leaves_the_new_one(tmp_path, victim, monkeypatch):
    """rmtree has no order: whichever file goes first, the new folder is there, and the next run tidies."""
    folder, rmtree = tmp_path / "folder", shutil.rmtree

    def make(what):
        with rundir.making(folder, {"made": what}) as part:
            for name in ("a.txt", "z.txt"):
                (part / name).write_text(what)

    def killed(path, *args, **kwargs):
        files = sorted(Path(path).iterdir())
        files[min(victim, len(files) - 1)].unlink()
        raise KeyboardInterrupt

    make("first")
    before = drive.snapshot(folder)
    assert not rundir.finished(folder, {"made": "second"}, force=True)
    assert drive.snapshot(folder) == before  # --force removes nothing by itself
    monkeypatch.setattr(atomic.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make("second")
    monkeypatch.setattr(atomic.shutil, "rmtree", rmtree)
    assert rundir.finished(folder, {"made": "second"})
    with atomic.locked(folder):
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".old"] == []
