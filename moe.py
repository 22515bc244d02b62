"""MetaMoE's mixture-of-experts layer: independently trained FFN experts under one context-aware router.

The layer of "MetaMoE: Diversity-Aware Proxy Selection for Privacy-Preserving Mixture-of-Experts Unification"
(arXiv 2605.14289, ICML 2026), Eq. 5-6. It needs torch and safetensors alone and can be copied:

    model = unify(seed_model, ffn_names, experts, vectors)  # experts: K x {ffn_name: LoRA or full weights}
    model.routing.context_mask = prompt_mask  # (B, T), tokens averaged into the router's context
    save(model, "unified"); model = load("unified", fresh_seed_model)
    disable_expert(model, "hotels")  # opt out without training; enable_expert undoes it

`generate` and key-value caches also need metamoe/serving/generation.py.
Shapes: B sequences, T tokens, N = B T, d width, h the FFN's hidden width, K experts, k = top_k, r LoRA rank,
L layers.
"""

import importlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTINGS = ("stopgrad", "literal", "renormalized")
CONTEXTS = ("fixed", "prefix", "none")
# Up to so many tokens LoRA experts run behind masks, all at once: K - 1 times more low-rank work, but no
# sorting, no wait on CUDA, no product of a new size in each batch. The number of tokens decides what is
# faster, not K.
FEW_TOKENS = {"cpu": 2048, "cuda": 65536}
# an FFN is known by the names of its linears, the down projection last, and of its activation
FFNS = (
    (("gate_proj", "up_proj", "down_proj"), "act_fn"),  # LLaMA: down(act(gate(x)) * up(x))
    (("c_fc", "c_proj"), "gelu"),  # open_clip
    (("fc1", "fc2"), "activation_fn"),  # CLIP in transformers
)


class Router(nn.Module):
    """The context-aware router, Eq. 6: pi = softmax(z~ . e_p), z~ = (1 - lambda) z + lambda z_x.

    vectors: (K, d), the uploaded mean FFN inputs that e_p starts from. lam: where lambda starts, in [0, 1].
    offset: subtract |e_p|^2 / 2 from the logits, which makes the largest one the nearest mean.
    disabled: indices of experts that have opted out: their pi is 0, the others' sum to 1.
    """

    def __init__(self, vectors: Tensor, lam: float = 0.3, offset: bool = False):
        super().__init__()
        if vectors.dim() != 2:
            raise ValueError(f"vectors must be (K, d), not {tuple(vectors.shape)}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], not {lam}")
        self.vectors = nn.Parameter(vectors.detach().to(torch.float32, copy=True))
        self.lam = nn.Parameter(torch.tensor(float(lam), dtype=torch.float32, device=vectors.device))
        self.offset, self.disabled = offset, []

    def forward(self, z: Tensor, context: Tensor | None) -> Tensor:
        """pi (B, T, K) in float32 for z (B, T, d) and a context (B, 1 or T, d), or None for z~ = z."""
        with torch.autocast(z.device.type, enabled=False):  # bf16 logits of size 100 are off by 0.5
            e = self.vectors.float().t()  # (d, K)
            logits = z.float() @ e  # (B, T, K)
            if context is not None:  # z~ . e is linear in z~: blend the K logits, not the d features
                logits = (1 - self.lam) * logits + self.lam * (context.float() @ e)
            if self.offset:
                logits = logits - e.square().sum(0) / 2
            if self.disabled:
                out = torch.tensor(self.disabled, device=logits.device)
                logits = logits.index_fill(-1, out, -math.inf)
            return logits.softmax(-1)  # Eq. 6

    @torch.no_grad()
    def clamp_(self):
        """Project lambda onto [0, 1]; call it after every optimiser step."""
        self.lam.clamp_(0, 1)


