"""What this project computes of a language model, compared at load with what the model itself computes: one
that does more than we know is refused before any work."""

import torch

import moe
from metamoe.backbones.scoring import pack, tree_mask
from metamoe.errors import UserError


def after_head(model):
    """What the family does to lm_head's logits: a function of these, element by element."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def finish(logits):
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return finish


@torch.no_grad()
def check_computes(model, ffn_names, linears, source):
    """UserError where the model computes more than this project knows: of its logits, of its FFNs, or of a
    text in which several choices follow one prompt."""
    device, vocabulary = model.device, model.get_input_embeddings().num_embeddings
    ids = torch.arange(7, 7 + 2 * 6, device=device).view(2, 6) % vocabulary
    family, calls = f"seed model {source}: a {type(model).__name__}", []
    ffns = {name: model.get_submodule(name) for name in ffn_names}
    hooks = [ffn.register_forward_hook(lambda ffn, *_: calls.append(ffn)) for ffn in ffns.values()]
    want = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    if len(calls) != len(ffns) or set(calls) != set(ffns.values()):
        raise UserError(f"{family} does not run each FFN once: such a model cannot be unified")
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    if not same(after_head(model)(model.lm_head(states)), want):
        raise UserError(f"{family} computes its logits in a way that is not known here")
    if sees_other_choices(model, vocabulary):
        raise UserError(f"{family} has layers that do not follow the attention mask: its choices would mix")
    generator = torch.Generator().manual_seed(0)
    for name, ffn in ffns.items():
        x = torch.randn(1, 5, states.shape[-1], generator=generator).to(device, states.dtype)
        if not same(zero_layer(ffn, linears, name, source)(x), ffn(x)):
            why = f"its FFN {name}, a {type(ffn).__name__}, computes more than its three linears"
            raise UserError(f"seed model {source}: {why}: such a model cannot be unified")


def sees_other_choices(model, vocabulary):
    """Whether a choice is another one after a long first choice, as in a recurrent layer."""
    ids, part, places = (t.to(model.device) for t in pack([([7], [[*range(8, 20)], [20]])], 0))
    ids %= vocabulary
    packed = {"attention_mask": tree_mask(part, model.dtype), "position_ids": places}
    states = model.model(input_ids=ids, use_cache=False, **packed).last_hidden_state[0, -1]
    alone = model.model(input_ids=ids[:, [0, -1]], use_cache=False).last_hidden_state[0, -1]
    return not (states - alone).float().norm() < 0.1 * alone.float().norm()  # SmolLM2: 0; without a mask 0.27


def same(ours, theirs):
    """Equal within the rounding of their dtype."""
    rounding = 1e-4 if theirs.dtype == torch.float32 else 0.03
    return bool(((ours - theirs).abs() <= rounding * theirs.abs().amax().clamp(min=1e-3)).all())


def zero_layer(ffn, linears, name, source):
    """The MoE layer of one expert that changes nothing."""
    expert = {"scaling": 1.0}
    for linear in linears:
        module = getattr(ffn, linear)
        expert[f"{linear}.lora_A"] = torch.zeros(1, module.in_features)
        expert[f"{linear}.lora_B"] = torch.zeros(module.out_features, 1)
    router = moe.Router(torch.zeros(1, getattr(ffn, linears[0]).in_features))
    try:
        layer = moe.MoELayer(ffn, [expert], router, moe.RoutingState(mode="none"))
    except ValueError as error:
        raise UserError(f"seed model {source}: {name}: {error}") from None
    return layer.to(getattr(ffn, linears[0]).weight.device)
