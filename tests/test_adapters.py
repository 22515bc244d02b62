"""PEFT adapters of other people: as an expert, in the soup and in the MoE what PEFT computes, or refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import llama

import moe
from metamoe.errors import UserError
from metamoe.rivals import soup
from metamoe.serving.seed_model import fix_torchvision
from metamoe.uploads import read_expert

fix_torchvision()
import peft  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FFNS = [f"model.layers.{i}.mlp" for i in range(3)]
LINEARS = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def upload(folder, seed=1, **changed):
    """The upload of an adapter with random factors."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "init_lora_weights": False} | changed
    torch.manual_seed(seed)
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder / "adapter")
    return folder


def sent(folder):
    """Of an Upload what the soup reads."""
    return SimpleNamespace(client=folder.name, expert=read_expert(folder))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def by_peft(folder):
    return logits(peft.PeftModel.from_pretrained(llama(), folder / "adapter").eval())


def by_moe(*folders):
    experts = [read_expert(folder, FFNS) for folder in folders]
    return logits(moe.unify(llama(), FFNS, experts, torch.randn(len(experts), len(FFNS), 16)))


PLAIN = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"down_proj": 2, "layers.1.mlp.up_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"gate_proj": 32, r"layers\.[02]\.mlp\.down_proj": 1}},
    "rsLoRA and patterns": {
        "use_rslora": True,
        "rank_pattern": {"up_proj": 9},
        "alpha_pattern": {"model.layers.2.mlp.gate_proj": 3},
    },
    "one linear": {"target_modules": ["up_proj"]},
    "two linears, of one layer": {"target_modules": r".*layers\.1\.mlp\.(gate|down)_proj"},
    "layers_to_transform": {"layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("changed", PLAIN.values(), ids=PLAIN)
def test_expert_moe_and_soup_of_one_adapter_agree(tmp_path, changed):
    folder = upload(tmp_path / "a", **changed)
    want = by_peft(folder)
    assert (want - logits(llama())).abs().max() > 0.5
    torch.testing.assert_close(by_moe(folder, folder), want, atol=1e-5, rtol=1e-4)
    (tmp_path / "soup").mkdir()
    soup.merge([sent(folder)] * 3, tmp_path / "soup")
    torch.testing.assert_close(by_peft(tmp_path / "soup"), want, atol=2e-5, rtol=1e-4)


def test_the_soup_is_the_mean_of_the_true_products(tmp_path):
    """Whatever the ranks, scales and linears of the clients."""
    several = [upload(tmp_path / f"{i}", i, **changed) for i, changed in enumerate(PLAIN.values())]
    (tmp_path / "soup").mkdir()
    soup.merge([sent(folder) for folder in several], tmp_path / "soup")
    model, updates = llama(), {}
    for folder in several:
        adapted = peft.PeftModel.from_pretrained(llama(), folder / "adapter")
        for name, module in adapted.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                updates.setdefault(name, []).append(module.get_delta_weight("default"))
    for name, found in updates.items():
        model.get_submodule(name).weight.data += sum(found).detach() / len(several)
    torch.testing.assert_close(by_peft(tmp_path / "soup"), logits(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changed, said",
    (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"target_modules": "all-linear"}, "self_attn"),
        ({"target_modules": ["q_proj", *LINEARS]}, "self_attn"),
    ),
)
def test_what_an_ffn_lora_cannot_express_is_refused_by_name(tmp_path, changed, said):
    folder = upload(tmp_path / "client", **changed)
    with pytest.raises(UserError, match=said) as error:
        read_expert(folder, FFNS)
    assert "client" in str(error.value)


def test_pickles_and_other_methods_are_refused(tmp_path):
    folder = upload(tmp_path / "client")
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        read_expert(folder, FFNS)
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="IA3"):
        read_expert(folder, FFNS)


def test_a_soup_of_adapters_and_full_weights_is_refused(tmp_path):
    folder, full = upload(tmp_path / "a"), tmp_path / "full"
    full.mkdir()
    ffns = {
        f"{name}.{key}": t for name in FFNS for key, t in llama().get_submodule(name).state_dict().items()
    }
    soup.save_file(ffns, full / "ffn.safetensors")
    (tmp_path / "soup").mkdir()
    with pytest.raises(UserError, match="client full: sent another kind"):
        soup.merge([sent(folder), sent(full)], tmp_path / "soup")
