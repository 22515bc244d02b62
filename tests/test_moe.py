"""moe.py against Eq. 5 and 6 token by token, and the properties of a unified model."""

import copy
import json
import os
import re
import sys
from collections import OrderedDict
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from drive import snapshot
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moe
from metamoe.backbones.base import import_transformers
from metamoe.serving.members import remove_expert
from metamoe.start import seed_expert
from moe import MoELayer, Router, RoutingState

transformers = import_transformers()
pytestmark = pytest.mark.usefixtures("one_thread")
D, H, K = 8, 20, 3


def gated():
    """LLaMA's FFN; with one bias, so that linears with and without one are tested together."""
    config = transformers.LlamaConfig(hidden_size=D, intermediate_size=H, num_attention_heads=2)
    ffn = transformers.models.llama.modeling_llama.LlamaMLP(config)
    ffn.down_proj = nn.Linear(H, D)
    return ffn


def two_layer(names=("c_fc", "gelu", "c_proj"), **more):
    """CLIP's FFN, by default as in open_clip: a Sequential whose children have names."""
    modules = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)
    return nn.Sequential(OrderedDict(zip(names, modules, strict=True), **more))


def clip():  # as in transformers
    return two_layer(("fc1", "activation_fn", "fc2"))


@pytest.mark.parametrize("make_ffn, top_k", product((gated, two_layer), (1, 2)))
def test_many_experts_are_sorted_for_which_masks_cost_more_and_give_the_same(make_ffn, top_k, monkeypatch):
    """On a CPU; of the 20 experts some get no token."""
    layer, ffn, experts = make_layer(make_ffn, n=20, top_k=top_k, state=RoutingState("none"))
    parameters, work, found = [*layer.router.parameters(), *layer.experts.parameters()], {}, {}
    x, layer.state.context_mask = torch.randn(2, 6, D, requires_grad=True), torch.ones(2, 6, dtype=torch.bool)
    for most in (moe.FEW_EXPERTS, 1000):
        monkeypatch.setattr(moe, "FEW_EXPERTS", most)
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        work[most] = counter.get_total_flops()
        options = dict(allow_unused=True, materialize_grads=True)
        found[most] = [y, *torch.autograd.grad(y.square().sum(), [x, *parameters], **options)]
    assert work[6] * 1.2 < work[1000]
    close(found[6][0], naive(layer, ffn, experts, x))
    for own, other in zip(found[6], found[1000], strict=True):
        close(own, other, 2e-4)


@pytest.fixture(params=("masked", "by expert", "sorted"))
def both_ways(request, monkeypatch):
    """All LoRA experts behind masks; one after the other; sorted, with one product of the seed model's."""
    if request.param == "sorted":
        monkeypatch.setattr(moe, "FEW_EXPERTS", 0)
        return
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", 2048 if request.param == "masked" else 0)


def make_expert(ffn, kind, rank=2, scaling=1.5):
    if kind == "full":
        return {name: torch.randn_like(t) * 0.4 for name, t in ffn.named_parameters()}
    e = {"scaling": scaling}
    for name, linear in ffn.named_children():
        if isinstance(linear, nn.Linear):
            e[f"{name}.lora_A"] = torch.randn(rank, linear.in_features) * 0.5
            e[f"{name}.lora_B"] = torch.randn(linear.out_features, rank) * 0.5
    return e


def make_layer(make_ffn=two_layer, kind="lora", n=K, lam=0.7, offset=False, state=None, **options):
    """(layer, its FFN, its experts)."""
    torch.manual_seed(0)
    ffn = make_ffn()
    experts = [make_expert(ffn, kind, scaling=1 + p / 2) for p in range(n)]
    router = Router(torch.randn(n, D), lam, offset)
    return MoELayer(ffn, experts, router, state or RoutingState(), **options), ffn, experts


def dense(ffn, e, x):
    """FFN_p(x), with W + scaling B A, or with the full expert's own weights."""
    weights = {key: t for key, t in e.items() if key.endswith((".weight", ".bias"))}
    for key in e:
        name, found, _ = key.rpartition(".lora_A")
        if found:
            low_rank = e["scaling"] * e[f"{name}.lora_B"] @ e[key]
            weights[f"{name}.weight"] = ffn.get_parameter(f"{name}.weight") + low_rank
    return torch.func.functional_call(ffn, weights, (x,))


