"""Inference of whole unified models against their dense seed models; prints samples/s and ratios.

ViT-B/32 (open_clip's visual tower) and a LLaMA of 1.2 billion parameters (Llama-3.2-1B's shape, 128 tokens a
sample), both randomly initialised, each unified with three random experts of rank 16. The paper's ratios are
0.966 (ViT) and 0.936 (LLaMA-3B). bfloat16 on CUDA.
"""

import torch
from common import MACHINE, command_line, header, row, timed, unified

from metamoe.backbones.base import import_transformers, pick_device, pick_dtype


def vit():
    """(model, its FFNs, their width, function from a batch size to an input)."""
    import_transformers()  # a torchvision that open_clip can import
    import open_clip

    tower = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).visual
    names = [f"transformer.resblocks.{i}.mlp" for i in range(12)]
    return tower, names, 768, lambda batch: torch.randn(batch, 3, 224, 224)


def llama():
    transformers = import_transformers()
    sizes = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    heads = dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).model  # heads are alike
    names = [f"layers.{i}.mlp" for i in range(16)]
    return model, names, 2048, lambda batch: torch.randint(5, 128000, (batch, 128))


def tiny():
    """A LLaMA of toy size, which tests this script."""
    transformers = import_transformers()
    sizes = dict(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).model
    names = [f"layers.{i}.mlp" for i in range(2)]
    return model, names, 64, lambda batch: torch.randint(5, 100, (batch, 16))


MODELS = {"vit": vit, "llama": llama, "tiny": tiny}


@torch.inference_mode()
def samples_per_second(model, x, least):
    """Of the shortest forward of at least five that take `least` seconds, after two to warm up."""
    times = []
    while len(times) < 7 or sum(times[2:]) < least:
        times.append(timed(model, x)[1])
    return len(x) / min(times[2:])


def compare(name, device, dtype, args):
    sides = []
    for build in (False, True):
        torch.manual_seed(0)
        model, names, width, batch_of = MODELS[name]()
        model = model.to(device, dtype).eval()
        if build:
            model = unified(model, names, width)
        # Alike on both sides: of tokens that attention transposes, PyTorch makes one product where weights
        # may be trained and T products where they are frozen, as unify leaves them.
        model.requires_grad_(not args.frozen)
        sides.append(torch.compile(model) if args.compile else model)
    for batch in args.batches:
        x = batch_of(batch).to(device)
        if x.is_floating_point():
            x = x.to(dtype)
        dense, ours = (samples_per_second(model, x, args.least) for model in sides)
        row(name, batch, f"{dense:.1f}", f"{ours:.1f}", f"{ours / dense:.3f}")


if __name__ == "__main__":
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["vit", "llama"], help="models")
    add("--batches", nargs="+", type=int, default=[1, 32, 256], help="batch sizes")
    add("--compile", action="store_true", help="torch.compile both sides")
    add("--frozen", action="store_true", help="freeze both sides")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    add("--least", type=float, default=3.0, help="seconds to measure each for")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype("auto", device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {dtype}, {MACHINE}{', compiled' if args.compile else ''}\n")
    header("model | batch | dense, samples/s | unified, samples/s | unified / dense", "lrrrr")
    for name in args.models:
        compare(name, device, dtype, args)
