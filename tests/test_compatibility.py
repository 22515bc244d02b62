"""A unified model in the hands of other tools computes what its parts compute, or says that it cannot."""

import pytest
import torch
from tiny import llama

import moe
from metamoe.serving.seed_model import fix_torchvision

fix_torchvision()
import peft  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
K, NAMES, LINEARS = 3, [f"model.layers.{i}.mlp" for i in range(2)], ("gate_proj", "up_proj", "down_proj")
IDS = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(1))


def unified(context="prefix", lam=0.7, top_k=1):
    model = llama(layers=2)
    experts = [{name: {"scaling": 2.0} for name in NAMES} for _ in range(K)]
    for expert in experts:
        for name in NAMES:
            for linear in LINEARS:
                rows, columns = model.get_submodule(f"{name}.{linear}").weight.shape
                expert[name][f"{linear}.lora_A"] = torch.randn(2, columns) / 2
                expert[name][f"{linear}.lora_B"] = torch.randn(rows, 2) / 2
    vectors = torch.randn(K, len(NAMES), 16) / 2
    return moe.unify(model, NAMES, experts, vectors, context=context, lam=lam, top_k=top_k)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the seed model's linears are called


@pytest.mark.parametrize("top_k", (1, 2))
@pytest.mark.parametrize("few", (0, 10**6))
def test_adapters_and_hooks_on_the_linears_of_a_unified_model_act(few, top_k, monkeypatch):
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", few)
    model, changed = unified(top_k=top_k), unified(top_k=top_k)
    seen = []
    model.get_submodule(NAMES[0]).up_proj.register_forward_hook(lambda *_: seen.append(1))
    adapter = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(LINEARS), init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter).eval()
    for name in NAMES:
        for linear in LINEARS:
            layer = model.get_submodule(f"{name}.{linear}")
            changed.get_submodule(f"{name}.{linear}").weight.data += layer.get_delta_weight("default")
    close(logits(adapted, IDS), logits(changed, IDS))
    assert seen and (logits(changed, IDS) - logits(unified(top_k=top_k), IDS)).abs().max() > 0.1
    adapted.train()
    adapted(IDS, labels=IDS).loss.backward()
    trained = [p.grad for name, p in adapted.named_parameters() if "lora_A.default" in name]
    assert len(trained) == len(NAMES) * len(LINEARS) and all(grad.abs().max() > 0 for grad in trained)


def test_lambda_is_bounded_in_the_forward_itself():
    model, bounded = unified(lam=1.0), unified(lam=1.0)
    with torch.no_grad():
        for lam in moe.lambda_parameters(model):
            lam.fill_(1.028)  # an optimiser without moe.clamp_
    assert torch.equal(logits(model, IDS), logits(bounded, IDS))


# ---------------------------------------------------------------- several documents in a row


@pytest.mark.parametrize("context", ("prefix", "fixed"))
def test_documents_in_a_row_are_computed_as_if_alone(context):
    model, lengths = unified(context), (4, 6, 1)
    places = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    got = logits(model, IDS, position_ids=places, use_cache=False).split(lengths, dim=1)
    for alone, packed in zip(IDS.split(lengths, dim=1), got, strict=True):
        close(packed, logits(model, alone))


def test_with_a_mask_positions_begin_no_document():
    model, mask = unified(), torch.ones_like(IDS)
    mask[0, :4], mask[1, -3:] = 0, 0
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate makes them
    own = [logits(model, IDS[i : i + 1, keep], use_cache=False)[0] for i, keep in enumerate(mask.bool())]
    got = logits(model, IDS, attention_mask=mask, position_ids=places)
    close(got[mask == 1], torch.cat(own))
