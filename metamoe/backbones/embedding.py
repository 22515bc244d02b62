"""The embeddings of the public set D_0: one pass for all clients, which goes on where a kill stopped it."""

import io
import os
import time

import numpy as np

from metamoe.atomic import atomic, flush
from metamoe.backbones.base import dtype_name
from metamoe.backbones.distributed import processes
from metamoe.errors import UserError
from metamoe.records import read_records
from metamoe.rundir import finish_file, finished_file, read_json, versions, write_json

MOST_PRIVATE = 20_000  # private samples that a relevance head is fitted on


def public_features(run_dir, backbone, records, force=False):
    """RUN/public/features.npy, memory-mapped: D_0's embeddings (|D_0|, d) float32.

    The row of an unreadable image stays NaN; RUN/public/unreadable.json lists those. Features
    of other records are made again; those of another dtype are refused, or with `force` made again.
    """
    path = run_dir / "public" / "features.npy"
    part, note = path.with_name(".features.npy"), path.with_name(".progress.json")
    settings = {"dtype": dtype_name(backbone.dtype)}
    made_from = versions(run_dir, "public/records.jsonl")
    with processes().main_process_first():
        there = finished_file(path, settings, force, made_from)
    if there:
        return read_array(path, len(records))
    try:
        state = embed_public(part, note, backbone, records, settings | made_from)
    except OSError:  # a full disk: nothing half-written stays on it
        part.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        raise
    if processes().is_main_process:
        write_json(path.with_name("unreadable.json"), sorted(index for index, _ in state["unreadable"]))
        write_json(path.with_name("timing.json"), {"embedding_seconds": state["seconds"]})
        flush(part)
        finish_file(part, path, settings, made_from)
        os.replace(part, path)
        note.unlink()
    processes().wait_for_everyone()
    return np.load(path, mmap_mode="r")


def private_features(run_dir, run, backbone, name, every=False):
    """The embeddings (n, d) of a client's training records, of MOST_PRIVATE random ones or of `every` one."""
    private = read_records(run_dir / "clients" / name / "private" / "train.jsonl")
    if len(private) > MOST_PRIVATE and not every:
        sample = np.random.default_rng([run["seed"], 5]).permutation(len(private))[:MOST_PRIVATE]
        private = [private[i] for i in np.sort(sample)]
    return backbone.features(private, label=f"embedding {name}")


def keep_array(path, values, settings, made_from):
    """Write an array as the finished file `path`."""
    np.save(buffer := io.BytesIO(), values)
    with atomic(path) as temporary:  # NumPy's own write to a full disk raises an OSError without errno
        temporary.write_bytes(buffer.getvalue())
        finish_file(temporary, path, settings, made_from)


def read_array(path, rows):
    """The memory-mapped array of a file; UserError where it is none with these rows."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run the same command again") from None
    if len(array) != rows:
        raise UserError(f"{path} has {len(array)} rows, not {rows}: remove it and run the same command again")
    return array


def embed_public(part, note, backbone, records, identity):
    """Embed D_0 into the file `part`; returns the final state, which is kept in the file `note`.

    identity: what a pass that was killed must have in common with this one to go on.
    """
    main = processes().is_main_process
    with processes().main_process_first():
        state = begin(part, note, (len(records), backbone.width), identity)
    out = np.load(part, mmap_mode="r+")
    before, earlier, count = list(state["unreadable"]), state["seconds"], 0
    start = saved = time.perf_counter()
    for indices, values, unreadable in backbone.shared_embed(records, "embedding D_0", state["batches"]):
        if not main:
            continue
        out[indices] = values
        count += len(indices)
        state["batches"] += 1
        state["unreadable"] = before + [list(item) for item in unreadable]
        if time.perf_counter() - saved > 30:
            out.flush()
            saved = time.perf_counter()
            write_json(note, state | {"seconds": earlier + saved - start})
    if main:
        out[[index for index, _ in state["unreadable"]]] = np.nan
        out.flush()
        seconds = time.perf_counter() - start
        state["seconds"] = earlier + seconds
        write_json(note, state)
        line = f"select_proxies: embedded {count} public samples, {count / seconds:.1f} a second"
        if backbone.seconds:
            line += f", {100 * backbone.seconds / seconds:.0f}% of the time waiting for decoded images"
        skipped = [f"    skipped: {message}" for _, message in state["unreadable"]]
        print("\n".join([line, *skipped]))
    return state


def begin(part, note, shape, identity):
    """The state that a killed pass left in `note`, or that of a new pass, whose file is made."""
    if part.exists() and note.exists():
        state = read_json(note)
        if state.get("identity") == identity:
            return state
    if processes().is_main_process:
        note.unlink(missing_ok=True)
        np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk ends here, not in a SIGBUS half-way through
            with open(part, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return {"identity": identity, "batches": 0, "unreadable": [], "seconds": 0.0}
