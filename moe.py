"""MetaMoE's mixture-of-experts layer: independently trained FFN experts and a context-aware router in one model.

The layer of "MetaMoE: Diversity-Aware Proxy Selection for Privacy-Preserving Mixture-of-Experts Unification"
(arXiv 2605.14289, ICML 2026), Eq. 5-6. This file needs torch and safetensors alone and can be copied:

    model = unify(seed, ffn_names, experts, vectors)      # experts: K x {ffn_name: LoRA or full FFN weights}
    model.routing.context_mask = prompt_mask              # (B, T), what the router's context is the mean of
    save(model, "unified"); model = load("unified", fresh_seed)

Letters in shapes: B sequences, T tokens, N = B T, d width, h the FFN's hidden width, K experts, k = top_k,
r LoRA rank, L layers.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTINGS = ("stopgrad", "literal", "renormalized")
CONTEXTS = ("fixed", "prefix", "none")
# an FFN is known by the names of its linears, the last of them the down projection, and of its activation
FFNS = (
    (("gate_proj", "up_proj", "down_proj"), "act_fn"),  # LLaMA: down(act(gate(x)) * up(x))
    (("c_fc", "c_proj"), "gelu"),  # open_clip
    (("fc1", "fc2"), "activation_fn"),  # CLIP in transformers
)


@dataclass(eq=False)
class RoutingState:
    """What the router has to know of a batch beside its tokens; one object for all layers, set before each forward.

    mode: what the context z_x of Eq. 6 is. "fixed": one mean over the tokens of context_mask, the same for every token
        of the sequence. "prefix": the running mean over the tokens of context_mask up to and including t, so no token
        is routed by its future. "none": no context.
    context_mask: (B, T) bool, None for all tokens. Padding must be False in it: outputs then do not depend on padding.
    token_mask: (B, T) bool, the tokens that `record` counts, None for all.
    record: add the number of routed tokens (each of the k choices counted) to every layer's `counts`.

    A forward must see whole sequences: with a key-value cache the tokens of the past would be missing in the means.
    """

    mode: str = "fixed"
    context_mask: Tensor | None = None
    token_mask: Tensor | None = None
    record: bool = False

    def context(self, z: Tensor) -> Tensor | None:
        """z_x of Eq. 6 for z (B, T, d): (B, 1, d) if fixed, (B, T, d) if prefix, in float32; None without context.

        Where no token is in the mask (yet), the context is 0. Raises ValueError on an unknown mode, and on a mask that
        is not (B, T).
        """
        if self.mode == "none":
            return None
        if self.mode not in CONTEXTS:
            raise ValueError(f"mode is {self.mode!r}, not one of {CONTEXTS}")
        z = z.float()  # a bf16 sum over a long sequence loses its last terms
        if self.context_mask is None:
            mask = torch.ones(1, z.shape[1], 1, dtype=torch.bool, device=z.device)
        else:
            mask = _mask("context_mask", self.context_mask, z).unsqueeze(-1)  # (B, T, 1)
            z = z.masked_fill(~mask, 0)  # not z * mask: padding may hold NaN
        if self.mode == "fixed":
            return z.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1, d)
        return z.cumsum(1) / mask.cumsum(1).clamp(min=1)  # (B, T, d)


class Router(nn.Module):
    """The context-aware router, Eq. 6: pi = softmax(z~ . e_p), z~ = (1 - lambda) z + lambda z_x.

    vectors: (K, d), the uploaded mean FFN inputs that e_p starts from. lam: where lambda starts.
    offset: subtract |e_p|^2 / 2 from the logits, which makes the largest one the nearest mean.
    Raises ValueError where vectors is not a matrix or lam not in [0, 1].
    """

    def __init__(self, vectors: Tensor, lam: float = 0.3, offset: bool = False):
        super().__init__()
        if vectors.dim() != 2:
            raise ValueError(f"vectors must be (K, d), not {tuple(vectors.shape)}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], not {lam}")
        self.vectors = nn.Parameter(vectors.detach().to(torch.float32, copy=True))
        self.lam = nn.Parameter(torch.tensor(float(lam), device=vectors.device))
        self.offset = offset

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
            return logits.softmax(-1)  # Eq. 6

    @torch.no_grad()
    def clamp_(self):
        """Project lambda onto [0, 1]; call it after every optimiser step."""
        self.lam.clamp_(0, 1)


class MoELayer(nn.Module):
    """The MoE layer, Eq. 5: y_t = sum over the top-k experts p of weight_p FFN_p(z_t). Takes the place of an FFN.

    ffn: the seed's own FFN, gated or two-layer, known by the names in FFNS. Frozen here; with full experts only its
        activation is kept.
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
        self.ffn = ffn.requires_grad_(False) if self.kind == "lora" else None
        self.act = getattr(ffn, act)
        self.router, self.state, self.top_k, self.weighting = router, state, top_k, weighting
        self.register_buffer("counts", torch.zeros_like(router.vectors[:, 0], dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """y, of x's shape, for x (B, T, d), or (T, d) as one sequence."""
        z = x if x.dim() == 3 else x.unsqueeze(0)  # (B, T, d)
        chosen, weight = self.choose(self.router(z, self.state.context(z)))  # (B, T, k) both
        if self.state.record:
            kept = chosen if self.state.token_mask is None else chosen[_mask("token_mask", self.state.token_mask, z)]
            self.counts += kept.flatten().bincount(minlength=len(self.counts))
        # autocast would cast the frozen weights again for every expert: cast here, once, and leave it nothing to do
        dev = x.device.type
        dtype = torch.get_autocast_dtype(dev) if torch.is_autocast_enabled(dev) else x.dtype
        chosen, weight = chosen.flatten(0, 1), weight.flatten(0, 1).to(dtype)  # (N, k)
        return self._mix(z.flatten(0, 1).to(dtype), chosen, weight).view(x.shape)

    def choose(self, pi: Tensor) -> tuple[Tensor, Tensor]:
        """The top-k experts of pi (..., K) and their weights, (..., k) both; of equal ones the lowest index first."""
        pi, chosen = pi.sort(dim=-1, descending=True, stable=True)  # topk promises no order among equals
        pi, chosen = pi[..., : self.top_k], chosen[..., : self.top_k]  # (..., k)
        if self.weighting == "literal":
            return chosen, pi  # Eq. 5
        total = pi.sum(-1, keepdim=True)
        # at top-1 both are x / x = 1, exactly; stopgrad keeps the derivative by the numerator
        return chosen, pi / (total.detach() if self.weighting == "stopgrad" else total)

    def _mix(self, x, chosen, weight):
        """Eq. 5 for x (N, d), chosen and weight (N, k): y (N, d). The N k (token, expert) pairs are sorted by expert."""
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
        # the base projections run once a token: W z ahead of the experts, and W_down, linear, behind their weighted sum
        *ups, down = self.linears
        base = [F.linear(x, weights[name][0][0], weights[name][1][0]) for name in ups]  # (N, h) each
        W, bias, A, B = weights[down]
        hidden, low = x.new_zeros(n, W[0].shape[1]), x.new_zeros(n, W[0].shape[0])  # (N, h), (N, d)
        for p, (t, w) in enumerate(zip(token.split(sizes), weight.flatten()[order].split(sizes))):
            z = x[t]  # (n_p, d)
            h = self._activate([self._linear(p, z, *weights[name], y[t]) for name, y in zip(ups, base)])
            h = h * w.unsqueeze(1)  # (n_p, h)
            hidden.index_add_(0, t, h)
            if A[p] is not None:
                low.index_add_(0, t, F.linear(F.linear(h, A[p]), B[p]), alpha=self.scaling[p])
        y = F.linear(hidden, W[0]) + low
        return y if bias[0] is None else y + weight.sum(1, keepdim=True) * bias[0]  # (N, d) Eq. 5

    def _weights(self, dtype):
        """{linear: (W, bias, A, B)} in dtype, each a list over experts, of None where there is no such tensor."""
        weights, none = {}, [None] * len(self.counts)
        for name in self.linears:
            seed, stack = getattr(self.ffn, name, None), self.experts[name] if name in self.experts else None
            own = stack if self.kind == "full" else seed
            weights[name] = []
            for module, leaf in ((own, "weight"), (own, "bias"), (stack, "A"), (stack, "B")):
                t = getattr(module, leaf, None)
                if t is None:
                    weights[name].append(none)
                else:  # unbind: one gradient for a whole stack, not one of its size for every expert
                    t = t.to(dtype)
                    weights[name].append(t.unbind(0) if module is stack else [t] * len(none))
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

    Afterwards only routers and experts require gradients; model.routing is the RoutingState to set before each forward
    and model.moe_config describes the model. A key-value cache is switched off in the model's configuration, as the
    router's context needs the whole sequence. Raises ValueError, naming the argument, where anything disagrees; the
    model then has its FFNs still.
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
    for name, layer in zip(ffn_names, new):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    model.routing = state
    model.moe_config = dict(
        names=names, ffn_names=ffn_names, kind=kind, top_k=top_k, weighting=weighting, context=context, offset=offset,
        lam=float(lam), scaling=[layer.scaling for layer in new])
    return model


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
    """Write what unify added - experts, routing vectors, lambdas, configuration; not the seed's weights - to a folder.

    The files are written aside and moved in, the configuration last: a folder that has one is complete.
    """
    folder = Path(folder).absolute()
    tensors = {}
    for name, layer in zip(model.moe_config["ffn_names"], layers(model)):
        for part, module in (("router", layer.router), ("experts", layer.experts)):
            tensors |= {f"{name}.{part}.{key}": t.contiguous() for key, t in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        save_file(tensors, aside / "moe.safetensors", metadata={"format": "pt"})
        (aside / "moe_config.json").write_text(json.dumps(model.moe_config, indent=1) + "\n")
        (folder / "moe_config.json").unlink(missing_ok=True)  # else a crash leaves the old one beside new tensors
        for file in ("moe.safetensors", "moe_config.json"):
            os.replace(aside / file, folder / file)
    finally:
        shutil.rmtree(aside)


def load(folder, model):
    """The unified model of `save` from its folder and a fresh seed model, which is changed in place and returned."""
    config = json.loads((Path(folder) / "moe_config.json").read_text())
    tensors = load_file(Path(folder) / "moe.safetensors")
    scaling, lora = config.pop("scaling"), config.pop("kind") == "lora"
    experts = [{name: {"scaling": scaling[l][p]} if lora else {} for l, name in enumerate(config["ffn_names"])}
               for p in range(len(config["names"]))]
    for key, stack in tensors.items():
        name, found, rest = key.rpartition(".experts.")
        for p, e in enumerate(experts if found else ()):
            e[name][rest.replace(".A", ".lora_A").replace(".B", ".lora_B")] = stack[p]
    vectors = torch.stack([tensors[f"{name}.router.vectors"] for name in config["ffn_names"]], dim=1)  # (K, L, d)
    model = unify(model, experts=experts, vectors=vectors, **config)
    with torch.no_grad():
        for name, lam in zip(config["ffn_names"], lambda_parameters(model)):
            lam.copy_(tensors[f"{name}.router.lam"])
    return model
