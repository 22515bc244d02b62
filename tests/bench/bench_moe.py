"""Cost of one MoE layer against the dense FFN it replaces: `python tests/bench/bench_moe.py` prints a table of ratios.

Dense is the base FFN alone, frozen as its weights are in the MoE layer. The two are timed in turn, so that both see the same machine, and
medians are compared.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from moe import MoELayer, Router, RoutingState  # noqa: E402


class Gated(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down_proj, self.act_fn = nn.Linear(h, d, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TwoLayer(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(d, h), nn.GELU(), nn.Linear(h, d)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


def random_expert(ffn, rank):
    """A LoRA expert of random weights for the linears of an FFN."""
    expert = {"scaling": 2.0}
    for name, module in ffn.named_children():
        if isinstance(module, nn.Linear):
            expert |= {
                f"{name}.lora_A": torch.randn(rank, module.in_features) * 0.02,
                f"{name}.lora_B": torch.randn(module.out_features, rank) * 0.02,
            }
    return expert


def interleaved(repeats, **functions):
    """Median seconds of each function, one call of each a round, the order reversed every other round."""
    times = {name: [] for name in functions}
    for i in range(-2, repeats):  # two rounds to warm up
        for name in list(functions)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            functions[name]()
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(gated, count, top_k, batch, args):
    """{what: ratio of MoE to dense} and the dense forward's milliseconds."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    dense = (Gated if gated else TwoLayer)(args.d, args.hidden).to(dtype)
    experts = [random_expert(dense, args.rank) for _ in range(count)]
    # vectors of equal size in random directions: the experts get about equal shares of the tokens
    moe = MoELayer(
        dense, experts, Router(torch.randn(count, args.d)), RoutingState(mode=args.context), top_k=top_k
    )
    x = torch.randn(batch, args.tokens, args.d, dtype=dtype)

    def forward(layer):
        with torch.no_grad():
            layer(x)

    z = x.clone().requires_grad_()  # as inside a model: the gradient goes on to the layer below

    def both(layer):
        layer(z).sum().backward()

    t = interleaved(args.repeats, dense=lambda: forward(dense), moe=lambda: forward(moe))
    g = interleaved(args.repeats, dense=lambda: both(dense), moe=lambda: both(moe))
    return t["moe"] / t["dense"], g["moe"] / g["dense"], 1e3 * t["dense"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 32], help="numbers of experts K")
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2], help="experts a token")
    parser.add_argument(
        "--ffn",
        choices=("two-layer", "gated"),
        nargs="+",
        default=["two-layer", "gated"],
        help="CLIP's FFN, LLaMA's",
    )
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--d", type=int, default=768, help="width")
    parser.add_argument("--hidden", type=int, default=3072, help="hidden width of the FFN")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64], help="sequences")
    parser.add_argument("--tokens", type=int, default=50, help="tokens a sequence")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the seed's weights and the tokens",
    )
    parser.add_argument(
        "--context", choices=("fixed", "prefix", "none"), default="fixed", help="the router's context"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    args = parser.parse_args()
    print(
        f"rank {args.rank}, d = {args.d}, hidden {args.hidden}, {args.tokens} tokens a sequence, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(
        "| tokens | FFN | K | top-k | dense forward, ms | MoE, forward | MoE, forward and backward |\n|---:|---|---:|---:|---:|---:|---:|"
    )
    for batch, ffn, top_k, count in itertools.product(args.batch, args.ffn, args.top_k, args.experts):
        forward, both, dense = measure(ffn == "gated", count, top_k, batch, args)
        print(
            f"| {batch * args.tokens:,} | {ffn} | {count} | {top_k} | {dense:.1f} | {forward:.2f}x | {both:.2f}x |",
            flush=True,
        )
