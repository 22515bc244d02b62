"""The embeddings of the public set D_0: one pass for all clients, which goes on where a kill stopped it."""

import os
import time

import numpy as np

from metamoe.backbones.distributed import processes
from metamoe.rundir import read_json, write_json


def public_features(run_dir, backbone, records, dtype):
    """RUN/public/features.npy, memory-mapped: D_0's embeddings (|D_0|, d) float32, once for all clients.

    One streaming pass, which goes on where a kill stopped it. The row of an unreadable image stays NaN;
    RUN/public/unreadable.json lists those.
    """
    path = run_dir / "public" / "features.npy"
    part, progress = path.with_name(".features.npy"), path.with_name(".progress.json")
    if not path.exists():
        try:
            state = embed_public(part, progress, backbone, records, dtype)
        except OSError:  # a full disk: nothing half-written stays on it
            part.unlink(missing_ok=True)
            progress.unlink(missing_ok=True)
            raise
        if processes().is_main_process:
            write_json(path.with_name("unreadable.json"), sorted(index for index, _ in state["unreadable"]))
            write_json(path.with_name("timing.json"), {"embedding_seconds": state["seconds"]})
            os.replace(part, path)
            progress.unlink()
        processes().wait_for_everyone()
    return np.load(path, mmap_mode="r")


def embed_public(part, progress, backbone, records, dtype):
    """Embed D_0 into `part`, or go on where `progress` says that it stopped.

    Returns what is known then: "unreadable", "seconds", ...
    """
    state, shape = (
        {"dtype": dtype, "batches": 0, "unreadable": [], "seconds": 0.0},
        (len(records), backbone.width),
    )
    main = processes().is_main_process
    with processes().main_process_first():
        if part.exists() and progress.exists() and (found := read_json(progress))["dtype"] == dtype:
            out, state = np.load(part, mmap_mode="r+"), found
        elif main:
            progress.unlink(missing_ok=True)
            out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk ends here, not in a SIGBUS half-way through
                with open(part, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    before, earlier, count, start = list(state["unreadable"]), state["seconds"], 0, time.perf_counter()
    saved = start
    for indices, values, bad in backbone.shared_embed(records, "embedding D_0", skip=state["batches"]):
        if not main:
            continue
        out[indices] = values
        count += len(indices)
        state["batches"] += 1
        state["unreadable"] = before + [list(item) for item in bad]
        if time.perf_counter() - saved > 30:
            out.flush()
            saved = time.perf_counter()
            write_json(progress, state | {"seconds": earlier + saved - start})
    if not main:
        return state
    out[[index for index, _ in state["unreadable"]]] = np.nan
    out.flush()
    seconds = time.perf_counter() - start
    state["seconds"] = earlier + seconds
    write_json(progress, state)
    waited = (
        f", {100 * backbone.seconds / seconds:.0f}% of the time waiting for decoded images"
        if backbone.seconds
        else ""
    )
    print(f"select_proxies: embedded {count} public samples, {count / seconds:.1f} a second{waited}")
    for _, message in state["unreadable"]:
        print(f"    skipped: {message}")
    return state
