"""Inference of whole unified models against their dense seeds: `python tests/bench/bench_models.py [--compile]` prints samples/s and ratios.

ViT-B/32 (open_clip's visual tower) and a LLaMA of 1.2 billion parameters (Llama-3.2-1B's shape, 128 tokens a sample), both randomly initialised, each
unified with three random experts of rank 16. The paper's ratios are 0.966 (ViT) and 0.936 (LLaMA-3B). bfloat16 on CUDA.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_moe import random_expert  # noqa: E402

import moe  # noqa: E402
from metamoe.backbones.base import import_transformers, pick_device, pick_dtype  # noqa: E402

TOKENS = 128


def vit():
    """(model, its FFNs, function from a batch size to an input)."""
    import_transformers()  # a torchvision that open_clip can import
    import open_clip

    tower = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).visual
    return (
        tower,
        [f"transformer.resblocks.{i}.mlp" for i in range(12)],
        lambda batch: torch.randn(batch, 3, 224, 224),
    )


def llama():
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).model  # the head is the same in both
    return (
        model,
        [f"layers.{i}.mlp" for i in range(16)],
        lambda batch: torch.randint(5, 128000, (batch, TOKENS)),
    )


def unified(model, names, rank=16, count=3, **options):
    """The model with `count` random experts in every FFN; options: of moe.unify."""
    experts = [{name: random_expert(model.get_submodule(name), rank) for name in names} for _ in range(count)]
    width = next(
        m.in_features for m in model.get_submodule(names[0]).modules() if isinstance(m, torch.nn.Linear)
    )
    return moe.unify(model, names, experts, torch.randn(count, len(names), width), **options)


@torch.inference_mode()
def seconds(model, x, device, least):
    """Seconds of a forward: the shortest of some, `least` seconds of them, after two to warm up."""
    times, began = [], None
    while began is None or time.perf_counter() - began < least or len(times) < 5:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if len(times) == 2 and began is None:
            times, began = [], time.perf_counter()
    return min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("vit", "llama"), default=["vit", "llama"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    parser.add_argument(
        "--least", type=float, default=3.0, help="seconds to measure each for (default: %(default)s)"
    )
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype("auto", device)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{where}, {dtype}, torch {torch.__version__}{', compiled' * args.compile}\n")
    print(
        "| model | batch | dense, samples/s | unified, samples/s | unified / dense |\n|---|---:|---:|---:|---:|"
    )
    for name in args.models:
        sides = []
        for build in (False, True):
            torch.manual_seed(0)
            model, names, batch_of = (vit if name == "vit" else llama)()
            model = model.to(device, dtype).eval()
            model = unified(model, names) if build else model
            sides.append(torch.compile(model) if args.compile else model)
        for batch in args.batches:
            x = batch_of(batch).to(device)
            x = x.to(dtype) if x.is_floating_point() else x
            dense, ours = (batch / seconds(model, x, device, args.least) for model in sides)
            print(f"| {name} | {batch} | {dense:.1f} | {ours:.1f} | {ours / dense:.3f} |", flush=True)
