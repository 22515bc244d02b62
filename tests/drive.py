"""Run stages through their own command lines, several in one process: each import of torch costs seconds.

python tests/drive.py JOB.json      {"commands": [["select_proxies", "--run-dir", ...], ...], ...}; see `main`
"""

import contextlib
import hashlib
import io
import json
import os
import random
import runpy
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    code: int
    out: str
    err: str


def call(stage, *args):
    """`python STAGE.py ARGS` in this process: exit code, stdout, stderr."""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [f"{stage}.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(REPO / f"{stage}.py"), run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def snapshot(folder, *leave_out):
    """{path: hash} of every file below `folder`, less those named in `leave_out`."""
    paths = (p for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in leave_out)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def all_of(commands):
    """Run the commands in order up to the first that fails; returns (its exit code, seconds)."""
    start = time.perf_counter()
    for command in commands:
        result = call(*command)
        print(result.out, end="")
        if result.code:
            print(result.err, file=sys.stderr)
            return result.code, time.perf_counter() - start
    return 0, time.perf_counter() - start


def record_opens(below, opened):
    """From now on, put every path below `below` that this process opens or lists into the set `opened`."""

    def hook(event, args):
        if event in ("open", "os.scandir", "os.listdir") and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(below + os.sep):
                opened.add((event, os.path.relpath(path, below)))

    sys.addaudithook(hook)


def record_pickles(found):
    """From now on, put what a pickle names and can so call into the set `found`."""
    sys.addaudithook(lambda event, args: found.add(".".join(args)) if event == "pickle.find_class" else None)


WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "tempfile.mkdtemp")


def die_at_write(below, count):
    """SIGKILL this process right before its `count`-th change of files below `below`."""
    left = count

    def hook(event, args):
        nonlocal left
        if event == "open":
            changes = (
                isinstance(args[0], (str, bytes, os.PathLike))
                and isinstance(args[2], int)
                and args[2] & (os.O_WRONLY | os.O_RDWR)
            )
        else:
            changes = event in WRITES
        if changes and os.path.abspath(os.fsdecode(args[0])).startswith(below + os.sep):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def import_all():
    """What the stages import, imported here once for all the forks."""
    sys.path.insert(0, str(REPO))
    from metamoe.backbones.base import import_transformers

    transformers = import_transformers()
    import peft  # noqa: F401
    import sklearn.calibration
    import sklearn.linear_model
    import sklearn.pipeline  # noqa: F401

    for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)


def run_killed(run_dir, commands, kills, seconds, writes, seed):
    """Kill the commands up to `kills` times, at random times and at random writes in turn, each time starting
    them again, until they end. Returns the exit code, the files, and what each kill left half-written."""
    import_all()
    rng, left = random.Random(seed), []
    for life in range(kills + 1):
        delay, count = rng.uniform(0, seconds), rng.randint(1, writes)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            sys.stdout = open(os.devnull, "w")
            if life % 2 and life < kills:
                die_at_write(str(run_dir), count)
            os._exit(all_of(commands)[0])
        if life % 2 == 0 and life < kills:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        left.append([str(path.relative_to(run_dir)) for path in run_dir.rglob("*.part*")])
    return {"code": os.waitstatus_to_exitcode(status), "files": snapshot(run_dir), "left": left}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    if "kills" in job:
        arguments = ("commands", "kills", "seconds", "writes", "seed")
        report = run_killed(Path(job["run_dir"]), *(job[name] for name in arguments))
    else:
        opened, unpickled = set(), set()
        record_pickles(unpickled)
        if "audit" in job:
            record_opens(job["audit"], opened)
        code, seconds = all_of(job["commands"])
        report = {"code": code, "seconds": seconds, "opened": sorted(opened)}
        report["unpickled"] = sorted(unpickled)
    if os.environ.get("RANK", "0") == "0":  # of the processes of `accelerate launch`
        Path(job["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()
