"""Records on disk: JSON lines, read one at a time, so that memory holds 8 bytes a record."""

import json
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from metamoe.errors import UserError
from metamoe.rundir import atomic, check_input, read_json


def write_records(path, records):
    """Write records (dicts) as JSON lines, atomically and one at a time."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Records(Sequence):
    """Records (dicts) of a JSON-lines file, each read when it is asked for.

    starts: byte offsets of the records' lines, any array (default: every line of the file).
    convert: a function applied to each record as it is read.
    more: records after those of the file, kept in memory; also those added with `+`.
    """

    def __init__(self, path, starts=None, convert=None, more=()):
        self.path, self.convert, self.more = Path(path), convert, list(more)
        self.starts = line_starts(path) if starts is None else starts

    def __len__(self):
        return len(self.starts) + len(self.more)

    def __getitem__(self, index):
        chosen = range(len(self))[index]  # a number, or a range for a slice; IndexError as a list's
        if isinstance(index, slice):
            return list(self._read(chosen))
        return list(self._read([chosen]))[0]

    def __iter__(self):
        return self._read(range(len(self)))

    def __add__(self, records):
        return Records(self.path, self.starts, self.convert, [*self.more, *records])

    def take(self, rows):
        """The records at these indices, read on demand like these."""
        if len(self.starts):
            return Records(self.path, self.starts[rows], self.convert)
        return Records(self.path, (), more=[self.more[i] for i in rows])

    def _read(self, indices):
        # Opened anew each time: processes that share a handle would move each other's position.
        with open(self.path, "rb") as file:
            for i in indices:
                if i >= len(self.starts):
                    yield self.more[i - len(self.starts)]
                    continue
                file.seek(self.starts[i])
                record = self._parse(file.readline())
                yield self.convert(record) if self.convert else record

    def _parse(self, line):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: {error} in {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.path} is damaged: {line[:60]!r} is no JSON object")
        return record


def line_starts(path):
    """The byte offset of every line of a file, an array of 8 bytes each."""
    with open(path, "rb") as lines:
        return array("q", accumulate(map(len, lines), initial=0))[:-1]


def read_records(path):
    """The records of a file that write_records wrote, as a sequence that is read on demand.

    UserError where the file is not what the done.json beside it says.
    """
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run select_proxies.py first")
    return Records(check_input(path))


def usable_public(run_dir, public):
    """Indices of the readable public samples: all but RUN/public/unreadable.json; a range where all are."""
    path = Path(run_dir) / "public" / "unreadable.json"
    unreadable = set(read_json(path)) if path.exists() else set()
    if not unreadable:
        return range(len(public))
    return [i for i in range(len(public)) if i not in unreadable]
