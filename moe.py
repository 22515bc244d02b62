"""MetaMoE's mixture-of-experts layer: independently trained FFN experts and a context-aware router in one model.

The layer of "MetaMoE: Diversity-Aware Proxy Selection for Privacy-Preserving Mixture-of-Experts Unification"
(arXiv 2605.14289, ICML 2026), Eq. 5-6. This file needs torch and safetensors alone and can be copied:

    model = unify(seed, ffn_names, experts, vectors)      # experts: K x {ffn_name: LoRA or full FFN weights}
    model.routing.context_mask = prompt_mask              # (B, T), what the router's context is the mean of
    save(model, "unified"); model = load("unified", fresh_seed)
    model.generate(ids, attention_mask=mask)              # a language model of transformers: with or without a cache
    disable_expert(model, "hotels")                       # opt out, without training; enable_expert: in again

Letters in shapes: B sequences, T tokens, N = B T, d width, h the FFN's hidden width, K experts, k = top_k,
r LoRA rank, L layers.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTINGS = ("stopgrad", "literal", "renormalized")
CONTEXTS = ("fixed", "prefix", "none")
CROP = 32  # so many tokens can be taken back from the end of a key-value cache (speculative decoding does)
# an FFN is known by the names of its linears, the last of them the down projection, and of its activation
FFNS = (
    (("gate_proj", "up_proj", "down_proj"), "act_fn"),  # LLaMA: down(act(gate(x)) * up(x))
    (("c_fc", "c_proj"), "gelu"),  # open_clip
    (("fc1", "fc2"), "activation_fn"),  # CLIP in transformers
)


@dataclass(eq=False)
class RoutingState:
    """What the router has to know of a batch beside its tokens; one object for all layers.

    mode: what the context z_x of Eq. 6 is. "fixed": one mean over the tokens of context_mask, the same for every token
        of the sequence; with a key-value cache the mean over the first forward's tokens, the prompt's, which every later
        token keeps. "prefix": the running mean over the tokens of context_mask up to and including t, so no token
        is routed by its future. "none": no context.
    context_mask: (B, T) bool, None for all tokens. Padding must be False in it: outputs then do not depend on padding.
    token_mask: (B, T) bool, the tokens that `record` counts, None for all.
    record: add the number of routed tokens (each of the k choices counted) to every layer's `counts`.

    In a language model of transformers "all tokens" are those of its attention_mask, and the sums of the tokens in a
    key-value cache are kept in that cache (see `Past`). The masks are set before a forward and hold until they are changed
    or set to None; `generate` does without them: its context is the prompt's mean ("fixed") or the prefix's.
    """

    mode: str = "fixed"
    context_mask: Tensor | None = None
    token_mask: Tensor | None = None
    record: bool = False
    # of the forward at hand, set by the hooks of a language model
    prompt: int | None = field(default=None, repr=False)  # inside generate: the prompt's length
    generated: Tensor | None = field(default=None, repr=False)  # inside generate: the attention mask of all tokens so far
    real: Tensor | None = field(default=None, repr=False)  # (B, T), from the attention mask
    before: dict = field(default_factory=dict, repr=False)  # the sums of the cache's tokens: {layer: (sums, numbers)}
    after: dict | None = field(default=None, repr=False)  # where the sums go that a cache will keep; None: nowhere

    def context(self, z: Tensor, layer: int = 0) -> Tensor | None:
        """z_x of Eq. 6 for z (B, T, d): (B, 1, d) if fixed, (B, T, d) if prefix, in float32; None without context.

        Where no token is in the mask (yet), the context is 0. layer: whose sums of the tokens in a key-value cache it goes
        on from. Raises ValueError on an unknown mode, and on a mask that is not (B, T).
        """
        if self.mode == "none":
            return None
        if self.mode not in CONTEXTS:
            raise ValueError(f"mode is {self.mode!r}, not one of {CONTEXTS}")
        if self.mode == "fixed" and layer in self.before:
            sums, number = self.before[layer]
        else:
            z = z.float()  # a bf16 sum over a long sequence loses its last terms
            mask = self.real if self.context_mask is None or self.prompt else self.context_mask
            if mask is None:
                mask = torch.ones(1, z.shape[1], 1, dtype=torch.bool, device=z.device)
            else:
                mask = _mask("context_mask", mask, z).unsqueeze(-1)  # (B, T, 1)
                z = z.masked_fill(~mask, 0)  # not z * mask: padding may hold NaN
            if self.mode == "fixed":
                sums, number = z.sum(1, keepdim=True), mask.sum(1, keepdim=True)  # (B, 1, d), (B, 1, 1)
            else:
                sums, number = z.cumsum(1), mask.cumsum(1)  # (B, T, d), (B, T, 1)
                if layer in self.before:
                    sums, number = sums + self.before[layer][0][:, -1:], number + self.before[layer][1][:, -1:]
        if self.after is not None:
            self.after[layer] = self._kept(layer, sums, number.expand(len(sums), -1, -1))
        return sums / number.clamp(min=1)

    def _kept(self, layer, sums, number):
        """The last CROP sums and numbers: after taking back as many tokens the running mean is still known."""
        if self.mode == "prefix" and layer in self.before and sums.shape[1] < CROP:
            sums, number = (torch.cat(pair, 1) for pair in zip(self.before[layer], (sums, number)))
        return tuple(t[:, -CROP:].clone() for t in (sums, number))  # clone: a view would keep the whole in memory


class Past:
    """The router's sums over the tokens that a key-value cache holds; an attribute of that cache, so that they live, are
    copied and are reordered with it.

    mode: RoutingState's. length: the tokens in the cache. prompt: how many of them the fixed mean is of. sums: {layer:
    (sums (B, s, d), numbers (B, s, 1))} up to the last s <= CROP tokens; s = 1 if fixed.
    """

    def __init__(self, mode, length, prompt, sums):
        self.mode, self.length, self.prompt, self.sums = mode, length, prompt, sums

    def upto(self, length, mode):
        """The sums when the cache holds `length` tokens: its last ones may have been taken back. Else ValueError."""
        if mode != self.mode:
            raise ValueError(f"the key-value cache was filled in mode {self.mode!r}, the mode is {mode!r} now: begin with an empty one")
        back = self.length - length
        if back < 0:
            raise ValueError(f"the key-value cache holds {length} tokens, {-back} of which the router has not seen: fill it with the unified model alone")
        if mode == "fixed":
            if length < self.prompt:
                raise ValueError(f"the key-value cache was cropped to {length} of the {self.prompt} tokens whose mean is the context: begin with an empty one")
            return self.sums
        if back and any(back >= s.shape[1] for s, _ in self.sums.values()):
            raise ValueError(f"{back} tokens were taken back from the key-value cache, the router can go back by {CROP - 1} at most: begin with an empty one")
        return {layer: tuple(t[:, : t.shape[1] - back] for t in pair) for layer, pair in self.sums.items()}

    @staticmethod
    def of(cache, length, mode):
        """The sums of the tokens in `cache`, {} for an empty one. ValueError where another model filled it."""
        if length == 0:  # new or reset: nothing of an earlier prompt
            return {}
        if mode == "none":
            return {}
        if not hasattr(cache, "routing_past"):
            raise ValueError(f"the key-value cache holds {length} tokens that the router has not seen: fill it with the unified model")
        return cache.routing_past.upto(length, mode)

    def keep_in(self, cache):
        if not hasattr(cache, "routing_past"):
            for change in (reorder_cache, batch_select_indices, batch_repeat_interleave):  # all that changes its batch
                setattr(cache, change.__name__, MethodType(change, cache))
        cache.routing_past = self

    def change(self, function):
        self.sums = {layer: tuple(map(function, pair)) for layer, pair in self.sums.items()}


def reorder_cache(self, beam_idx):
    type(self).reorder_cache(self, beam_idx)
    self.routing_past.change(lambda t: t.index_select(0, beam_idx.to(t.device)))


def batch_select_indices(self, indices):
    type(self).batch_select_indices(self, indices)
    self.routing_past.change(lambda t: t[indices.to(t.device)])


def batch_repeat_interleave(self, repeats):
    type(self).batch_repeat_interleave(self, repeats)
    self.routing_past.change(lambda t: t.repeat_interleave(repeats, dim=0))


def _before(module, args, kwargs):
    """Before a forward of a language model: which tokens are real, and what the router knows of those in the cache."""
    state = module.routing
    given = dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args)) | kwargs
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if ids is None:
        return  # the forward has its own message
    B, T = ids.shape[:2]
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    length = 0 if cache is None else int(cache.get_seq_length())
    state.before = Past.of(cache, length, state.mode)
    use_cache = given.get("use_cache")
    state.after = {} if cache is not None or (module.config.use_cache if use_cache is None else use_cache) else None
    if state.prompt:
        mask = state.generated  # a static cache has generate pass another, of four dimensions
    if mask is not None and not (torch.is_tensor(mask) and mask.dim() == 2):
        if state.context_mask is None and state.mode != "none":
            raise ValueError("the attention mask is not (B, T), and does not say which tokens are real: set routing.context_mask")
        mask = None
    state.real = None if mask is None else mask[:, -T:].bool()
    if state.prompt and state.mode == "fixed":
        prompt = torch.arange(length, length + T, device=ids.device).expand(B, T) < state.prompt
        state.real = prompt if mask is None else prompt & state.real.to(ids.device)


def _after(module, args, kwargs, output):
    """After it: what the router knows now goes into the cache that the forward filled."""
    state = module.routing
    if state.after and state.mode != "none":
        values = output.values() if isinstance(output, dict) else output
        cache = next((value for value in values if hasattr(value, "get_seq_length")), kwargs.get("past_key_values"))
        if cache is not None:
            length = int(cache.get_seq_length())
            prompt = cache.routing_past.prompt if state.before else min(length, state.prompt or length)
            Past(state.mode, length, prompt, state.after).keep_in(cache)
    state.after = None
    if not torch.is_grad_enabled():  # else a backward that recomputes the forward needs them again
        state.real, state.before = None, {}


def generate(self, inputs=None, *args, **kwargs):
    """The seed's own generate; the context is the prompt's mean ("fixed") or the prefix's, with or without a cache."""
    prompt = next((t for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None)
    chunked = kwargs.get("prefill_chunk_size", getattr(kwargs.get("generation_config") or self.generation_config, "prefill_chunk_size", None))
    if chunked and self.routing.mode == "fixed":
        raise ValueError("prefill_chunk_size: the context is the mean of the whole prompt; leave it out, or set routing.mode to 'prefix'")
    self.routing.prompt = 1 if prompt is None else max(1, prompt.shape[1])  # nothing: it begins with BOS
    try:
        return type(self).generate(self, inputs, *args, **kwargs)
    finally:
        self.routing.prompt = self.routing.generated = None


def prepare_inputs_for_generation(self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs):
    self.routing.generated = attention_mask
    return type(self).prepare_inputs_for_generation(self, input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class Router(nn.Module):
    """The context-aware router, Eq. 6: pi = softmax(z~ . e_p), z~ = (1 - lambda) z + lambda z_x.

    vectors: (K, d), the uploaded mean FFN inputs that e_p starts from. lam: where lambda starts.
    offset: subtract |e_p|^2 / 2 from the logits, which makes the largest one the nearest mean.
    disabled: indices of experts that have opted out: their pi is 0, the others' sum to 1.
    Raises ValueError where vectors is not a matrix or lam not in [0, 1].
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
            if context is not None:
                # Eq. 6. z~ . e is linear in z~: blending the K logits spares a blend of width d
                logits = (1 - self.lam) * logits + self.lam * (context.float() @ e)
            if self.offset:
                logits = logits - e.square().sum(0) / 2
            if self.disabled:
                logits = logits.index_fill(-1, torch.tensor(self.disabled, device=logits.device), -math.inf)
            return logits.softmax(-1)  # Eq. 6

    @torch.no_grad()
    def clamp_(self):
        """Project lambda onto [0, 1]; call it after every optimiser step."""
        self.lam.clamp_(0, 1)


class MoELayer(nn.Module):
    """The MoE layer, Eq. 5: y_t = sum over the top-k experts p of weight_p FFN_p(z_t). Takes the place of an FFN.

    ffn: the seed's own FFN, gated or two-layer, known by the names in FFNS. Its linears are frozen and become the layer's,
        under their own names; with full experts only its activation is kept.
    experts: K dicts, all of one kind. LoRA, FFN_p's linears being W + scaling B A: {"up_proj.lora_A": (r, d_in),
        "up_proj.lora_B": (d_out, r), ..., "scaling": float}; ranks may differ, and a linear that is left out has no
        update. Full: {"up_proj.weight": (d_out, d_in), "up_proj.bias": (d_out,), ...}, biases where ffn has them.
    router, state: the layer's Router and the model's RoutingState.
    weighting: the weights of the chosen experts. "literal": pi_p, as Eq. 5 is written; shrinks every FFN output.
        "renormalized": pi_p / sum of the chosen pi; at top-1 the constant 1, so no gradient reaches the router.
        "stopgrad": pi_p / stop_gradient(sum): renormalized in the forward, literal's direction in the backward.

    Raises ValueError, naming the argument, where shapes, counts or kinds disagree.
    """

    def __init__(self, ffn, experts, router, state, top_k=1, weighting="stopgrad"):
        super().__init__()
        self.linears, act = _parts(ffn)
        width = getattr(ffn, self.linears[0]).in_features
        if tuple(router.vectors.shape) != (len(experts), width):
            raise ValueError(f"router has vectors {tuple(router.vectors.shape)}, not ({len(experts)} experts, {width})")
        if not 1 <= top_k <= len(experts):
            raise ValueError(f"top_k is {top_k}, not in 1..{len(experts)}, the number of experts")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}, not one of {WEIGHTINGS}")
        self.kind = _kind(experts)
        self.experts = _stack(experts, ffn, self.linears, self.kind)
        self.scaling = [float(e["scaling"]) for e in experts] if self.kind == "lora" else None
        for name in self.linears if self.kind == "lora" else ():
            setattr(self, name, getattr(ffn, name).requires_grad_(False))
        self.act = getattr(ffn, act)
        self.router, self.state, self.top_k, self.weighting, self.index = router, state, top_k, weighting, 0
        self.register_buffer("counts", torch.zeros_like(router.vectors[:, 0], dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """y, of x's shape, for x (B, T, d), or (T, d) as one sequence."""
        z = x if x.dim() == 3 else x.unsqueeze(0)  # (B, T, d)
        chosen, weight = self.choose(self.router(z, self.state.context(z, self.index)))  # (B, T, k) both
        if self.state.record:
            mask = self.state.real if self.state.token_mask is None or self.state.prompt else self.state.token_mask
            kept = chosen if mask is None else chosen[_mask("token_mask", mask, z)]
            self.counts += kept.flatten().bincount(minlength=len(self.counts))
        # autocast would cast the frozen weights again for every expert: cast here, once, and leave it nothing to do
        dev = x.device.type
        dtype = torch.get_autocast_dtype(dev) if torch.is_autocast_enabled(dev) else x.dtype
        chosen, weight = chosen.flatten(0, 1), weight.flatten(0, 1).to(dtype)  # (N, k)
        return self._mix(z.flatten(0, 1).to(dtype), chosen, weight).view(x.shape)

    def choose(self, pi: Tensor) -> tuple[Tensor, Tensor]:
        """The top-k experts of pi (..., K) and their weights, (..., k) both; of equal ones the lowest index first."""
        k = min(self.top_k, len(self.counts) - len(self.router.disabled))
        pi, chosen = pi.sort(dim=-1, descending=True, stable=True)  # topk promises no order among equals
        pi, chosen = pi[..., :k], chosen[..., :k]
        if self.weighting == "literal":
            return chosen, pi  # Eq. 5
        total = pi.sum(-1, keepdim=True)
        # at top-1 both are x / x = 1, exactly; stopgrad keeps the derivative by the numerator
        return chosen, pi / (total.detach() if self.weighting == "stopgrad" else total)

    def _mix(self, x, chosen, weight):
        """Eq. 5 for x (N, d), chosen and weight (N, k): y (N, d)."""
        return (self._mix_masked if self._masked(x) else self._mix_sorted)(x, chosen, weight)

    def _masked(self, x):
        """Whether LoRA experts run as masks. That multiplies N r (K - 1) more for every width, sorting makes K times as many products,
        of sizes that are new in every batch: launches and a wait on CUDA, new code for bfloat16 on a CPU. Which is more, N decides, not K."""
        return self.kind == "lora" and len(x) <= (2048 if x.device.type == "cpu" else 65536)

    def _mix_masked(self, x, chosen, weight):
        """All tokens through all experts' A at once, (K r, d_in), a mask that leaves each its own expert's r numbers, all B at once."""
        *ups, down = self.linears
        # the scalings one by one: a tensor of them would be a copy to the device, and a wait, in every layer
        masks = torch.stack([(chosen == p).to(x.dtype) * s for p, s in enumerate(self.scaling)], dim=-1).unsqueeze(-1).unbind(1)  # k of (N, K, 1)

        def weights(name):
            """W, its bias, A (K r, d_in), B (K r, d_out)."""
            W, bias, A, B = self._tensors(name, x.dtype)
            return W, bias, A if A is None else A.flatten(0, 1), B if B is None else B.mT.flatten(0, 1)

        def low(z, A, mask):
            return (F.linear(z, A).view(len(z), len(self.scaling), -1) * mask).flatten(1)  # (N, K r)

        # the base projections run once a token: W z ahead of the choices, and W_down, linear, behind their weighted sum
        base, hidden = [(F.linear(x, W, bias), A, B) for W, bias, A, B in map(weights, ups)], []
        for j, mask in enumerate(masks):
            add = Tensor.addmm_ if j == len(masks) - 1 else Tensor.addmm  # the last one in place: a copy costs more than the product
            hidden.append(self._activate([y if A is None else add(y, low(x, A, mask), B) for y, A, B in base]))  # k of (N, h)
        W, bias, A, B = weights(down)
        if len(masks) == 1:
            y = F.linear(hidden[0], W, bias)
            return (y if A is None else y.addmm_(low(hidden[0], A, masks[0]), B)) * weight
        weight = weight.split(1, dim=1)  # k of (N, 1)
        total = hidden[0] * weight[0]
        for h, w in zip(hidden[1:], weight[1:]):
            total.addcmul_(h, w)
        y = F.linear(total, W)
        if A is not None:
            y.addmm_(sum(low(h, A, mask * w.unsqueeze(-1)) for h, mask, w in zip(hidden, masks, weight)), B)
        return y if bias is None else y + sum(weight) * bias  # (N, d) Eq. 5

    def _mix_sorted(self, x, chosen, weight):
        """The N k (token, expert) pairs sorted by expert, each expert's products over its own."""
        n, k = chosen.shape
        sizes = chosen.flatten().bincount(minlength=len(self.counts)).tolist()  # pairs per expert
        order = chosen.flatten().argsort(stable=True)  # (N k)
        token, weights = order // k, self._weights(x.dtype)
        if k == 1 or self.kind == "full":
            # an expert shares nothing with a token's others: each runs on its own contiguous slice, so that tensors of
            # the hidden width are neither gathered nor copied
            y = torch.cat([self._expert(p, z, weights) for p, z in enumerate(x[token].split(sizes))])
            y = y * weight.flatten()[order].unsqueeze(1)  # (N k, d)
            y = y[torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))]
            return y if k == 1 else y.view(n, k, -1).sum(1)  # (N, d) Eq. 5
        *ups, down = self.linears  # the base projections once a token, as above
        base = [F.linear(x, weights[name][0][0], weights[name][1][0])[token].unsafe_split_with_sizes(sizes) for name in ups]  # (n_p, h) each
        W, bias, A, B = weights[down]
        hidden, low = x.new_zeros(n, W[0].shape[1]), x.new_zeros(n, W[0].shape[0])  # (N, h), (N, d)
        slices = zip(token.split(sizes), x[token].split(sizes), weight.flatten()[order].split(sizes), *base)
        for p, (t, z, w, *own) in enumerate(slices):
            h = self._activate([self._linear(p, z, *weights[name], y) for name, y in zip(ups, own)])
            h = h * w.unsqueeze(1)  # (n_p, h)
            hidden.index_add_(0, t, h)
            if A[p] is not None:
                low.index_add_(0, t, F.linear(F.linear(h, A[p]), B[p]), alpha=self.scaling[p])
        y = F.linear(hidden, W[0]) + low
        return y if bias[0] is None else y + weight.sum(1, keepdim=True) * bias[0]  # (N, d) Eq. 5

    def _tensors(self, name, dtype):
        """W, bias, A, B of a linear in dtype, None where there is no such tensor; what is the experts' own has K in front."""
        stack = self.experts[name] if name in self.experts else None
        base = stack if self.kind == "full" else getattr(self, name)
        found = [getattr(module, leaf, None) for module, leaf in ((base, "weight"), (base, "bias"), (stack, "A"), (stack, "B"))]
        return [None if t is None else t.to(dtype) for t in found]

    def _weights(self, dtype):
        """{linear: (W, bias, A, B)} in dtype, each a list over experts, of None where there is no such tensor."""
        weights, K = {}, len(self.counts)

        def own(t):  # unbind: one gradient for a whole stack, not one of its size for every expert
            return [None] * K if t is None else t.unbind(0)

        for name in self.linears:
            W, bias, A, B = self._tensors(name, dtype)
            base = (own(W), own(bias)) if self.kind == "full" else ([W] * K, [bias] * K)
            weights[name] = *base, own(A), own(B)
        return weights

    def _expert(self, p, z, weights):
        """FFN_p(z): (n, d) -> (n, d)."""
        *ups, down = self.linears
        return self._linear(p, self._activate([self._linear(p, z, *weights[name]) for name in ups]), *weights[down])

    def _linear(self, p, z, W, bias, A, B, y=None):
        """W_p z + b_p + scaling_p B_p A_p z, (n, d_in) -> (n, d_out); y, if given, is a fresh W_p z + b_p."""
        y = F.linear(z, W[p], bias[p]) if y is None else y
        # in place: copying y costs more than the product
        return y if A[p] is None else y.addmm_(F.linear(z, A[p]), B[p].t(), alpha=self.scaling[p])

    def _activate(self, u):
        return self.act(u[0]) * u[1] if len(u) == 2 else self.act(u[0])