class MoELayer(nn.Module):
    """The MoE layer in an FFN's place, Eq. 5: y_t = sum over the top-k experts p of weight_p FFN_p(z_t).

    ffn: the seed model's FFN, gated or two-layer (FFNS). With LoRA experts its linears, frozen, become the
    layer's.
    experts: K dicts, all of one kind. LoRA, W + scaling B A: {"up_proj.lora_A": (r, d_in), "up_proj.lora_B":
        (d_out, r), ..., "scaling": float}; ranks may differ, linears may be left out. Full:
        {"up_proj.weight": (d_out, d_in), ...}.
    weighting: of the chosen experts. "literal": pi_p, as in Eq. 5. "renormalized": pi_p / sum of the chosen
        pi. "stopgrad": pi_p / stop_gradient(sum), which still trains the router at top-1.
    Raises ValueError, naming the argument, where shapes, counts or kinds disagree.
    """

    def __init__(self, ffn, experts, router, state, top_k=1, weighting="stopgrad"):
        super().__init__()
        self.linears, act = _parts(ffn)
        want = (len(experts), getattr(ffn, self.linears[0]).in_features)
        if tuple(router.vectors.shape) != want:
            found = tuple(router.vectors.shape)
            raise ValueError(f"router has vectors {found}, not ({want[0]} experts, {want[1]})")
        if not 1 <= top_k <= len(experts):
            raise ValueError(f"top_k is {top_k}, not in 1..{len(experts)}, the number of experts")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}, not one of {WEIGHTINGS}")
        self.kind, self.act = _kind(experts), getattr(ffn, act)
        self.experts, self.scaling = _stack(experts, ffn, self.linears, self.kind), None
        if self.kind == "lora":
            self.scaling = [float(e["scaling"]) for e in experts]
            for name in self.linears:
                setattr(self, name, getattr(ffn, name).requires_grad_(False))
        self.router, self.state = router, state
        self.top_k, self.weighting = top_k, weighting
        self.index = 0  # of this layer in the model
        counts = torch.zeros_like(router.vectors[:, 0], dtype=torch.long)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """y, of x's shape, for x (B, T, d), or (T, d) as one sequence."""
        z = x if x.dim() == 3 else x.unsqueeze(0)  # (B, T, d)
        pi = self.router(z, self.state.context(z, self.index))  # (B, T, K)
        chosen, weight = self.choose(pi)  # (B, T, k) both
        if self.state.record:
            self.count(chosen, z)
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):  # cast once; autocast would cast again for every expert
            dtype = torch.get_autocast_dtype(device)
        few = z.shape[0] * z.shape[1] <= FEW_TOKENS.get(device, FEW_TOKENS["cuda"])
        mix = self._mix_masked if few and self.kind == "lora" else self._mix_by_expert
        y = mix(z.flatten(0, 1).to(dtype), chosen.flatten(0, 1), weight.flatten(0, 1).to(dtype))  # (N, d)
        return y.view(x.shape)

    def choose(self, pi: Tensor) -> tuple[Tensor, Tensor]:
        """The top-k experts of pi (..., K) and their weights, (..., k) both; of equal ones the lowest index
        first."""
        k = min(self.top_k, len(self.counts) - len(self.router.disabled))
        pi, chosen = pi.sort(dim=-1, descending=True, stable=True)  # topk promises no order among equals
        pi, chosen = pi[..., :k], chosen[..., :k]
        if self.weighting == "literal":
            return chosen, pi
        total = pi.sum(-1, keepdim=True)
        return chosen, pi / (total.detach() if self.weighting == "stopgrad" else total)

    def _mix_by_expert(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Eq. 5, one expert after the other: y (N, d) for x (N, d), chosen and weight (N, k)."""
        order = chosen.flatten().argsort(stable=True)  # (N k), the (token, choice) pairs sorted by expert
        sizes = chosen.flatten().bincount(minlength=len(self.counts)).tolist()  # K: pairs of each expert
        token = order // chosen.shape[1]  # (N k)
        pairs = token.split(sizes), x[token].split(sizes), weight.flatten()[order].split(sizes)
        weights, y = self._weights(x.dtype), torch.zeros_like(x)
        for p, (t, z, w) in enumerate(zip(*pairs, strict=True)):  # (n_p), (n_p, d), (n_p): what expert p gets
            y.index_add_(0, t, w.unsqueeze(1) * self._expert(p, z, weights))  # Eq. 5
        return y

    def _mix_masked(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Eq. 5 for LoRA experts, as above, without sorting: all experts' A and B at once, behind masks.

        W z runs once a token, ahead of the choices; W_down, linear, runs once behind their weighted sum.
        """
        *ups, down = self.linears
        weights, last = weight.split(1, dim=1), chosen.shape[1] - 1  # k of (N, 1)
        # a tensor of the scalings would be a copy to the device, and a wait, in every layer
        masks = torch.stack([(chosen == p).to(x.dtype) * s for p, s in enumerate(self.scaling)], dim=-1)
        masks = masks.unsqueeze(-1).unbind(1)  # k of (N, K, 1)
        base, hidden = [], []
        for W, bias, A, B in (self._flat(name, x.dtype) for name in ups):
            base.append((F.linear(x, W, bias), A, B))  # (N, h), (K r, d), (K r, h)
        for j, mask in enumerate(masks):
            add = Tensor.addmm_ if j == last else Tensor.addmm  # in place: a copy costs more than the product
            u = [y if A is None else add(y, _low_rank(x, A, mask), B) for y, A, B in base]
            hidden.append(self._activate(u))  # k of (N, h)
        W, bias, A, B = self._flat(down, x.dtype)
        if last == 0:  # top-1: weigh the d numbers of y, not the h of hidden
            y = F.linear(hidden[0], W, bias)
            return (y if A is None else y.addmm_(_low_rank(hidden[0], A, masks[0]), B)) * weight
        hidden = [h * w for h, w in zip(hidden, weights, strict=True)]
        y = F.linear(_sum(hidden), W)
        if A is not None:
            y.addmm_(_sum([_low_rank(h, A, mask) for h, mask in zip(hidden, masks, strict=True)]), B)
        return y if bias is None else y + _sum(weights) * bias  # (N, d) Eq. 5

    def _expert(self, p: int, z: Tensor, weights: dict) -> Tensor:
        """FFN_p(z): (n, d) -> (n, d)."""
        *ups, down = self.linears
        hidden = self._activate([self._linear(p, z, *weights[name]) for name in ups])  # (n, h)
        return self._linear(p, hidden, *weights[down])

    def _linear(self, p, z, W, bias, A, B):
        y = F.linear(z, W[p], bias[p])
        if A[p] is None:
            return y
        return y.addmm_(F.linear(z, A[p]), B[p].t(), alpha=self.scaling[p])  # W z + b + scaling B A z

    def _activate(self, u):
        return self.act(u[0]) * u[1] if len(u) == 2 else self.act(u[0])

    def _tensors(self, name, dtype):
        """W, bias, A, B of a linear in dtype, None where there is none; the experts' own have K in front."""
        stack = self.experts[name] if name in self.experts else None
        base = stack if self.kind == "full" else getattr(self, name)
        found = [getattr(base, leaf, None) for leaf in ("weight", "bias")]
        found += [getattr(stack, leaf, None) for leaf in ("A", "B")]
        return [None if t is None else t.to(dtype) for t in found]

    def _flat(self, name, dtype):
        """W, bias and all experts' A (K r, d_in) and B (K r, d_out)."""
        W, bias, A, B = self._tensors(name, dtype)
        return (W, bias, None, None) if A is None else (W, bias, A.flatten(0, 1), B.mT.flatten(0, 1))

    def _weights(self, dtype):
        """{linear: (W, bias, A, B)}, each a list over the experts."""
        weights, K = {}, len(self.counts)
        for name in self.linears:
            tensors = self._tensors(name, dtype)
            shared = self.kind == "lora"  # W and bias are the seed model's
            weights[name] = []
            for t, common in zip(tensors, (shared, shared, False, False), strict=True):
                # unbind: one gradient for a whole stack, not one of its size for every expert
                weights[name].append([t] * K if t is None or common else t.unbind(0))
        return weights

    def count(self, chosen: Tensor, z: Tensor):
        """Add the choices (B, T, k) of the tokens in token_mask, else of the real ones, to `counts`."""
        mask = self.state.real if self.state.token_mask is None else self.state.token_mask
        if mask is not None:
            chosen = chosen[_mask("token_mask", mask, z)]
        self.counts += chosen.flatten().bincount(minlength=len(self.counts))


def _low_rank(z, A, mask):
    """(N, K r): A z of all experts, times the mask (N, K, 1) that leaves a token's own."""
    return (F.linear(z, A).view(len(z), mask.shape[1], -1) * mask).flatten(1)


def _sum(tensors):
    return tensors[0] if len(tensors) == 1 else torch.stack(tuple(tensors)).sum(0)


def _mask(name, mask, z):
    if mask.shape != z.shape[:2]:
        raise ValueError(f"{name} is {tuple(mask.shape)}, the tokens are {tuple(z.shape[:2])}")
    return mask.to(z.device, torch.bool)


@dataclass(eq=False)
class RoutingState:
    """What the router knows of a batch beside its tokens; one object for all layers.

    mode: the context z_x of Eq. 6. "fixed": the mean over the tokens of context_mask, one for the whole
        sequence; a key-value cache keeps that of the first forward, the prompt's. "prefix": the running mean
        up to each token, so no token is routed by its future. "none": no context.
    context_mask: (B, T) bool, None for all tokens, in a language model all of its attention mask. Padding
    must be False.
    token_mask: (B, T) bool, the tokens that `record` counts, None as above.
    record: add the number of routed tokens (each of the k choices counts) to every layer's `counts`.

    The masks hold until they are changed or set to None; `generate` does without them.
    """

    mode: str = "fixed"
    context_mask: Tensor | None = None
    token_mask: Tensor | None = None
    record: bool = False
    real: Tensor | None = field(default=None, repr=False)  # (B, T), of the attention mask
    cached: object | None = field(default=None, repr=False)  # generation.Bookkeeper, for key-value caches

    def context(self, z: Tensor, layer: int = 0) -> Tensor | None:
        """z_x of Eq. 6 for z (B, T, d): (B, 1, d) if fixed, (B, T, d) if prefix, float32; None without
        context.

        Where no token is in the mask (yet) it is 0. ValueError on an unknown mode, or a mask that is not (B,
        T).
        """
        if self.mode == "none":
            return None
        if self.mode not in CONTEXTS:
            raise ValueError(f"mode is {self.mode!r}, not one of {CONTEXTS}")
        if self.cached is None:
            sums, numbers = self._sums(z)
        else:
            sums, numbers = self.cached.extend(layer, self.mode, self._sums, z)
        return sums / numbers.clamp(min=1)

    def _sums(self, z):
        """Sums (B, 1 or T, d) and numbers (B, 1 or T, 1) of the tokens in the mask."""
        z = z.float()  # a bf16 sum over a long sequence loses its last terms
        mask = self.real if self.context_mask is None else self.context_mask
        if mask is None:
            mask = torch.ones(1, z.shape[1], 1, dtype=torch.bool, device=z.device)
        else:
            mask = _mask("context_mask", mask, z).unsqueeze(-1)  # (B, T, 1)
            z = z.masked_fill(~mask, 0)  # not z * mask: padding may hold NaN
        if self.mode == "fixed":
            return z.sum(1, keepdim=True), mask.sum(1, keepdim=True)
        return z.cumsum(1), mask.cumsum(1)


def _before_forward(module, args, kwargs):
    """Before a language model's forward: which tokens are real, and what the router knows of those in the
    cache."""
    state = module.routing
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    given = dict(zip(names, args, strict=False)) | kwargs
    ids = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if ids is None:
        return  # the forward has its own message
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    length = 0 if cache is None else int(cache.get_seq_length())
    if state.cached is not None:
        state.cached.begin(module, state.mode, given, length)
        mask = state.cached.attention_mask(given, state.mode, length)
    elif length:
        raise RuntimeError(NEEDS_GENERATION)
    state.real = None
    if torch.is_tensor(mask) and mask.dim() == 2:
        state.real = mask[:, -ids.shape[1] :].bool()  # (B, T)
    elif mask is not None and state.context_mask is None and state.mode != "none":
        raise ValueError(
            "the attention mask is not (B, T), and does not say which tokens are real: "
            "set routing.context_mask"
        )


def _after_forward(module, args, kwargs, output):
    state = module.routing
    if state.cached is not None:
        state.cached.end(state.mode, kwargs, output)
    if not torch.is_grad_enabled():  # else a backward that recomputes the forward needs it again
        state.real = None


NEEDS_GENERATION = (
    "generate, and a forward with a key-value cache that holds tokens, need metamoe/serving/generation.py "
    "beside moe.py (in a package: generation.py)"
)


def _refuse_generation(*args, **kwargs):
    raise RuntimeError(NEEDS_GENERATION)


def _serving(name):
    """metamoe/serving/NAME.py, in a package NAME.py beside this file; None where there is none."""
    target = f"{__package__}.{name}" if __package__ else f"metamoe.serving.{name}"
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if not f"{target}.".startswith(f"{error.name}."):
            raise
        return None


def _parts(ffn):
    """The names of ffn's linears and of its activation."""
    for linears, act in FFNS:
        if all(hasattr(ffn, name) for name in (*linears, act)):
            known = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
            unknown = {name for name, _ in ffn.named_parameters()} - known
            if unknown:
                raise ValueError(f"ffn has parameters that the MoE layer would leave out: {sorted(unknown)}")
            return linears, act
    raise ValueError(f"ffn is a {type(ffn).__name__}; known are modules with the attributes of {FFNS}")


def _kind(experts):
    """The kind "lora" or "full", the same for all experts."""
    kinds = {"lora" if any(".lora_" in key for key in e) or "scaling" in e else "full" for e in experts}
    if len(kinds) != 1:
        raise ValueError(f"experts must be all LoRA or all full, and at least one; these are {sorted(kinds)}")
    return kinds.pop()


def _stack(experts, ffn, linears, kind):
    """{linear: tensors stacked}: A (K, r, d_in), B (K, d_out, r), or weight (K, d_out, d_in), bias (K,
    d_out).

    r is the largest rank; an expert of a smaller one gets zeros, which stay zero in training. No ranks, no
    entry.
    """
    leaves = ("lora_A", "lora_B") if kind == "lora" else ("weight", "bias")
    known = {f"{name}.{leaf}" for name in linears for leaf in leaves} | {"scaling"}
    for p, e in enumerate(experts):
        if set(e) - known:
            raise ValueError(f"experts[{p}], of kind {kind}, has unknown entries {sorted(set(e) - known)}")
        if kind == "lora" and "scaling" not in e:
            raise ValueError(f"experts[{p}] has no scaling")
    out = nn.ModuleDict()
    for name in linears:
        own = [_own(e, name, getattr(ffn, name), kind, p) for p, e in enumerate(experts)]
        if kind == "lora":
            rank = max(len(t["lora_A"]) for t in own)
            # fp32, whatever the seed model is stored in: bf16 parameters would round small updates away
            stack = {
                "A": [F.pad(t["lora_A"].float(), (0, 0, 0, rank - len(t["lora_A"]))) for t in own],
                "B": [F.pad(t["lora_B"].float(), (0, rank - t["lora_B"].shape[1])) for t in own],
            }
            if rank == 0:
                continue
        else:
            stack = {leaf: [t[leaf] for t in own] for leaf in own[0]}
        out[name] = nn.ParameterDict({leaf: nn.Parameter(torch.stack(ts)) for leaf, ts in stack.items()})
    return out


def _own(e, name, linear, kind, p):
    """{leaf: tensor}, expert p's own of one linear, in the right shapes."""
    device = linear.weight.device
    own = {key: t for key, t in e.items() if key.startswith(f"{name}.")}
    tensors = {key.split(".")[1]: t.detach().to(device) for key, t in own.items()}
    want = {leaf: tuple(t.shape) for leaf, t in linear.named_parameters()}
    if kind == "lora":
        d_out, d_in = linear.weight.shape
        if not tensors:  # no update of this linear
            tensors = {
                "lora_A": linear.weight.new_zeros(0, d_in),
                "lora_B": linear.weight.new_zeros(d_out, 0),
            }
        r = len(tensors.get("lora_A", ()))
        want = {"lora_A": (r, d_in), "lora_B": (d_out, r)}
    shapes = {leaf: tuple(t.shape) for leaf, t in tensors.items()}
    if shapes != want:
        raise ValueError(f"experts[{p}]: {name} has the shapes {shapes}, not {want}")
    return tensors


def seed_expert(ffn: nn.Module, like: dict) -> dict:
    """e_0 of Eq. 6: the seed model's own FFN as an expert of the kind of `like`, one of the other experts.

    For LoRA, A and B are both zero, so neither gets a gradient: training leaves it as it is.
    """
    if _kind([like]) == "lora":
        return {key: v if key == "scaling" else torch.zeros_like(v) for key, v in like.items()}
    return {key: v.detach().clone() for key, v in ffn.named_parameters()}


def unify(
    model,
    ffn_names,
    experts,
    vectors,
    *,
    names=None,
    lam=0.3,
    top_k=1,
    weighting="stopgrad",
    context="fixed",
    offset=False,
):
    """Replace the L FFNs of a seed model by MoE layers (Sec. 3.4), in place; returns the model.

    ffn_names: the FFNs' module paths, such as "model.layers.0.mlp". experts: K x {ffn_name: expert of
    MoELayer}.
    vectors: K x (L, d), or one (K, L, d). names: of the experts. The others: see Router, MoELayer,
    RoutingState.mode.

    Afterwards only routers and experts require gradients; model.routing is the RoutingState, model.moe_config
    describes the model. A language model of transformers takes padding from its attention mask, and
    generates. Raises ValueError, naming the argument, where anything disagrees; the model then still has its
    FFNs.
    """
    ffn_names, vectors = list(ffn_names), [torch.as_tensor(v) for v in vectors]
    names = [f"expert{p + 1}" for p in range(len(experts))] if names is None else list(names)
    _check(ffn_names, experts, vectors, names, context)
    kind, state = _kind([e[name] for e in experts for name in ffn_names]), RoutingState(mode=context)
    new = []
    for index, name in enumerate(ffn_names):
        try:
            ffn = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"ffn_names: the model has no module {name!r}") from error
        try:
            device = next(ffn.parameters()).device
            router = Router(torch.stack([v[index].to(device) for v in vectors]), lam, offset)
            new.append(MoELayer(ffn, [e[name] for e in experts], router, state, top_k, weighting))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
    model.requires_grad_(False)
    _install(model, dict(zip(ffn_names, new, strict=True)), state)
    model.moe_config = dict(
        names=names,
        ffn_names=ffn_names,
        kind=kind,
        top_k=top_k,
        weighting=weighting,
        context=context,
        offset=offset,
        lam=float(lam),
        scaling=[layer.scaling for layer in new],
        seed=_source(model),
        disabled=[],
    )
    return model