def views(layer, experts):
    """The experts as views of the layer's parameters, which gradients reach."""
    entry = {key: ".".join(key.rsplit("_", 1)) for key in layer.experts.keys()}
    entry = {key: re.sub(r"\b[AB]$", r"lora_\g<0>", name) for key, name in entry.items()}
    stacks = {entry[key]: t for key, t in layer.experts.items()}
    assert stacks.keys() == experts[0].keys() - {"scaling"}
    assert all(torch.equal(t[p], e[key]) for key, t in stacks.items() for p, e in enumerate(experts))
    return [e | {key: t[p] for key, t in stacks.items()} for p, e in enumerate(experts)]


def naive(layer, ffn, experts, x):
    """Eq. 5 and 6, one token after the other."""
    vectors, lam, state, y = layer.router.vectors, layer.router.lam, layer.state, []
    outputs = [dense(ffn, e, x) for e in views(layer, experts)]
    for b, t in product(range(x.shape[0]), range(x.shape[1])):
        last = t if state.mode == "prefix" else x.shape[1] - 1
        seen = [x[b, s] for s in range(last + 1) if state.context_mask[b, s]]
        context = sum(seen) / len(seen) if seen else torch.zeros(D)
        blend = x[b, t] if state.mode == "none" else (1 - lam) * x[b, t] + lam * context
        logits = vectors @ blend
        if layer.router.absolute:
            logits = logits.abs()
        if layer.router.bias is not None:
            logits = logits + layer.router.bias
        pi = logits.softmax(0)  # Eq. 6
        top = pi.topk(layer.top_k).indices.tolist()
        total = pi[top].sum()
        weight = {"literal": 1.0, "renormalized": total, "stopgrad": total.detach()}[layer.weighting]
        y.append(sum(pi[p] / weight * outputs[p][b, t] for p in top))  # Eq. 5
    return torch.stack(y).view(x.shape)


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=10 * atol)


@pytest.mark.parametrize("make_ffn, kind", [*product((gated, two_layer), ("lora", "full")), (clip, "lora")])
@pytest.mark.parametrize("top_k, weighting, mode", product((1, 2, 3), moe.WEIGHTINGS, moe.CONTEXTS))
def test_both_ways_equal_naive_with_gradients(make_ffn, kind, top_k, weighting, mode, monkeypatch):
    options = dict(top_k=top_k, weighting=weighting, offset=mode == "prefix", absolute=mode == "fixed")
    layer, ffn, experts = make_layer(make_ffn, kind, state=RoutingState(mode), **options)
    x, target = torch.randn(4, 3, D, requires_grad=True), torch.randn(4, 3, D)
    layer.state.context_mask = mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, :1] = mask[1, 2:] = mask[2, 1] = mask[3] = False  # padding on both sides, a hole, no context
    parameters = [x, *layer.router.parameters(), *layer.experts.parameters()]
    grad = partial(torch.autograd.grad, inputs=parameters, allow_unused=True, materialize_grads=True)
    want = naive(layer, ffn, experts, x)
    wanted = grad((want * target).sum())
    for few in (2048, 0):
        monkeypatch.setitem(moe.FEW_TOKENS, "cpu", few)
        y = layer(x)
        close(y, want)
        for got, right in zip(grad((y * target).sum()), wanted, strict=True):
            close(got, right, 2e-4)
        with torch.no_grad():
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("weighting", moe.WEIGHTINGS)
def test_top1_has_weight_1_and_the_task_loss_reaches_the_router_unless_renormalized(weighting):
    layer, _, _ = make_layer(weighting=weighting)
    x = torch.randn(3, 4, D)
    chosen, weight = layer.choose(layer.router(x, None))
    assert len(chosen.unique()) > 1 and torch.equal(weight, torch.ones(3, 4, 1)) == (weighting != "literal")
    layer(x).square().sum().backward()
    gradients = [p.grad.abs().max() for p in layer.router.parameters()]
    assert max(gradients) < 1e-5 if weighting == "renormalized" else min(gradients) > 1e-2


