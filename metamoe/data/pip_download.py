"""Download one distribution file of a package with pip, without installing or building it."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys

from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.rundir import sha256 as file_hash

# pip as a child that does not outlive this process (Linux's prctl PR_SET_PDEATHSIG; elsewhere it runs on).
_PIP = """
import runpy, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
# pip checks the hash before it unpacks or builds; packages that a build would need are not fetched.
_FLAGS = "--no-deps --require-hashes --no-build-isolation --no-cache-dir --no-input --quiet"
_FLAGS += " --disable-pip-version-check --progress-bar off"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = "make room, or set METAMOE_CACHE to a folder on another disk"
INDEX = "the package index that pip uses"


def pip_download(name, filename, size, sha256, kind, tmp):
    """Let pip download the file into `tmp`; return its path. UserError if it is not the published file.

    pip writes a download to $TMPDIR/pip-unpack-*/<filename>. The file is taken from there once it is
    complete, and pip is stopped: for a source distribution it would go on, unpack the file and, where the
    hash is right, run its setup.py.
    """
    whole = tmp / filename
    (tmp / "out").mkdir()
    (tmp / "scratch").mkdir()
    (tmp / "requirements.txt").write_text(f"{name} --hash=sha256:{sha256}\n")
    if not sys.stderr.isatty():
        print(f"fetching {name} with pip ({size / 1e6:,.1f} MB)", file=sys.stderr)
    seen, said, bar = 0, None, progress(total=size, unit="B", unit_scale=True, desc=name)
    with _running_pip(kind, tmp) as pip, bar:
        while said is None and seen < size:
            said = _wait(pip)  # before looking for the file, so that nothing is missed
            for path in [*tmp.glob(f"out/{filename}"), *tmp.glob(f"scratch/pip-*/{filename}")]:
                now = _size_of(path)
                bar.update(max(0, min(now, size) - seen))
                seen = max(seen, now)
                if seen >= size:
                    path.rename(whole)
                    break
    if whole.exists():
        found = file_hash(whole)
    elif match := re.search(r"\bGot +([0-9a-f]{64})", said):
        found = match[1]
    else:
        raise UserError(_failure(pip, name, filename, said, tmp / "out"))
    if found != sha256:
        sent = f"{name}: the package index sent a {filename} with SHA-256 {found}, not {sha256}"
        advice = f"it is not the published file or was cut off; run this again, or check {INDEX}"
        raise UserError(f"{sent}: {advice}")
    return whole


@contextlib.contextmanager
def _running_pip(kind, tmp):
    """pip as a process, which is killed at the end."""
    command = [sys.executable, "-P", "-c", _PIP, "download", *_FLAGS.split(), "--dest", str(tmp / "out")]
    command += ["--only-binary" if kind == "wheel" else "--no-binary", ":all:"]
    command += ["--requirement", str(tmp / "requirements.txt")]
    env = {**os.environ, "TMPDIR": str(tmp / "scratch"), "PIP_REQUIRE_VIRTUALENV": "0"}
    no, pipe = subprocess.DEVNULL, subprocess.PIPE
    options = {"env": env, "text": True, "errors": "replace", "start_new_session": True}
    pip = subprocess.Popen(command, stdin=no, stdout=no, stderr=pipe, **options)
    try:
        yield pip
    finally:
        if pip.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pip.pid, signal.SIGKILL)
        pip.wait()
        pip.stderr.close()


def _wait(pip):
    """What pip wrote, if it ends within 50 ms; else None."""
    try:
        return pip.communicate(timeout=0.05)[1]
    except subprocess.TimeoutExpired:
        return None


def _size_of(path):
    """Bytes of a file; 0 if pip has just moved it away."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _failure(pip, name, filename, said, out):
    """The error line for a download that gave no file."""
    if pip.returncode == 0:
        found = ", ".join(sorted(os.listdir(out))) or "nothing"
        return f"{name}: pip downloaded {found}, not {filename}; check {INDEX}"
    return f"cannot fetch {name}: {_pip_reason(said)}"


def _pip_reason(said):
    """Why pip gave up, and what to do, from what it wrote."""
    lines = [line.strip() for line in said.split("\n") if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    last = lines[-1] if lines else "it gave no reason"
    if errors and errors[-1] != "Exception:":
        last = errors[-1]
    full = [line for line in lines if any(f"[Errno {number}]" in line for number in FULL)]
    if full:
        return f"pip: {full[-1].removeprefix('ERROR:').strip()}; {ROOM}"
    if "No module named pip" in said:
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    if "connection broken by" in said or "Connection" in last:
        return f"pip cannot reach its package index ({last}); run this again with the network up"
    return f"pip: {last}; check the network and {INDEX}, then run this again"
