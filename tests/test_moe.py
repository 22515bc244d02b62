"""moe.py against Eq. 5-6 written out token by token, and the properties that a unified model must have."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moe
from metamoe.serving.members import remove_expert
from metamoe.serving.seed_model import fix_torchvision
from moe import MoELayer, Router, RoutingState  # noqa: E402

D, H, K, R = 8, 20, 3, 2


class Gated(nn.Module):
    def __init__(self, d=D, h=H):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down_proj, self.act_fn = nn.Linear(h, d), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TwoLayer(nn.Sequential):
    """As open_clip has it: a Sequential whose children have names."""

    def __init__(self, d=D, h=H):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(d, h), nn.GELU(), nn.Linear(h, d)


class CLIPMLP(nn.Module):
    """As transformers has CLIP's."""

    def __init__(self, d=D, h=H):
        super().__init__()
        self.activation_fn, self.fc1, self.fc2 = nn.GELU(), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


pytestmark = pytest.mark.usefixtures("one_thread")


LINEARS = {
    Gated: ("gate_proj", "up_proj", "down_proj"),
    TwoLayer: ("c_fc", "c_proj"),
    CLIPMLP: ("fc1", "fc2"),
}


@pytest.fixture(params=("masked", "by expert"))
def both_ways(request, monkeypatch):
    """The test runs twice: all LoRA experts at once behind masks, which few tokens take, and one expert after the other."""
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", 2048 if request.param == "masked" else 0)


def make_expert(ffn, kind, rank=R, scaling=1.5):
    e = {"scaling": scaling} if kind == "lora" else {}
    for name in LINEARS[type(ffn)]:
        linear = getattr(ffn, name)
        if kind == "lora":
            e[f"{name}.lora_A"] = torch.randn(rank, linear.in_features) * 0.5
            e[f"{name}.lora_B"] = torch.randn(linear.out_features, rank) * 0.5
        else:
            e |= {f"{name}.{leaf}": torch.randn_like(t) * 0.4 for leaf, t in linear.named_parameters()}
    return e


def make_layer(
    cls=TwoLayer, kind="lora", n=K, lam=0.7, offset=False, mode="fixed", seed=0, experts=None, **options
):
    torch.manual_seed(seed)
    ffn = cls()
    experts = [make_expert(ffn, kind, scaling=1 + p / 2) for p in range(n)] if experts is None else experts
    router = Router(torch.randn(len(experts), D), lam, offset)
    return MoELayer(ffn, experts, router, RoutingState(mode=mode), **options), ffn, experts


def merged(ffn, e):
    """FFN_p as a dense module: W + s B A, or the full expert's own weights."""
    dense = copy.deepcopy(ffn)
    with torch.no_grad():
        for name in LINEARS[type(ffn)]:
            linear = getattr(dense, name)
            if "scaling" in e:
                if f"{name}.lora_A" in e:
                    linear.weight += e["scaling"] * e[f"{name}.lora_B"] @ e[f"{name}.lora_A"]
            else:
                for leaf, t in linear.named_parameters():
                    t.copy_(e[f"{name}.{leaf}"])
    return dense


def naive_expert(layer, ffn, p):
    """FFN_p as a function of one token (d,), with merged weights, differentiable in the layer's own parameters."""
    maps = {}
    for name in LINEARS[type(ffn)]:
        own, stack = getattr(ffn, name), layer.experts[name]
        W = (
            stack["weight"][p]
            if layer.kind == "full"
            else own.weight + layer.scaling[p] * stack["B"][p] @ stack["A"][p]
        )
        bias = None if own.bias is None else stack["bias"][p] if layer.kind == "full" else own.bias
        maps[name] = lambda v, W=W, bias=bias: W @ v if bias is None else W @ v + bias
    if isinstance(ffn, Gated):
        return lambda z: maps["down_proj"](nn.functional.silu(maps["gate_proj"](z)) * maps["up_proj"](z))
    up, down = LINEARS[type(ffn)]
    return lambda z: maps[down](nn.functional.gelu(maps[up](z)))


