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

import moe
from metamoe.serving.members import remove_expert
from metamoe.serving.seed_model import fix_torchvision
from moe import MoELayer, Router, RoutingState

fix_torchvision()
import transformers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
D, H, K = 8, 20, 3


class Gated(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down_proj, self.act_fn = nn.Linear(H, D, bias=bias), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TwoLayer(nn.Sequential):
    """As open_clip has it: a Sequential whose children have names."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)


class CLIPMLP(nn.Module):
    """As transformers has CLIP's."""

    def __init__(self):
        super().__init__()
        self.activation_fn, self.fc1, self.fc2 = nn.GELU(), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


@pytest.fixture(params=("masked", "by expert"))
def both_ways(request, monkeypatch):
    """All LoRA experts at once behind masks, which few tokens take, and one expert after the other."""
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


def make_layer(cls=TwoLayer, kind="lora", n=K, lam=0.7, offset=False, mode="fixed", **options):
    torch.manual_seed(0)
    ffn = cls()
    experts = [make_expert(ffn, kind, scaling=1 + p / 2) for p in range(n)]
    router = Router(torch.randn(n, D), lam, offset)
    return MoELayer(ffn, experts, router, RoutingState(mode=mode), **options), ffn, experts


def dense(ffn, e):
    """FFN_p as a function: with W + scaling B A, or with the full expert's own weights."""
    weights = {key: t for key, t in e.items() if key.endswith((".weight", ".bias"))}
    for key in e:
        name, found, _ = key.rpartition(".lora_A")
        if found:
            low = e["scaling"] * e[f"{name}.lora_B"] @ e[key]
            weights[f"{name}.weight"] = ffn.get_parameter(f"{name}.weight") + low
    return lambda x: torch.func.functional_call(ffn, weights, (x,))


def own(layer, p):
    """Expert p of a layer as a dict, of the layer's own parameters."""
    e = {} if layer.kind == "full" else {"scaling": layer.scaling[p]}
    for key, t in layer.experts.items():
        name, _, leaf = key.rpartition("_")
        e[f"{name}.{leaf}" if layer.kind == "full" else f"{name}.lora_{leaf}"] = t[p]
    return e


def naive(layer, ffn, x, mask, mode, top_k, weighting):
    """Eq. 5-6, one token and one expert at a time."""
    e, lam = layer.router.vectors, layer.router.lam
    ffns = [dense(ffn, own(layer, p)) for p in range(len(e))]
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


def ragged_mask():
    """(3, 5): left padding, right padding, and a hole."""
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = mask[1, 3:] = mask[2, 2] = False
    return mask


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=10 * atol)


# ---------------------------------------------------------------- against the equations

SETTINGS = [
    *itertools.product((Gated, TwoLayer), ("lora", "full"), (1, 2, 3), moe.WEIGHTINGS, moe.CONTEXTS),
    (CLIPMLP, "lora", 1, "stopgrad", "fixed"),
]


