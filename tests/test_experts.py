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
    config = read_json(folder / "adapter_config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
            found[weight] = config["lora_alpha"] / config["r"] * b @ a
    return found


def test_peft_loads_an_upload_as_the_expert(finished, seed_model):
    adapter = finished[0] / "clients" / "intent" / "upload" / "aligned-dpp" / "adapter"
    dense = products(adapter)
    assert len(dense) == 6 and all(delta.abs().max() > 1e-3 for delta in dense.values())
    got, want = logits_with(seed_model, adapter), logits_with(seed_model, deltas=dense)
    assert (got - want).abs().max() < 1e-3 < 0.1 < (got - logits_with(seed_model)).abs().max()
    assert read_json(adapter / "adapter_config.json")["peft_type"] == "LORA"


def test_what_is_uploaded_is_the_ffn_alone(finished):
    factor = re.compile(r"\.mlp\.(gate|up|down)_proj\.lora_[AB]\.weight$")
    for upload in uploads(finished[0]):
        tensors = load_file(upload / "adapter" / "adapter_model.safetensors")
        assert len(tensors) == 2 * 3 * 2 and all(map(factor.search, tensors))


def test_the_soup_is_the_average_of_the_products(finished, seed_model):
    clients, adapter = finished[0] / "clients", finished[0] / "moe" / "soup" / "adapter"
    experts = [products(clients / name / "upload" / "private-similarity" / "adapter") for name in CLIENTS]
    soup = products(adapter)
    assert soup.keys() == experts[0].keys()
    for key, delta in soup.items():
        assert torch.allclose(delta, sum(expert[key] for expert in experts) / 3, atol=1e-6)
        assert delta.abs().max() > 1e-3
    got = logits_with(seed_model, adapter)
    assert torch.allclose(got, logits_with(seed_model, deltas=soup), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_ffn_experts_are_trained_uploaded_and_unified(fresh, dtype):
    """float32 trains and scores every kind of model; bfloat16 (autocast) goes the same way with fewer."""

    def made(name, *flags):  # the later --dtype wins
        result = stage(name, fresh, *flags, "--dtype", dtype)
        assert result.code == 0, result.err

    similarity = ["--selection", "similarity"]
    made("select_proxies", *similarity)
    for data in ("private", "aligned"):
        made("train_expert", *similarity, "--data", data, "--full-ffn", "--epochs", "1", "--batch-size", "16")
    uploaded = [fresh / "clients" / name / "upload" / "private-similarity-full" for name in CLIENTS]
    weights = [load_file(upload / "ffn.safetensors") for upload in uploaded]
    files = ["ffn.safetensors", "manifest.json", "proxies.json", "router.safetensors"]
    assert sorted(drive.snapshot(uploaded[1])) == files
    linears = [f"mlp.{linear}_proj.weight" for linear in ("gate", "up", "down")]
    assert set(weights[1]) == {f"model.layers.{i}.{linear}" for i in (0, 1) for linear in linears}
    made("unify_moe", "--method", "soup", "--full-ffn")
    made("unify_moe", "--method", "btm", "--full-ffn")
    metamoe = ["--method", "metamoe", "--full-ffn", "--top-k", "2", *similarity]
    made("unify_moe", *metamoe, "--seed-expert", "--train", "none")
    trained = ["stopgrad", "literal", "renormalized"] if dtype == "float32" else []
    for weighting in trained:
        made("unify_moe", *metamoe, "--weighting", weighting, "--name", weighting, "--offset")
    made("evaluate")
    rows = {row["model"]: row for row in read_json(fresh / "results.json")["rows"]}
    assert len(rows) == 4 + 3 + len(trained)
    assert rows["metamoe"]["experts"] == ["seed", *CLIENTS]
    assert read_json(fresh / "moe" / "metamoe" / "moe_config.json")["kind"] == "full"
    if dtype == "float32":  # the soup of the weights
        for key, tensor in load_file(fresh / "moe" / "soup" / "ffn.safetensors").items():
            assert torch.allclose(tensor, sum(expert[key] for expert in weights) / 3, atol=1e-6)


def test_an_expert_needs_its_selection(fresh):
    assert "select_proxies.py --selection dpp" in refused("train_expert", fresh)
