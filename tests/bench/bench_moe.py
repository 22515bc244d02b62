"""Cost of one MoE layer against the dense FFN it replaces: `python tests/bench/bench_moe.py` prints a table of ratios.

Dense is the seed model's FFN alone, frozen as its weights are in the MoE layer. An earlier moe.py (--baseline, --against)
is measured beside this one. All are timed in turn in one process, so that they see the same machine, and medians are compared.
"""

import argparse
import importlib.util
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parents[2]


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


FFNS = {"two-layer": TwoLayer, "gated": Gated}


def load_module(name, path):
    """The module in the file `path`, whatever else is called so."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions(args):
    """{"this": moe, "earlier": the earlier moe}, the second where --baseline or --against has it."""
    sys.path.insert(0, str(ROOT))
    found = {"this": load_module("moe", ROOT / "moe.py")}
    if args.baseline:
        found["earlier"] = load_module("earlier_moe", args.baseline)
        return found
    show = subprocess.run(["git", "show", f"{args.against}:moe.py"], cwd=ROOT, capture_output=True)
    if show.returncode:
        print(f"git has no {args.against}: this moe.py alone\n")
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moe.py"
        path.write_bytes(show.stdout)
        found["earlier"] = load_module("earlier_moe", path)
    return found


def random_expert(ffn, rank):
    """A LoRA expert of random weights for the linears of an FFN."""
    expert = {"scaling": 2.0}
    for name, module in ffn.named_children():
        if isinstance(module, nn.Linear):
            expert[f"{name}.lora_A"] = torch.randn(rank, module.in_features) * 0.02
            expert[f"{name}.lora_B"] = torch.randn(module.out_features, rank) * 0.02
    return expert


def interleaved(repeats, functions):
    """Median seconds of each function, one call of each a round, the order reversed every other round."""
    times = {name: [] for name in functions}
    for i in range(-2, repeats):  # two rounds to warm up
        for name in list(functions)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            functions[name]()
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(modules, ffn, count, top_k, batch, args):
    """Median seconds ({version: of a forward}, {version: of forward and backward}), "dense" among the versions."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    dense = FFNS[ffn](args.d, args.hidden).to(dtype)
    experts = [random_expert(dense, args.rank) for _ in range(count)]
    vectors = torch.randn(
        count, args.d
    )  # of about equal size: the experts get about equal shares of the tokens
    layers = {"dense": dense}
    for version, moe in modules.items():
        state = moe.RoutingState(mode=args.context)
        layers[version] = moe.MoELayer(dense, experts, moe.Router(vectors), state, top_k=top_k)
    x = torch.randn(batch, args.tokens, args.d, dtype=dtype)
    z = x.clone().requires_grad_()  # as inside a model: the gradient goes on to the layer below

    def forward(layer):
        with torch.no_grad():
            layer(x)

    def both(layer):
        layer(z).sum().backward()

    return [
        interleaved(args.repeats, {name: lambda l=layer: work(l) for name, layer in layers.items()})
        for work in (forward, both)
    ]


def cells(seconds):
    """Times over dense of each version, and this one's over the earlier one's."""
    ratios = [f"{seconds[name] / seconds['dense']:.2f}x" for name in list(seconds)[1:]]
    if "earlier" in seconds:
        ratios.append(f"{seconds['this'] / seconds['earlier']:.2f}")
    return ratios


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--baseline", metavar="FILE", help="an earlier moe.py to compare with")
    add("--against", metavar="REV", default="505ec4f", help="without --baseline: moe.py of this git revision")
    add("--experts", type=int, nargs="+", default=[3, 32], help="numbers of experts K")
    add("--top-k", type=int, nargs="+", default=[1, 2], help="experts a token")
    add("--ffn", choices=FFNS, nargs="+", default=list(FFNS), help="CLIP's FFN, LLaMA's")
    add("--rank", type=int, default=16, help="LoRA rank")
    add("--d", type=int, default=768, help="width")
    add("--hidden", type=int, default=3072, help="hidden width of the FFN")
    add("--batch", type=int, nargs="+", default=[8, 64], help="sequences")
    add("--tokens", type=int, default=50, help="tokens a sequence")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the FFN and the tokens")
    add("--context", choices=("fixed", "prefix", "none"), default="fixed", help="the router's context")
    add("--repeats", type=int, default=15, help="timed calls of each")
    return parser.parse_args()


def main():
    args = parse_args()
    modules = versions(args)
    print(
        f"rank {args.rank}, d = {args.d}, hidden {args.hidden}, {args.tokens} tokens a sequence, {args.dtype}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    columns = ["tokens", "FFN", "K", "top-k", "dense forward, ms"]
    for what in ("forward", "forward and backward"):
        columns += [what] if len(modules) == 1 else [f"{what}: this", "earlier", "this / earlier"]
    print(f"| {' | '.join(columns)} |\n|---:|---|{'---:|' * (len(columns) - 2)}")
    for batch, ffn, top_k, count in itertools.product(args.batch, args.ffn, args.top_k, args.experts):
        forward, both = measure(modules, ffn, count, top_k, batch, args)
        row = [f"{batch * args.tokens:,}", ffn, count, top_k, f"{1e3 * forward['dense']:.1f}"]
        print("|", " | ".join(map(str, row + cells(forward) + cells(both))), "|", flush=True)


if __name__ == "__main__":
    main()