def naive(layer, ffn, x, mask, mode, top_k, weighting):
    """Eq. 5-6, one token and one expert at a time."""
    e, lam = layer.router.vectors, layer.router.lam
    ffns = [naive_expert(layer, ffn, p) for p in range(len(e))]
    rows = []
    for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
        seen = [x[b, s] for s in range(x.shape[1]) if mask[b, s] and (mode == "fixed" or s <= t)]
        context = sum(seen) / len(seen) if seen else torch.zeros(D)
        blend = x[b, t] if mode == "none" else (1 - lam) * x[b, t] + lam * context
        logits = [blend @ e[p] - (e[p] @ e[p] / 2 if layer.router.offset else 0) for p in range(len(e))]
        pi = torch.stack(logits).softmax(0)
        top = sorted(range(len(e)), key=lambda p: -pi[p].item())[:top_k]
        total = sum(pi[p] for p in top)
        weight = {"literal": 1.0, "renormalized": total, "stopgrad": total.detach()}[weighting]
        rows.append(sum(pi[p] / weight * ffns[p](x[b, t]) for p in top))
    return torch.stack(rows).view(x.shape)


def ragged_mask(b=3, t=5):
    """Left padding, right padding, and a hole; no sequence is without a token."""
    mask = torch.ones(b, t, dtype=torch.bool)
    mask[0, :2] = mask[1, 3:] = False
    mask[2, 2] = False
    return mask


# ---------------------------------------------------------------- against the equations

SETTINGS = [
    (cls, kind, top_k, weighting, mode)
    for cls, kind in itertools.product((Gated, TwoLayer), ("lora", "full"))
    for top_k, weighting, mode in itertools.product((1, 2, 3), moe.WEIGHTINGS, moe.CONTEXTS)
] + [(CLIPMLP, "lora", 1, "stopgrad", "fixed")]


@pytest.mark.parametrize("cls, kind, top_k, weighting, mode", SETTINGS)
@pytest.mark.usefixtures("both_ways")
def test_forward_and_gradients_equal_naive(cls, kind, top_k, weighting, mode):
    layer, ffn, _ = make_layer(
        cls, kind, mode=mode, top_k=top_k, weighting=weighting, offset=mode == "prefix"
    )
    x = torch.randn(3, 5, D, requires_grad=True)
    layer.state.context_mask = mask = ragged_mask()
    y, want = layer(x), naive(layer, ffn, x, mask, mode, top_k, weighting)
    torch.testing.assert_close(y, want, atol=2e-5, rtol=1e-5)

    wrt = [x, *layer.router.parameters(), *layer.experts.parameters()]
    target = torch.randn_like(y)
    got = torch.autograd.grad((y * target).sum(), wrt, allow_unused=True)
    ref = torch.autograd.grad((want * target).sum(), wrt, allow_unused=True)
    for g, r, w in zip(got, ref, wrt, strict=False):
        zero = torch.zeros_like(w)
        torch.testing.assert_close(zero if g is None else g, zero if r is None else r, atol=2e-4, rtol=1e-4)


def test_naive_tells_settings_apart():
    """The grid above would be worth nothing if its settings gave the same outputs."""
    layer, ffn, _ = make_layer()
    x, mask = torch.randn(3, 5, D), ragged_mask()
    outputs = [
        naive(layer, ffn, x, mask, *s)
        for s in itertools.product(moe.CONTEXTS, (1, 2), ("literal", "renormalized"))
    ]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outputs, 2))


def test_no_grad_equals_grad_and_one_sequence_equals_a_batch_of_one():
    for top_k, kind in itertools.product((1, 2), ("lora", "full")):
        layer, _, _ = make_layer(kind=kind, top_k=top_k)
        x = torch.randn(7, D)
        with torch.no_grad():
            y = layer.eval()(x)
        assert y.shape == x.shape and not y.requires_grad
        assert torch.equal(y, layer.train()(x)) and torch.equal(y, layer(x.unsqueeze(0)).squeeze(0))


# ---------------------------------------------------------------- the weights of the chosen experts


def test_weightings_by_hand():
    layer, _, _ = make_layer(top_k=2)
    pi = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    # total = 0.8; d(stopgrad weight of expert 1)/d pi = [0, 1 / 0.8, 0]; of the quotient: [0, 0.3 / 0.64, -0.5 / 0.64]
    for weighting, values, gradient in (
        ("literal", [0.5, 0.3], [0, 1, 0]),
        ("renormalized", [0.625, 0.375], [0, 0.46875, -0.78125]),
        ("stopgrad", [0.625, 0.375], [0, 1.25, 0]),
    ):
        layer.weighting = weighting
        chosen, weight = layer.choose(pi)
        assert chosen.tolist() == [1, 2]
        torch.testing.assert_close(weight, torch.tensor(values))
        torch.testing.assert_close(
            torch.autograd.grad(weight[0], pi)[0], torch.tensor(gradient, dtype=torch.float32)
        )


