"""MetaMoE's mixture-of-experts layer: independently trained FFN experts under one context-aware router.

The layer of "MetaMoE: Diversity-Aware Proxy Selection for Privacy-Preserving Mixture-of-Experts Unification"
(arXiv 2605.14289, ICML 2026), Eq. 5-6. It needs torch and safetensors alone and can be copied:

    model = unify(seed_model, ffn_names, experts, vectors)  # experts: K x {ffn_name: LoRA or full weights}
    model.routing.context_mask = prompt_mask  # (B, T), tokens averaged into the router's context
    save(model, "unified"); model = load("unified", fresh_seed_model)
    disable_expert(model, "hotels")  # opt out without training; enable_expert undoes it

`generate` and key-value caches also need metamoe/serving/generation.py.
Shapes: B sequences, T tokens, N = B T, d width, h FFN width, K experts, k = top_k, r LoRA rank, L layers.
"""

import importlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTINGS = ("stopgrad", "literal", "renormalized")
CONTEXTS = ("fixed", "prefix", "none")


class Router(nn.Module):
    """The context-aware router, Eq. 6: pi = softmax(z~ . e_p), z~ = (1 - lambda) z + lambda z_x.

    vectors: (K, d), the uploaded mean FFN inputs that e_p starts from. lam: where lambda starts, in [0, 1].
    offset: add a bias (K,) to the logits. It starts at -|e_p|^2 / 2, which makes the largest one the nearest
        mean, and is then a parameter of its own: it does not follow e_p in training.
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
        self.bias = nn.Parameter(self.vectors.detach().square().sum(1) / -2) if offset else None
        self.absolute, self.disabled = False, []

    def forward(self, z: Tensor, context: Tensor | None) -> Tensor:
        """pi (B, T, K) in float32 for z (B, T, d) and a context (B, 1 or T, d), or None for z~ = z."""
        return self.logits(z, context).softmax(-1)  # Eq. 6

    def logits(self, z: Tensor, context: Tensor | None) -> Tensor:
        """z~ . e_p + bias_p, -inf for the disabled: (B, T, K) in float32."""
        with torch.autocast(z.device.type, enabled=False):  # bf16 logits of size 100 are off by 0.5
            e = self.vectors.float().t()  # (d, K)
            if self.disabled:
                out = torch.tensor(self.disabled, device=e.device)
                e = e.index_fill(1, out, 0)  # it may hold NaN
            logits = z.float() @ e  # (B, T, K)
            if context is not None:  # z~ . e is linear in z~: blend the K logits, not the d features
                lam = self.lam.clamp(0, 1)  # whatever an optimiser did to it
                logits = (1 - lam) * logits + lam * (context.float() @ e)
            if self.absolute:
                logits = logits.abs()
            if self.bias is not None:
                logits = logits + self.bias.float()
            return logits.index_fill(-1, out, -torch.inf) if self.disabled else logits


@dataclass(eq=False)
class RoutingState:
    """How the router treats a batch; it holds until it is changed. One object for all layers.

    mode: the context z_x of Eq. 6. "fixed": the mean over the tokens of context_mask; a key-value cache keeps
        that of the first forward, the prompt's. "prefix": the running mean up to each token, so no token is
        routed by its future. "none": no context.
    context_mask, token_mask: (B, T) bool, the tokens of the mean, and those that are counted, padding False.
        None: all, in a language model those of its attention mask.
    record: add the number of routed tokens (each of the k choices counts) to every layer's `counts`.
    """

    mode: str = "fixed"
    context_mask: Tensor | None = None
    token_mask: Tensor | None = None
    record: bool = False
    latest: object | None = None  # generation.Forward: for compiled code, and for a backward's second forward
    thread = threading.local()  # its `forward`: the generation.Forward that the thread computes

    @property
    def forward(self):
        """What is known of this thread's forward of a language model, or None."""
        own = None if torch.compiler.is_compiling() else getattr(self.thread, "forward", None)
        return own or self.latest

    def context(self, z: Tensor, layer: int = 0) -> Tensor | None:
        """z_x of Eq. 6 for z (B, T, d), float32: (B, 1, d) if fixed, (B, T, d) if prefix, None without.

        0 where no token is in the mask (yet). ValueError on an unknown mode, or a mask that is not (B, T).
        """
        if self.mode not in CONTEXTS:
            raise ValueError(f"mode is {self.mode!r}, not one of {CONTEXTS}")
        if self.mode == "none":
            return None
        z, forward = z.float(), self.forward  # a bf16 sum over a long sequence loses its last terms
        sound = z.sum(-1).isfinite()  # not what a broken expert has made of a token
        mask = (tokens_in(self, "context_mask", z) & sound).unsqueeze(-1)  # (B, T, 1)
        z = z.masked_fill(~mask, 0)  # not z * mask: NaN * 0 is NaN
        if getattr(forward, "cached", None):
            sums, numbers = forward.cached.extend(layer, self.mode, z, mask, self._sums)
        else:
            sums, numbers = self._sums(z), self._sums(mask)
        return sums / numbers.clamp(min=1)

    def __getstate__(self):
        return self.__dict__ | {"latest": None}  # copied and saved between forwards

    def _sums(self, z):
        return z.sum(1, keepdim=True) if self.mode == "fixed" else z.cumsum(1)


