"""GPU memory that training takes at the paper's batch, computed; prints a table.

Counts the tensors that autograd keeps for the backward in one decoder layer of the model's own widths, with
random weights, on a few tokens; they grow with layers and tokens. To them come the weights, what is trained
(value, gradient, two AdamW moments, all fp32), the head's float32 logits (made in chunks; twice, with their
gradient) and, in the backward, about once more what one layer keeps. Fragmentation, the CUDA context and
libraries (1 to 2 GB) are not in it.
"""

import torch
from common import command_line, header, row, unified

from metamoe.backbones.base import import_transformers

# the published configurations: layers, width, FFN width, heads, key-value heads, vocabulary, tied embeddings
MODELS = {
    "llama-3.2-3b": (28, 3072, 8192, 24, 8, 128256, True),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
}
LOGITS = 2**29
COLUMNS = (
    "weights | trained, with AdamW | activations | head | one layer's backward | sum | with checkpointing"
)


def kept_bytes(model, batch, tokens):
    """Bytes that a forward of the model keeps for the backward, without its parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, else its address would be another's
        return tensor

    width, mask = model.config.hidden_size, torch.ones(batch, tokens, dtype=torch.long)
    embedded = torch.randn(batch, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def layer_bytes(config, rank, experts, batch, tokens):
    """Of a layer: (bytes that it keeps for the backward a token, frozen parameters, trained parameters)."""
    transformers = import_transformers()  # before peft
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    kept, lora = [], LoraConfig(r=rank, target_modules=["gate_proj", "up_proj", "down_proj"])
    for layers in (1, 2):
        config.num_hidden_layers = layers
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        frozen = sum(p.numel() for p in model.model.layers[0].parameters())
        if experts:
            names = [f"model.layers.{i}.mlp" for i in range(layers)]
            model = unified(model, names, config.hidden_size, rank, experts, context="prefix")
        else:
            model = get_peft_model(model, lora).get_base_model()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // layers
        kept.append(kept_bytes(model.train(), batch, tokens))
    return (kept[1] - kept[0]) / (batch * tokens), frozen, trained


def estimate(name, experts, args):
    """Bytes, as in COLUMNS."""
    layers, width, hidden, heads, kv_heads, vocabulary, tied = MODELS[name]
    sizes = dict(vocab_size=8, hidden_size=width, intermediate_size=hidden, attn_implementation="sdpa")
    heads = dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    config, tokens = import_transformers().LlamaConfig(**sizes, **heads), args.batch * args.tokens
    a_token, frozen, trained = layer_bytes(config, args.rank, experts, 2, args.tokens)
    weights = 2 * (layers * frozen + vocabulary * width * (1 if tied else 2))
    optimiser, layer = 16 * layers * trained, a_token * tokens
    # logits and their gradient, hidden states and theirs
    head = 2 * min(LOGITS, 4 * vocabulary * tokens) + 2 * 2 * tokens * width
    full = [weights, optimiser, layers * layer, head, layer]
    checkpointed = weights + optimiser + layers * 2 * width * tokens + head + 2 * layer
    return [*full, sum(full), checkpointed]


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--batch", type=int, default=32, help="samples a step, the paper's")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a sample, the most")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--experts", type=int, default=3, help="experts of the MoE")
    args = parser.parse_args()
    print(f"GB (10^9 bytes) at {args.batch} x {args.tokens} tokens, bfloat16, ", end="")
    print(f"rank {args.rank}, MoE of {args.experts} experts\n")
    header(f" | {COLUMNS}", "lrrrrrrr")
    for name in MODELS:
        for what, experts in (("an expert", 0), ("final training of the MoE", args.experts)):
            row(f"{name}, {what}", *(f"{size / 1e9:.1f}" for size in estimate(name, experts, args)))