def test_top1_task_loss_reaches_router_unless_renormalized():
    gradients = {}
    for weighting in moe.WEIGHTINGS:
        layer, _, _ = make_layer(weighting=weighting)
        layer(torch.randn(3, 5, D)).square().sum().backward()
        gradients[weighting] = [p.grad.abs().max().item() for p in (layer.router.vectors, layer.router.lam)]
    assert min(gradients["stopgrad"]) > 1e-2 and min(gradients["literal"]) > 1e-2
    assert max(gradients["renormalized"]) < 1e-4 * min(gradients["stopgrad"])


@pytest.mark.parametrize("weighting", ("stopgrad", "renormalized"))
def test_top1_forward_is_the_expert_itself(weighting):
    layer, ffn, experts = make_layer(lam=0.0, weighting=weighting)
    x = torch.randn(4, 6, D)
    chosen, weight = layer.choose(layer.router(x, None))
    assert torch.equal(weight, torch.ones(4, 6, 1))
    want = torch.stack([merged(ffn, e)(x) for e in experts])  # (K, 4, 6, d)
    want = want.gather(0, chosen.permute(2, 0, 1).unsqueeze(-1).expand(1, 4, 6, D))[0]
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    assert len(chosen.unique()) == K


def test_ties_go_to_the_lowest_index():
    for n, top_k in ((2, 1), (5, 3), (40, 7)):
        layer, _, _ = make_layer(n=n, top_k=top_k)
        chosen, _ = layer.choose(torch.full((2, 3, n), 1 / n))
        assert chosen.tolist() == [[list(range(top_k))] * 3] * 2
    layer, _, _ = make_layer(n=4, top_k=2)
    assert layer.choose(torch.tensor([0.1, 0.35, 0.2, 0.35]))[0].tolist() == [1, 3]


# ---------------------------------------------------------------- the router


def test_router_by_hand():
    z, context = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    e = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    for lam, offset, logits in (
        (0.0, False, [1, 0]),
        (1.0, False, [0, 6]),
        (0.25, False, [0.75, 1.5]),
        (0.25, True, [0.25, -3]),
    ):
        got = Router(e, lam, offset)(z, context)
        torch.testing.assert_close(got[0, 0], torch.tensor(logits, dtype=torch.float32).softmax(0))
    torch.testing.assert_close(Router(e, 0.9)(z, None)[0, 0], torch.tensor([1.0, 0]).softmax(0))


