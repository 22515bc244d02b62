"""What every test needs set before the first heavy import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

THREADS = int(os.environ.get("METAMOE_TEST_THREADS", min(2, os.cpu_count() or 1)))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests use no hub: everything they read is made or fetched by them
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

from metamoe.backbones.base import import_transformers  # noqa: E402
from metamoe.presets import PRESETS  # noqa: E402
from metamoe.serving.seed_model import fix_torchvision  # noqa: E402

torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def seed_model(tmp_path_factory):
    """The folder of a tiny LLaMA with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "seed"
    tiny.make_seed_model(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """On tensors this small, threads only wait for each other, and long where the machine is busy."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, seed_model):
    """A run directory with its data and nothing else."""
    run_dir = tmp_path_factory.mktemp("pristine") / "run"
    tiny.make_run(run_dir, seed_model)
    return run_dir


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pristine):
    """A run of the whole pipeline: its folder and the driver's report."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(pristine, run_dir)
    report = tiny.drive(commands=tiny.commands(run_dir))
    assert report["code"] == 0, report["stderr"]
    return run_dir, report


@pytest.fixture
def run(tmp_path, finished):
    """A copy of the finished run, for a test to change."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def fresh(tmp_path, pristine):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def export_code(tmp_path_factory):
    """Where transformers copies an export's code to, instead of the user's cache."""
    folder = str(tmp_path_factory.mktemp("export_code"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_transformers().dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_vit(tmp_path, monkeypatch):
    """Give the backbone vit-b-32 an architecture of two narrow layers; returns a checkpoint of it."""
    fix_torchvision()
    import open_clip

    config = {"embed_dim": 32, "quick_gelu": True}
    config["vision_cfg"] = {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32}
    config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "small-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    monkeypatch.setitem(PRESETS["vit-b-32"], "architecture", "small-vit")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("small-vit", pretrained=None).state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"