class MoELayer(nn.Module):
    """The MoE layer in an FFN's place, Eq. 5: y_t = sum over the top-k experts p of weight_p FFN_p(z_t).

    ffn: the seed model's FFN, one of FFNS. With LoRA experts its linears, frozen, become the layer's.
    experts: K dicts, all of one kind. LoRA, W + scaling B A: {"up_proj.lora_A": (r, d_in), "up_proj.lora_B":
        (d_out, r), ..., "scaling": float}; ranks may differ, linears may be left out. Full:
        {"up_proj.weight": (d_out, d_in), ...}.
    weighting: of the chosen experts. "literal": pi_p, as in Eq. 5. "renormalized": pi_p / sum of the chosen
        pi. "stopgrad": pi_p / stop_gradient(sum), which still trains the router at top-1.
    absolute: the router takes |z~ . e_p|: a singular vector has no sign (Arrow, arXiv 2405.11157).
    Raises ValueError, naming the argument, where shapes, counts or kinds disagree.
    """

    def __init__(self, ffn, experts, router, state, top_k=1, weighting="stopgrad", absolute=False):
        super().__init__()
        self.linears, act = _parts(ffn)
        _check_layer(len(experts), getattr(ffn, self.linears[0]).in_features, router, top_k, weighting)
        self.router, self.state, self.top_k, self.weighting = router, state, top_k, weighting
        router.absolute = absolute
        self.kind, self.act = _kind(experts), getattr(ffn, act)
        self.experts, self.scaling = _stack(experts, ffn, self.linears, self.kind), None
        if self.kind == "lora":
            self.scaling = [float(e["scaling"]) for e in experts]
            for name in self.linears:
                setattr(self, name, getattr(ffn, name).requires_grad_(False))
        self.index = 0  # of this layer in the model
        counts = torch.zeros_like(router.vectors[:, 0], dtype=torch.long)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """y, of x's shape, for x (B, T, d), or (T, d) as one sequence."""
        z = x if x.dim() == 3 else x.unsqueeze(0)  # (B, T, d)
        pi = self.router(z, self.state.context(z, self.index))  # (B, T, K)
        chosen, weight = self.choose(pi)  # (B, T, k) both
        if self.state.record:
            counted = chosen[tokens_in(self.state, "token_mask", z)]
            self.counts += counted.flatten().bincount(minlength=len(self.counts))
        y = self._mix(z.flatten(0, 1), chosen.flatten(0, 1), weight.flatten(0, 1))  # (N, d)
        return y.view(x.shape)

    def _mix_by_expert(self, x, chosen, weight, stacks, broken=None) -> Tensor:
        """Eq. 5, one expert after the other: y (N, d) for x (N, d), chosen and weight (N, k).

        broken: (K,) bool, to mark the experts that give NaN or infinity in.
        """
        own, y = _each_expert(stacks), torch.zeros_like(x)
        for p in range(len(self.counts)):
            t, choice = (chosen == p).nonzero(as_tuple=True)  # (n) both: the tokens that chose p
            out = self._experts(x[t], {p: len(t)}, own)  # FFN_p(z_t), (n, d)
            y.index_add_(0, t, weight[t, choice].unsqueeze(1) * out)  # Eq. 5
            if broken is not None and not out.isfinite().all():
                broken[p] = True
        return y

    def _mix_sorted(self, x, chosen, weight, stacks) -> Tensor:
        """Eq. 5 for LoRA experts, as above; the seed model's linears run once, on tokens sorted by expert."""
        order = chosen.flatten().argsort(stable=True)  # (N k), the (token, choice) pairs
        t, w = order // chosen.shape[1], weight.flatten()[order]
        sizes = chosen.flatten().bincount(minlength=len(self.counts)).tolist()  # K
        out = self._experts(x[t], dict(enumerate(sizes)), _each_expert(stacks))  # (N k, d)
        return torch.zeros_like(x).index_add_(0, t, w.unsqueeze(1) * out)

    def _experts(self, z, sizes, own):
        """FFN_p(z) of some experts, each on its rows of z (n, d): (n, d). sizes: {p: number of rows}."""
        *ups, down = self.linears
        hidden = self._activate([self._linear(name, z, sizes, own) for name in ups])  # (n, h)
        return self._linear(down, hidden, sizes, own)

    def _linear(self, name, z, sizes, own):
        rows = [*sizes.values()]
        if self.kind == "full":
            weight, bias = own[f"{name}_weight"], own.get(f"{name}_bias", [None] * len(self.counts))
            return _cat([F.linear(v, weight[p], bias[p]) for p, v in zip(sizes, z.split(rows), strict=True)])
        y = getattr(self, name)(z)  # the seed model's part, for all of them at once
        if f"{name}_A" not in own or not len(z):
            return y
        A, B, s = own[f"{name}_A"], own[f"{name}_B"], self.scaling
        each = zip(sizes, y.split(rows), z.split(rows), strict=True)
        return _cat([torch.addmm(u, F.linear(v, A[p]), B[p].t(), alpha=s[p]) for p, u, v in each if len(v)])

    def _activate(self, u):
        return self.act(u[0]) * u[1] if len(u) == 2 else self.act(u[0])

    def _mix(self, x, chosen, weight):
        """Eq. 5 by the path that is faster for so many tokens."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):  # cast once; autocast would cast again for every expert
            dtype = torch.get_autocast_dtype(device)
        few = len(x) <= FEW_TOKENS.get(device, FEW_TOKENS["cuda"]) and self.kind == "lora"
        stacks = {key: stack.to(dtype) for key, stack in self.experts().items()}
        x, weight = x.to(dtype), weight.to(dtype)
        if weight.requires_grad:  # what a broken expert gives teaches the router nothing
            weight.register_hook(lambda grad: grad.nan_to_num(0, 0, 0))
        if few and torch.compiler.is_compiling():  # a graph cannot branch on what it finds
            broken = _broken(stacks)
            y = self._mix_masked(x, chosen, weight, _without(broken, stacks))
            return y.masked_fill(broken[chosen].any(1, keepdim=True), torch.nan)
        mix = self._mix_by_expert
        if few:
            many = device == "cpu" and len(self.scaling) > FEW_EXPERTS * chosen.shape[1]
            mix = self._mix_sorted if many else self._mix_masked
        y = mix(x, chosen, weight, stacks)
        if y.detach().sum(1, dtype=torch.float32).isfinite().all():
            return y
        return self._isolate(x, chosen, weight, stacks, mix)

    def _isolate(self, x, chosen, weight, stacks, mix):
        """Eq. 5 where an expert gives NaN or infinity, which no other expert's tokens or gradients may see.

        A mask lets NaN through, since NaN * 0 is NaN. The tokens of such experts are computed by expert, the
        others again by `mix` with zeros in its place, bit for bit as if it were sound.
        """
        broken = _broken(stacks)
        y = self._mix_by_expert(x, chosen, weight, stacks, broken)
        y = y.masked_fill(~y.isfinite().all(1, keepdim=True), torch.nan)  # which stops the gradient, too
        if mix == self._mix_by_expert:
            return y
        rest = mix(x, chosen, weight, _without(broken, stacks))
        return torch.where(broken[chosen].any(1, keepdim=True), y, rest)

    def choose(self, pi: Tensor) -> tuple[Tensor, Tensor]:
        """The top-k experts of pi (..., K), of equals the lowest index, and their weights: (..., k) both."""
        k = min(self.top_k, len(self.counts) - len(self.router.disabled))
        if self.router.disabled:  # below the others, of which some may be 0, too
            pi = pi.index_fill(-1, torch.tensor(self.router.disabled, device=pi.device), -1)
        pi, chosen = pi.sort(dim=-1, descending=True, stable=True)  # topk promises no order among equals
        pi, chosen = pi[..., :k], chosen[..., :k]
        if self.weighting == "literal":
            return chosen, pi
        total = pi.sum(-1, keepdim=True)
        return chosen, pi / (total.detach() if self.weighting == "stopgrad" else total)

    def _mix_masked(self, x: Tensor, chosen: Tensor, weight: Tensor, stacks: dict) -> Tensor:
        """Eq. 5 for LoRA experts, as above, without sorting: all experts' A and B at once, behind masks.

        The seed model's W_up z is computed once a token, ahead of the choices. W_down is affine: it is
        computed once for the mean of the chosen experts' hidden features.
        """
        (n, k), (*ups, down) = chosen.shape, self.linears
        # a tensor of the scalings would be a copy to the device in every layer
        masks = [(chosen.t() == p).to(x.dtype) * s for p, s in enumerate(self.scaling)]
        mask = torch.stack(masks, dim=-1).unsqueeze(-1)  # (k, N, K, 1)
        hidden, total = [], weight.sum(1, keepdim=True)
        for name in ups:
            u = getattr(self, name)(x)  # (N, h)
            hidden.append(self._add_low_rank(u.repeat(k, 1) if k > 1 else u, name, x, mask, stacks))
        mean = hidden = self._activate(hidden)  # (k N, h)
        if k > 1:
            hidden = hidden * (weight / total).t().reshape(-1, 1)
            mean = hidden.view(k, n, -1).sum(0)  # (N, h)
        return total * self._add_low_rank(getattr(self, down)(mean), down, hidden, mask, stacks)  # Eq. 5

    def _add_low_rank(self, y, name, z, mask, stacks):
        """y + B A z of the chosen experts, z (N or k N, d_in): a row a choice, or y has N rows, their sum."""
        if f"{name}_A" in stacks:
            A, B = stacks[f"{name}_A"], stacks[f"{name}_B"]
            _, n, K, _ = mask.shape
            low = F.linear(z, A.flatten(0, 1)).view(-1, n, K, A.shape[1])
            if torch.compiler.is_compiling():
                low = low.masked_fill(mask == 0, 0)
            low = (low * mask).flatten(2)  # (k, N, K r)
            low = low.sum(0) if len(y) == n else low.flatten(0, 1)
            y.addmm_(low, B.mT.flatten(0, 1))  # in place: a copy costs more than the product
        return y


# Up to so many tokens LoRA experts run behind masks, all at once: K - 1 times more low-rank work, but no
# sorting, and no product of a new size in each batch. On a CPU with more than so many experts a choice the
# tokens are sorted.
FEW_TOKENS, FEW_EXPERTS = {"cpu": 2048, "cuda": 65536}, 6


def _each_expert(stacks):
    """{"up_proj_A": [(r, d_in), ...], ...}; unbind gives one gradient for a whole stack, not one for each."""
    return {key: stack.unbind(0) for key, stack in stacks.items()}


def _cat(parts):
    """The rows of all; of a single part without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _broken(stacks):
    """(K,) bool: the experts whose own weights are not all finite."""
    return torch.stack([~stack.float().flatten(1).sum(1).isfinite() for stack in stacks.values()]).any(0)


