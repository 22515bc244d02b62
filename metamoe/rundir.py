"""The run directory, through which the stages talk: settings, atomic files, resumption.

    RUN/run.json                            backbone, seed model, clients and data sizes of the run
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


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path (the caller makes it a file or a folder) that replaces `path` on success.

    The result gets the permissions of the umask: some libraries write files that only their owner can read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    for stale in path.parent.glob(f"{glob.escape(temporary.name)}.*"):  # left where moe.save was killed
        _remove(stale)
    try:
        yield temporary
        _follow_umask(temporary)
        if path.is_dir():  # a folder cannot be replaced in one step
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _follow_umask(path):
    """Give `path`, and what is in it, the permissions of a plain open() or mkdir()."""
    mask = os.umask(0o077)  # the mask cannot be read without setting one
    os.umask(mask)
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


def write_json(path, value):
    """Write `value` as JSON, atomically, with a fixed layout (same value: same bytes)."""
    with atomic(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and run the stage that writes it again"
        ) from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished(folder, settings, force=False):
    """True if `folder` holds this stage's result under `settings`.

    A result under other settings is removed with `force`, to be made again; without it, UserError.
    """
    folder = Path(folder)
    if not (folder / "done.json").exists():
        return False
    found = read_json(folder / "done.json")
    settings = json.loads(json.dumps(settings))
    if found == settings:
        return True
    if force:
        _remove(folder)
        return False
    differs = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
    what = ", ".join(f"{key} {found.get(key)!r} there, {settings.get(key)!r} now" for key in differs)
    raise UserError(
        f"{folder} was made with other settings ({what}): pass --force to redo it, or use another --run-dir"
    )


def open_run(run_dir, create=True, **settings):
    """Create RUN/run.json, or check that the run directory was made with these settings (None: take its own).

    Without `create` a new run is checked and not written yet.
    """
    path = Path(run_dir) / "run.json"
    if not path.exists():
        _check_new_run(run_dir, settings)
        if not create:
            return settings
        write_json(path, settings)
    found = read_json(path)
    for key, value in settings.items():
        if value is not None and found.get(key) != value:
            raise UserError(
                f"--run-dir {run_dir} was made with {key} {found.get(key)!r}, now {value!r}: "
                "use another --run-dir"
            )
    return found


def _check_new_run(run_dir, settings):
    """UserError unless these settings can start a run here: all are given, and the folder is empty."""
    folder = Path(run_dir)
    if any(value is None for value in settings.values()):
        raise UserError(f"--run-dir {run_dir} holds no run yet (no run.json): run select_proxies.py first")
    taken = folder.is_file()
    if folder.is_dir():
        taken = any(not p.name.startswith(".") for p in folder.iterdir())
    if taken:
        raise UserError(
            f"--run-dir {run_dir} is not empty and not a run directory (no run.json): name another folder"
        )


def is_name(text):
    """Whether `text` can name a client, a model or a rule: each is a folder."""
    return bool(re.fullmatch(r"\w[\w.-]*", text))


def check_client(run, name):
    if name not in run["clients"]:
        raise UserError(f"--client {name}: unknown, this run has {', '.join(run['clients'])}")


def folder_bytes(folder):
    """Size of all files of a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