def _check(ffn_names, experts, vectors, names, context):
    K, L = len(experts), len(ffn_names)
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}, not one of {CONTEXTS}")
    if L == 0 or len(set(ffn_names)) < L:
        raise ValueError("ffn_names must be distinct module paths, at least one")
    for what, n in (("vectors", len(vectors)), ("names", len(names))):
        if n != K:
            raise ValueError(f"{what} has {n} entries, experts has {K}")
    for p, (e, v) in enumerate(zip(experts, vectors, strict=True)):
        if set(e) != set(ffn_names):
            raise ValueError(f"experts[{p}] and ffn_names differ in {sorted(set(e) ^ set(ffn_names))}")
        if v.dim() != 2 or len(v) != L:
            raise ValueError(f"vectors[{p}] is {tuple(v.shape)}, not (L = {L}, d)")


def _install(model, new, state):
    """Put the layers {name: MoELayer} in the FFNs' places; a language model's forwards then inform
    `state`."""
    for index, (name, layer) in enumerate(new.items()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.index = index
    model.routing = state
    if not hasattr(model, "generate"):
        return
    base = model.base_model  # the transformer below the head, which every forward goes through
    base.routing = state
    base.register_forward_pre_hook(_before_forward, with_kwargs=True)
    base.register_forward_hook(_after_forward, with_kwargs=True)
    generation = _serving("generation")
    if generation is None:
        model.generate = _refuse_generation
    else:
        generation.attach(model)


def _source(model):
    """Where the seed model came from: a hub id, or a local folder's name and "/", not its path."""
    source = str(getattr(model, "name_or_path", "") or "")
    return Path(source).name + "/" if os.path.isabs(source) or os.path.isdir(source) else source


def layers(model) -> list[MoELayer]:
    """The MoE layers of a unified model, in the order of its ffn_names."""
    return [model.get_submodule(name) for name in model.moe_config["ffn_names"]]


def router_parameters(model) -> list[nn.Parameter]:
    """The routing vectors e_p, (K, d) a layer."""
    return [layer.router.vectors for layer in layers(model)]


def lambda_parameters(model) -> list[nn.Parameter]:
    """lambda, a scalar a layer."""
    return [layer.router.lam for layer in layers(model)]


def expert_parameters(model) -> list[nn.Parameter]:
    """The experts' stacked weights."""
    return [parameter for layer in layers(model) for parameter in layer.experts.parameters()]


def clamp_(model):
    """Project every layer's lambda onto [0, 1]; call it after every optimiser step."""
    for layer in layers(model):
        layer.router.clamp_()


def reset_counts(model):
    for layer in layers(model):
        layer.counts.zero_()


def counts(model) -> Tensor:
    """How many (token, choice) pairs went to each expert while routing.record was set: (L, K) int64."""
    return torch.stack([layer.counts for layer in layers(model)])


def save(model, folder):
    """Write what unify added to a folder: experts, routing vectors, lambdas, configuration; no seed model.

    The files are written aside and moved in, the configuration last: a folder that has one is complete.
    """
    tensors = {}
    for name, layer in zip(model.moe_config["ffn_names"], layers(model), strict=True):
        for part, module in (("router", layer.router), ("experts", layer.experts)):
            tensors |= {f"{name}.{part}.{key}": t.contiguous() for key, t in module.state_dict().items()}
    write(folder, model.moe_config, tensors)


def write(folder, config, tensors):
    """What `save` writes. tensors: {"model.layers.0.mlp.router.vectors": (K, d), ...}."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        save_file(tensors, aside / "moe.safetensors", metadata={"format": "pt"})
        (aside / "moe_config.json").write_text(json.dumps(config, indent=1) + "\n")
        shutil.copymode(aside / "moe_config.json", aside / "moe.safetensors")  # save_file ignores the umask
        # else a crash leaves the old one beside new tensors
        (folder / "moe_config.json").unlink(missing_ok=True)
        for file in ("moe.safetensors", "moe_config.json"):
            os.replace(aside / file, folder / file)
    finally:
        shutil.rmtree(aside)


def read(folder):
    """(configuration, tensors) of a folder that `save` wrote."""
    config = {"seed": "", "disabled": []} | json.loads((Path(folder) / "moe_config.json").read_text())
    return config, load_file(Path(folder) / "moe.safetensors")


def load(folder, model=None, **options):
    """The unified model of `save` from its folder. model: a fresh seed model, which is changed in place and
    returned.

    Without one metamoe/serving/seed_model.py loads it through transformers, with `options` (dtype,
    device_map, ...), from the hub or from the local folders named there. FileNotFoundError where it is not
    there.
    """
    config, tensors = read(folder)
    if model is None:
        seed_model = _serving("seed_model")
        if seed_model is None:
            raise FileNotFoundError(
                "no metamoe/serving/seed_model.py: give the seed model, moe.load(folder, model)"
            )
        model = seed_model.load_seed(Path(folder).absolute(), config["seed"], options)
    return assemble(model, config, tensors)


def unstack(config, tensors):
    """(experts, vectors) as `unify` takes them, of what `read` returns."""
    K, ffn_names = len(config["names"]), config["ffn_names"]
    experts = [{name: {} for name in ffn_names} for _ in range(K)]
    for p, e in enumerate(experts):
        if config["kind"] == "lora":
            for name, scaling in zip(ffn_names, config["scaling"], strict=True):
                e[name]["scaling"] = scaling[p]
        for key, stack in tensors.items():
            name, found, rest = key.rpartition(".experts.")
            if found:
                e[name][rest.replace(".A", ".lora_A").replace(".B", ".lora_B")] = stack[p]
    vectors = torch.stack([tensors[f"{name}.router.vectors"] for name in ffn_names], dim=1)  # (K, L, d)
    return experts, list(vectors)


def assemble(model, config, tensors, joining=()):
    """The unified model of what `read` returns, from a fresh seed model, in place.

    joining: experts to add, (name, {ffn_name: expert of MoELayer}, vectors (L, d)) each; the others stay as
    they are.
    """
    experts, vectors = unstack(config, tensors)
    names = list(config["names"])
    for name, expert, own in joining:
        names.append(name)
        experts.append(expert)
        vectors.append(own)
    options = {key: config[key] for key in ("lam", "top_k", "weighting", "context", "offset")}
    model = unify(model, config["ffn_names"], experts, vectors, names=names, **options)
    with torch.no_grad():
        for name, lam in zip(config["ffn_names"], lambda_parameters(model), strict=True):
            lam.copy_(tensors[f"{name}.router.lam"])
    _disable(model, list(config["disabled"]))
    return model


def disable_expert(model, name):
    """Opt out: no token goes to the expert any more, its pi is 0 and the others' sum to 1. Nothing is
    trained.

    `save` keeps its weights; `remove_expert` leaves them out. ValueError for an unknown expert, or the last
    one.
    """
    config = model.moe_config
    out = {*config["disabled"], _known(config, name)}
    if len(out) == len(config["names"]):
        raise ValueError(f"{name!r} is the last expert: a model without one has no FFN")
    _disable(model, [other for other in config["names"] if other in out])


def enable_expert(model, name):
    """Opt in again. ValueError where there is no such expert."""
    name = _known(model.moe_config, name)
    _disable(model, [other for other in model.moe_config["disabled"] if other != name])


def _known(config, name):
    if name not in config["names"]:
        raise ValueError(f"no expert is called {name!r}; there are {', '.join(config['names'])}")
    return name


def _disable(model, disabled):
    names = model.moe_config["names"]
    model.moe_config["disabled"] = disabled
    for layer in layers(model):
        layer.router.disabled = [names.index(name) for name in disabled]


def remove_expert(config, tensors, name):
    """(configuration, tensors) of what `read` returns, without the expert: its weights and routing vectors
    are gone.

    The outputs are those of `disable_expert`. ValueError for an unknown expert, or the last one.
    """
    keep = [p for p, other in enumerate(config["names"]) if other != _known(config, name)]
    if not keep:
        raise ValueError(f"{name!r} is the last expert: a model without one has no FFN")
    config = config | {
        "names": [config["names"][p] for p in keep],
        "top_k": min(config["top_k"], len(keep)),
        "scaling": [own and [own[p] for p in keep] for own in config["scaling"]],
        "disabled": [other for other in config["disabled"] if other != name],
    }
    return config, {key: t if key.endswith(".router.lam") else t[keep] for key, t in tensors.items()}