def _without(broken, stacks):
    return {key: stack.masked_fill(broken.view(-1, 1, 1), 0) for key, stack in stacks.items()}


def tokens_in(state: RoutingState, mask: str, z: Tensor) -> Tensor:
    """(B, T) bool for z (B, T, d): the mask of that name, or all."""
    found = getattr(state.forward or state, mask)
    if found is None:
        return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    if found.shape != z.shape[:2]:
        raise ValueError(f"{mask} is {tuple(found.shape)}, the tokens are {tuple(z.shape[:2])}")
    return found.to(z.device, torch.bool)


# an FFN is known by the names of its linears, the down projection last, and of its activation
FFNS = (
    (("gate_proj", "up_proj", "down_proj"), "act_fn"),  # LLaMA: down(act(gate(x)) * up(x))
    (("c_fc", "c_proj"), "gelu"),  # open_clip
    (("fc1", "fc2"), "activation_fn"),  # CLIP in transformers
)


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


def _check_layer(K, d, router, top_k, weighting):
    if tuple(router.vectors.shape) != (K, d):
        raise ValueError(f"router has vectors {tuple(router.vectors.shape)}, not ({K} experts, {d})")
    if not 1 <= top_k <= K:
        raise ValueError(f"top_k is {top_k}, not in 1..{K}, the number of experts")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}, not one of {WEIGHTINGS}")


