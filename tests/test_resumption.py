"""Finished stages are skipped or refused under other settings; killed ones go on to the same results."""

import re
import shutil
from pathlib import Path

import drive
import pytest
import tiny
from tiny import CLOCKS, flags_of, refused, stage

from metamoe import rundir

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name, needed, folder, say",
    [
        (
            "select_proxies",
            ["dpp"],
            "clients/hotels/selection/dpp",
            "dpp selection is there already, skipped",
        ),
        (
            "train_expert",
            ["aligned"],
            "clients/hotels/experts/aligned-dpp",
            "expert is there already, skipped",
        ),
        ("unify_moe", ["metamoe"], "moe/metamoe", "is there already, skipped"),
    ],
)
def test_a_finished_stage_is_skipped(run, name, needed, folder, say):
    before = drive.snapshot(run), {p: p.stat().st_mtime_ns for p in (run / folder).rglob("*")}
    result = stage(name, run, *flags_of(name, run, *needed))
    assert result.code == 0 and say in result.out
    assert (drive.snapshot(run), {p: p.stat().st_mtime_ns for p in (run / folder).rglob("*")}) == before


@pytest.mark.parametrize(
    "name, needed, folder, other, say",
    [
        (
            "select_proxies",
            ["dpp"],
            "clients/hotels/selection/dpp",
            ["--dtype", "bfloat16"],
            "dtype 'float32' there, 'bfloat16' now",
        ),
        (
            "train_expert",
            ["aligned"],
            "clients/hotels/experts/aligned-dpp",
            ["--lr", "0.5"],
            "lr 0.02 there, 0.5 now",
        ),
        ("unify_moe", ["metamoe"], "moe/metamoe", ["--lambda-init", "0.5"], "lambda_init 1.0 there, 0.5 now"),
    ],
)
def test_other_settings_are_refused_and_redone_with_force(run, name, needed, folder, other, say):
    flags = [*flags_of(name, run, *needed), *other]
    message = refused(name, run, *flags)
    assert say in message and "--force" in message
    before = drive.snapshot(run)
    result = stage(name, run, *flags, "--force")
    assert result.code == 0, result.err
    after = drive.snapshot(run)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert f"{folder}/done.json" in changed
    # a selection is redone from the embeddings on
    roots = (
        folder.replace("hotels", r"\w+"),
        r"clients/\w+/upload",
        r"clients/\w+/selection/(relevance.npy|timing.json)",
        "public/(features.npy|timing.json)",
        "settings/",
    )
    assert all(re.match("|".join(roots), path) for path in changed), changed
    assert stage(name, run, *flags).out.count("skipped") >= 1


def test_a_new_upload_makes_the_old_model_stale(run):
    """The unified model knows which uploads it was made of."""
    flags = flags_of("train_expert", run, "aligned")
    assert stage("train_expert", run, *flags, "--client", "hotels", "--lr", "0.5", "--force").code == 0
    assert "uploads" in refused("unify_moe", run, *flags_of("unify_moe", run, "metamoe"))


def test_leftovers_of_a_killed_stage_are_no_rows(run):
    shutil.copytree(run / "moe" / "metamoe", run / "moe" / ".next.part")
    shutil.copytree(
        run / "clients" / "hotels" / "upload" / "aligned-dpp",
        run / "clients" / "hotels" / "upload" / ".next.part",
    )
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


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_to_the_same_results(tmp_path, pristine, finished):
    """SIGKILL at random times and right before random writes, again and again, then the same command lines to the end."""
    run_dir, report = finished
    shutil.copytree(pristine, tmp_path / "run")
    killed = tiny.drive(
        run_dir=str(tmp_path / "run"),
        pristine=str(pristine),
        commands=tiny.commands(tmp_path / "run"),
        kills=10,
        seconds=report["seconds"],
        writes=500,
        seed=3,
    )
    assert killed["kills"] == 10 and killed["ended"]
    wanted = {p: h for p, h in drive.snapshot(run_dir, *CLOCKS).items() if not p.startswith("scores/")}
    for end in killed["ended"]:
        assert end["code"] == 0, killed["stderr"]
        assert not [path for path in end["files"] if ".part" in path]
        got = {
            p: h
            for p, h in end["files"].items()
            if not p.startswith("scores/") and Path(p).name not in CLOCKS
        }
        assert got == wanted
    assert any(log["left"] for log in killed["logs"])  # the kills did hit half-written things


@pytest.mark.parametrize("victim", range(3))
def test_a_folder_killed_while_removed_is_not_taken_for_finished(tmp_path, victim, monkeypatch):
    """rmtree has no order: whichever file goes first, the folder must stop counting as finished."""
    folder = tmp_path / "folder"
    for name in ("a.txt", "done.json", "z.txt"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    def killed(path, *args, **kwargs):
        sorted(Path(path).iterdir())[min(victim, len(list(Path(path).iterdir())) - 1)].unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(rundir.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rundir.finished(folder, {"other": 1}, force=True)
    assert not rundir.finished(folder, {})
