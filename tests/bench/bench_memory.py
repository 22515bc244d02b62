"""GPU memory that training takes at the paper's batch, computed: `python tests/bench/bench_memory.py` prints a table.

The tensors that autograd keeps for the backward are counted (`saved_tensors_hooks`) in one decoder layer of the model's own widths,
randomly initialised, on a few tokens; they grow with layers and tokens. To them come the weights, what is trained (fp32 value, gradient,
two AdamW moments), the head's float32 logits (`head_loss` makes them in chunks; twice, with their gradient) and, in the
backward, about once more what one layer keeps. Fragmentation, the CUDA context and libraries (1 to 2 GB) are not in it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_models import unified  # noqa: E402

from metamoe.backbones.base import import_transformers  # noqa: E402

# the published configurations: layers, width, FFN width, heads, key-value heads, vocabulary, tied embeddings
MODELS = {
    "llama-3.2-3b": (28, 3072, 8192, 24, 8, 128256, True),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
}
LINEARS, LOGITS = ("gate_proj", "up_proj", "down_proj"), 2**29


def layer_bytes(config, rank, experts, batch, tokens):
    """(bytes that one layer keeps for the backward a token, frozen parameters of a layer, trained parameters of a layer)."""
    transformers = import_transformers()
    torch.manual_seed(0)
    kept = []
    for layers in (1, 2):
        config.num_hidden_layers = layers
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        frozen = sum(p.numel() for p in model.model.layers[0].parameters())
        names = [f"model.layers.{l}.mlp" for l in range(layers)]
        if experts:
            model = unified(model, names, rank, experts, context="prefix")
        else:
            from peft import LoraConfig, get_peft_model

            targets = [f"{name}.{linear}" for name in names for linear in LINEARS]
            model = get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
            ).get_base_model()
        model.train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // layers
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive, sizes = [], {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)  # else its address would be another's
            return tensor

        embedded = torch.randn(batch, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            model.model(
                inputs_embeds=embedded,
                attention_mask=torch.ones(batch, tokens, dtype=torch.long),
                use_cache=False,
            )
        kept.append(sum(sizes.values()))
    return (kept[1] - kept[0]) / (batch * tokens), frozen, trained


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch", type=int, default=32, help="samples a step (default: %(default)s, the paper's)"
    )
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens a sample (default: %(default)s, the most)"
    )
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=3, help="experts of the MoE (default: %(default)s)")
    args = parser.parse_args()
    tokens = args.batch * args.tokens
    print(
        f"GB (10^9 bytes) at {args.batch} x {args.tokens} tokens, bfloat16, rank {args.rank}, MoE of {args.experts} experts\n"
    )
    print(
        "| | weights | trained, with AdamW | activations | head | one layer's backward | sum | with checkpointing |\n|---|"
        + "---:|" * 7
    )
    for name, (layers, width, hidden, heads, kv_heads, vocabulary, tied) in MODELS.items():
        config = import_transformers().LlamaConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            attn_implementation="sdpa",
        )
        for what, experts in (("an expert", 0), ("final training of the MoE", args.experts)):
            a_token, frozen, trained = layer_bytes(config, args.rank, experts, 2, args.tokens)
            weights = 2 * (layers * frozen + vocabulary * width * (1 if tied else 2))
            optimiser = 16 * layers * trained
            # logits and their gradient, hidden states and theirs
            head = 2 * min(LOGITS, 4 * vocabulary * tokens) + 2 * 2 * tokens * width
            layer = a_token * tokens
            full = [weights, optimiser, layers * layer, head, layer]
            checkpointed = weights + optimiser + layers * 2 * width * tokens + head + 2 * layer
            print(
                f"| {name}, {what} | "
                + " | ".join(f"{v / 1e9:.1f}" for v in (*full, sum(full), checkpointed))
                + " |",
                flush=True,
            )