def test_ties_go_to_the_lowest_index():
    layer, _, _ = make_layer(n=40, top_k=7)
    assert layer.choose(torch.full((2, 3, 40), 1 / 40))[0].tolist() == [[list(range(7))] * 3] * 2
    assert make_layer(n=4, top_k=2)[0].choose(torch.tensor([0.1, 0.35, 0.2, 0.35]))[0].tolist() == [1, 3]


def test_router_and_context_stay_float32_under_bf16():
    """In bf16 the logits 100.1 and 100.2 would be one number, and a sum of ones would stop at 256."""
    router = Router(torch.tensor([[100.1, 0.0], [100.2, 0.0]]), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        pi = router(torch.tensor([[[1.0, 0.0]]], dtype=torch.bfloat16), None)
    assert pi.dtype == torch.float32
    close(pi[0, 0], torch.tensor([100.1, 100.2]).softmax(0))
    biased = Router(torch.tensor([[3.1, 0.0], [3.2, 0.0]]), 0.0, offset=True)  # biases -4.805 and -5.12
    with torch.autocast("cpu", torch.bfloat16):
        close(biased(torch.ones(1, 1, 2).bfloat16(), None)[0, 0], torch.tensor([-1.705, -1.92]).softmax(0))
    for mode in ("fixed", "prefix"):
        context = RoutingState(mode).context(torch.ones(1, 1001, 1, dtype=torch.bfloat16))
        assert context.dtype == torch.float32 and (context == 1).all()


@pytest.mark.parametrize("weighting, top_k", product(moe.WEIGHTINGS, (1, 2, 3)))
@pytest.mark.usefixtures("both_ways")
def test_a_disabled_expert_is_as_if_it_were_not_there(weighting, top_k):
    layer, ffn, experts = make_layer(top_k=top_k, weighting=weighting, offset=True)
    router, k = Router(layer.router.vectors[1:], 0.7, True), min(top_k, 2)
    without = MoELayer(ffn, experts[1:], router, RoutingState(), k, weighting)
    x = torch.randn(3, 5, D)
    whole = layer(x)
    layer.state.record, layer.router.disabled = True, [0]
    y, pi = layer(x), layer.router(x, None)
    close(y, without(x))
    assert (y - whole).abs().max() > 1e-2 and not pi[..., 0].any()
    close(pi.sum(-1), torch.ones(3, 5))
    assert layer.counts[0] == 0 and layer.counts.sum() == 15 * k
    layer.router.disabled = []
    assert torch.equal(layer(x), whole)


def test_the_bias_starts_at_the_nearest_mean_and_keeps_a_disabled_experts_nan_out():
    layer, _, _ = make_layer(offset=True, lam=0.0)
    router, x = layer.router, torch.randn(3, 5, D)
    distances = (x.unsqueeze(2) - router.vectors).square().sum(-1)  # (3, 5, K)
    close(router(x, None), (-distances / 2).softmax(-1))
    assert [p.shape for p in make_layer()[0].router.parameters()] == [(K, D), ()]
    with torch.no_grad():
        router.vectors[1] = router.bias[1] = torch.nan
    router.disabled, x.requires_grad = [1], True
    y = layer(x)
    y.square().sum().backward()
    assert all(t.isfinite().all() for t in (y, x.grad, router.vectors.grad, router.bias.grad))
    assert router.bias.grad[[0, 2]].abs().min() > 0 and router.bias.grad[1] == 0


def poison(layer, p, value, entry):
    """Fill the tensors of expert p whose names end in `entry`."""
    with torch.no_grad():
        for key, stack in layer.experts.items():
            if key.endswith(entry):
                stack[p] = value


def routed(layer, x):
    """(B, T, K) bool: which experts each token goes to."""
    chosen, _ = layer.choose(layer.router(x, layer.state.context(x)))
    return torch.nn.functional.one_hot(chosen, len(layer.counts)).any(2)


ENTRIES = [*product(("lora",), ("A", "B")), *product(("full",), ("weight", "bias"))]
POISONS = (torch.nan, torch.inf, -torch.inf, 1e30)


@pytest.mark.parametrize("kind, entry", ENTRIES)
@pytest.mark.parametrize("top_k, dtype", product((1, 2), ("float32", "bfloat16", "float16")))
@pytest.mark.usefixtures("both_ways")
def test_a_broken_expert_reaches_its_own_tokens_alone(kind, entry, top_k, dtype):
    layer, ffn, _ = make_layer(gated, kind, lam=0.4, top_k=top_k)
    ffn.to(getattr(torch, dtype))
    sizes = zip(moe.CONTEXTS, ((3, 5), (1, 9), (4, 1)), strict=True)
    for (p, value), (mode, shape) in product(enumerate((torch.nan, -torch.inf, 1e30)), sizes):
        layer.state.mode, layer.router.disabled = mode, []
        x = torch.randn(*shape, D).to(getattr(torch, dtype))
        broken, clean, want = copy.deepcopy(layer), ~routed(layer, x)[..., p], layer(x)
        poison(broken, p, value, entry)
        y = broken(x)
        assert torch.equal(y[clean], want[clean])
        assert value == 1e30 or not y[~clean].isfinite().all(-1).any()
        broken.router.disabled = layer.router.disabled = [p]
        with torch.no_grad():
            broken.router.vectors[p] = torch.nan  # of a client that left
        assert torch.equal(broken(x), layer(x))


@pytest.mark.parametrize("kind, entry", ENTRIES)
@pytest.mark.parametrize("top_k, weighting", product((1, 2), moe.WEIGHTINGS))
@pytest.mark.usefixtures("both_ways")
def test_a_broken_expert_reaches_no_gradient_of_others(kind, entry, top_k, weighting):
    """They are those of a loss over the other tokens alone."""
    for mode, value in product(moe.CONTEXTS, (torch.nan, torch.inf, 1e30)):
        options = dict(lam=0.4, top_k=top_k, weighting=weighting, state=RoutingState(mode))
        layer, _, _ = make_layer(gated, kind, **options)
        x = torch.randn(4, 6, D, requires_grad=True)
        p = int(routed(layer, x).sum((0, 1)).argmax())
        clean = ~routed(layer, x)[..., p]
        parameters = [x, *layer.router.parameters(), *layer.experts.parameters()]
        grad = partial(torch.autograd.grad, inputs=parameters, allow_unused=True, materialize_grads=True)
        wanted = grad(layer(x)[clean].square().sum())
        poison(layer, p, value, entry)
        y, others = layer(x), [q for q in range(K) if q != p]
        got = grad(y.square().sum())
        for found, want in zip(got[3:], wanted[3:], strict=True):
            assert found[others].isfinite().all()
            if not y[~clean].isfinite().all(1).any():
                close(found[others], want[others], 1e-4)
        assert all(found.isfinite().all() for found in (got[0][clean], *got[1:3]))
        assert clean.sum() > 2 and got[0][clean].abs().max() > 0


def test_an_expert_that_opted_out_is_not_chosen_where_the_others_have_probability_0():
    layer, _, _ = make_layer(n=3, top_k=2)
    layer.router.disabled = [0]
    assert layer.choose(torch.tensor([0.0, 1.0, 0.0]))[0].tolist() == [1, 2]


def test_tokens_that_a_broken_expert_made_nan_are_in_no_mean():
    x = torch.randn(2, 5, D)
    for mode in ("fixed", "prefix"):
        broken, others = x.clone(), torch.ones(2, 5, dtype=torch.bool)
        broken[0, 2], broken[1, 0, 3] = torch.nan, torch.inf
        others[0, 2] = others[1, 0] = False
        want = RoutingState(mode, context_mask=others).context(x)
        assert torch.equal(RoutingState(mode).context(broken), want)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, 1e30))