def _kind(experts):
    """The kind "lora" or "full", the same for all experts."""
    kinds = {"lora" if any(".lora_" in key for key in e) or "scaling" in e else "full" for e in experts}
    if len(kinds) != 1:
        raise ValueError(f"experts must be all LoRA or all full, and at least one; these are {sorted(kinds)}")
    return kinds.pop()


def _shapes(e, ffn, linears, kind):
    """{entry: shape} that expert e must have; a LoRA may leave linears out."""
    if kind == "full":
        return {key: tuple(t.shape) for key, t in ffn.named_parameters()}
    want = {"scaling": ()}
    for name in linears:
        linear, A, B = getattr(ffn, name), f"{name}.lora_A", f"{name}.lora_B"
        if A in e or B in e:
            r = len(e.get(A, ()))
            want |= {A: (r, linear.in_features), B: (linear.out_features, r)}
    return want


def _stack(experts, ffn, linears, kind):
    """{"up_proj_A": (K, r, d_in), "up_proj_B": (K, d_out, r)}, or {"fc1_weight": (K, d_out, d_in), ...}.

    r is the largest rank; zeros fill up smaller ones, and stay zero in training. No ranks, no entry.
    """
    for p, e in enumerate(experts):
        want = _shapes(e, ffn, linears, kind)
        if e.keys() != want.keys():
            wrong = sorted(e.keys() ^ want.keys())
            raise ValueError(f"experts[{p}], of kind {kind}, has unknown or missing entries {wrong}")
        for key, shape in want.items():
            if shape and tuple(e[key].shape) != shape:
                raise ValueError(f"experts[{p}]: {key} is {tuple(e[key].shape)}, not {shape}")
    out = Stacks()
    for name in linears:
        like, stack = dict(getattr(ffn, name).named_parameters()), {}
        if kind == "lora":  # nothing, where a LoRA leaves the linear out
            like = dict.fromkeys(("lora_A", "lora_B"), torch.zeros(0, 0, device=like["weight"].device))
        for leaf, none in like.items():
            own = [e.get(f"{name}.{leaf}", none).detach().to(none.device) for e in experts]
            if kind == "lora":
                rows, columns = max(len(t) for t in own), max(t.shape[1] for t in own)
                # fp32, whatever the seed model is stored in: bf16 parameters would round small updates away
                own = [F.pad(t.float(), (0, columns - t.shape[1], 0, rows - len(t))) for t in own]
            stack[f"{name}_{leaf.removeprefix('lora_')}"] = torch.stack(own)
        if any(t.numel() for t in stack.values()):
            out.update({key: nn.Parameter(t) for key, t in stack.items()})
    return out


