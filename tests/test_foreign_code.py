"""Seed models and data sets that bring code: it never runs, nothing is asked, one line names the folder."""

import io
import json
import random
import shutil
import sys
from pathlib import Path

import drive
import pytest
import tiny
import torch

from metamoe import backbones
from metamoe.backbones.base import import_transformers
from metamoe.errors import UserError
from metamoe.records import write_records
from metamoe.rundir import read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """What all code of the tests writes. Whoever asks for leave to run it is told yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return tmp_path / "marker"


class Pickled:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def armed(tmp_path, seed_model, marker):
    """A function that makes a seed model's folder with code of this kind."""

    def make(kind):
        folder = Path(shutil.copytree(seed_model, tmp_path / f"armed-{kind}"))
        code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nimport transformers\n"
        code += "class C(transformers.LlamaConfig): model_type = 'armed'\n"
        code += "class M(transformers.LlamaForCausalLM): config_class = C\n"
        code += "class T(transformers.PreTrainedTokenizerFast): pass\n"
        (folder / "code.py").write_text(code)
        model = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
        if kind == "model":
            change_json(folder / "config.json", model_type="armed", auto_map=model)
        elif kind == "known model":
            change_json(folder / "config.json", auto_map=model)
        elif kind == "tokenizer":
            tokenizer = {"AutoTokenizer": [None, "code.T"]}
            change_json(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=tokenizer)
        else:
            (folder / "model.safetensors").unlink()
            torch.save({"weight": Pickled(marker)}, folder / "pytorch_model.bin")
        return folder

    return make


@pytest.mark.parametrize("kind", ["model", "known model", "tokenizer", "pickle"])
def test_a_seed_model_with_code_of_its_own_is_refused(kind, armed, marker, fresh):
    folder = armed(kind)
    write_json(fresh / "local.json", read_json(fresh / "local.json") | {"seed_model": str(folder)})
    assert f"seed model {folder}:" in tiny.refused("select_proxies", fresh)
    assert not marker.exists() and sys.stdin.tell() == 0


@pytest.mark.parametrize("kind", ["model", "tokenizer", "pickle"])
def test_that_code_would_run(kind, armed, marker, monkeypatch, tmp_path):
    """What the test above guards against: the same folders where code may run."""
    folder, transformers = armed(kind), import_transformers()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    if kind == "pickle":
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    elif kind == "model":
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    else:
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["dict", "object", "tar"])
@pytest.mark.parametrize("name", ["vit-b-32", "glyph-clip"])
def test_a_clip_checkpoint_that_runs_code_is_refused(name, kind, marker, tmp_path, small_vit):
    path = tmp_path / "armed.pt"
    content = Pickled(marker) if kind == "object" else {"state_dict": {"weight": Pickled(marker)}}
    torch.save(content, path, _use_new_zipfile_serialization=kind != "tar")
    with pytest.raises(UserError) as caught:
        backbones.load_backbone(name, path, "cpu", "float32")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would


@pytest.mark.parametrize("kind", ["script", "pickle"])
def test_a_dataset_that_brings_code_is_refused_and_not_run(kind, marker, tmp_path, seed_model):
    folder = tmp_path / "armed"
    folder.mkdir()
    if kind == "script":
        (folder / "armed.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    else:
        torch.save(Pickled(marker), folder / "train.pkl")
    write_records(tmp_path / "own.jsonl", tiny.public_records(random.Random(0), 60))
    flags = ["--seed-model", seed_model, "--client", f"own={tmp_path / 'own.jsonl'}", "--public", folder]
    assert str(folder) in tiny.refused("select_proxies", tmp_path / "new", *flags)
    assert not marker.exists()


def test_no_file_of_a_seed_model_is_unpickled(seed_model, monkeypatch, tmp_path):
    """Pickles beside the safetensors are not opened."""
    folder = Path(shutil.copytree(seed_model, tmp_path / "seed"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Pickled(tmp_path / "marker"), folder / name)
    opened, unpickled = set(), set()
    drive.record_opens(str(folder), opened)
    drive.record_pickles(unpickled)
    backbones.load_backbone("smollm2-135m", folder, "cpu", "float32")
    names = {name for _, name in opened}
    assert not unpickled
    torch.load(folder / "optimizer.pt", weights_only=False)
    assert unpickled  # it would show
    assert "config.json" in names and not [name for name in names if name.endswith((".bin", ".pt"))]
