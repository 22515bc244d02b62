"""The run directory, through which the stages talk: settings, atomic files, resumption.

    RUN/run.json                            the agreement: what all parties compute with
    RUN/local.json                          this party's own: whose data are here, and where they come from
    RUN/public/                             D_0: records, seed-model features
    RUN/clients/NAME/private/               NAME's data; on the server only --method unrestricted reads it
    RUN/clients/NAME/selection/             relevance and the proxies of each selection rule
    RUN/clients/NAME/experts/VARIANT/       the trained expert
    RUN/clients/NAME/upload/VARIANT/        what leaves NAME: manifest, proxies, adapter, routing vectors
    RUN/moe/METHOD/                         the server's unified model
    RUN/scores/, RUN/results.*              evaluation

Every stage writes into a temporary neighbour and renames it when it is complete. So a killed stage leaves
nothing that a later one could mistake for a result. `done.json` inside a finished folder holds its settings.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from metamoe.errors import UserError

OLD = {"answers": "text", "loss": "answer"}  # settings of runs from before they were settings


@contextlib.contextmanager
def atomic(path, private=False):
    """Yield a temporary path (the caller makes it a file or a folder) that replaces `path` on success.

    The result gets the permissions of the umask: some libraries write files that only their owner can read.
    With `private` its owner alone can read it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    for stale in path.parent.glob(f"{glob.escape(temporary.name)}.*"):  # of earlier versions of moe.save
        _remove(stale)
    try:
        yield temporary
        _follow_umask(temporary, 0o077 if private else 0)
        if path.is_dir():  # a folder cannot be replaced in one step
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


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


def _remove(path):
    if path.is_dir():
        # First: without it a folder that a kill leaves half-removed counts as unfinished.
        (path / "done.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value, private=False):
    """Write `value` as JSON, atomically, with a fixed layout (same value: same bytes)."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic(path, private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "remove it and run the stage that writes it again"
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished(folder, settings, force=False):
    """True if `folder` holds this stage's result under `settings`.

    A result under other settings is removed with `force`, to be made again; without it, UserError.
    """
    done = Path(folder) / "done.json"
    if not done.exists():
        return False
    found, now = read_json(done), json.loads(json.dumps(settings))
    if found == now:
        return True
    if force:
        _remove(done.parent)
        return False
    differs = sorted(key for key in found.keys() | now.keys() if found.get(key) != now.get(key))
    what = ", ".join(f"{key} {found.get(key)!r} there, {now.get(key)!r} now" for key in differs)
    remedy = "pass --force to redo it, or use another --run-dir"
    raise UserError(f"{folder} was made with other settings ({what}): {remedy}")


def open_run(run_dir, **settings):
    """RUN/run.json, checked to be of these settings (None: any); of a run that is not there yet the settings.

    UserError where they differ, or cannot start a run here: one is not given, or the folder is not empty.
    """
    folder, where = Path(run_dir), f"--run-dir {run_dir}"
    if (folder / "run.json").exists():
        found = read_json(folder / "run.json")
        for key, value in settings.items():
            was = found.get(key, OLD.get(key))
            if value not in (None, was):
                raise UserError(f"{where} was made with {key} {was!r}, now {value!r}: use another --run-dir")
        return found
    if None in settings.values():
        raise UserError(f"{where} holds no run yet (no run.json): run select_proxies.py first")
    begun = {"local.json", "settings"}  # of a run that was killed before it had its run.json
    if folder.is_file() or {path.name for path in folder.glob("[!.]*")} - begun:
        raise UserError(f"{where} is not empty and not a run directory (no run.json): name another folder")
    return settings


def is_name(text):
    """Whether `text` can name a client, a model or a rule: each is a folder."""
    return bool(re.fullmatch(r"\w[\w.-]*", text))


def check_client(run, name):
    if name not in run["clients"]:
        raise UserError(f"--client {name}: unknown, this run has {', '.join(run['clients'])}")


def folder_bytes(folder):
    """Size of all files of a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