def test_router_logits_stay_float32_under_bf16():
    """In bf16 the two logits, 100.1 and 100.2, would be one number."""
    router = Router(torch.tensor([[100.1, 0.0], [100.2, 0.0]]), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        pi = router(torch.tensor([[[1.0, 0.0]]], dtype=torch.bfloat16), None)
    assert pi.dtype == torch.float32
    torch.testing.assert_close(pi[0, 0], torch.tensor([100.1, 100.2]).softmax(0), atol=1e-5, rtol=0)


def test_contexts_by_hand():
    z = torch.tensor([[1.0, 10, 100, 1000]]).unsqueeze(-1)
    state = RoutingState(context_mask=torch.tensor([[False, True, False, True]]))
    assert state.context(z).flatten().tolist() == [505]
    state.mode = "prefix"
    assert state.context(z).flatten().tolist() == [0, 10, 10, 505]
    state.context_mask = None
    torch.testing.assert_close(state.context(z).flatten(), torch.tensor([1, 5.5, 37, 277.75]))
    state.mode = "fixed"
    assert state.context(z).flatten().tolist() == [277.75]
    state.mode = "none"
    assert state.context(z) is None


def test_context_is_summed_in_float32():
    z = torch.full((1, 1001, 1), 1.0, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    for mode in ("fixed", "prefix"):
        context = RoutingState(mode=mode).context(z)
        assert context.dtype == torch.float32 and (context == 1).all()


@pytest.mark.parametrize("mode", ("fixed", "prefix"))
def test_empty_context_is_zero_and_padding_may_be_nan(mode):
    layer, _, _ = make_layer(mode=mode)
    x = torch.randn(2, 4, D)
    layer.state.context_mask = torch.tensor([[False] * 4, [False, True, True, True]])
    y = layer(x)
    assert y.isfinite().all()
    no_context = layer.router(x, torch.zeros(2, 1, D))
    torch.testing.assert_close(layer.router(x, layer.state.context(x))[0], no_context[0])
    bad = x.clone()
    bad[1, 0] = float("nan")
    torch.testing.assert_close(layer(bad)[1, 1:], y[1, 1:])


def test_prefix_does_not_see_the_future_and_fixed_routes_by_the_prompt_alone():
    layer, _, _ = make_layer(mode="prefix", lam=1.0)
    x = torch.randn(2, 6, D)
    other = torch.cat((x[:, :3], 5 * torch.randn(2, 3, D)), dim=1)
    torch.testing.assert_close(layer(x)[:, :3], layer(other)[:, :3])
    layer.state.mode, layer.state.context_mask = "fixed", torch.arange(6).expand(2, 6) < 3
    torch.testing.assert_close(layer(x)[:, :3], layer(other)[:, :3])
    layer.state.context_mask = None
    pi = lambda z: layer.router(z, layer.state.context(z))
    assert (pi(x)[:, :3] - pi(other)[:, :3]).abs().max() > 1e-2


@pytest.mark.parametrize("weighting, top_k", itertools.product(moe.WEIGHTINGS, (1, 2, 3)))
@pytest.mark.usefixtures("both_ways")
def test_a_disabled_expert_is_as_if_it_were_not_there(weighting, top_k):
    layer, ffn, experts = make_layer(top_k=top_k, weighting=weighting, offset=True)
    x = torch.randn(3, 5, D)
    layer.state.record = True
    whole, out = layer(x), int(layer.counts.argmax())
    layer.counts.zero_()
    rest, layer.router.disabled = [p for p in range(K) if p != out], [out]
    other = MoELayer(
        ffn,
        [experts[p] for p in rest],
        Router(layer.router.vectors[rest], 0.7, True),
        RoutingState(),
        min(top_k, 2),
        weighting,
    )
    pi = layer.router(x, layer.state.context(x))
    assert (pi[..., out] == 0).all()
    torch.testing.assert_close(pi.sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-5)
    assert (
        layer.counts[out] == 0
        and layer.counts.sum() == 15 * min(top_k, 2)
        and (whole - layer(x)).abs().max() > 1e-2
    )
    layer.router.disabled = []
    assert torch.equal(layer(x), whole)


def test_clamp():
    router = Router(torch.randn(2, D), 1.0)
    for value, want in ((1.7, 1.0), (-0.2, 0.0), (0.4, 0.4)):
        with torch.no_grad():
            router.lam.fill_(value)
        router.clamp_()
        assert router.lam.item() == pytest.approx(want)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("mode", moe.CONTEXTS)
@pytest.mark.parametrize("top_k", (1, 2))
@pytest.mark.usefixtures("both_ways")
def test_outputs_do_not_depend_on_batch_or_padding(mode, top_k):
    layer, _, _ = make_layer(mode=mode, top_k=top_k, lam=0.6)
    sequences = [torch.randn(n, D) for n in (3, 7, 5)]
    alone = [layer(s) for s in sequences]
    for side, length in itertools.product(("left", "right"), (7, 12)):
        x, mask = 50 * torch.randn(3, length, D), torch.zeros(3, length, dtype=torch.bool)
        where = [slice(length - len(s), length) if side == "left" else slice(0, len(s)) for s in sequences]
        for b, s in enumerate(sequences):
            x[b, where[b]], mask[b, where[b]] = s, True
        layer.state.context_mask = mask
        y = layer(x)
        for b, want in enumerate(alone):
            torch.testing.assert_close(y[b, where[b]], want, atol=1e-5, rtol=1e-5)
        layer.state.context_mask = None


@pytest.mark.parametrize("kind", ("lora", "full"))
@pytest.mark.usefixtures("both_ways")
def test_permuting_the_experts_permutes_only_indices(kind):
    for top_k in (1, 2, 3):
        layer, ffn, experts = make_layer(kind=kind, top_k=top_k)
        order = [2, 0, 1]
        other = MoELayer(
            ffn, [experts[p] for p in order], Router(layer.router.vectors[order], 0.7), RoutingState(), top_k
        )
        layer.state.record = other.state.record = True
        x = torch.randn(3, 5, D)
        torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(layer.counts[order], other.counts) and layer.counts.sum() == 15 * top_k


@pytest.mark.parametrize("cls, kind", itertools.product((Gated, TwoLayer), ("lora", "full")))
@pytest.mark.usefixtures("both_ways")
def test_equal_experts_and_one_expert_are_that_expert(cls, kind):
    torch.manual_seed(1)
    ffn, x = cls(), torch.randn(3, 5, D)
    e = make_expert(ffn, kind)
    want = merged(ffn, e)(x)
    assert (want - ffn(x)).abs().max() > 1e-2
    for n, top_k in ((1, 1), (3, 1), (3, 2), (3, 3)):
        layer = MoELayer(ffn, [e] * n, Router(torch.randn(n, D)), RoutingState(), top_k)
        torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_ranks_may_differ_and_linears_be_left_out():
    torch.manual_seed(2)
    ffn, x = Gated(), torch.randn(3, 5, D)
    experts = [make_expert(ffn, "lora", rank, scaling=0.5 + rank) for rank in (1, 4, 2)]
    for key in ("up_proj.lora_A", "up_proj.lora_B"):
        del experts[2][key]
    for e in experts:
        del e["gate_proj.lora_A"], e["gate_proj.lora_B"]
    for top_k in (1, 3):
        layer = MoELayer(ffn, experts, Router(torch.randn(3, D)), RoutingState(mode="none"), top_k)
        assert layer.experts["up_proj"]["A"].shape == (3, 4, D) and "gate_proj" not in layer.experts
        chosen, weight = layer.choose(layer.router(x, None))
        outputs = torch.stack([merged(ffn, e)(x) for e in experts], dim=2)  # (3, 5, K, d)
        want = (weight.unsqueeze(-1) * outputs.gather(2, chosen.unsqueeze(-1).expand(3, 5, top_k, D))).sum(2)
        torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ("lora", "full"))
@pytest.mark.usefixtures("both_ways")
def test_seed_expert_is_the_seed_and_lora_stays_it(kind):
    torch.manual_seed(3)
    ffn, x = Gated(), torch.randn(3, 5, D)
    like = make_expert(ffn, kind)
    zero = moe.seed_expert(ffn, like)
    layer = MoELayer(ffn, [zero, like], Router(torch.randn(2, D)), RoutingState(), top_k=1)
    only = MoELayer(ffn, [zero], Router(torch.randn(1, D)), RoutingState())
    torch.testing.assert_close(only(x), ffn(x))
    layer(x).square().sum().backward()
    for stack in layer.experts.values():
        for parameter in stack.values():
            assert parameter.grad[1].abs().max() > 0
            if kind == "lora":
                assert parameter.grad[0].abs().max() == 0


def test_few_and_many_tokens_give_the_same():
    """Where the layer changes from one way to the other, its outputs and gradients do not."""
    few = moe.FEW_TOKENS["cpu"]
    for top_k in (1, 2):
        layer, _, _ = make_layer(top_k=top_k, mode="none")
        x, found = torch.randn(few + 1, D), []
        for count in (few, few + 1):
            y = layer(x[:count])[:few]
            found.append((y, *torch.autograd.grad(y.square().sum(), list(layer.experts.parameters()))))
        for a, b in zip(*found, strict=False):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_few_tokens_compile_to_one_graph(monkeypatch):
    """Nothing waits for the tokens' experts to be known; with many tokens, or full experts, it does."""

    def compiled(layer):
        torch.compiler.reset()
        return torch.compile(layer, fullgraph=True, backend="eager")(x)

    layer, _, _ = make_layer(top_k=2)
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(compiled(layer), layer(x))
    full, _, _ = make_layer(kind="full")
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", 14)
    for other in (layer, full):
        with pytest.raises(Exception, match="data-dependent|tolist|unbacked|Unsupported|graph"):
            compiled(other)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "top_k, cls, stored", itertools.product((1, 2), (Gated, TwoLayer), ("float32", "bfloat16"))
)
@pytest.mark.usefixtures("both_ways")
def test_bf16_runs_and_is_close(top_k, cls, stored):
    """autocast over fp32 weights, and a seed that is stored in bf16; experts and router are fp32 in both."""
    layer, ffn, _ = make_layer(cls, top_k=top_k, mode="prefix")
    x = torch.randn(3, 5, D).bfloat16().float()
    if stored == "bfloat16":
        ffn.bfloat16()
        exact = copy.deepcopy(layer)
        for name in exact.linears:
            getattr(exact, name).float()
        y = layer(x.bfloat16())
    else:
        exact = layer
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    want = exact(x)
    assert (y - want).norm() < 0.02 * want.norm()
    y.float().square().sum().backward()
    for parameter in (*layer.router.parameters(), *layer.experts.parameters()):
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in ffn.parameters())


