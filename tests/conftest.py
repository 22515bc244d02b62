"""What every test needs set before the first heavy import."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

THREADS = min(2, os.cpu_count() or 1)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests use no hub: everything they read is made or fetched by them
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def seed_model(tmp_path_factory):
    """The folder of a tiny LLaMA with its tokenizer."""
    import tiny

    folder = tmp_path_factory.mktemp("models") / "seed"
    tiny.make_seed_model(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """On tensors this small, threads only wait for each other, and long where the machine is busy."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)
