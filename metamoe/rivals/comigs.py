"""CoMiGS (arXiv 2409.13931): each client's own mixture of a generalist and a specialist; rounds.py trains it.

In every FFN two LoRA experts are mixed by softmax(W z) of the token z. Expert 0, the generalist, becomes the
clients' mean in every round; expert 1, the specialist, and W, the router, stay with the client.
"""

import torch

import moe
from metamoe.data.splits import rng_of
from metamoe.errors import UserError

PERSONAL = "clients"  # in a row's folder, that of the clients' own models
ROUTER_PART = 0.2  # of a client's training records: W is trained on these, the experts on the others
ROUTER_EVERY, ROUTER_STEPS = 0.15, 0.05  # of all steps of the experts: the paper's 30 and 10 of 200


def mixture(backbone, rank, alpha, seed):
    """The seed model with both experts and the router in every FFN; they start as PEFT and nn.Linear do."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return (2 * torch.rand(shape, generator=generator) - 1) / shape[-1] ** 0.5

    experts = [{}, {}]
    for expert in experts:
        for ffn in backbone.ffn_names:
            own = expert[ffn] = {"scaling": alpha / rank}
            for name in backbone.ffn_linears:
                linear = backbone.model.get_submodule(f"{ffn}.{name}")
                own[f"{name}.lora_A"] = uniform(rank, linear.in_features)
                own[f"{name}.lora_B"] = torch.zeros(linear.out_features, rank)
    vectors = uniform(2, len(backbone.ffn_names), backbone.width)  # (2, L, d): each layer's W
    options = {"names": ["generalist", "specialist"], "top_k": 2, "weighting": "literal", "context": "none"}
    return moe.unify(backbone.model, backbone.ffn_names, experts, vectors, **options)


def router_part(name, records, seed):
    """(records of the experts, records of the router), drawn from a client's training records."""
    if len(records) < 2:
        why = "comigs trains its router on a part of its own: it needs 2 training records or more"
        raise UserError(f"client {name}: {why}")
    order = rng_of(seed, f"{name}, router").permutation(len(records)).tolist()
    count = max(1, round(ROUTER_PART * len(records)))
    return [records[i] for i in sorted(order[count:])], [records[i] for i in sorted(order[:count])]