def test_a_compiled_layer_keeps_a_broken_expert_to_its_tokens(value):
    layer = make_layer(top_k=2)[0]
    x = torch.randn(3, 5, D)
    clean = ~routed(layer, x)[..., 1]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    want = compiled(x)
    poison(layer, 1, value, "A")
    y = compiled(x)
    assert torch.equal(y[clean], want[clean]) and not torch.equal(y, want)


@pytest.mark.parametrize("mode, top_k", product(moe.CONTEXTS, (1, 2)))
@pytest.mark.usefixtures("both_ways")
def test_outputs_do_not_depend_on_batch_or_padding(mode, top_k):
    layer, _, _ = make_layer(state=RoutingState(mode), top_k=top_k, lam=0.6)
    sequences = [torch.randn(n, D) for n in (3, 7, 5)]
    alone = torch.cat([layer(sequence) for sequence in sequences])
    for side, width in product(("left", "right"), (7, 12)):
        mask = torch.arange(width) < torch.tensor([[3], [7], [5]])
        if side == "left":
            mask = mask.flip(1)
        x = torch.full((3, width, D), torch.nan)
        x[mask] = torch.cat(sequences)
        layer.state.context_mask = mask
        close(layer(x)[mask], alone)


@pytest.mark.usefixtures("both_ways")
def test_ranks_may_differ_and_linears_be_left_out():
    torch.manual_seed(2)
    ffn, x = gated(), torch.randn(3, 5, D)
    experts = [make_expert(ffn, "lora", rank, scaling=0.5 + rank) for rank in (1, 4, 2)]
    for e, name in [(experts[2], "up_proj"), *((e, "gate_proj") for e in experts)]:
        del e[f"{name}.lora_A"], e[f"{name}.lora_B"]
    outputs = torch.stack([dense(ffn, e, x) for e in experts], dim=2)  # (3, 5, K, d)
    for top_k in (1, 3):
        layer = MoELayer(ffn, experts, Router(torch.randn(3, D)), RoutingState("none"), top_k)
        assert layer.experts["up_proj_A"].shape == (3, 4, D) and "gate_proj_A" not in layer.experts
        chosen, weight = layer.choose(layer.router(x, None))  # (3, 5, k) both
        weights = torch.zeros(3, 5, K).scatter(2, chosen, weight)
        close(layer(x), (weights.unsqueeze(-1) * outputs).sum(2))


