"""Cost of one MoE layer against the dense FFN it replaces; prints a table of ratios.

Dense is the seed model's FFN alone, frozen as its weights are in the MoE layer. An earlier moe.py is measured
beside this one. All are timed in turn, so that they see the same machine; medians are compared.
"""

import statistics
import subprocess
import sys
from collections import OrderedDict
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from common import MACHINE, command_line, header, random_expert, row, timed
from torch import nn

import moe
from metamoe.backbones.base import import_transformers

transformers = import_transformers()


def gated(d, h):
    config = transformers.LlamaConfig(hidden_size=d, intermediate_size=h, num_attention_heads=1)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


def two_layer(d, h):
    return nn.Sequential(OrderedDict(c_fc=nn.Linear(d, h), gelu=nn.GELU(), c_proj=nn.Linear(h, d)))


FFNS = {"two-layer": two_layer, "gated": gated}


def versions(args):
    """{"this": moe, "earlier": the earlier moe}, the second where --baseline or --against has it."""
    if args.baseline:
        source = Path(args.baseline).read_bytes()
    else:
        show, home = ["git", "show", f"{args.against}:moe.py"], Path(moe.__file__).parent
        source = subprocess.run(show, cwd=home, capture_output=True).stdout
    if not source:
        print(f"git has no {args.against}: this moe.py alone\n")
        return {"this": moe}
    earlier = sys.modules["earlier_moe"] = ModuleType("earlier_moe")
    exec(source, vars(earlier))
    return {"this": moe, "earlier": earlier}


def interleaved(repeats, work, layers):
    """Median seconds of work(layer) for each layer, in turn, the order reversed every other round."""
    times = {name: [] for name in layers}
    for i in range(repeats + 2):  # two rounds to warm up
        for name in list(layers)[:: 1 if i % 2 else -1]:
            times[name].append(timed(work, layers[name])[1])
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def measure(modules, ffn, count, top_k, batch, args):
    """Median seconds of a forward, and of forward and backward: two of {"dense" or version: seconds}."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    dense = FFNS[ffn](args.d, args.hidden).to(dtype)
    experts, layers = [random_expert(dense, args.rank) for _ in range(count)], {"dense": dense}
    vectors = torch.randn(count, args.d)  # of about equal size: each expert gets about as many tokens
    for version, module in modules.items():
        state = module.RoutingState(mode=args.context)
        layers[version] = module.MoELayer(dense, experts, module.Router(vectors), state, top_k=top_k)
    x = torch.randn(batch, args.tokens, args.d, dtype=dtype)
    z = x.clone().requires_grad_()  # as inside a model: the gradient goes on to the layer below
    with torch.no_grad():
        forward = interleaved(args.repeats, lambda layer: layer(x), layers)
    return forward, interleaved(args.repeats, lambda layer: layer(z).sum().backward(), layers)


def parse_args():
    parser = command_line(__doc__)
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
    add("--context", choices=moe.CONTEXTS, default="fixed", help="the router's context")
    add("--repeats", type=int, default=15, help="timed calls of each")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    modules = versions(args)
    print(f"rank {args.rank}, d = {args.d}, hidden {args.hidden}, ", end="")
    print(f"{args.tokens} tokens a sequence, {args.dtype}, {MACHINE}\n")
    columns = ["tokens", "FFN", "K", "top-k", "dense forward, ms"]
    for what in ("forward", "forward and backward"):
        columns += [what] if len(modules) == 1 else [f"{what}: this", "earlier", "this / earlier"]
    header(" | ".join(columns), "rl" + "r" * (len(columns) - 2))
    for batch, ffn, top_k, count in product(args.batch, args.ffn, args.top_k, args.experts):
        forward, both = measure(modules, ffn, count, top_k, batch, args)
        cells = [f"{batch * args.tokens:,}", ffn, count, top_k, f"{1e3 * forward['dense']:.1f}"]
        for seconds in (forward, both):
            cells += [f"{seconds[version] / seconds['dense']:.2f}x" for version in modules]
            if len(modules) == 2:
                cells.append(f"{seconds['this'] / seconds['earlier']:.2f}")
        row(*cells)
