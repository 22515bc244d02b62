"""train_expert.py through its command line: experts are PEFT adapters of the FFN, or whole FFNs."""

import re

import drive
import pytest
import torch
from safetensors.torch import load_file
from tiny import CLIENTS, refused, stage, uploads

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def logits_with(seed_model, folder=None, deltas=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(seed_model, dtype=torch.float32).eval()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    for name, delta in (deltas or {}).items():
        model.get_parameter(name).data += delta
    with torch.no_grad():
        return model(torch.arange(2, 42).view(2, 20)).logits


def products(folder):
    """{weight: s B A} of a PEFT adapter, by its two files alone."""
    config, tensors = (
        read_json(folder / "adapter_config.json"),
        load_file(folder / "adapter_model.safetensors"),
    )
    scaling = config["lora_alpha"] / config["r"]
    bases = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        f"{b.removeprefix('base_model.model.')}.weight": scaling
        * tensors[f"{b}.lora_B.weight"]
        @ tensors[f"{b}.lora_A.weight"]
        for b in bases
    }


def test_peft_loads_an_upload_as_the_expert(finished, seed_model):
    upload = finished[0] / "clients" / "intent" / "upload" / "aligned-dpp"
    dense = products(upload / "adapter")
    assert len(dense) == 6 and all(delta.abs().max() > 1e-3 for delta in dense.values())
    got, want = logits_with(seed_model, upload / "adapter"), logits_with(seed_model, deltas=dense)
    assert (got - want).abs().max() < 1e-3 < 0.1 < (got - logits_with(seed_model)).abs().max()
    assert read_json(upload / "adapter" / "adapter_config.json")["peft_type"] == "LORA"


def test_what_is_uploaded_is_the_ffn_alone(finished):
    for upload in uploads(finished[0]):
        tensors = load_file(upload / "adapter" / "adapter_model.safetensors")
        assert len(tensors) == 2 * 3 * 2 and all(
            re.search(r"\.mlp\.(gate|up|down)_proj\.lora_[AB]\.weight$", key) for key in tensors
        )


def test_the_soup_is_the_average_of_the_products(finished, seed_model):
    run_dir, _ = finished
    experts = [
        products(run_dir / "clients" / name / "upload" / "private-similarity" / "adapter") for name in CLIENTS
    ]
    soup = products(run_dir / "moe" / "soup" / "adapter")
    assert soup.keys() == experts[0].keys()
    for key, delta in soup.items():
        assert (
            torch.allclose(delta, sum(expert[key] for expert in experts) / 3, atol=1e-6)
            and delta.abs().max() > 1e-3
        )
    got = logits_with(seed_model, run_dir / "moe" / "soup" / "adapter")
    assert torch.allclose(got, logits_with(seed_model, deltas=soup), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_ffn_experts_are_trained_uploaded_and_unified(fresh, dtype):
    """float32 trains and scores every kind of model; bfloat16 (autocast) goes the same way with fewer of them."""
    common = ["--dtype", dtype]  # the later --dtype wins
    assert stage("select_proxies", fresh, "--selection", "similarity", *common).code == 0
    for data in ("private", "aligned"):
        result = stage(
            "train_expert",
            fresh,
            "--data",
            data,
            "--selection",
            "similarity",
            "--full-ffn",
            "--epochs",
            "1",
            *common,
        )
        assert result.code == 0, result.err
    upload = fresh / "clients" / "hotels" / "upload" / "private-similarity-full"
    assert sorted(drive.snapshot(upload)) == [
        "ffn.safetensors",
        "manifest.json",
        "proxies.json",
        "router.safetensors",
    ]
    assert set(load_file(upload / "ffn.safetensors")) == {
        f"model.layers.{i}.mlp.{linear}_proj.weight" for i in (0, 1) for linear in ("gate", "up", "down")
    }
    variants = [
        ["soup"],
        ["btm"],
        ["metamoe", "--selection", "similarity", "--seed-expert", "--top-k", "2", "--train", "none"],
    ]
    if dtype == "float32":
        variants += [
            [
                "metamoe",
                "--selection",
                "similarity",
                "--weighting",
                w,
                "--name",
                w,
                "--top-k",
                "2",
                "--offset",
            ]
            for w in ("stopgrad", "literal", "renormalized")
        ]
    for method, *flags in variants:
        result = stage("unify_moe", fresh, "--method", method, "--full-ffn", *flags, *common)
        assert result.code == 0, result.err
    result = stage("evaluate", fresh, *common)
    assert result.code == 0, result.err
    rows = read_json(fresh / "results.json")["rows"]
    assert len(rows) == 4 + len(variants) and next(row for row in rows if row["model"] == "metamoe")[
        "experts"
    ] == ["seed", *CLIENTS]
    assert read_json(fresh / "moe" / "metamoe" / "moe_config.json")["kind"] == "full"
    if dtype == "float32":  # the soup of the weights
        paths = [
            fresh / "clients" / name / "upload" / "private-similarity-full" / "ffn.safetensors"
            for name in CLIENTS
        ]
        for key, tensor in load_file(fresh / "moe" / "soup" / "ffn.safetensors").items():
            assert torch.allclose(tensor, sum(load_file(path)[key] for path in paths) / 3, atol=1e-6)


def test_an_expert_needs_its_selection(fresh):
    assert "select_proxies.py --selection dpp" in refused("train_expert", fresh)