@pytest.mark.parametrize("kind", ("lora", "full"))
@pytest.mark.usefixtures("both_ways")
def test_seed_expert_is_the_seed_model_and_lora_stays_it(kind):
    torch.manual_seed(3)
    ffn, x = gated(), torch.randn(3, 5, D)
    like = make_expert(ffn, kind)
    zero = seed_expert(ffn, like)
    layer = MoELayer(ffn, [zero, like], Router(torch.randn(2, D)), RoutingState(), top_k=1)
    close(MoELayer(ffn, [zero], Router(torch.randn(1, D)), RoutingState())(x), ffn(x))
    layer(x).square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad[1].abs().max() > 0
        assert kind == "full" or parameter.grad[0].abs().max() == 0


@pytest.mark.parametrize("stored", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.usefixtures("both_ways")
def test_the_output_lies_in_memory_as_the_dense_ffns(stored):
    """What comes after the layer depends on it: a view that fails, or a copy at each step."""
    layer, ffn, _ = make_layer()
    x = torch.randn(3, 5, D)
    other = x.permute(stored).contiguous().permute([stored.index(i) for i in range(3)])
    assert torch.equal(x, other) and layer(other).stride() == ffn(other).stride()
    close(layer(other), layer(x))


def test_few_tokens_compile_to_one_graph(monkeypatch):
    """Nothing waits for the tokens' experts to be known; with many tokens, or full experts, it does."""
    layer, full = make_layer(top_k=2)[0], make_layer(kind="full")[0]
    x, options = torch.randn(3, 5, D), dict(fullgraph=True, backend="eager")
    close(torch.compile(layer, **options)(x), layer(x))
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", 14)
    torch.compiler.reset()
    for other in (layer, full):
        with pytest.raises(Exception, match="data-dependent|tolist|unbacked|Unsupported|graph"):
            torch.compile(other, **options)(x)


@pytest.mark.parametrize("top_k, make_ffn, stored", product((1, 2), (gated, two_layer), ("fp32", "bf16")))
@pytest.mark.usefixtures("both_ways")
def test_bf16_runs_and_is_close(top_k, make_ffn, stored):
    """autocast over fp32 weights, and a seed model in bf16; experts and router are fp32 in both."""
    layer, ffn, _ = make_layer(make_ffn, state=RoutingState("prefix"), top_k=top_k)
    x = torch.randn(3, 5, D).bfloat16()
    if stored == "bf16":
        ffn.bfloat16()
        y = layer(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.float())
    want = copy.deepcopy(layer).float()(x.float())
    assert y.dtype == torch.bfloat16 and (y - want).norm() < 0.02 * want.norm()
    y.float().square().sum().backward()
    for parameter in (*layer.router.parameters(), *layer.experts.parameters()):
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in ffn.parameters())


