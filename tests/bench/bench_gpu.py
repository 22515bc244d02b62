"""What has only ever run on a CPU, checked and measured on one CUDA GPU; gpu.sh runs it with the other parts.

Prints a table of checks (results against the CPU's, in float32), the times of both ways through the MoE
layer, the peak memory of a training step of Llama-3.2-3B's shape beside what bench_memory.py computes, and
images embedded a second with their decoding. Weights are random. Exit code 1 where a check fails.
"""

import tempfile
from pathlib import Path

import bench_memory
import numpy as np
import torch
from bench_models import samples_per_second
from common import MACHINE, command_line, header, random_expert, row, timed, unified
from PIL import Image

import moe
from dpp import relevance_weighted_dpp
from metamoe.backbones import load_backbone
from metamoe.backbones.base import import_transformers, pick_device
from metamoe.backbones.text import head_loss

transformers = import_transformers()  # before peft


def llama(layers, width, hidden, heads, kv_heads, vocabulary, tied, dtype=torch.float32, device="cpu"):
    sizes = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers)
    heads = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    return model.to(dtype).eval()


SMALL = (4, 256, 1024, 8, 4, 1000, True)
TINY = (2, 64, 128, 4, 2, 100, True)


class Checks:
    """A table of comparisons with the CPU, and whether one failed."""

    def __init__(self):
        self.failed = False
        header("check | largest difference | allowed | ", "lrrl")

    def add(self, what, difference, allowed):
        good = difference <= allowed  # NaN is not
        self.failed |= not good
        row(what, f"{difference:.1e}", f"{allowed:.0e}", "ok" if good else "FAILED")


