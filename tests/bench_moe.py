"""Cost of one MoE layer against the dense FFN it replaces: `python tests/bench_moe.py`; the last line is the ratio.

Dense is the base FFN alone. The two are timed in turn, so that both see the same machine, and medians are compared.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moe import FFNS, MoELayer, Router, RoutingState  # noqa: E402


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--experts", type=int, default=3, help="number of experts K")
    parser.add_argument("--top-k", type=int, default=1, help="experts a token")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--d", type=int, default=768, help="width")
    parser.add_argument("--hidden", type=int, default=3072, help="hidden width of the FFN")
    parser.add_argument("--batch", type=int, default=64, help="sequences")
    parser.add_argument("--tokens", type=int, default=50, help="tokens a sequence")
    parser.add_argument("--gated", action="store_true", help="LLaMA's FFN instead of CLIP's")
    parser.add_argument("--context", choices=("fixed", "prefix", "none"), default="fixed", help="the router's context")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    args = parser.parse_args()

    torch.manual_seed(0)
    dense = (Gated if args.gated else TwoLayer)(args.d, args.hidden)
    linears = FFNS[0 if args.gated else 1][0]
    experts = []
    for _ in range(args.experts):
        e = {"scaling": 2.0}
        for name in linears:
            linear = getattr(dense, name)
            e[f"{name}.lora_A"] = torch.randn(args.rank, linear.in_features) * 0.02
            e[f"{name}.lora_B"] = torch.randn(linear.out_features, args.rank) * 0.02
        experts.append(e)
    # vectors of equal size in random directions: the experts get about equal shares of the tokens
    router = Router(torch.randn(args.experts, args.d))
    moe = MoELayer(dense, experts, router, RoutingState(mode=args.context), top_k=args.top_k)
    x = torch.randn(args.batch, args.tokens, args.d)

    def forward(layer):
        with torch.no_grad():
            layer(x)

    z = x.clone().requires_grad_()  # as inside a model: the gradient goes on to the layer below

    def both(layer):
        layer(z).sum().backward()

    moe.state.record = True
    forward(moe)
    moe.state.record = False
    print(f"{args}\n{torch.get_num_threads()} threads, torch {torch.__version__}, tokens per expert {moe.counts.tolist()}")
    t = interleaved(args.repeats, dense=lambda: forward(dense), moe=lambda: forward(moe))
    # the dense FFN is frozen too, as its weights are in the MoE layer
    g = interleaved(args.repeats, dense=lambda: both(dense), moe=lambda: both(moe))
    for what, s in (("forward + backward", g), ("forward", t)):
        print(f"{what}: dense {1e3 * s['dense']:.1f} ms, MoE {1e3 * s['moe']:.1f} ms, {s['moe'] / s['dense']:.2f}x")
    print(f"{t['moe'] / t['dense']:.2f}x")