def _mask(name, mask, z):
    if mask.shape != z.shape[:2]:
        raise ValueError(f"{name} is {tuple(mask.shape)}, the tokens are {tuple(z.shape[:2])}")
    return mask.to(z.device, torch.bool)


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
    """"lora" or "full", the same for all experts."""
    kinds = {"lora" if any(".lora_" in key for key in e) or "scaling" in e else "full" for e in experts}
    if len(kinds) != 1:
        raise ValueError(f"experts must be all LoRA or all full, and at least one; these are {sorted(kinds)}")
    return kinds.pop()


def _stack(experts, ffn, linears, kind):
    """{linear: the experts' tensors stacked}: A (K, r, d_in), B (K, d_out, r), or weight (K, d_out, d_in), bias (K, d_out).

    r is the largest rank; an expert of a smaller one gets zeros, which stay zero in training. No ranks, no entry.
    """
    leaves = ("lora_A", "lora_B") if kind == "lora" else ("weight", "bias")
    known = {f"{name}.{leaf}" for name in linears for leaf in leaves} | {"scaling"}
    out = nn.ModuleDict()
    for name in linears:
        linear, own = getattr(ffn, name), []
        d_in, d_out, device = linear.in_features, linear.out_features, linear.weight.device
        for p, e in enumerate(experts):
            if unknown := set(e) - known:
                raise ValueError(f"experts[{p}], of kind {kind}, has unknown entries {sorted(unknown)}")
            if kind == "lora" and "scaling" not in e:
                raise ValueError(f"experts[{p}] has no scaling")
            tensors = {key.split(".")[1]: t.detach().to(device) for key, t in e.items() if key.startswith(f"{name}.")}
            if kind == "lora":
                if not tensors:
                    tensors = dict(lora_A=linear.weight.new_zeros(0, d_in), lora_B=linear.weight.new_zeros(d_out, 0))
                r = len(tensors.get("lora_A", ()))
                want = {"lora_A": (r, d_in), "lora_B": (d_out, r)}
            else:
                want = {leaf: tuple(t.shape) for leaf, t in linear.named_parameters()}
            shapes = {leaf: tuple(t.shape) for leaf, t in tensors.items()}
            if shapes != want:
                raise ValueError(f"experts[{p}]: {name} has the shapes {shapes}, not {want}")
            own.append(tensors)
        if kind == "lora":
            rank = max(len(t["lora_A"]) for t in own)
            # fp32, whatever the seed is stored in: bf16 parameters would round small updates away
            stack = {"A": [F.pad(t["lora_A"].float(), (0, 0, 0, rank - len(t["lora_A"]))) for t in own],
                     "B": [F.pad(t["lora_B"].float(), (0, rank - t["lora_B"].shape[1])) for t in own]} if rank else {}
        else:
            stack = {leaf: [t[leaf] for t in own] for leaf in own[0]}
        if stack:
            out[name] = nn.ParameterDict({leaf: nn.Parameter(torch.stack(ts)) for leaf, ts in stack.items()})
    return out