def difference(ours, reference):
    """Of two tensors, or lists of them: the largest, as a share of the reference's largest entry."""
    pairs = zip(ours, reference, strict=True) if isinstance(ours, list) else [(ours, reference)]
    return max(((a.cpu() - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in pairs)


def check_dpp(checks, device, n, m):
    """The same items in the same order, and the same gains."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(n, 64)).astype(np.float32))
    relevance = torch.from_numpy(rng.uniform(0.01, 1, n))
    items, gains = relevance_weighted_dpp(features, relevance, m, True)
    ours, own_gains = relevance_weighted_dpp(features.to(device), relevance.to(device), m, True)
    checks.add(f"dpp.py, {m} of {n}: items that differ", (ours.cpu() != items).sum().item(), 0)
    checks.add("dpp.py: gains", difference(own_gains, gains), 1e-9)


def moe_layer(device, top_k, few):
    """(layer, input) of eight random experts; few: all behind masks, else sorted by expert."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=128, intermediate_size=256, num_attention_heads=1)
    ffn = transformers.models.llama.modeling_llama.LlamaMLP(config)
    experts, router = [random_expert(ffn, 4) for _ in range(8)], moe.Router(torch.randn(8, 128))
    layer = moe.MoELayer(ffn, experts, router, moe.RoutingState(), top_k=top_k)
    x = torch.randn(8, 64, 128)
    return layer.to(device), x.to(device).requires_grad_()


def layer_results(device, top_k, few):
    """[output, gradient of the input, gradients of the layer] of one forward and backward."""
    moe.FEW_TOKENS = dict.fromkeys(moe.FEW_TOKENS, 10**9 if few else 0)
    layer, x = moe_layer(device, top_k, few)
    y = layer(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def check_moe(checks, device):
    kept = moe.FEW_TOKENS
    for top_k in (1, 2):
        for few in (True, False):
            found = difference(layer_results(device, top_k, few), layer_results("cpu", top_k, few))
            way = "behind masks" if few else "sorted by expert"
            checks.add(f"MoE layer, top-{top_k}, {way}: output and gradients", found, 1e-4)
    moe.FEW_TOKENS = kept


def generated(device, shape):
    """(logits of a padded batch, tokens generated greedily with a key-value cache) of a unified LLaMA."""
    model = llama(*shape)
    names = [f"model.layers.{i}.mlp" for i in range(shape[0])]
    model = unified(model, names, shape[1], context="fixed").to(device)
    ids, mask = torch.arange(5, 45).view(4, 10), torch.ones(4, 10, dtype=torch.long)
    mask[1, :3] = mask[3, :7] = 0  # padded on the left
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    with torch.inference_mode():
        logits = model(**inputs).logits
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        return logits[mask.bool().to(device)], model.generate(**inputs, **options)


def check_generate(checks, device, shape):
    (logits, tokens), (expected, reference) = generated(device, shape), generated("cpu", shape)
    checks.add("unified LLaMA: logits of a padded batch", difference(logits, expected), 1e-4)
    checks.add("unified LLaMA: generated tokens that differ", (tokens.cpu() != reference).sum().item(), 0)


@torch.inference_mode()
def thresholds(device, dtype, sizes, d, hidden, repeats):
    """Milliseconds of one layer's forward, K = 3 and 32, both ways: where moe.FEW_TOKENS should lie."""
    kept = moe.FEW_TOKENS
    header("tokens | K | dense FFN, ms | behind masks, ms | sorted by expert, ms", "rrrrr")
    config = transformers.LlamaConfig(hidden_size=d, intermediate_size=hidden, num_attention_heads=1)
    ffn = transformers.models.llama.modeling_llama.LlamaMLP(config).to(device, dtype)
    for count in (3, 32):
        experts = [random_expert(ffn, 16) for _ in range(count)]
        router = moe.Router(torch.randn(count, d, device=device))
        layer = moe.MoELayer(ffn, experts, router, moe.RoutingState())
        for size in sizes:
            x, times = torch.randn(1, size, d, device=device, dtype=dtype), []
            for work, few in ((ffn, 0), (layer, 10**9), (layer, 0)):
                moe.FEW_TOKENS = dict.fromkeys(kept, few)
                times.append(sorted(timed(work, x)[1] for _ in range(repeats))[repeats // 2])
            row(f"{size:,}", count, *(f"{1e3 * seconds:.2f}" for seconds in times))
    moe.FEW_TOKENS = kept
    print(f"\nmoe.FEW_TOKENS is {kept[device.type]:,} here\n")


def step(model, batch, tokens, vocabulary):
    """One training step, with the loss in the head's chunks as the stages compute it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(5, vocabulary, (batch, tokens), device=model.device)
    for _ in range(2):  # the second has the optimiser's moments
        with torch.autocast(model.device.type, torch.bfloat16):
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = head_loss(
                model.lm_head, states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), torch.nn.Identity()
            )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def memory(device, name, shape, args):
    """The peak of an expert's step and of a final step, beside what bench_memory.py computes."""
    from peft import LoraConfig, get_peft_model

    bench_memory.MODELS[name] = shape
    header(f"{name}, {args.batch} x {args.tokens} tokens | peak, GB | computed, GB", "lrr")
    for what, experts in (("an expert", 0), ("final training of the MoE", args.experts)):
        model = llama(*shape, torch.bfloat16, device).requires_grad_(False)
        if experts:
            names = [f"model.layers.{i}.mlp" for i in range(shape[0])]
            model = unified(model, names, shape[1], args.rank, experts, context="prefix")
        else:
            targets = ["gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=args.rank, target_modules=targets)).get_base_model()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(model.train(), args.batch, args.tokens, shape[5])
        peak = "-"  # of a CPU not known
        if device.type == "cuda":
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
        del model
        row(what, peak, f"{bench_memory.estimate(name, experts, args)[-2] / 1e9:.1f}")
    print()


def images(device, name, checkpoint, count, folder):
    """Images embedded a second by the stage's loop, JPEG decoding in it, and by the bare model."""
    rng = np.random.default_rng(0)
    for i in range(min(count, 64)):
        picture = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        picture.save(folder / f"{i}.jpg")
    records = [{"image": str(folder / f"{i % 64}.jpg")} for i in range(count)]
    backbone = load_backbone(name, checkpoint, device.type)
    seconds = timed(lambda: list(backbone.embed(records)))[1]
    x = torch.randn(256, 3, backbone.size, backbone.size, device=device)
    with torch.inference_mode():
        bare = samples_per_second(lambda batch: backbone.pool(backbone.model, batch), x, 1.0)
    header("embedding, images/s | with decoding | the model alone | decoding processes", "lrrr")
    row(name, f"{count / seconds:.0f}", f"{bare:.0f}", backbone.workers)


def random_vit(folder):
    """A checkpoint of ViT-B/32 with random weights."""
    import open_clip
    from safetensors.torch import save_file

    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "vit.safetensors"
    )
    return str(folder / "vit.safetensors")


def main():
    parser = command_line(__doc__)
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    parser.add_argument("--toy", action="store_true", help="at toy sizes, for a CPU: tests the script")
    parser.set_defaults(rank=16, experts=3)
    args = parser.parse_args()
    device = pick_device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {MACHINE}\n")
    checks = Checks()
    check_dpp(checks, device, *((200, 20) if args.toy else (20_000, 500)))
    check_moe(checks, device)
    check_generate(checks, device, TINY if args.toy else SMALL)
    print()
    sizes = (64,) if args.toy else (32, 400, 3200, 16384, 65536, 131072)
    width = (64, 128, 3) if args.toy else (2048, 8192, 15)
    thresholds(device, torch.float32 if args.toy else torch.bfloat16, sizes, *width)
    args.batch, args.tokens = (2, 8) if args.toy else (32, 256)
    shape = TINY if args.toy else bench_memory.MODELS["llama-3.2-3b"]
    memory(device, "toy" if args.toy else "llama-3.2-3b", shape, args)
    with tempfile.TemporaryDirectory() as folder:
        if args.toy:
            images(device, "glyph-clip", "", 8, Path(folder))
        else:
            images(device, "vit-b-32", random_vit(Path(folder)), 4096, Path(folder))
    return int(checks.failed)


if __name__ == "__main__":
    raise SystemExit(main())
