"""How a client's expert is trained where no budget covers it: alone, or beside the seed model (anchored)."""

import math

import torch

import moe
from metamoe.backbones.base import unwrap
from metamoe.backbones.training import train, use_checkpointing, warm_up
from metamoe.errors import UserError
from metamoe.start import seed_expert, set_bias


def train_model(backbone, model, private, proxies, args, settings, run, options):
    """Train the expert in place; returns each step's loss."""
    steps = settings["epochs"] * math.ceil(len(private + proxies) / settings["batch_size"])
    options["warmup_steps"] = warm_up(args.warmup_steps, settings["warmup_steps"], steps)
    options |= {"batch_size": settings["batch_size"], "steps": steps}
    options["checkpointing"] = use_checkpointing(args.gradient_checkpointing, run, backbone)
    return train(backbone, model, private + proxies, **options)


def check_anchored(args):
    """UserError where another flag does not go with --data anchored."""
    for flag in ("full_ffn", "epsilon"):
        if args.data == "anchored" and getattr(args, flag):
            why = "an expert beside the seed model is LoRA factors, trained without a budget: leave it out"
            raise UserError(f"--{flag.replace('_', '-')}: does not go with --data anchored: {why}")


class Anchored:
    """FlexOlmo's coordination (arXiv 2507.07024): a LoRA learns beside the seed model, when it is better.

    model: two experts a token, weighted by the softmax over their logits z . e + b. e_0, the seed model's FFN
    with D_0's mean as its routing vector, never changes; the client's expert trains its LoRA, its routing
    vector, which starts at `vectors` (L, d), and a bias of at most 0. lora: of Backbone.add_lora.
    """

    def __init__(self, backbone, mean, vectors, lora):
        self.backbone, self.lora = backbone, lora
        expert = self._start()
        self.ffns = {name: backbone.model.get_submodule(name) for name in backbone.ffn_names}
        zero = {name: seed_expert(ffn, expert[name]) for name, ffn in self.ffns.items()}
        options = dict(lam=0.0, offset=True, context="none", top_k=2, weighting="renormalized")
        self.model = moe.unify(backbone.model, list(self.ffns), [zero, expert], [mean, vectors], **options)
        self.layers = dict(zip(self.ffns, moe.layers(self.model), strict=True))
        set_bias(self.model, torch.zeros(2, len(self.ffns)).unbind())
        if lora[3]:  # fixed A
            for layer in self.layers.values():
                for key, stack in layer.experts.items():
                    stack.requires_grad_(not key.endswith("_A"))
        pairs = moe.router_parameters(self.model) + moe.expert_parameters(self.model)
        self.frozen = [(pair, pair[0].detach().clone()) for pair in pairs]

    def _start(self):
        """A new LoRA of every FFN, as PEFT makes it."""
        model, expert = self.backbone.add_lora(*self.lora), {}
        for name in self.backbone.ffn_names:
            own = expert[name] = {}
            for linear in self.backbone.ffn_linears:
                module = unwrap(model).get_submodule(f"{name}.{linear}")
                own["scaling"] = module.scaling["default"]
                own[f"{linear}.lora_A"] = module.lora_A["default"].weight
                own[f"{linear}.lora_B"] = module.lora_B["default"].weight
        model.unload()
        return expert

    @torch.no_grad()
    def hold(self):
        """After a step, which takes each element for itself: undo what it did to e_0; no bias above 0."""
        for pair, first in self.frozen:
            pair[0] = first
        for layer in self.layers.values():
            layer.router.bias.clamp_(max=0)

    @torch.no_grad()
    def take_apart(self):
        """(the seed model with the trained LoRA, PEFT's; {"vectors": (L, d), "bias": (L,)}) of the expert."""
        for name, ffn in self.ffns.items():
            self.backbone.model.set_submodule(name, ffn)
        model = self.backbone.add_lora(*self.lora)
        for name, layer in self.layers.items():
            for linear in self.backbone.ffn_linears:
                module = unwrap(model).get_submodule(f"{name}.{linear}")
                module.lora_A["default"].weight.copy_(layer.experts[f"{linear}_A"][1])
                module.lora_B["default"].weight.copy_(layer.experts[f"{linear}_B"][1])
        routers = [layer.router for layer in self.layers.values()]
        sent = {"vectors": torch.stack([router.vectors[1] for router in routers]).cpu()}
        return model, sent | {"bias": torch.stack([router.bias[1] for router in routers]).cpu()}
