"""The run directory, through which the stages talk: settings, atomic files, resumption.

    RUN/run.json                            the agreement: what all parties compute with
    RUN/local.json                          this party's own: whose data are here, and where they come from
    RUN/public/                             D_0: records, seed-model features
    RUN/clients/NAME/private/               NAME's data; on the server only --method unrestricted, fedavg and
                                            comigs read it
    RUN/clients/NAME/selection/             relevance and the proxies of each selection rule
    RUN/clients/NAME/experts/VARIANT/       the trained expert
    RUN/clients/NAME/upload/VARIANT/        what leaves NAME: manifest, proxies, adapter, routing vectors
    RUN/moe/METHOD/                         the server's unified model
    RUN/scores/, RUN/results.*              evaluation

Every stage writes into a temporary neighbour, flushes it to the disk and renames it when it is complete. So a
killed stage leaves nothing that a later one could mistake for a result. One process at a time makes a result,
see atomic.py. `done.json` inside a finished folder holds its settings, under "files" the hash of every file
("timing.json" excepted: a clock), and under "made_from" the hashes of what it was made from.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

from metamoe.atomic import atomic, tidy
from metamoe.check_run import check_run, is_name
from metamoe.errors import UserError


def inside(run_dir, *names):
    """The folder RUN/NAME/NAME/..., made where it is missing; the run directory itself must be there."""
    folder = Path(run_dir)
    for name in names:
        folder = folder / name
        folder.mkdir(exist_ok=True)
    return folder


def write_json(path, value, private=False):
    """Write `value` as JSON, atomically, with a fixed layout (same value: same bytes)."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic(path, private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def _damaged(path, what):
    return UserError(f"{path} is damaged ({what}): remove it and run the stage that writes it again")


def sha256(path):
    """The file's hash, taken once for each state of the file."""
    found = os.stat(path)
    state = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return _sha256(os.path.abspath(path), state)


