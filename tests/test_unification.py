"""unify_moe.py through its command line: every switch, where the model starts, what its training moves."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import CLIENTS, refused, stage

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed-expert", "--top-k", "2", "--weighting", "stopgrad"],
        ["--weighting", "literal", "--lambda-init", "0.3"],
        ["--weighting", "renormalized", "--top-k", "3", "--offset"],
        ["--context", "off", "--init", "random", "--train", "router"],
        ["--samples", "public", "--data", "private", "--selection", "similarity"],
        ["--train", "none"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_switch_makes_a_model_that_evaluate_scores(run, flags):
    result = stage("unify_moe", run, "--method", "metamoe", "--name", "variant", *flags)
    assert result.code == 0, result.err
    result = stage("evaluate", run, "--models", "variant", "metamoe")
    assert result.code == 0, result.err
    assert [row["model"] for row in read_json(run / "results.json")["rows"]] == ["metamoe", "variant"]
    scores = [read_json(run / "scores" / f"{name}.test.json")["scores"] for name in ("metamoe", "variant")]
    assert scores[0] != scores[1]


def test_the_untrained_moe_starts_at_the_uploads(run):
    """--train none: routing vectors and experts are the uploaded ones, lambda the given one."""
    assert (
        stage(
            "unify_moe",
            run,
            "--method",
            "metamoe",
            "--name",
            "start",
            "--train",
            "none",
            "--lambda-init",
            "0.25",
        ).code
        == 0
    )
    tensors = load_file(run / "moe" / "start" / "moe.safetensors")
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp"
        assert tensors[f"{prefix}.router.lam"].item() == 0.25
        for p, name in enumerate(CLIENTS):
            upload = run / "clients" / name / "upload" / "aligned-dpp"
            assert torch.equal(
                tensors[f"{prefix}.router.vectors"][p],
                load_file(upload / "router.safetensors")["vectors"][layer],
            )
            adapter = load_file(upload / "adapter" / "adapter_model.safetensors")
            assert torch.equal(
                tensors[f"{prefix}.experts.up_proj.B"][p],
                adapter[f"base_model.model.{prefix}.up_proj.lora_B.weight"],
            )


@pytest.mark.parametrize(
    "method, moves",
    [("metamoe", {"router", "lam", "experts"}), ("flexolmo", {"router"}), ("btx", {"router", "experts"})],
)
def test_the_final_training_moves_what_the_method_says(run, method, moves):
    """FlexOlmo trains its router alone; without a context lambda gets no gradient."""
    assert stage("unify_moe", run, "--method", method, "--name", "start", "--train", "none").code == 0
    before, after = (load_file(run / "moe" / name / "moe.safetensors") for name in ("start", method))
    moved = {
        key.split(".")[-1] if key.endswith("lam") else key.split(".")[4]
        for key in before
        if not torch.equal(before[key], after[key])
    }
    assert {"router" if m == "vectors" else m for m in moved} == moves


def test_unrestricted_says_that_it_breaks_privacy(finished):
    assert finished[1]["stdout"].count("TRAINED ON ALL CLIENTS' PRIVATE DATA") == 1


def test_a_missing_upload_is_named(run):
    shutil.rmtree(run / "clients" / "hotels" / "upload" / "aligned-dpp")
    message = refused("unify_moe", run, "--method", "metamoe", "--name", "new")
    assert "hotels/upload/aligned-dpp" in message and "train_expert.py" in message
