"""What the benchmarks share: the project on the path, tables, a clock, unified models of random experts."""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import moe  # noqa: E402

MACHINE = f"{torch.get_num_threads()} threads, torch {torch.__version__}"


def command_line(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def header(names, align):
    """The first two lines of a table; names: joined by " | "; align: "l" or "r" for each of them."""
    row(names)
    print(f"|{'|'.join({'l': '---', 'r': '---:'}[side] for side in align)}|", flush=True)


def timed(function, *args):
    """(result, seconds)."""
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def random_expert(ffn, rank):
    """A LoRA expert of random weights for the linears of an FFN."""
    expert = {"scaling": 2.0}
    for name, module in ffn.named_children():
        if isinstance(module, torch.nn.Linear):
            expert[f"{name}.lora_A"] = torch.randn(rank, module.in_features) * 0.02
            expert[f"{name}.lora_B"] = torch.randn(module.out_features, rank) * 0.02
    return expert


def unified(model, names, width, rank=16, count=3, **options):
    """The model with `count` random experts in every FFN; width: of the model; options: of moe.unify."""
    experts = [{name: random_expert(model.get_submodule(name), rank) for name in names} for _ in range(count)]
    return moe.unify(model, names, experts, torch.randn(count, len(names), width), **options)