class Stacks(nn.ParameterDict):  # no submodules: tools that look for "up_proj" shall find the linear alone
    __call__ = nn.Module.__call__  # tools that offload weights bring a module's own back when it is called

    def forward(self):
        return dict(self.items())


def unify(
    model, ffn_names, experts, vectors, *, names=None, lam=0.3, offset=False, context="fixed", **options
):
    """Replace the L FFNs of a seed model by MoE layers (Sec. 3.4), in place; returns the model.

    ffn_names: the FFNs' module paths, such as "model.layers.0.mlp".
    experts: K x {ffn_name: expert of MoELayer}. vectors: K x (L, d), or one (K, L, d). names: of the experts.
    lam, offset: of Router. context: the mode of RoutingState. options: of MoELayer, from top_k on.

    Then only routers and experts require gradients; model.routing and model.moe_config describe the model.
    Raises ValueError, naming the argument, where anything disagrees; the model then still has its FFNs.
    """
    ffn_names, vectors = list(ffn_names), [torch.as_tensor(v) for v in vectors]
    names = [f"expert{p + 1}" for p in range(len(experts))] if names is None else list(names)
    _check(model, ffn_names, experts, vectors, names, context)
    kind = _kind([e[name] for e in experts for name in ffn_names])
    state, new = RoutingState(mode=context), []
    for index, name in enumerate(ffn_names):
        ffn = model.get_submodule(name)
        device = next(ffn.parameters()).device
        try:
            router = Router(torch.stack([v[index].to(device) for v in vectors]), lam, offset)
            new.append(MoELayer(ffn, [e[name] for e in experts], router, state, **options))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
    model.requires_grad_(False)
    for index, (name, layer) in enumerate(zip(ffn_names, new, strict=True)):
        model.set_submodule(name, layer)
        layer.index = index
    source = str(getattr(model, "name_or_path", "") or "")  # a hub id
    if os.path.isabs(source) or os.path.isdir(source):
        source = Path(source).name + "/"  # a local folder's name, not its path
    model.routing, model.moe_config = state, dict(names=names, ffn_names=ffn_names, kind=kind)
    model.moe_config |= dict(top_k=new[0].top_k, weighting=new[0].weighting, context=context, offset=offset)
    model.moe_config |= dict(lam=float(lam), scaling=[own.scaling for own in new], seed=source, disabled=[])
    if options.get("absolute"):
        model.moe_config["absolute"] = True
    if hasattr(model, "generate"):
        _attach(model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save
    return model


def _check(model, ffn_names, experts, vectors, names, context):
    K, L, modules = len(experts), len(ffn_names), dict(model.named_modules())
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}, not one of {CONTEXTS}")
    if L == 0 or len(set(ffn_names)) < L:
        raise ValueError("ffn_names must be distinct module paths, at least one")
    for name in ffn_names:
        if name not in modules:
            raise ValueError(f"ffn_names: the model has no module {name!r}")
        if next(modules[name].parameters()).is_meta and not vectors[0].is_meta:
            raise ValueError(f"{name}: the seed model's weights are offloaded: load it into memory")
    for what, n in (("vectors", len(vectors)), ("names", len(names))):
        if n != K:
            raise ValueError(f"{what} has {n} entries, experts has {K}")
    for p, (e, v) in enumerate(zip(experts, vectors, strict=True)):
        if set(e) != set(ffn_names):
            raise ValueError(f"experts[{p}] and ffn_names differ in {sorted(set(e) ^ set(ffn_names))}")
        if v.dim() != 2 or len(v) != L:
            raise ValueError(f"vectors[{p}] is {tuple(v.shape)}, not (L = {L}, d)")