@functools.lru_cache(maxsize=10_000)
def _sha256(path, state):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder):
    """{path inside `folder`: hash} of what a finished folder holds."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.name not in ("done.json", "timing.json"):
            found[name.as_posix()] = sha256(path)
    return found


def versions(run_dir, *names):
    """{name: hash} of files RUN/NAME that a result is made from; None where one is not there (any more).

    UserError where the done.json beside one says that it was changed.
    """
    paths = {name: Path(run_dir, name) for name in names}
    return {name: sha256(check_input(path)) if path.exists() else None for name, path in paths.items()}


@contextlib.contextmanager
def making(folder, settings, run_dir=None, made_from=None):
    """Yield the temporary folder that becomes a stage's result `folder` when all of it is written.

    made_from: `versions` of its sources in run_dir; UserError and no result where one was replaced meanwhile.
    """
    with atomic(folder) as part:
        part.mkdir()
        yield part
        for name, digest in versions(run_dir, *(made_from or {})).items():
            if made_from[name] != digest:
                raise UserError(f"{run_dir}/{name} was changed while it was used: run the same command again")
        finish(part, settings, made_from)


def finish(part, settings, made_from=None):
    """Write done.json, the last file of the result in the temporary folder `part`.

    made_from: `versions` of the files that the result was made from.
    """
    _write_done(Path(part) / "done.json", settings, made_from, hashes(part))


def finish_file(part, path, settings, made_from=None):
    """As finish, for a result that is one file: PATH.json. Call it before `part` becomes `path`."""
    _write_done(_note(path), settings, made_from, {path.name: sha256(part)})


def _note(path):
    return path.with_name(f"{path.name}.json")


def _write_done(done, settings, made_from, files):
    known = {name: digest for name, digest in (made_from or {}).items() if digest is not None}
    more = {"made_from": known} if known else {}
    write_json(done, {**settings, **more, "files": files})


def finished(folder, settings, force=False, made_from=None):
    """True if `folder` holds this stage's result under `settings`, whole and made from the present files.

    Else it is to be made (again): a line says why where it is damaged or made from other files. UserError
    where it was made with other settings and there is no `force`. Nothing is removed.
    """
    done = Path(folder) / "done.json"
    if not done.exists():
        return False
    if not _same_settings(folder, done, settings, force):
        return False
    return _current(folder, _problem(folder) or _other_source(done, made_from))


def finished_file(path, settings, force=False, made_from=None):
    """As finished, for a result that is one file. One of an earlier version, without PATH.json, is valid."""
    done = _note(path)
    if not path.exists() or not done.exists():
        return path.exists() and not force
    if not _same_settings(path, done, settings, force):
        return False
    problem = None
    if _read_done(done)["files"].get(path.name) != sha256(path):
        problem = "it was changed"
    return _current(path, problem or _other_source(done, made_from))


def _current(what, problem):
    if problem:
        print(f"{what}: {problem}: it is made again", flush=True)
    return not problem


def _read_done(path):
    found = read_json(path)
    if not isinstance(found, dict):
        raise _damaged(path, "no JSON object")
    for key in ("files", "made_from"):
        if not isinstance(found.setdefault(key, {}), dict):
            raise _damaged(path, f"{key} is no JSON object")
    return found


def settings_of(folder):
    """The settings that the result in `folder` was made with."""
    return _settings(_read_done(Path(folder) / "done.json"))


def _settings(done):
    return {key: value for key, value in done.items() if key not in ("files", "made_from")}


def _same_settings(what, done, settings, force):
    """Whether it was made with these settings; UserError if not, and without `force`."""
    found, now = _settings(_read_done(done)), json.loads(json.dumps(settings))
    if found == now or force:
        return found == now
    differs = sorted(key for key in found.keys() | now.keys() if found.get(key) != now.get(key))
    how = ", ".join(f"{key} {found.get(key)!r} there, {now.get(key)!r} now" for key in differs)
    remedy = "pass --force to redo it, or use another --run-dir"
    raise UserError(f"{what} was made with other settings ({how}): {remedy}")


def _problem(folder):
    """What is wrong with the files of a finished folder; None: nothing, or an earlier version made it."""
    files = _read_done(Path(folder) / "done.json")["files"]
    there = hashes(folder) if files else {}
    for name in sorted(files.keys() | there.keys()):
        if name not in files:
            raise UserError(f"{folder}: {name} is not of this result: take it out")
        if name not in there:
            return f"{name} is missing"
        if files[name] != there[name]:
            return f"{name} was changed (its hash differs)"
    return None


def _other_source(done, made_from):
    """Which file differs from the one that the result was made from; None: none that is known."""
    before, now = _read_done(done)["made_from"], made_from or {}
    for name, digest in before.items():
        if now.get(name) not in (None, digest):
            return f"{name} was changed since"
    return None


def check_whole(folder, remedy):
    """UserError naming the file where a finished folder does not hold what its done.json says."""
    problem = _problem(folder)
    if problem:
        raise UserError(f"{folder}: {problem}: {remedy}")


def check_input(path):
    """The path of a file in RUN/public/ or a client's private/; UserError where it was changed."""
    path = Path(path)
    done = path.with_name("done.json")
    known = _read_done(done)["files"].get(path.name) if done.exists() else None
    if known not in (None, sha256(path)):
        remedy = f"put it back, or remove {path.parent} and run select_proxies.py again"
        raise UserError(f"{path} was changed (its hash differs): {remedy}")
    return path


def read_run(run_dir):
    """RUN/run.json, checked: it may be another party's, or edited."""
    run = read_json(Path(run_dir) / "run.json")
    check_run(run, Path(run_dir) / "run.json")
    return run


def open_run(run_dir, **settings):
    """RUN/run.json, checked to be of these settings (None: any); of a run that is not there yet the settings.

    UserError where they differ, or cannot start a run here: one is not given, or the folder is not empty.
    """
    folder, where = Path(run_dir), f"--run-dir {run_dir}"
    if (folder / "run.json").exists():
        found = read_run(folder)
        for part in (".", "public", "moe", "settings"):
            tidy(folder / part, below=part != ".")
        for name in found["clients"]:  # of a client the uploads alone: the server opens nothing else
            tidy(folder / "clients" / name / "upload")
        for key, value in settings.items():
            was = found.get(key)
            if value not in (None, was):
                raise UserError(f"{where} was made with {key} {was!r}, now {value!r}: use another --run-dir")
        return found
    if None in settings.values():
        raise UserError(f"{where} holds no run yet (no run.json): run select_proxies.py first")
    begun = {"local.json", "settings"}  # of a run that was killed before it had its run.json
    if folder.is_file() or {path.name for path in folder.glob("[!.]*")} - begun:
        raise UserError(f"{where} is not empty and not a run directory (no run.json): name another folder")
    return settings


def check_name(what, name):
    """The name of a folder, as it is; UserError where it would lead elsewhere."""
    if not isinstance(name, str) or not is_name(name):
        raise UserError(f"{what} {name!r} is no name: letters, digits, '-', '_' and '.'")
    return name


def check_client(run, name):
    if name not in run["clients"]:
        raise UserError(f"--client {name}: unknown, this run has {', '.join(run['clients'])}")


def folder_bytes(folder):
    """Size of all files of a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
