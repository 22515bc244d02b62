"""The processes of a run: one, or several under `accelerate launch`."""

import contextlib
import datetime
import os
from types import SimpleNamespace

import torch

ALONE = SimpleNamespace(
    process_index=0,
    num_processes=1,
    is_main_process=True,
    main_process_first=contextlib.nullcontext,
    wait_for_everyone=lambda: None,
)


def processes(device="auto"):
    """accelerate's PartialState under `accelerate launch` (torchrun), else ALONE.

    All processes run the same lines of a stage. They share the samples of a batch (training) or the batches
    (embedding); only the main process writes files. The first call decides whether they use the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    # A long timeout: the others wait while the main process fits relevance heads and runs the DPP.
    return PartialState(cpu=cpu, timeout=datetime.timedelta(hours=6))


def sharding():
    """Whether accelerate's configuration asks for FSDP."""
    return processes() is not ALONE and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