@pytest.mark.parametrize("cls, kind, top_k, weighting, mode", SETTINGS)
@pytest.mark.usefixtures("both_ways")
def test_forward_and_gradients_equal_naive(cls, kind, top_k, weighting, mode):
    options = dict(top_k=top_k, weighting=weighting, offset=mode == "prefix")
    layer, ffn, _ = make_layer(cls, kind, mode=mode, **options)
    x = torch.randn(3, 5, D, requires_grad=True)
    layer.state.context_mask = mask = ragged_mask()
    y, want = layer(x), naive(layer, ffn, x, mask, mode, top_k, weighting)
    close(y, want)
    wrt, target = [x, *layer.router.parameters(), *layer.experts.parameters()], torch.randn_like(y)
    options = dict(allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad((y * target).sum(), wrt, **options)
    for g, r in zip(got, torch.autograd.grad((want * target).sum(), wrt, **options), strict=True):
        close(g, r, 2e-4)


def test_naive_tells_settings_apart():
    """The grid above would be worth nothing if its settings gave the same outputs."""
    layer, ffn, _ = make_layer()
    x, mask = torch.randn(3, 5, D), ragged_mask()
    settings = itertools.product(moe.CONTEXTS, (1, 2), ("literal", "renormalized"))
    outputs = [naive(layer, ffn, x, mask, *s) for s in settings]
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
    # total = 0.8; d(weight of expert 1)/d pi: stopgrad 1 / 0.8, the quotient 0.3 / 0.64 and -0.5 / 0.64
    for weighting, values, gradient in (
        ("literal", [0.5, 0.3], [0.0, 1, 0]),
        ("renormalized", [0.625, 0.375], [0, 0.46875, -0.78125]),
        ("stopgrad", [0.625, 0.375], [0, 1.25, 0]),
    ):
        layer.weighting = weighting
        chosen, weight = layer.choose(pi)
        assert chosen.tolist() == [1, 2]
        close(weight, torch.tensor(values))
        close(torch.autograd.grad(weight[0], pi)[0], torch.tensor(gradient))


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
    assert torch.equal(weight, torch.ones(4, 6, 1)) and len(chosen.unique()) == K
    want = torch.stack([dense(ffn, e)(x) for e in experts])  # (K, 4, 6, d)
    close(layer(x), want.gather(0, chosen.permute(2, 0, 1).unsqueeze(-1).expand(1, 4, 6, D))[0])


def test_ties_go_to_the_lowest_index():
    for n, top_k in ((2, 1), (5, 3), (40, 7)):
        layer, _, _ = make_layer(n=n, top_k=top_k)
        chosen, _ = layer.choose(torch.full((2, 3, n), 1 / n))
        assert chosen.tolist() == [[list(range(top_k))] * 3] * 2
    layer, _, _ = make_layer(n=4, top_k=2)
    assert layer.choose(torch.tensor([0.1, 0.35, 0.2, 0.35]))[0].tolist() == [1, 3]


# ---------------------------------------------------------------- the router and its context


def test_router_by_hand():
    z, context = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    e = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    for lam, offset, around, logits in (
        (0.0, False, context, [1.0, 0]),
        (1.0, False, context, [0.0, 6]),
        (0.25, False, context, [0.75, 1.5]),
        (0.25, True, context, [0.25, -3]),
        (0.9, False, None, [1.0, 0]),
    ):
        close(Router(e, lam, offset)(z, around)[0, 0], torch.tensor(logits).softmax(0))


def test_router_and_context_stay_float32_under_bf16():
    """In bf16 the logits 100.1 and 100.2 would be one number, and a sum of ones would stop at 256."""
    router = Router(torch.tensor([[100.1, 0.0], [100.2, 0.0]]), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        pi = router(torch.tensor([[[1.0, 0.0]]], dtype=torch.bfloat16), None)
    assert pi.dtype == torch.float32
    close(pi[0, 0], torch.tensor([100.1, 100.2]).softmax(0))
    for mode in ("fixed", "prefix"):
        context = RoutingState(mode=mode).context(torch.ones(1, 1001, 1, dtype=torch.bfloat16))
        assert context.dtype == torch.float32 and (context == 1).all()


def test_contexts_by_hand():
    z, mask = torch.tensor([[1.0, 10, 100, 1000]]).unsqueeze(-1), torch.tensor([[False, True, False, True]])
    for mode, context_mask, want in (
        ("fixed", mask, [505]),
        ("prefix", mask, [0, 10, 10, 505]),
        ("fixed", None, [277.75]),
        ("prefix", None, [1, 5.5, 37, 277.75]),
    ):
        assert RoutingState(mode, context_mask).context(z).flatten().tolist() == want
    assert RoutingState("none").context(z) is None


@pytest.mark.parametrize("mode", ("fixed", "prefix"))
def test_empty_context_is_zero_and_padding_may_be_nan(mode):
    layer, _, _ = make_layer(mode=mode)
    x = torch.randn(2, 4, D)
    layer.state.context_mask = torch.tensor([[False] * 4, [False, True, True, True]])
    y = layer(x)
    assert y.isfinite().all()
    close(layer.router(x, layer.state.context(x))[0], layer.router(x, torch.zeros(2, 1, D))[0])
    bad = x.clone()
    bad[1, 0] = float("nan")
    close(layer(bad)[1, 1:], y[1, 1:])


def test_prefix_does_not_see_the_future_and_fixed_routes_by_the_prompt_alone():
    layer, _, _ = make_layer(mode="prefix", lam=1.0)
    x = torch.randn(2, 6, D)
    other = torch.cat((x[:, :3], 5 * torch.randn(2, 3, D)), dim=1)
    close(layer(x)[:, :3], layer(other)[:, :3])
    layer.state.mode, layer.state.context_mask = "fixed", torch.arange(6).expand(2, 6) < 3
    close(layer(x)[:, :3], layer(other)[:, :3])
    layer.state.context_mask = None
    pi = [layer.router(z, layer.state.context(z))[:, :3] for z in (x, other)]
    assert (pi[0] - pi[1]).abs().max() > 1e-2


@pytest.mark.parametrize("weighting, top_k", itertools.product(moe.WEIGHTINGS, (1, 2, 3)))
@pytest.mark.usefixtures("both_ways")
def test_a_disabled_expert_is_as_if_it_were_not_there(weighting, top_k):
    layer, ffn, experts = make_layer(top_k=top_k, weighting=weighting, offset=True)
    x = torch.randn(3, 5, D)
    layer.state.record = True
    whole, out = layer(x), int(layer.counts.argmax())
    layer.counts.zero_()
    rest, layer.router.disabled = [p for p in range(K) if p != out], [out]
    router, k = Router(layer.router.vectors[rest], 0.7, True), min(top_k, 2)
    other = MoELayer(ffn, [experts[p] for p in rest], router, RoutingState(), k, weighting)
    pi, y = layer.router(x, layer.state.context(x)), layer(x)
    assert (pi[..., out] == 0).all()
    close(pi.sum(-1), torch.ones(3, 5))
    close(y, other(x))
    assert layer.counts[out] == 0 and layer.counts.sum() == 15 * k and (whole - y).abs().max() > 1e-2
    layer.router.disabled = []
    assert torch.equal(layer(x), whole)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("mode, top_k", itertools.product(moe.CONTEXTS, (1, 2)))
@pytest.mark.usefixtures("both_ways")
def test_outputs_do_not_depend_on_batch_or_padding(mode, top_k):
    layer, _, _ = make_layer(mode=mode, top_k=top_k, lam=0.6)
    sequences = [torch.randn(n, D) for n in (3, 7, 5)]
    alone = [layer(s) for s in sequences]
    for side, length in itertools.product(("left", "right"), (7, 12)):
        x, mask = 50 * torch.randn(3, length, D), torch.zeros(3, length, dtype=torch.bool)
        where = [slice(0, len(s)) if side == "right" else slice(length - len(s), length) for s in sequences]
        for b, s in enumerate(sequences):
            x[b, where[b]], mask[b, where[b]] = s, True
        layer.state.context_mask = mask
        y = layer(x)
        layer.state.context_mask = None
        for b, want in enumerate(alone):
            close(y[b, where[b]], want)


@pytest.mark.parametrize("kind, top_k", itertools.product(("lora", "full"), (1, 2, 3)))
@pytest.mark.usefixtures("both_ways")
def test_permuting_the_experts_permutes_only_indices(kind, top_k):
    layer, ffn, experts = make_layer(kind=kind, top_k=top_k)
    order, x = [2, 0, 1], torch.randn(3, 5, D)
    router = Router(layer.router.vectors[order], 0.7)
    other = MoELayer(ffn, [experts[p] for p in order], router, RoutingState(), top_k)
    layer.state.record = other.state.record = True
    close(layer(x), other(x))
    assert torch.equal(layer.counts[order], other.counts) and layer.counts.sum() == 15 * top_k


@pytest.mark.parametrize("cls, kind", itertools.product((Gated, TwoLayer), ("lora", "full")))
@pytest.mark.usefixtures("both_ways")
def test_equal_experts_and_one_expert_are_that_expert(cls, kind):
    torch.manual_seed(1)
    ffn, x = cls(), torch.randn(3, 5, D)
    e = make_expert(ffn, kind)
    want = dense(ffn, e)(x)
    assert (want - ffn(x)).abs().max() > 1e-2
    for n, top_k in ((1, 1), (3, 1), (3, 2), (3, 3)):
        close(MoELayer(ffn, [e] * n, Router(torch.randn(n, D)), RoutingState(), top_k)(x), want)


@pytest.mark.usefixtures("both_ways")
def test_ranks_may_differ_and_linears_be_left_out():
    torch.manual_seed(2)
    ffn, x = Gated(), torch.randn(3, 5, D)
    experts = [make_expert(ffn, "lora", rank, scaling=0.5 + rank) for rank in (1, 4, 2)]
    for e, name in [(experts[2], "up_proj"), *((e, "gate_proj") for e in experts)]:
        del e[f"{name}.lora_A"], e[f"{name}.lora_B"]
    for top_k in (1, 3):
        layer = MoELayer(ffn, experts, Router(torch.randn(3, D)), RoutingState(mode="none"), top_k)
        assert layer.experts["up_proj_A"].shape == (3, 4, D) and "gate_proj_A" not in layer.experts
        chosen, weight = layer.choose(layer.router(x, None))
        outputs = torch.stack([dense(ffn, e)(x) for e in experts], dim=2)  # (3, 5, K, d)
        outputs = outputs.gather(2, chosen.unsqueeze(-1).expand(3, 5, top_k, D))
        close(layer(x), (weight.unsqueeze(-1) * outputs).sum(2))


@pytest.mark.parametrize("kind", ("lora", "full"))
@pytest.mark.usefixtures("both_ways")
def test_seed_expert_is_the_seed_model_and_lora_stays_it(kind):
    torch.manual_seed(3)
    ffn, x = Gated(), torch.randn(3, 5, D)
    like = make_expert(ffn, kind)
    zero = moe.seed_expert(ffn, like)
    layer = MoELayer(ffn, [zero, like], Router(torch.randn(2, D)), RoutingState(), top_k=1)
    close(MoELayer(ffn, [zero], Router(torch.randn(1, D)), RoutingState())(x), ffn(x))
    layer(x).square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad[1].abs().max() > 0
        assert kind == "full" or parameter.grad[0].abs().max() == 0


def test_few_and_many_tokens_give_the_same():
    """Where the layer changes from one way to the other, its outputs and gradients do not."""
    few = moe.FEW_TOKENS["cpu"]
    for top_k in (1, 2):
        layer, _, _ = make_layer(top_k=top_k, mode="none")
        x, found = torch.randn(few + 1, D), []
        for count in (few, few + 1):
            y = layer(x[:count])[:few]
            found.append((y, *torch.autograd.grad(y.square().sum(), list(layer.experts.parameters()))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_few_tokens_compile_to_one_graph(monkeypatch):
    """Nothing waits for the tokens' experts to be known; with many tokens, or full experts, it does."""

    def compiled(layer):
        torch.compiler.reset()
        return torch.compile(layer, fullgraph=True, backend="eager")(x)

    layer, _, _ = make_layer(top_k=2)
    x = torch.randn(3, 5, D)
    close(compiled(layer), layer(x))
    full, _, _ = make_layer(kind="full")
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", 14)
    for other in (layer, full):
        with pytest.raises(Exception, match="data-dependent|tolist|unbacked|Unsupported|graph"):
            compiled(other)


@pytest.mark.parametrize(
    "top_k, cls, stored", itertools.product((1, 2), (Gated, TwoLayer), ("float32", "bfloat16"))
)
@pytest.mark.usefixtures("both_ways")
def test_bf16_runs_and_is_close(top_k, cls, stored):
    """autocast over fp32 weights, and a seed model in bf16; experts and router are fp32 in both."""
    layer, ffn, _ = make_layer(cls, top_k=top_k, mode="prefix")
    x = torch.randn(3, 5, D).bfloat16().float()
    exact = layer
    if stored == "bfloat16":
        ffn.bfloat16()
        exact = copy.deepcopy(layer).float()
        y = layer(x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    want = exact(x)
    assert y.dtype == torch.bfloat16 and (y - want).norm() < 0.02 * want.norm()
    y.float().square().sum().backward()
    for parameter in (*layer.router.parameters(), *layer.experts.parameters()):
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in ffn.parameters())


# ---------------------------------------------------------------- whole models

NAMES = [f"model.layers.{l}.mlp" for l in range(3)]
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(4))


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=D, intermediate_size=H, num_hidden_layers=3)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config).eval()


def uploads(kind="lora", n=K):
    """n clients' experts and routing vectors for `llama`."""
    torch.manual_seed(5)
    experts = [
        {name: make_expert(Gated(bias=False), kind, scaling=1 + p) for name in NAMES} for p in range(n)
    ]
    return experts, torch.randn(n, 3, D)


def unified(kind="lora", names="abc", **options):
    return moe.unify(llama(), NAMES, *uploads(kind, len(names)), names=list(names), **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind, top_k", (("lora", 1), ("lora", 2), ("full", 1)))
def test_save_and_load_give_the_same_model_bit_for_bit(kind, top_k, tmp_path):
    model = unified(kind, lam=0.9, top_k=top_k, context="prefix", offset=True)
    parameters = moe.router_parameters(model) + moe.expert_parameters(model) + moe.lambda_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        moe.clamp_(model)
    folder = tmp_path / "out" / "unified"
    for _ in range(2):  # the second time over the first
        moe.save(model, folder)
    assert sorted(os.listdir(folder)) == ["moe.safetensors", "moe_config.json"]
    assert os.listdir(folder.parent) == ["unified"]
    saved = sum(t.numel() for t in moe.load_file(folder / "moe.safetensors").values())
    assert saved == sum(t.numel() for t in model.parameters() if t.requires_grad)
    again = moe.load(folder, llama())
    assert torch.equal(logits(model), logits(again)) and not torch.equal(logits(model), logits(llama()))
    for a, b in zip(moe.lambda_parameters(model), moe.lambda_parameters(again), strict=True):
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
    model, folder = unified(), tmp_path / "m"
    moe.save(model, folder)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    model.moe_config["top_k"] = {1}  # not JSON: fails before anything is moved
    with pytest.raises(TypeError):
        moe.save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    model.moe_config["top_k"] = 1

    def stop(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError):
        moe.save(model, folder)
    assert not (folder / "moe_config.json").exists() and os.listdir(tmp_path) == ["m"]


def test_unify_trains_routers_and_experts_alone_and_shares_one_state():
    model = unified()
    groups = [moe.router_parameters(model), moe.expert_parameters(model), moe.lambda_parameters(model)]
    ids = [id(parameter) for group in groups for parameter in group]
    assert [len(group) for group in groups] == [3, 3 * 3 * 2, 3] and len(set(ids)) == len(ids)
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert torch.equal(torch.stack(moe.router_parameters(model)), uploads()[1].transpose(0, 1))
    other = copy.deepcopy(model)
    assert other.routing is not model.routing
    for each in (model, other):
        assert all(layer.state is each.routing for layer in moe.layers(each))
    assert json.loads(json.dumps(model.moe_config)) == model.moe_config


def test_clamp():
    model = unified(names="a")
    for value, want in ((1.7, 1.0), (-0.2, 0.0), (0.4, 0.4)):
        with torch.no_grad():
            for lam in moe.lambda_parameters(model):
                lam.fill_(value)
        moe.clamp_(model)
        assert [lam.item() for lam in moe.lambda_parameters(model)] == [pytest.approx(want)] * 3


def test_opt_out_and_in_of_a_model_and_on_disk(tmp_path):
    model = unified(top_k=3, context="prefix")
    whole = logits(model)
    for _ in range(2):  # twice is once
        moe.disable_expert(model, "b")
    got = logits(model)
    assert model.moe_config["disabled"] == ["b"] and (got - whole).abs().max() > 1e-3
    moe.save(model, tmp_path / "m")
    again = moe.load(tmp_path / "m", llama())
    assert again.moe_config["disabled"] == ["b"] and torch.equal(logits(again), got)
    one = remove_expert(*moe.read(tmp_path / "m"), "b")
    moe.write(tmp_path / "gone", *one)
    gone = moe.load(tmp_path / "gone", llama())
    assert [gone.moe_config[key] for key in ("names", "top_k", "disabled")] == [["a", "c"], 2, []]
    close(logits(gone), got)
    moe.enable_expert(again, "b")
    assert torch.equal(logits(again), whole)
    for change in (moe.disable_expert, moe.enable_expert):
        with pytest.raises(ValueError, match="'d'.* a, b, c"):
            change(model, "d")
    moe.disable_expert(model, "c")
    with pytest.raises(ValueError, match="'a' is the last expert"):
        moe.disable_expert(model, "a")
    assert model.moe_config["disabled"] == ["b", "c"]
    with pytest.raises(ValueError, match="'c' is the last expert"):
        remove_expert(*remove_expert(*one, "a"), "c")
    with pytest.raises(ValueError, match="no expert is called 'b'"):
        remove_expert(*one, "b")


@pytest.mark.parametrize("kind", ("lora", "full"))
def test_an_expert_joins_and_the_others_stay_as_they_are(kind, tmp_path):
    experts, vectors = uploads(kind)
    options = dict(lam=0.8, top_k=2)
    model = moe.unify(llama(), NAMES, experts[:2], vectors[:2], names=["a", "b"], **options)
    moe.save(model, tmp_path / "m")
    both = moe.assemble(llama(), *moe.read(tmp_path / "m"), [("c", experts[2], vectors[2])])
    want = unified(kind, **options)
    assert torch.equal(logits(both), logits(want)) and both.moe_config == want.moe_config


@pytest.mark.parametrize("top_k", (1, 2))
def test_counts(top_k):
    model = moe.unify(llama(), NAMES[::-1], *uploads(), top_k=top_k)
    ids, mask = torch.randint(50, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    model(ids)
    assert moe.counts(model).tolist() == [[0] * K] * 3  # not asked for
    model.routing.record, model.routing.token_mask = True, mask
    seen = {}

    def note(layer, inputs):
        seen[layer] = layer.choose(layer.router(inputs[0], layer.state.context(inputs[0])))[0]

    for layer in moe.layers(model):
        layer.register_forward_pre_hook(note)
    for times in (1, 2):
        model(ids)
        got = moe.counts(model)
        assert got.dtype == torch.int64 and (got.sum(1) == times * 10 * top_k).all()
    # in the order of ffn_names, from the last layer to the first
    want = [[2 * int((seen[layer][mask] == p).sum()) for p in range(K)] for layer in moe.layers(model)]
    assert got.tolist() == want
    moe.reset_counts(model)
    assert moe.counts(model).abs().sum() == 0


def test_full_experts_do_not_keep_the_seed_models_ffn():
    model = unified("full")
    assert not any(isinstance(module, nn.Linear) for layer in moe.layers(model) for module in layer.modules())
    model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in moe.expert_parameters(model))


# ---------------------------------------------------------------- errors


def spoil(p, layer, **entries):
    """A change of expert p in a layer: entries, named with _ for the dot, set, or taken out where None."""

    def change(experts):
        e = experts[p][NAMES[layer]]
        for key, value in entries.items():
            key = key.replace("__", ".")
            if value is None:
                del e[key]
            else:
                e[key] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ffn_names=NAMES[:2]), r"experts\[0\] and ffn_names .*'model.layers.2.mlp'"),
        (dict(ffn_names=NAMES[:1] * 3), "ffn_names must be distinct"),
        (dict(ffn_names=[]), "ffn_names must be .*at least one"),
        (dict(vectors=torch.zeros(2, 3, D)), "vectors has 2 entries, experts has 3"),
        (dict(vectors=torch.zeros(3, 2, D)), r"vectors\[0\] is \(2, 8\), not \(L = 3, d\)"),
        (dict(vectors=torch.zeros(3, 3, D + 1)), r"vectors \(3, 9\), not \(3 experts, 8\)"),
        (dict(names=["a"]), "names has 1 entries, experts has 3"),
        (dict(top_k=4), r"top_k is 4, not in 1..3"),
        (dict(top_k=0), "top_k is 0"),
        (dict(weighting="softmax"), "weighting is 'softmax'"),
        (dict(context="mean"), "context is 'mean'"),
        (dict(lam=1.5), r"lam must be in \[0, 1\], not 1.5"),
        (spoil(1, 0, scaling=None), r"experts\[1\].*'scaling'"),
        (spoil(1, 0, up_proj__lora_A=None), r"experts\[1\].*'up_proj.lora_A'|up_proj.lora_B is"),
        (
            spoil(2, 1, down_proj__lora_A=torch.zeros(2, 3)),
            r"layers.1.mlp: experts\[2\]: down_proj.lora_A is \(2, 3\), not \(2, 20\)",
        ),
        (spoil(0, 1, w1__lora_A=torch.zeros(2, 3)), r"experts\[0\], of kind lora.*\['w1.lora_A'\]"),
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
        arguments["vectors"] = vectors[: len(experts)]
    else:
        arguments |= change
    model = llama()
    with pytest.raises(ValueError, match=message):
        moe.unify(model, **arguments)
    assert not any(isinstance(module, MoELayer) for module in model.modules())
    assert not hasattr(model, "routing")


