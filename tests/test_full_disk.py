"""Full disks and limits on file sizes: one line, exit code 2, no half a file."""

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
from tiny import COMMON, fill, stage

from metamoe.rundir import atomic, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
READERS = {".json": read_json, ".npy": np.load, ".safetensors": load_file}
WRITERS = [  # (stage, its flags, what it has still to write)
    ("select_proxies", "--selection dpp", "clients/hotels/selection public/features.npy"),
    ("select_proxies", "--selection dpp --client hotels", "clients/hotels/selection"),
    ("train_expert", "--data private --selection similarity --client hotels", "clients/hotels/*/private*"),
    ("unify_moe", "--method metamoe", "moe/metamoe"),
    ("unify_moe", "--method soup", "moe/soup"),
    ("evaluate", "", "scores/metamoe.test.json"),
    ("evaluate", "", "results.json"),
]


@pytest.fixture(params=WRITERS, ids=lambda writer: writer[2].split("/")[-1])
def unfinished(request, run):
    """A run that lacks what one stage writes, and that stage's name and flags."""
    name, flags, lacking = request.param
    for path in [path for pattern in lacking.split() for path in run.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run, name, flags.split()


def files_of(run):
    """{path: hash} but for the settings, which are written before the work that fails."""
    return {path: value for path, value in drive.snapshot(run).items() if not path.startswith("settings/")}


def check(result, run, before):
    """One line said what went wrong; no file changed, and each new one was written while there was room."""
    assert result.code == 2, f"code {result.code}: {result.err or result.out}"
    assert result.err.count("\n") == 1 and "cannot write" in result.err, result.err
    after = files_of(run)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in run.rglob("*") if ".part" in path.name]
    for path in (run / new for new in after.keys() - before.keys()):
        READERS[path.suffix](path)
        ends = [folder / end for folder in path.parents[:2] for end in ("done.json", "manifest.json")]
        assert path.parent.name in ("public", "selection", "scores") or any(end.exists() for end in ends)


def test_a_limit_on_file_sizes_ends_in_one_line(unfinished):
    """EFBIG where a file may not grow, as on a full disk."""
    run, name, flags = unfinished
    before = files_of(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        result = stage(name, run, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    check(result, run, before)


def test_a_full_disk_ends_in_one_line(unfinished, small_disk):
    """ENOSPC for real, at once and after a page."""
    run, name, flags = unfinished
    shutil.copytree(run, small_disk / "run")
    before = files_of(run)
    for room in (0, 5000):
        fill(small_disk, room)
        check(stage(name, small_disk / "run", *flags), small_disk / "run", before)


def test_a_full_disk_under_a_memory_map_ends_in_one_line(seed_model, small_disk):
    """features.npy is sparse at first: with room for its ends alone, its pages would meet the full disk in
    a SIGBUS."""
    run_dir = small_disk / "run"
    tiny.make_run(run_dir, seed_model, public_size=600)  # 75 kB of features
    before = files_of(run_dir)
    fill(small_disk, 30_000)
    command = [sys.executable, tiny.REPO / "select_proxies.py", "--run-dir", run_dir, *COMMON]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
    check(drive.Result(done.returncode, done.stdout, done.stderr), run_dir, before)


def test_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == 1 and [p.name for p in tmp_path.iterdir()] == ["a.json"]
