"""Results are written whole or not at all, each by one process at a time.

A process locks a hidden file beside what it makes; its death releases the lock.

Beside RUN/moe/metamoe there may be, of a process that makes it or was killed while it did:

    .metamoe.lock               who makes it
    .metamoe.PID-RANDOM.part    what is being made
    .metamoe.PID-RANDOM.old     what it replaces
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from metamoe.errors import FOLLOWER

HELD = set()  # absolute paths that this process has locked
LEFT = r"\d+-[0-9a-f]{8}\.(?:part|old)|part(?:\.\w+)?"  # how such names end; the last: earlier versions
MAKING = set()  # temporary paths of this process: what is written inside one needs no second


@contextlib.contextmanager
def atomic(path, private=False):
    """Yield a temporary path (the caller makes it a file or a folder) that replaces `path` on success.

    The folder that `path` is in must be there: what was deleted meanwhile does not come back. The result gets
    the permissions of the umask: some libraries write files that only their owner can read. With `private`
    its owner alone can read it.
    """
    path = Path(path)
    if MAKING.intersection(path.parents):
        yield path
        return
    with locked(path):
        temporary = _beside(path, "part")
        MAKING.add(temporary)
        try:
            yield temporary
            _follow_umask(temporary, 0o077 if private else 0)
            flush(temporary, *temporary.rglob("*"))
            _replace(temporary, path)
        finally:
            MAKING.discard(temporary)
            remove(temporary)


def _replace(temporary, path):
    """Rename `temporary` to `path`. A folder cannot be replaced in one step: the old one is set aside."""
    if not path.is_dir():
        os.replace(temporary, path)
        flush(path.parent)
        return
    aside = _beside(path, "old")
    os.rename(path, aside)
    try:
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        _put_back_or_remove(aside, path)


def flush(*paths):
    """Have the kernel write these files and folders to the disk."""
    for path in paths:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some file systems cannot flush a folder
                raise
        finally:
            os.close(descriptor)


def _follow_umask(path, more=0):
    """Give `path`, and what is in it, the permissions of a plain open() or mkdir()."""
    mask = os.umask(0o077)  # the mask cannot be read without setting one
    os.umask(mask)
    mask |= more
    for each in (path, *path.rglob("*")):
        if each.is_symlink():
            continue
        with contextlib.suppress(PermissionError):  # some mounted file systems fix every file's mode
            each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def locked(path):
    """Hold the lock of the file or folder `path`; wait, and say so, while another process makes it.

    What dead processes left beside `path` is removed, or put back. Under `accelerate launch` the main process
    alone locks. Without locks (some network file systems, a folder that is read-only) all goes on as it is.
    """
    path = Path(path)
    name = os.path.abspath(path)
    if FOLLOWER or name in HELD:
        yield
        return
    lock = _acquire(path, wait=True)
    HELD.add(name)
    try:
        if lock is not None:
            _tidy(path)
        yield
    finally:
        HELD.discard(name)
        if lock is not None:
            _release(lock)


@contextlib.contextmanager
def locked_run(run_dir):
    """Hold the lock of RUN/run.json. A new run directory is made, and removed if it stays empty."""
    folder = Path(run_dir)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    if not FOLLOWER:
        with contextlib.suppress(FileExistsError):  # a file, which the caller refuses
            folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "run.json"):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


def _acquire(path, wait):
    """The lock's open file; None where there can be none, or another process has it and there is no `wait`.

    FileNotFoundError where the folder is not there.
    """
    while True:
        try:
            file = open(path.with_name(f".{path.name}.lock"), "a+", encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise
        except OSError:
            return None
        try:
            _lock(file, path, wait)
        except OSError:
            file.close()
            return None
        if _is_there(file):
            break
        file.close()  # the one before removed it
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def _lock(file, path, wait):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        file.seek(0)
        holder = file.read(200).strip() or "unknown"
        print(f"waits for process {holder}, which makes {path}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_there(file):
    """Whether the open file still has its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    return False


def _release(file):
    with contextlib.suppress(OSError):
        if _is_there(file):
            os.unlink(file.name)
    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked process has the file open too
    with contextlib.suppress(OSError):
        file.close()


def _beside(path, kind):
    """A hidden name beside `path` that no other process takes. kind: "part" or "old"."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def _tidy(path):
    """Remove what dead processes left beside `path`; put back what a killed replacement set aside."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.({LEFT})")
    for name in os.listdir(path.parent):
        if ours.fullmatch(name) and name.endswith(".old"):
            _put_back_or_remove(path.with_name(name), path)
        elif ours.fullmatch(name):
            remove(path.with_name(name))


def _put_back_or_remove(aside, path):
    """Rename the result that was set aside back to `path`, where nothing has taken its place."""
    if path.exists():
        remove(aside)
    else:
        os.rename(aside, path)


def tidy(folder, below=True):
    """Remove or put back what dead processes left in a folder, and `below` it; what others make stays."""
    if FOLLOWER:
        return
    for parent, folders, files in os.walk(folder):
        names = [name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        for name in names:
            left = re.fullmatch(rf"\.(.+?)\.(lock|{LEFT})", name)
            result = Path(parent, left[1] if left else name)
            lock = _acquire(result, wait=False) if left else None
            if lock is not None:
                _tidy(result)
                _release(lock)


def remove(path):
    """Remove a file or a folder, or nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        # First: without it a folder that a kill leaves half-removed counts as unfinished.
        (path / "done.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