def seed_expert(ffn: nn.Module, like: dict) -> dict:
    """e_0 of Eq. 6: the seed's own FFN as an expert of the kind of `like`, one of the other experts.

    For LoRA, A and B are both zero, so neither gets a gradient and it stays the seed under training.
    """
    if _kind([like]) == "lora":
        return {key: v if key == "scaling" else torch.zeros_like(v) for key, v in like.items()}
    return {key: v.detach().clone() for key, v in ffn.named_parameters()}


def unify(model, ffn_names, experts, vectors, *, names=None, lam=0.3, top_k=1, weighting="stopgrad",
          context="fixed", offset=False):
    """Replace the L FFNs of a seed model by MoE layers (Sec. 3.4), in place; returns the model.

    ffn_names: the FFNs' module paths, such as "model.layers.0.mlp". experts: K x {ffn_name: expert of MoELayer}.
    vectors: K x (L, d), or one (K, L, d). names: the experts' names, kept in the configuration. lam, top_k, weighting,
    context, offset: as in Router, MoELayer, RoutingState (its mode).

    Afterwards only routers and experts require gradients; model.routing is the RoutingState, model.moe_config describes
    the model. A language model of transformers takes the tokens' mask from its attention_mask and generates, with or
    without a key-value cache. Raises ValueError, naming the argument, where anything disagrees; the model then has its
    FFNs still.
    """
    ffn_names, vectors = list(ffn_names), [torch.as_tensor(v) for v in vectors]
    K, L = len(experts), len(ffn_names)
    names = [f"expert{p + 1}" for p in range(K)] if names is None else list(names)
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}, not one of {CONTEXTS}")
    if L == 0 or len(set(ffn_names)) < L:
        raise ValueError("ffn_names must be distinct module paths, at least one")
    for what, n in (("vectors", len(vectors)), ("names", len(names))):
        if n != K:
            raise ValueError(f"{what} has {n} entries, experts has {K}")
    for p, (e, v) in enumerate(zip(experts, vectors)):
        if set(e) != set(ffn_names):
            raise ValueError(f"experts[{p}] and ffn_names differ in {sorted(set(e) ^ set(ffn_names))}")
        if v.dim() != 2 or len(v) != L:
            raise ValueError(f"vectors[{p}] is {tuple(v.shape)}, not (L = {L}, d)")
    kind = _kind([e[name] for e in experts for name in ffn_names])
    state, new = RoutingState(mode=context), []
    for l, name in enumerate(ffn_names):
        try:
            ffn = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"ffn_names: the model has no module {name!r}") from error
        try:
            device = next(ffn.parameters()).device
            router = Router(torch.stack([v[l].to(device) for v in vectors]), lam, offset)
            new.append(MoELayer(ffn, [e[name] for e in experts], router, state, top_k, weighting))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
    model.requires_grad_(False)
    for index, (name, layer) in enumerate(zip(ffn_names, new)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.index = index
    model.routing = state
    if hasattr(model, "generate"):
        base = model.base_model  # the transformer below the head, which every forward goes through
        base.routing = state
        base.register_forward_pre_hook(_before, with_kwargs=True)
        base.register_forward_hook(_after, with_kwargs=True)
        for method in (generate, prepare_inputs_for_generation):
            setattr(model, method.__name__, MethodType(method, model))
    model.moe_config = dict(
        names=names, ffn_names=ffn_names, kind=kind, top_k=top_k, weighting=weighting, context=context, offset=offset,
        lam=float(lam), scaling=[layer.scaling for layer in new], seed=_source(model), disabled=[])
    return model


def _source(model):
    """Where the seed came from: a hub id, or the name of a local folder (not its path, which says where it was made) and "/"."""
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


def disable_expert(model, name):
    """Opt out: no token goes to the expert any more, its pi is 0 and the others' sum to 1. Nothing is trained.

    `save` keeps its weights, and that it is disabled; `remove_expert` leaves them out. ValueError where there is no such
    expert, or no other one left.
    """
    config = model.moe_config
    out = {*config["disabled"], _known(config, name)}
    if len(out) == len(config["names"]):
        raise ValueError(f"{name!r} is the last expert: a model without one has no FFN")
    _disable(model, [other for other in config["names"] if other in out])


def enable_expert(model, name):
    """Opt in again. ValueError where there is no such expert."""
    config = model.moe_config
    _disable(model, [other for other in config["disabled"] if other != _known(config, name)])


def _known(config, name):
    if name not in config["names"]:
        raise ValueError(f"no expert is called {name!r}; there are {', '.join(config['names'])}")
    return name


def _disable(model, disabled):
    names = model.moe_config["names"]
    model.moe_config["disabled"] = disabled
    for layer in layers(model):
        layer.router.disabled = [names.index(name) for name in disabled]


def save(model, folder):
    """Write what unify added - experts, routing vectors, lambdas, configuration; not the seed's weights - to a folder.

    The files are written aside and moved in, the configuration last: a folder that has one is complete.
    """
    tensors = {}
    for name, layer in zip(model.moe_config["ffn_names"], layers(model)):
        for part, module in (("router", layer.router), ("experts", layer.experts)):
            tensors |= {f"{name}.{part}.{key}": t.contiguous() for key, t in module.state_dict().items()}
    write(folder, model.moe_config, tensors)


def write(folder, config, tensors):
    """What `save` writes, from the configuration and the tensors {"model.layers.0.mlp.router.vectors": (K, d), ...}."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        save_file(tensors, aside / "moe.safetensors", metadata={"format": "pt"})
        (aside / "moe_config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "moe_config.json").unlink(missing_ok=True)  # else a crash leaves the old one beside new tensors
        for file in ("moe.safetensors", "moe_config.json"):
            os.replace(aside / file, folder / file)
    finally:
        shutil.rmtree(aside)


def read(folder):
    """(configuration, tensors) of a folder that `save` wrote."""
    config = {"seed": "", "disabled": []} | json.loads((Path(folder) / "moe_config.json").read_text())
    return config, load_file(Path(folder) / "moe.safetensors")


def load(folder, model=None, **options):
    """The unified model of `save` from its folder. model: a fresh seed model, which is changed in place and returned.

    Without one the seed is loaded through transformers, with `options` (dtype, device_map, ...), from where `save` found
    it: the hub, or a local folder of that name - the run's own (RUN/run.json, for a model under RUN/moe/), one in
    METAMOE_CACHE (~/.cache/metamoe) or beside `folder`. FileNotFoundError where it is not there.
    """
    config, tensors = read(folder)
    if model is None:
        model = _load_seed(Path(folder).absolute(), config["seed"], options)
    return assemble(model, config, tensors)


def _load_seed(folder, seed, options):
    if not seed:
        raise FileNotFoundError(f"{folder} does not say what its seed model was: give it, moe.load(folder, model)")
    source, name = seed, seed.removesuffix("/")
    if name != seed:
        run, cache = folder.parent.parent / "run.json", Path(os.environ.get("METAMOE_CACHE") or "~/.cache/metamoe").expanduser()
        own = json.loads(run.read_text()).get("seed_model") if run.exists() else None
        places = [place for place in (own and Path(own), cache / name, folder.parent / name) if place and place.name == name]
        source = next((str(place) for place in places if (place / "config.json").exists()), None)
        if source is None:
            raise FileNotFoundError(f"the seed model {name!r} of {folder} is not there, looked for {', '.join(map(str, places))}: give it, moe.load(folder, model)")
    fix_torchvision()
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(source, **options).eval()
    except OSError as error:
        raise FileNotFoundError(f"the seed model {source!r} of {folder} cannot be loaded ({str(error).splitlines()[0]}): give it, moe.load(folder, model)") from None


def fix_torchvision():
    """Let transformers, peft and open_clip import a torchvision whose compiled operators do not load.

    With a CPU build of torch, a CUDA build of torchvision fails on import at the two operators it registers fakes
    for; defining their schemas first is enough, since nothing here calls them.
    """
    global _torchvision_library
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # the half-imported package
        _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _torchvision_library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def unstack(config, tensors):
    """(experts, vectors) as `unify` takes them, of what `read` returns."""
    experts = [{name: {"scaling": config["scaling"][l][p]} if config["kind"] == "lora" else {} for l, name in enumerate(config["ffn_names"])}
               for p in range(len(config["names"]))]
    for key, stack in tensors.items():
        name, found, rest = key.rpartition(".experts.")
        for p, e in enumerate(experts if found else ()):
            e[name][rest.replace(".A", ".lora_A").replace(".B", ".lora_B")] = stack[p]
    vectors = torch.stack([tensors[f"{name}.router.vectors"] for name in config["ffn_names"]], dim=1)  # (K, L, d)
    return experts, list(vectors)


def assemble(model, config, tensors, joining=()):
    """The unified model of what `read` returns, from a fresh seed model, in place.

    joining: experts to add, (name, {ffn_name: expert of MoELayer}, vectors (L, d)) each; all that is there stays as it is.
    """
    experts, vectors = unstack(config, tensors)
    names, new, more = zip(*joining) if joining else ((), (), ())
    options = {key: config[key] for key in ("lam", "top_k", "weighting", "context", "offset")}
    model = unify(model, config["ffn_names"], experts + list(new), vectors + list(more), names=config["names"] + list(names), **options)
    with torch.no_grad():
        for name, lam in zip(config["ffn_names"], lambda_parameters(model)):
            lam.copy_(tensors[f"{name}.router.lam"])
    _disable(model, list(config["disabled"]))
    return model


def remove_expert(config, tensors, name):
    """(configuration, tensors) of the model without the expert, its weights and routing vectors gone, of what `read`
    returns: its outputs are those of `disable_expert`. ValueError where there is no such expert, or no other one left.
    """
    keep = [p for p, other in enumerate(config["names"]) if other != _known(config, name)]
    if not keep:
        raise ValueError(f"{name!r} is the last expert: a model without one has no FFN")
    names, top_k = [config["names"][p] for p in keep], min(config["top_k"], len(keep))
    scaling = [own and [own[p] for p in keep] for own in config["scaling"]]
    config = config | {"names": names, "top_k": top_k, "scaling": scaling, "disabled": [n for n in config["disabled"] if n != name]}
    return config, {key: t if key.endswith(".router.lam") else t[keep] for key, t in tensors.items()}

