"""The run directory, through which the stages talk: settings, atomic files, resumption, one-line errors.

    RUN/run.json                            backbone, seed, clients and data sizes of the run
    RUN/public/                             D_0: records, seed-model features
    RUN/clients/NAME/private/               NAME's data: never read by a server stage (except --method unrestricted)
    RUN/clients/NAME/selection/             relevance and the proxies of each selection rule
    RUN/clients/NAME/experts/VARIANT/       the trained expert
    RUN/clients/NAME/upload/VARIANT/        what leaves the client: manifest, proxy indices, adapter, routing vectors
    RUN/moe/METHOD/                         the server's unified model
    RUN/scores/, RUN/results.*              evaluation

Every stage writes into a temporary neighbour and renames it when it is complete, so a killed stage leaves
nothing that a later one could mistake for a result; `done.json` inside a finished folder holds its settings.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Sequence
import time
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can put right; printed as one line, exit code 2."""


# This process is one of several, under `accelerate launch` (see backbones.processes), and not the main one.
SEVERAL = int(os.environ.get("WORLD_SIZE", 1)) > 1
FOLLOWER = SEVERAL and os.environ.get("RANK", "0") != "0"


def run_main(main):
    """Run a script's `main()`; what the user can put right ends in one line on stderr and exit code 2."""
    if FOLLOWER:  # what the processes have to say is said once, by the main one; no bars (tqdm shows them on terminals)
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise
        sys.exit(_complain(f"cannot write or read {error.filename or 'a file'}: {error.strerror}; nothing half-written was left"))
    except SafetensorError as error:  # its way to say that the disk is full
        if "(os error " not in str(error):
            raise
        sys.exit(_complain(f"cannot write or read a file: {error}; nothing half-written was left"))
    except RuntimeError as error:
        if not (SEVERAL and "by peer" in str(error)):
            raise
        time.sleep(60)  # a connection broke: another process has ended and says why, and the launcher ends this one
        sys.exit(2)
    except KeyboardInterrupt:
        if not FOLLOWER:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    if FOLLOWER:  # the same is wrong in the main process, as a rule: it says so, and the launcher ends this one
        time.sleep(10)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path (file or folder, up to the caller) that replaces `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    for stale in (temporary, *path.parent.glob(f"{glob.escape(temporary.name)}.*")):  # the others: where moe.save was killed
        _remove(stale)
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path):
    if path.is_dir():
        (path / "done.json").unlink(missing_ok=True)  # first: without it what a kill leaves here counts as unfinished
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as JSON, atomically, with a fixed layout (same value: same bytes)."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run the stage that writes it again") from None


def write_records(path, records):
    """Write records (dicts) as JSON lines, atomically and one at a time."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Records(Sequence):
    """Records (dicts) of a JSON-lines file, each read when it is asked for: memory holds 8 bytes a record.

    starts: byte offsets of the records' lines, any array (default: every line of the file). convert: a function applied
    to each as it is read. Used as a list is: length, indices, slices (these are lists), iteration, `+ [records]` (these
    stay in memory), pickling.
    """

    def __init__(self, path, starts=None, convert=None, more=()):
        self.path, self.convert, self.more = Path(path), convert, list(more)
        self.starts = line_starts(path) if starts is None else starts

    def __len__(self):
        return len(self.starts) + len(self.more)

    def __getitem__(self, index):
        chosen = range(len(self))[index]  # one, or those of a slice; IndexError as a list's
        return list(self._read(chosen)) if isinstance(index, slice) else list(self._read([chosen]))[0]

    def __iter__(self):
        return self._read(range(len(self)))

    def __add__(self, records):
        return Records(self.path, self.starts, self.convert, [*self.more, *records])

    def _read(self, indices):
        with open(self.path, "rb") as file:  # no handle is kept: processes that share one would move each other's position
            for i in indices:
                if i >= len(self.starts):
                    yield self.more[i - len(self.starts)]
                    continue
                file.seek(self.starts[i])
                record = json.loads(file.readline())
                yield self.convert(record) if self.convert else record


def line_starts(path):
    """The byte offset of every line of a file, an array of 8 bytes each."""
    starts, position = array("q"), 0
    with open(path, "rb") as lines:
        for line in lines:
            starts.append(position)
            position += len(line)
    return starts


def read_records(path):
    """The records of a file that write_records wrote, as a sequence that is read on demand."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run select_proxies.py first")
    return Records(path)


def usable_public(run_dir, public):
    """Indices of the public samples that can be read: all but RUN/public/unreadable.json; a range where all can."""
    path = Path(run_dir) / "public" / "unreadable.json"
    unreadable = set(read_json(path)) if path.exists() else set()
    return [i for i in range(len(public)) if i not in unreadable] if unreadable else range(len(public))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished(folder, settings, force=False):
    """True if `folder` holds this stage's result under `settings`; UserError if it holds one under other settings.

    With `force` a result under other settings is removed, to be made anew.
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
    raise UserError(f"{folder} was made with other settings ({what}): pass --force to redo it, or use another --run-dir")


def open_run(run_dir, create=True, **settings):
    """Create RUN/run.json, or check that the run directory was made with these settings (None: take its own).

    Without `create` a new run is checked and not written yet.
    """
    path = Path(run_dir) / "run.json"
    if not path.exists():
        if any(value is None for value in settings.values()):
            raise UserError(f"--run-dir {run_dir} holds no run yet (no run.json): run select_proxies.py first")
        if Path(run_dir).is_file() or Path(run_dir).is_dir() and any(p for p in Path(run_dir).iterdir() if not p.name.startswith(".")):
            raise UserError(f"--run-dir {run_dir} is not empty and not a run directory (no run.json): name another folder")
        if not create:
            return settings
        write_json(path, settings)
    found = read_json(path)
    for key, value in settings.items():
        if value is not None and found.get(key) != value:
            raise UserError(f"--run-dir {run_dir} was made with {key} {found.get(key)!r}, now {value!r}: use another --run-dir")
    return found


def check_client(run, name):
    if name not in run["clients"]:
        raise UserError(f"--client {name}: unknown, this run has {', '.join(run['clients'])}")


def upload_variant(data, selection, full_ffn=False):
    """The folder name of an upload below clients/NAME/upload/: client and server must agree on it."""
    return f"{data}-{selection}" + "-full" * full_ffn


def folder_bytes(folder):
    """Size of all files of a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def write_manifest(upload, about):
    """Close an upload folder: `manifest.json` with the hash of every file in it."""
    files = sorted(p for p in upload.rglob("*") if p.is_file())
    write_json(upload / "manifest.json", {**about, "files": {str(p.relative_to(upload)): sha256(p) for p in files}})


def read_manifest(upload):
    """The manifest of an upload whose files are all there and unchanged; else UserError naming the file."""
    upload = Path(upload)
    if not (upload / "manifest.json").exists():
        raise UserError(f"upload {upload} is missing: run train_expert.py for that client and variant")
    manifest = read_json(upload / "manifest.json")
    present = {str(p.relative_to(upload)) for p in upload.rglob("*") if p.is_file()} - {"manifest.json"}
    for name in sorted(present ^ manifest["files"].keys()):
        raise UserError(f"upload {upload}: {name} is {'not in the manifest' if name in present else 'missing'}: have the client upload it again")
    for name, digest in manifest["files"].items():
        if sha256(upload / name) != digest:
            raise UserError(f"upload {upload}: {name} was changed after the upload (its hash differs): have the client upload it again")
    return manifest