NAMES = [f"model.layers.{i}.mlp" for i in range(3)]
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(4))


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=D, intermediate_size=H, num_hidden_layers=3)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config).eval()


def uploads(kind="lora"):
    ffn = llama().get_submodule(NAMES[0])
    experts = [{name: make_expert(ffn, kind, scaling=1 + p) for name in NAMES} for p in range(K)]
    return experts, torch.randn(K, 3, D)


def unified(kind="lora", joined=K, **options):
    """The tiny LLaMA with the first `joined` of three clients."""
    experts, vectors = uploads(kind)
    return moe.unify(
        llama(), NAMES, experts[:joined], vectors[:joined], names=list("abc")[:joined], **options
    )


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind, top_k", (("lora", 1), ("lora", 2), ("full", 1)))
def test_save_and_load_give_the_same_model_bit_for_bit(kind, top_k, tmp_path):
    model = unified(kind, lam=0.9, top_k=top_k, context="prefix", offset=True, absolute=top_k == 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    folder = tmp_path / "out" / "unified"
    for _ in range(2):  # the second time over the first
        moe.save(model, folder)
    assert snapshot(tmp_path).keys() == {f"out/unified/moe{end}" for end in (".safetensors", "_config.json")}
    again, (config, tensors) = moe.load(folder, llama()), moe.read(folder)
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in trained)
    assert torch.equal(logits(model), logits(again)) and not torch.equal(logits(model), logits(llama()))
    for a, b in zip(moe.lambda_parameters(model), moe.lambda_parameters(again), strict=True):
        assert torch.equal(a, b) and a.item() != pytest.approx(0.9, abs=1e-9)
    assert again.moe_config == config == model.moe_config
    assert again.routing.mode == "prefix" and config["names"] == ["a", "b", "c"]


def test_a_bias_is_saved_and_an_earlier_versions_offset_still_loads(tmp_path):
    model = unified(offset=True)
    biases = [layer.router.bias for layer in moe.layers(model)]
    assert set(map(id, biases)) < set(map(id, moe.router_parameters(model)))
    with torch.no_grad():
        for bias in biases:
            bias += torch.randn(K)
    moe.save(model, tmp_path)
    config, tensors = moe.read(tmp_path)
    assert torch.equal(logits(moe.load(tmp_path, llama())), logits(model))
    extra = [("d", uploads("lora")[0][0], torch.ones(3, D))]
    for layer, bias in zip(moe.layers(moe.assemble(llama(), config, tensors, extra)), biases, strict=True):
        assert layer.router.bias.tolist() == [*bias.tolist(), -D / 2]
    moe.write(tmp_path, config, {key: t for key, t in tensors.items() if not key.endswith("bias")})
    for layer in moe.layers(moe.load(tmp_path, llama())):
        close(layer.router.bias, -layer.router.vectors.square().sum(1) / 2)