def test_unify_takes_ffns_that_it_knows_alone():
    experts, vectors = uploads()
    for name, message in (
        ("layers.7.mlp", "no module 'model.layers.7.mlp'"),
        ("layers.0.self_attn", "Attention"),
    ):
        with pytest.raises(ValueError, match=message):
            name = f"model.{name}"
            moe.unify(llama(), [name], [{name: experts[0][NAMES[0]]}], vectors[:1, :1])
    scaled, biased = TwoLayer(), Gated()
    scaled.ln = nn.LayerNorm(H)
    e = make_expert(biased, "full")
    del e["down_proj.bias"]
    for ffn, expert, message in (
        (scaled, make_expert(TwoLayer(), "lora"), r"\['ln.bias', 'ln.weight'\]"),
        (biased, e, "down_proj.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            MoELayer(ffn, [expert], Router(torch.zeros(1, D)), RoutingState())
    with pytest.raises(ValueError, match=r"vectors must be \(K, d\)"):
        Router(torch.zeros(D))


@pytest.mark.parametrize(
    "state, message",
    (
        (dict(context_mask=torch.ones(2, 4)), r"context_mask is \(2, 4\), the tokens are \(2, 5\)"),
        (dict(record=True, token_mask=torch.ones(5)), r"token_mask is \(5,\)"),
        (dict(mode="batch"), "mode is 'batch'"),
    ),
)
def test_a_mask_or_mode_that_does_not_fit_is_refused(state, message):
    layer, _, _ = make_layer()
    layer.state = RoutingState(**state)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 5, D))


def test_moe_imports_torch_and_safetensors_alone():
    code = "import sys, torch, safetensors.torch; before = set(sys.modules); import moe; "
    code += "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    home = Path(moe.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) <= {"moe", "torch", "safetensors"} | sys.stdlib_module_names