def _attach(model):
    """Let a language model tell model.routing which tokens are real, and what its key-value cache holds."""
    model.base_model.routing, generation = model.routing, _serving("generation")
    if generation is not None:
        return generation.attach(model)
    model.base_model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.base_model.register_forward_hook(_end, always_call=True)
    model.generate = _refuse


def _begin(module, args, kwargs):
    """Before a language model's forward, where there is no generation.py."""
    names, state = ("input_ids", "attention_mask", "position_ids", "past_key_values"), module.routing
    _, mask, places, cache = ((dict(zip(names, args, strict=False)) | kwargs).get(name) for name in names)
    packed = places is not None and mask is None and bool((places.diff() <= 0).any())
    if packed or cache is not None and cache.get_seq_length():
        _refuse()
    own = [mask if given is None else given for given in (state.context_mask, state.token_mask)]
    state.latest = RoutingState(state.mode, *own)


def _end(module, args, output):
    if not torch.is_grad_enabled():  # else a backward that recomputes the forward needs it again
        module.routing.latest = None


def _refuse(*args, **kwargs):
    what = "generate, filled key-value caches and positions that restart"
    raise RuntimeError(f"{what} need metamoe/serving/generation.py")


def _refuse_to_save(*args, **kwargs):
    what = "save_pretrained would write a configuration without experts, which loads as the seed model"
    raise RuntimeError(f"{what}: use moe.save(model, folder), or unify_moe.py --export")