@pytest.mark.parametrize("umask, mode", ((0o022, 0o644), (0o007, 0o660)))
def test_write_follows_the_umask_and_a_failed_one_does_not_look_complete(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        moe.write(tmp_path, {"top_k": 1}, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}
    old = snapshot(tmp_path)
    with pytest.raises(TypeError):  # not JSON: fails before anything is moved
        moe.write(tmp_path, {"top_k": {1}}, {"a": torch.zeros(2)})
    assert snapshot(tmp_path) == old
    (tmp_path / "moe.safetensors").unlink()
    (tmp_path / "moe.safetensors").mkdir()  # no file can take its place
    with pytest.raises(OSError):
        moe.write(tmp_path, {"top_k": 1}, {"a": torch.zeros(2)})
    assert not (tmp_path / "moe_config.json").exists()


@pytest.mark.parametrize("kind, tensors", (("lora", 6), ("full", 3)))
def test_unify_trains_routers_and_experts_alone_and_shares_one_state(kind, tensors):
    model = unified(kind)
    groups = [moe.router_parameters(model), moe.expert_parameters(model), moe.lambda_parameters(model)]
    ids = [id(parameter) for group in groups for parameter in group]
    assert [len(group) for group in groups] == [3, 3 * tensors, 3] and len(set(ids)) == len(ids)
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert torch.equal(torch.stack(moe.router_parameters(model)), uploads(kind)[1].transpose(0, 1))
    linears = [module for module in moe.layers(model)[0].modules() if isinstance(module, nn.Linear)]
    assert bool(linears) == (kind == "lora")  # full experts do not keep the seed model's FFN
    other = copy.deepcopy(model)
    assert other.routing is not model.routing
    for each in (model, other):
        assert all(layer.state is each.routing for layer in moe.layers(each))
    assert json.loads(json.dumps(model.moe_config)) == model.moe_config


def test_clamp():
    model = unified()
    for lam, value in zip(moe.lambda_parameters(model), (1.7, -0.2, 0.4), strict=True):
        lam.data.fill_(value)
    moe.clamp_(model)
    assert [lam.item() for lam in moe.lambda_parameters(model)] == pytest.approx([1.0, 0.0, 0.4])


def test_opt_out_and_in_of_a_model_and_on_disk(tmp_path):
    model = unified(top_k=3, context="prefix", offset=True)
    whole = logits(model)
    for _ in range(2):  # twice is once
        moe.disable_expert(model, "b")
    got = logits(model)
    assert model.moe_config["disabled"] == ["b"] and (got - whole).abs().max() > 1e-3
    moe.save(model, tmp_path)
    again = moe.load(tmp_path, llama())
    assert again.moe_config["disabled"] == ["b"] and torch.equal(logits(again), got)
    moe.enable_expert(again, "b")
    assert torch.equal(logits(again), whole)
    removed = remove_expert(*moe.read(tmp_path), "b")
    moe.write(tmp_path, *removed)
    gone = moe.load(tmp_path, llama())
    assert [gone.moe_config[key] for key in ("names", "top_k", "disabled")] == [["a", "c"], 2, []]
    close(logits(gone), got)
    for change in (moe.disable_expert, moe.enable_expert):
        with pytest.raises(ValueError, match="'d'.* a, b, c"):
            change(model, "d")
    moe.disable_expert(model, "c")
    with pytest.raises(ValueError, match="'a' is the last"):
        moe.disable_expert(model, "a")
    assert model.moe_config["disabled"] == ["b", "c"]
    with pytest.raises(ValueError, match="'c' is the last"):
        remove_expert(*remove_expert(*removed, "a"), "c")
    with pytest.raises(ValueError, match="'b'.* a, c"):
        remove_expert(*removed, "b")


@pytest.mark.parametrize("kind", ("lora", "full"))
def test_an_expert_joins_and_the_others_stay_as_they_are(kind, tmp_path):
    experts, vectors = uploads(kind)
    moe.save(unified(kind, joined=2, lam=0.8, top_k=2), tmp_path)
    grown = moe.assemble(llama(), *moe.read(tmp_path), [("c", experts[2], vectors[2])])
    want = unified(kind, lam=0.8, top_k=2)
    assert torch.equal(logits(grown), logits(want)) and grown.moe_config == want.moe_config


@pytest.mark.parametrize("top_k", (1, 2))
def test_counts(top_k):
    model = moe.unify(llama(), NAMES[::-1], *uploads(), top_k=top_k)
    pis, mask = [], torch.arange(9) < torch.tensor([[6], [9]])
    for layer in moe.layers(model):  # in the order of ffn_names, from the last layer to the first
        layer.router.register_forward_hook(lambda router, inputs, pi: pis.insert(0, pi))
    model(IDS)
    assert moe.counts(model).tolist() == [[0] * K] * 3  # not asked for
    model.routing.record, model.routing.token_mask = True, mask
    for times in (1, 2):
        model(IDS)
        chosen = [pi[mask].topk(top_k).indices.flatten() for pi in pis[:3]]
        want = times * torch.stack([own.bincount(minlength=K) for own in chosen])
        assert moe.counts(model).dtype == torch.int64 and torch.equal(moe.counts(model), want)
        assert (want.sum(1) == times * 15 * top_k).all()
    moe.reset_counts(model)
    assert moe.counts(model).abs().sum() == 0


def unify(change=lambda experts: None, **arguments):
    """unify with changed experts or other arguments, which must leave the model as it was."""
    experts, vectors = uploads()
    change(experts)
    model, arguments = llama(), dict(ffn_names=NAMES, experts=experts, vectors=vectors) | arguments
    try:
        moe.unify(model, **arguments)
    finally:
        assert not hasattr(model, "routing") and not any(isinstance(m, MoELayer) for m in model.modules())


def forward(**state):
    return make_layer(state=RoutingState(**state))[0](torch.ones(2, 5, D))


SHAPE = r"layers.1.mlp: experts\[2\].*down_proj.lora_A is \(2, 3\), not \(2, 20\)"
FAULTS = (
    (lambda: unify(ffn_names=NAMES[:2]), r"experts\[0\].* ffn_names.*'model.layers.2.mlp'"),
    (lambda: unify(ffn_names=NAMES[:1] * 3), "ffn_names must be distinct"),
    (lambda: unify(ffn_names=[]), "ffn_names must be .*at least one"),
    (lambda: unify(ffn_names=["x"], experts=[{"x": {}}], vectors=torch.ones(1, 1, D)), "no module 'x'"),
    (lambda: unify(vectors=torch.zeros(2, 3, D)), "vectors has 2 .*3"),
    (lambda: unify(vectors=torch.zeros(3, 2, D)), r"vectors\[0\] is \(2, 8\).* 3"),
    (lambda: unify(vectors=torch.zeros(3, 3, D + 1)), r"vectors \(3, 9\).* 8"),
    (lambda: unify(names=["a"]), "names has 1 .*3"),
    (lambda: unify(top_k=4), r"top_k is 4.* 1..3"),
    (lambda: unify(top_k=0), "top_k is 0"),
    (lambda: unify(weighting="softmax"), "weighting is 'softmax'"),
    (lambda: unify(context="mean"), "context is 'mean'"),
    (lambda: unify(lam=1.5), "lam .*1.5"),
    (lambda: unify(experts=[], vectors=[]), "experts"),
    (lambda: unify(lambda e: e[1][NAMES[0]].pop("scaling")), r"experts\[1\].*scaling"),
    (lambda: unify(lambda e: e[1][NAMES[0]].pop("up_proj.lora_A")), r"experts\[1\].*up_proj.lora_[AB]"),
    (lambda: unify(lambda e: e[2][NAMES[1]].update({"down_proj.lora_A": torch.ones(2, 3)})), SHAPE),
    (lambda: unify(lambda e: e[0][NAMES[1]].update({"w1.lora_A": torch.ones(2)})), r"experts\[0\].*w1"),
    (lambda: unify(lambda e: e[0].update(uploads("full")[0][0])), "experts must be all LoRA or all full"),
    (lambda: unify(experts=[dict.fromkeys(NAMES, {"up_proj.weight": torch.ones(1)})] * 3), "down_proj"),
    (lambda: make_layer(lambda: nn.MultiheadAttention(D, 2)), "MultiheadAttention"),
    (lambda: make_layer(lambda: two_layer(ln=nn.LayerNorm(H))), "ln.bias.*ln.weight"),
    (lambda: forward(context_mask=torch.ones(2, 4)), r"context_mask is \(2, 4\).*\(2, 5\)"),
    (lambda: forward(record=True, token_mask=torch.ones(5)), r"token_mask is \(5,\)"),
    (lambda: forward(mode="batch"), "mode is 'batch'"),
    (lambda: Router(torch.zeros(D)), r"vectors must be \(K, d\)"),
)


@pytest.mark.parametrize("function, message", FAULTS)
def test_errors_name_what_does_not_fit(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_moe_imports_torch_and_safetensors_alone():
    found = re.findall(r"^(?:import|from) (\w+)", Path(moe.__file__).read_text(), re.MULTILINE)
    assert {"torch", "safetensors"} <= set(found) <= {"torch", "safetensors"} | sys.stdlib_module_names