# ---------------------------------------------------------------- whole models


def tiny_llama(seed=0):
    fix_torchvision()  # a CPU build of torch beside the registry's torchvision
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=D,
        intermediate_size=H,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


NAMES = [f"model.layers.{l}.mlp" for l in range(3)]


def uploads(kind="lora", n=K):
    """K clients' experts and routing vectors for tiny_llama."""
    torch.manual_seed(5)
    experts = [
        {name: make_expert(Gated().apply(_no_bias), kind, scaling=1 + p) for name in NAMES} for p in range(n)
    ]
    return experts, torch.randn(n, 3, D)


def _no_bias(module):
    if isinstance(module, nn.Linear):
        module.register_parameter("bias", None)


@pytest.mark.parametrize("kind, top_k", (("lora", 1), ("lora", 2), ("full", 1)))
def test_save_and_load_give_the_same_model_bit_for_bit(kind, top_k, tmp_path):
    experts, vectors = uploads(kind)
    model = moe.unify(
        tiny_llama(),
        NAMES,
        experts,
        vectors,
        names=["a", "b", "c"],
        lam=0.9,
        top_k=top_k,
        context="prefix",
        offset=True,
    )
    ids = torch.randint(50, (2, 9))
    optimizer = torch.optim.SGD(
        moe.router_parameters(model) + moe.expert_parameters(model) + moe.lambda_parameters(model), lr=0.1
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        moe.clamp_(model)
    folder = tmp_path / "out" / "unified"
    for _ in range(2):  # the second time over the first
        moe.save(model, folder)
    assert sorted(os.listdir(folder)) == ["moe.safetensors", "moe_config.json"]
    assert os.listdir(folder.parent) == ["unified"]
    saved = sum(t.numel() for t in moe.load_file(folder / "moe.safetensors").values())
    assert saved == sum(t.numel() for t in model.parameters() if t.requires_grad)

    again = moe.load(folder, tiny_llama())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert not torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    for a, b in zip(moe.lambda_parameters(model), moe.lambda_parameters(again), strict=False):
        assert torch.equal(a, b) and a.item() != pytest.approx(0.9, abs=1e-9)
    assert again.moe_config == json.loads((folder / "moe_config.json").read_text()) == model.moe_config
    assert again.routing.mode == "prefix" and again.moe_config["names"] == ["a", "b", "c"]


@pytest.mark.parametrize("umask, mode", ((0o022, 0o644), (0o007, 0o660)))
def test_saved_files_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        moe.write(tmp_path / "m", {}, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {mode}


def test_failed_save_leaves_no_folder_that_looks_complete(tmp_path, monkeypatch):
    experts, vectors = uploads()
    model = moe.unify(tiny_llama(), NAMES, experts, vectors)
    moe.save(model, tmp_path / "m")
    old = (tmp_path / "m" / "moe.safetensors").read_bytes()
    model.moe_config["top_k"] = {1}  # not JSON: fails before anything is moved
    with pytest.raises(TypeError):
        moe.save(model, tmp_path / "m")
    assert (tmp_path / "m" / "moe.safetensors").read_bytes() == old and (
        tmp_path / "m" / "moe_config.json"
    ).exists()
    model.moe_config["top_k"] = 1

    def stop(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError):
        moe.save(model, tmp_path / "m")
    assert not (tmp_path / "m" / "moe_config.json").exists() and os.listdir(tmp_path) == ["m"]


def test_unify_trains_routers_and_experts_alone_and_shares_one_state():
    experts, vectors = uploads()
    model = moe.unify(tiny_llama(), NAMES, experts, list(vectors))
    groups = [moe.router_parameters(model), moe.expert_parameters(model), moe.lambda_parameters(model)]
    ids = [id(parameter) for group in groups for parameter in group]
    assert [len(group) for group in groups] == [3, 3 * 3 * 2, 3] and len(set(ids)) == len(ids)
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(layer.state is model.routing for layer in moe.layers(model))
    assert torch.equal(torch.stack(moe.router_parameters(model)), vectors.transpose(0, 1))
    other = copy.deepcopy(model)
    assert other.routing is not model.routing and all(
        layer.state is other.routing for layer in moe.layers(other)
    )
    assert json.loads(json.dumps(model.moe_config)) == model.moe_config


def test_opt_out_and_in_of_a_model_and_on_disk(tmp_path):
    experts, vectors = uploads()
    model = moe.unify(tiny_llama(), NAMES, experts, vectors, names=["a", "b", "c"], top_k=3, context="prefix")
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        whole = model(ids).logits
        moe.disable_expert(model, "b")
        moe.disable_expert(model, "b")  # twice is once
        got = model(ids).logits
        assert model.moe_config["disabled"] == ["b"] and (got - whole).abs().max() > 1e-3
        moe.save(model, tmp_path / "m")
        again = moe.load(tmp_path / "m", tiny_llama())
        assert again.moe_config["disabled"] == ["b"] and torch.equal(again(ids).logits, got)
        moe.write(tmp_path / "gone", *remove_expert(*moe.read(tmp_path / "m"), "b"))
        gone = moe.load(tmp_path / "gone", tiny_llama())
        assert (
            gone.moe_config["names"] == ["a", "c"]
            and gone.moe_config["top_k"] == 2
            and gone.moe_config["disabled"] == []
        )
        torch.testing.assert_close(gone(ids).logits, got, atol=1e-5, rtol=1e-5)
        moe.enable_expert(again, "b")
        assert torch.equal(again(ids).logits, whole)
    for change in (moe.disable_expert, moe.enable_expert):
        with pytest.raises(ValueError, match="no expert is called 'd'; there are a, b, c"):
            change(model, "d")
    moe.disable_expert(model, "c")
    with pytest.raises(ValueError, match="'a' is the last expert"):
        moe.disable_expert(model, "a")
    assert model.moe_config["disabled"] == ["b", "c"]
    one = moe.read(tmp_path / "gone")
    with pytest.raises(ValueError, match="'c' is the last expert"):
        remove_expert(*remove_expert(*one, "a"), "c")
    with pytest.raises(ValueError, match="no expert is called 'b'"):
        remove_expert(*one, "b")


def test_an_expert_joins_and_the_others_stay_as_they_are():
    for kind in ("lora", "full"):
        experts, vectors = uploads(kind)
        model = moe.unify(tiny_llama(), NAMES, experts[:2], vectors[:2], names=["a", "b"], lam=0.8, top_k=2)
        config, state = (
            model.moe_config,
            {key: t for key, t in model.state_dict().items() if ".router." in key or ".experts." in key},
        )
        both = moe.assemble(tiny_llama(), config, state, [("c", experts[2], vectors[2])])
        want = moe.unify(tiny_llama(), NAMES, experts, vectors, names=["a", "b", "c"], lam=0.8, top_k=2)
        ids = torch.randint(50, (2, 9))
        assert torch.equal(both(ids).logits, want(ids).logits) and both.moe_config == want.moe_config


def test_counts():
    experts, vectors = uploads()
    for top_k in (1, 2):
        model = moe.unify(tiny_llama(), NAMES[::-1], experts, vectors, top_k=top_k)
        ids, mask = torch.randint(50, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
        model(ids)
        assert moe.counts(model).tolist() == [[0] * K] * 3  # not asked for
        model.routing.record, model.routing.token_mask = True, mask
        seen = []
        for layer in moe.layers(model):
            layer.register_forward_pre_hook(
                lambda layer, x: seen.append(layer.choose(layer.router(x[0], layer.state.context(x[0])))[0])
            )
        for times in (1, 2):
            model(ids)
            got = moe.counts(model)
            assert got.dtype == torch.int64 and (got.sum(1) == times * 10 * top_k).all()
        # the hooks ran from layer 0 up, ffn_names and with it counts from layer 2 down
        want = [[int((c[mask] == p).sum()) * 2 for p in range(K)] for c in seen[:3]][::-1]
        assert got.tolist() == want
        moe.reset_counts(model)
        assert moe.counts(model).abs().sum() == 0


def test_full_experts_do_not_keep_the_seeds_ffn():
    experts, vectors = uploads("full")
    model = moe.unify(tiny_llama(), NAMES, experts, vectors)
    assert not any(isinstance(module, nn.Linear) for layer in moe.layers(model) for module in layer.modules())
    model(torch.randint(50, (1, 4))).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in moe.expert_parameters(model))


# ---------------------------------------------------------------- errors


def _drop(experts, key):
    del experts[1][NAMES[0]][key]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ffn_names=NAMES[:2]), r"experts\[0\] and ffn_names differ in \['model.layers.2.mlp'\]"),
        (dict(ffn_names=NAMES[:1] * 3), "ffn_names must be distinct"),
        (dict(ffn_names=[]), "ffn_names must be distinct module paths, at least one"),
        (dict(vectors=torch.zeros(2, 3, D)), "vectors has 2 entries, experts has 3"),
        (dict(vectors=torch.zeros(3, 2, D)), r"vectors\[0\] is \(2, 8\), not \(L = 3, d\)"),
        (dict(vectors=torch.zeros(3, 3, D + 1)), r"router has vectors \(3, 9\), not \(3 experts, 8\)"),
        (dict(names=["a"]), "names has 1 entries, experts has 3"),
        (dict(top_k=4), r"top_k is 4, not in 1..3"),
        (dict(top_k=0), r"top_k is 0"),
        (dict(weighting="softmax"), "weighting is 'softmax'"),
        (dict(context="mean"), "context is 'mean'"),
        (dict(lam=1.5), r"lam must be in \[0, 1\], not 1.5"),
        (lambda e: _drop(e, "scaling"), r"experts\[1\] has no scaling"),
        (lambda e: _drop(e, "up_proj.lora_A"), "up_proj has the shapes {'lora_B'.*, not {'lora_A'"),
        (
            lambda e: e[2][NAMES[1]].update({"down_proj.lora_A": torch.zeros(2, 3)}),
            r"layers.1.mlp: experts\[2\]: down_proj has the shapes {'lora_A': \(2, 3\).*, not {'lora_A': \(2, 20\)",
        ),
        (
            lambda e: e[0][NAMES[1]].update({"w1.lora_A": torch.zeros(2, 3)}),
            r"experts\[0\], of kind lora, has unknown entries \['w1.lora_A'\]",
        ),
        (lambda e: e[0].update(uploads("full")[0][0]), "experts must be all LoRA or all full"),
        (lambda e: e.clear(), "experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unify_names_what_is_wrong_and_keeps_the_ffns(change, message):
    experts, vectors = uploads()
    arguments = dict(ffn_names=NAMES, experts=experts, vectors=vectors)
    if callable(change):
        change(experts)
        if not experts:
            arguments["vectors"] = vectors[:0]
    else:
        arguments |= change
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        moe.unify(model, **arguments)
    assert not any(isinstance(module, MoELayer) for module in model.modules()) and not hasattr(
        model, "routing"
    )


def test_other_errors():
    experts, vectors = uploads()
    with pytest.raises(ValueError, match="the model has no module 'model.layers.7.mlp'"):
        moe.unify(tiny_llama(), ["model.layers.7.mlp"], [{"model.layers.7.mlp": {}}], vectors[:1, :1])
    with pytest.raises(ValueError, match="ffn is a LlamaAttention"):
        name = "model.layers.0.self_attn"
        moe.unify(tiny_llama(), [name], [{name: experts[0][NAMES[0]]}], vectors[:1, :1])
    scaled = TwoLayer()
    scaled.ln = nn.LayerNorm(H)
    with pytest.raises(ValueError, match=r"would leave out: \['ln.bias', 'ln.weight'\]"):
        MoELayer(scaled, [make_expert(scaled, "lora")], Router(torch.zeros(1, D)), RoutingState())
    biased = Gated()
    e = make_expert(biased, "full")
    del e["down_proj.bias"]
    with pytest.raises(ValueError, match="down_proj has the shapes {'weight'.*}, not .*'bias': \\(8,\\)"):
        MoELayer(biased, [e], Router(torch.zeros(1, D)), RoutingState())
    layer, _, _ = make_layer()
    layer.state.context_mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"context_mask is \(2, 4\), the tokens are \(2, 5\)"):
        layer(torch.randn(2, 5, D))
    layer.state = RoutingState(record=True, token_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"token_mask is \(5,\)"):
        layer(torch.randn(2, 5, D))
    layer.state = RoutingState(mode="batch")
    with pytest.raises(ValueError, match="mode is 'batch'"):
        layer(torch.randn(2, 5, D))
    with pytest.raises(ValueError, match=r"vectors must be \(K, d\)"):
        Router(torch.zeros(D))


def test_moe_imports_torch_and_safetensors_alone():
    code = (
        "import sys, torch, safetensors.torch; before = set(sys.modules); import moe; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(moe.__file__).parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) <= {"moe", "torch", "safetensors"} | sys.stdlib_module_names
