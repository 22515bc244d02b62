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

# pip as a child that does not outlive this process (Linux's prctl PR_SET_PDEATHSIG; elsewhere it runs on).
_PIP = """
import runpy, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_FLAGS = "--no-deps --no-cache-dir --no-input --quiet --disable-pip-version-check --progress-bar off".split()

# Signs in pip's messages that a download was cut off.
_CUT = "IncompleteRead|EOFError|BadZipFile|incomplete-download| is invalid|file could not be opened"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = "make room, or set METAMOE_CACHE to a folder on another disk"
INDEX = "the index that pip uses"


def pip_download(name, filename, size, kind, tmp):
    """Let pip download the file into `tmp` and return its path.

    pip writes a download to $TMPDIR/pip-unpack-*/<filename>. The file is taken from there once it is
    complete, and pip is stopped: for a source distribution it would go on, unpack the file and run its
    setup.py.
    """
    out, scratch = tmp / "out", tmp / "scratch"
    out.mkdir()
    scratch.mkdir()
    if not sys.stderr.isatty():
        print(f"fetching {name} with pip ({size / 1e6:,.1f} MB)", file=sys.stderr)
    seen, said, bar = 0, None, progress(total=size, unit="B", unit_scale=True, desc=name)
    with _running_pip(name, kind, out, scratch) as pip, bar:
        while said is None and seen <= size:
            said = _wait(pip)  # before looking for the file, so that nothing is missed
            for path in [*out.glob(filename), *scratch.glob(f"pip-*/{filename}")]:
                now = _size_of(path)
                bar.update(max(0, min(now, size) - seen))
                seen = max(seen, now)
                if now == size:
                    return path
    raise UserError(_failure(pip, name, filename, size, seen, said, out))


@contextlib.contextmanager
def _running_pip(name, kind, out, scratch):
    """pip as a process, which is killed at the end."""
    command = [sys.executable, "-P", "-c", _PIP, "download", *_FLAGS]
    command += ["--only-binary" if kind == "wheel" else "--no-binary", ":all:", "--dest", str(out), name]
    env = {**os.environ, "TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}
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


def _failure(pip, name, filename, size, seen, said, out):
    """The error line for a download that gave no complete file."""
    if seen > size or (seen and pip.returncode == 0):
        more = " or more" if seen > size else ""
        sent = f"{name}: the package index sent a {filename} of {seen:,} bytes{more}, not {size:,}"
        return f"{sent}: it is not the published file or was cut off; run this again, or check {INDEX}"
    if pip.returncode == 0:
        found = ", ".join(sorted(os.listdir(out))) or "nothing"
        return f"{name}: pip downloaded {found}, not {filename}; check {INDEX}"
    return f"cannot fetch {name}: {_pip_reason(said, seen, size)}"


def _pip_reason(said, seen, size):
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
    if seen or re.search(_CUT, said):
        return f"the download ended before its {size:,} bytes were there (pip: {last}); run this again"
    if "connection broken by" in said or "Connection" in last:
        return f"pip cannot reach its package index ({last}); run this again with the network up"
    return f"pip: {last}; check the network and the package index that pip uses, then run this again"
