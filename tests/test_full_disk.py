"""Full disks and limits on file sizes: one line, exit code 2, no half a file."""

import contextlib
import resource
import shutil
import signal
import subprocess
import sys

import drive
import numpy as np
import pytest
import tiny
from safetensors.torch import load_file
from tiny import COMMON, stage

from metamoe.rundir import atomic, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


WRITERS = [
    ("select_proxies", ["--selection", "dpp"], ["clients/hotels/selection", "public/features.npy"]),
    ("select_proxies", ["--selection", "dpp", "--client", "hotels"], ["clients/hotels/selection"]),
    (
        "train_expert",
        ["--data", "private", "--selection", "similarity", "--client", "hotels"],
        ["clients/hotels/experts/private", "clients/hotels/upload/private-similarity"],
    ),
    ("unify_moe", ["--method", "metamoe"], ["moe/metamoe"]),
    ("unify_moe", ["--method", "soup"], ["moe/soup"]),
    ("evaluate", [], ["scores/metamoe.test.json"]),
    ("evaluate", [], ["results.json"]),
]


@pytest.mark.parametrize(
    "name, flags, remove",
    WRITERS,
    ids=lambda value: str(value[-1]) if isinstance(value, list) and value else "",
)
def test_a_limit_on_file_sizes_ends_in_one_line(run, name, flags, remove):
    """EFBIG where a file may not grow, as on a full disk: one line, exit code 2, no half a file."""
    for path in map(run.joinpath, remove):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = drive.snapshot(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        result = stage(name, run, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    full_disk_checks(result, run, before)


def full_disk_checks(result, run, before):
    assert result.code == 2, f"code {result.code}: {result.err or result.out}"
    assert result.err.count("\n") == 1 and "cannot write" in result.err, result.err
    # settings.json is written before the work that fails
    before, after = (
        {path: value for path, value in files.items() if not path.startswith("settings/")}
        for files in (before, drive.snapshot(run))
    )
    assert {path: after.get(path) for path in before} == before
    assert not [p for p in run.rglob("*") if ".part" in p.name]
    for path in (run / new for new in after.keys() - before.keys()):  # written while there was room: whole
        {".json": read_json, ".npy": np.load, ".safetensors": load_file}[path.suffix](path)
        assert path.parent.name in ("public", "selection", "scores") or any(
            (p / "done.json").exists() or (p / "manifest.json").exists()
            for p in (path.parent, path.parent.parent)
        )


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
        if shutil.which("mount")
        else None
    )
    if mount is None or mount.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    "name, flags, remove",
    WRITERS,
    ids=lambda value: str(value[-1]) if isinstance(value, list) and value else "",
)
@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_ends_in_one_line(run, small_disk, name, flags, remove, room):
    """ENOSPC for real, at once and after a page."""
    for path in map(run.joinpath, remove):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(run, small_disk / "run")
    before = drive.snapshot(small_disk / "run")
    fill(small_disk, room)
    full_disk_checks(stage(name, small_disk / "run", *flags), small_disk / "run", before)


def fill(disk, room):
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while ballast.write(b"x" * 1024):
                pass
        ballast.truncate(ballast.tell() - room)


def test_a_full_disk_under_a_memory_map_ends_in_one_line(seed_model, small_disk):
    """features.npy is sparse at first: with room for its ends alone, its pages would meet the full disk in a SIGBUS."""
    run_dir = small_disk / "run"
    tiny.make_run(run_dir, seed_model, public_size=600)  # 75 kB of features
    before = drive.snapshot(run_dir)
    fill(small_disk, 30_000)
    done = subprocess.run(
        [sys.executable, tiny.REPO / "select_proxies.py", "--run-dir", run_dir, *COMMON],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    full_disk_checks(drive.Result(done.returncode, done.stdout, done.stderr), run_dir, before)


def test_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == 1 and [p.name for p in tmp_path.iterdir()] == ["a.json"]