def _serving(name, error=None):
    """metamoe/serving/NAME.py, in a package NAME.py beside this file; without it the error, or None."""
    try:
        return importlib.import_module(f"{__package__ or 'metamoe.serving'}.{name}")
    except ModuleNotFoundError:
        if error:
            raise error from None


def layers(model) -> list[MoELayer]:
    """The MoE layers of a unified model, in the order of its ffn_names."""
    return [model.get_submodule(name) for name in model.moe_config["ffn_names"]]


def router_parameters(model) -> list[nn.Parameter]:
    """The routing vectors e_p, (K, d) a layer, and the biases (K,), where there are any."""
    routers = [layer.router for layer in layers(model)]
    return [r.vectors for r in routers] + [r.bias for r in routers if r.bias is not None]


def lambda_parameters(model) -> list[nn.Parameter]:
    """lambda, a scalar a layer."""
    return [layer.router.lam for layer in layers(model)]


def expert_parameters(model) -> list[nn.Parameter]:
    """The experts' stacked weights."""
    return [parameter for layer in layers(model) for parameter in layer.experts.parameters()]


@torch.no_grad()
def clamp_(model):
    """Project every layer's lambda onto [0, 1]; call it after every optimiser step."""
    for lam in lambda_parameters(model):
        lam.clamp_(0, 1)


def counts(model) -> Tensor:
    """How many (token, choice) pairs went to each expert while routing.record was set: (L, K) int64."""
    return torch.stack([layer.counts for layer in layers(model)])


def reset_counts(model):
    for layer in layers(model):
        layer.counts.zero_()


def added(layer: MoELayer) -> dict:
    """What the layer adds to its FFN: {"router.vectors": (K, d), "experts.up_proj.A": (K, r, d_in), ...}."""
    tensors = {key: t for key, t in layer.state_dict().items() if key.startswith("router.")}
    own = layer.experts.items()
    return tensors | {"experts." + ".".join(key.rsplit("_", 1)): t.detach() for key, t in own}


def save(model, folder):
    """Write what unify added to a folder: experts, routing vectors, lambdas, configuration; no seed model."""
    named = zip(model.moe_config["ffn_names"], layers(model), strict=True)
    tensors = {f"{name}.{key}": t.contiguous() for name, layer in named for key, t in added(layer).items()}
    write(folder, model.moe_config, tensors)


