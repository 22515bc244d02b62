"""Two small stages on one result, stopped and killed at every file operation: python tests/hands.py FOLDER

Prints how many interleavings and kills were tried. Without torch: a fork of so small a process takes no time.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metamoe import atomic  # noqa: E402
from metamoe.rundir import finished, hashes, making, read_json  # noqa: E402

STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "shutil.rmtree")
OLD, NEW, OTHER = {"lr": 1}, {"lr": 2}, {"lr": 3}


def make(folder, settings, force):
    """What a stage does: a result of two files, where it is not there yet."""
    with atomic.locked(folder):
        if finished(folder, settings, force):
            return
        with making(folder, settings) as part:
            for name in ("a.txt", "b.txt"):
                (part / name).write_text(f"{name} of {settings}")


class Process:
    """A forked process that makes `folder`, and stops before each of its file operations until it may go."""

    def __init__(self, folder, settings, force=False):
        (gate, self.gate), (self.report, report) = os.pipe(), os.pipe()
        self.pid, self.state = os.fork(), None
        if self.pid == 0:
            os._exit(self.child(folder, settings, force, gate, report))
        os.close(gate)
        os.close(report)
        self.listen()

    def child(self, folder, settings, force, gate, report):
        def hook(event, args):
            if event in STEPS and str(folder.parent) in os.fsdecode(args[0] if args[0] != 0 else ""):
                os.write(report, b"s")
                os.read(gate, 1)

        class Waits:
            def write(self, text):
                if "waits for process" in text:
                    os.write(report, b"w")

            def flush(self):
                pass

        sys.stdout = Waits()
        sys.addaudithook(hook)
        try:
            make(folder, settings, force)
        except BaseException:
            return 1
        return 0

    def listen(self):
        """Wait for its next stop (s), for the lock that it waits for (w), or for its end."""
        self.state = os.read(self.report, 1).decode()

    def go(self, steps):
        """Let it take so many steps, fewer where it ends or waits for the other's lock."""
        for _ in range(steps):
            if self.state != "s":
                return
            os.write(self.gate, b".")
            self.listen()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.state = ""

    def end(self):
        """Its exit code; it may go on."""
        if self.state == "w":
            self.listen()
        self.go(10_000)
        os.close(self.gate)
        os.close(self.report)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def whole(folder, *allowed):
    """The result is one of the allowed, complete, and nothing lies beside it."""
    done = read_json(folder / "done.json")
    files = done.pop("files")
    assert done in allowed and files == hashes(folder) and sorted(files) == ["a.txt", "b.txt"]
    assert {(folder / name).read_text() for name in files} == {f"{name} of {done}" for name in files}
    assert os.listdir(folder.parent) == [folder.name]


def interleavings(folder, before, second):
    """Run two processes under every schedule "k steps, up to j of the other, k's end, j's end"."""
    tried = 0
    for k in range(60):
        for j in (1, 4, 9, 16, 10_000):
            begin(folder, before)
            one, two = Process(folder, NEW, force=True), Process(folder, second, force=True)
            one.go(k)
            ended = one.state == ""
            two.go(j)
            one.go(10_000)
            order = (two, one) if one.state == "w" else (one, two)
            assert [process.end() for process in order] == [0, 0]
            whole(folder, NEW, second)
            tried += 1
        if ended:
            return tried
    raise AssertionError("more steps than this takes")


def kills(folder, before):
    """Kill a process at each of its steps: the old result or none is there, and the next process makes it."""
    for k in range(60):
        begin(folder, before)
        one = Process(folder, NEW, force=True)
        one.go(k)
        if one.state == "":
            one.end()
            return k
        one.kill()
        one.end()
        atomic.tidy(folder.parent)  # what every stage does when it opens the run
        if before:
            whole(folder, OLD, NEW)
        elif folder.exists():
            whole(folder, NEW)
        make(folder, NEW, force=True)
        whole(folder, NEW)
    raise AssertionError("more steps than this takes")


def begin(folder, before):
    """A run directory with an old result in it, or none."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.parent.mkdir()
    if before:
        make(folder, OLD, False)


def main():
    folder = Path(sys.argv[1]) / "run" / "result"
    tried = {"interleavings": 0, "kills": 0}
    for before in (False, True):
        for second in (NEW, OTHER):  # the same work twice, or other settings with --force
            tried["interleavings"] += interleavings(folder, before, second)
        tried["kills"] += kills(folder, before)
    print(json.dumps(tried))


if __name__ == "__main__":
    main()
