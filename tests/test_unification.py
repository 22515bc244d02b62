"""unify_moe.py through its command line: every switch, where the model starts, what its training moves."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import CLIENTS, refused, stage

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kept(tmp_path_factory, finished):
    """A copy of the finished run, to which the tests add models."""
    folder = tmp_path_factory.mktemp("unification") / "run"
    shutil.copytree(finished[0], folder)
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        "--seed-expert --top-k 2 --weighting stopgrad",
        "--weighting literal --lambda-init 0.3",
        "--weighting renormalized --top-k 3 --offset",
        "--context off --init random --train router",
        "--samples public --data private --selection similarity",
        "--train none",
    ],
)
def test_every_switch_makes_a_model_that_evaluate_scores(kept, flags):
    assert stage("unify_moe", kept, "--method=metamoe", "--name=variant", "--force", *flags.split()).code == 0
    assert stage("evaluate", kept, "--models", "variant", "metamoe").code == 0
    assert [row["model"] for row in read_json(kept / "results.json")["rows"]] == ["metamoe", "variant"]
    ours, variant = (read_json(kept / "scores" / f"{name}.test.json") for name in ("metamoe", "variant"))
    assert ours["scores"] != variant["scores"]


def test_the_untrained_moe_starts_at_the_uploads(kept):
    """--train none: routing vectors and experts are the uploaded ones, lambda the given one."""
    flags = ["--name", "untrained", "--train", "none", "--lambda-init", "0.25"]
    assert stage("unify_moe", kept, "--method", "metamoe", *flags).code == 0
    tensors = load_file(kept / "moe" / "untrained" / "moe.safetensors")
    for p, name in enumerate(CLIENTS):
        upload = kept / "clients" / name / "upload" / "aligned-dpp"
        vectors = load_file(upload / "router.safetensors")["vectors"]
        adapter = load_file(upload / "adapter" / "adapter_model.safetensors")
        for layer in (0, 1):
            ffn = f"model.layers.{layer}.mlp"
            assert tensors[f"{ffn}.router.lam"].item() == 0.25
            assert torch.equal(tensors[f"{ffn}.router.vectors"][p], vectors[layer])
            factor = adapter[f"base_model.model.{ffn}.up_proj.lora_B.weight"]
            assert torch.equal(tensors[f"{ffn}.experts.up_proj.B"][p], factor)


@pytest.mark.parametrize(
    "method, moves",
    [("metamoe", {"vectors", "lam", "experts"}), ("flexolmo", {"vectors"}), ("btx", {"vectors", "experts"})],
)
def test_the_final_training_moves_what_the_method_says(kept, method, moves):
    """FlexOlmo trains its router alone; without a context lambda gets no gradient."""
    assert stage("unify_moe", kept, f"--method={method}", f"--name={method}-0", "--train=none").code == 0
    before, after = (load_file(kept / "moe" / name / "moe.safetensors") for name in (f"{method}-0", method))
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert {"experts" if ".experts." in key else key.split(".")[-1] for key in moved} == moves


def test_unrestricted_says_that_it_breaks_privacy(finished):
    assert finished[1]["stdout"].count("TRAINED ON ALL CLIENTS' PRIVATE DATA") == 1


def test_a_missing_upload_is_named(kept):
    upload = kept / "clients" / "hotels" / "upload" / "aligned-dpp"
    upload.rename(kept / "away")
    message = refused("unify_moe", kept, "--method", "metamoe", "--name", "new")
    (kept / "away").rename(upload)
    assert "hotels/upload/aligned-dpp" in message and "train_expert.py" in message