def write(folder, config, tensors):
    """What `save` writes: aside, then moved in, the configuration last: a folder that has one is complete."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights, description = (Path(folder, name) for name in ("moe.safetensors", "moe_config.json"))
    new_weights, new_description = (Path(f"{file}.part") for file in (weights, description))
    new_description.write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, new_weights, metadata={"format": "pt"})
    new_weights.chmod(new_description.stat().st_mode)  # save_file ignores the umask
    description.unlink(missing_ok=True)  # else a crash leaves it beside new tensors
    new_weights.replace(weights)
    new_description.replace(description)


def read(folder):
    """(configuration, tensors {"model.layers.0.mlp.router.vectors": (K, d), ...}) of what `save` wrote."""
    config = {"seed": "", "disabled": []} | json.loads((Path(folder) / "moe_config.json").read_text())
    return config, load_file(Path(folder) / "moe.safetensors")


def load(folder, model=None, **options):
    """The unified model of `save`. model: a fresh seed model, which is changed in place and returned.

    Without one metamoe/serving/seed_model.py loads it through transformers, with `options` (dtype, ...), from
    the hub or from the local folders named there. FileNotFoundError where it is not there.
    """
    config, tensors = read(folder)
    if model is None:
        error = FileNotFoundError("no seed_model.py: give the seed model, moe.load(folder, model)")
        seed_model = _serving("seed_model", error)
        model = seed_model.load_seed(Path(folder).absolute(), config["seed"], options)
    return assemble(model, config, tensors)


def assemble(model, config, tensors, joining=()):
    """The unified model of what `read` returns, from a fresh seed model, in place.

    joining: experts to add, (name, {ffn_name: expert of MoELayer}, vectors (L, d)) each.
    """
    ffn_names, K = config["ffn_names"], len(config["names"])
    scalings = list(zip(ffn_names, config["scaling"], strict=True))  # None for full experts
    experts = [{name: {"scaling": own[p]} if own else {} for name, own in scalings} for p in range(K)]
    for p, e in enumerate(experts):
        for key, stack in tensors.items():
            name, found, rest = key.rpartition(".experts.")
            if found:
                e[name][rest.replace(".A", ".lora_A").replace(".B", ".lora_B")] = stack[p]
    vectors = torch.stack([tensors[f"{name}.router.vectors"] for name in ffn_names], dim=1)  # (K, L, d)
    joined, others, own = zip(*joining, strict=True) if joining else ((), (), ())
    given = ("lam", "top_k", "weighting", "context", "offset", "absolute")
    options = {key: config[key] for key in given if key in config} | {"names": [*config["names"], *joined]}
    model = unify(model, ffn_names, [*experts, *others], [*vectors, *own], **options)
    model.moe_config = config | model.moe_config  # it may say more, such as who was merged
    with torch.no_grad():
        for name, layer in zip(ffn_names, layers(model), strict=True):
            layer.router.lam.copy_(tensors[f"{name}.router.lam"])
            if f"{name}.router.bias" in tensors:  # an earlier version's model has none: it is that of its e_p
                layer.router.bias[:K].copy_(tensors[f"{name}.router.bias"])
    for name in config["disabled"]:
        disable_expert(model, name)
    return model


def classify(model, tokenizer, prompts, choices):
    """The likeliest choice for each prompt, and all log-likelihoods: metamoe/serving/classification.py."""
    error = RuntimeError("classify needs metamoe/serving/classification.py")
    return _serving("classification", error).classify(model, tokenizer, prompts, choices)


def disable_expert(model, name):
    """Opt out, without training: no token goes to the expert any more, its pi is 0 and the others' sum to 1.

    `save` keeps its weights; members.remove_expert leaves them out. ValueError if unknown, or the last one.
    """
    _disable(model, name, {*model.moe_config["disabled"], name})


def enable_expert(model, name):
    """Opt in again. ValueError where there is no such expert."""
    _disable(model, name, {*model.moe_config["disabled"]} - {name})


def _disable(model, name, disabled):
    names = model.moe_config["names"]
    if name not in names:
        raise ValueError(f"no expert is called {name!r}; there are {', '.join(names)}")
    if len(disabled) == len(names):
        raise ValueError(f"{name!r} is the last expert: a model without one has no FFN")
    model.moe_config["disabled"] = [other for other in names if other in disabled]
    for layer in layers(model):
        layer.router.disabled = [p for p, other in enumerate(names) if other in disabled]
