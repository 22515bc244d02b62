"""What the pipeline adds to the bare model: `python tests/bench/bench_pipeline.py` prints a table of ratios, on the embedded default's real seed and texts.

Embedding: the stage's loop over D_0 (tokenising, batches by length, means, the memory map) and the relevance heads, against a bare loop of
forwards over tokens that are there, at the best of a few fixed batch sizes. Training: a step of the stages, tokenising and bookkeeping in
it, against a step of a plain PEFT model with transformers' own loss on the same batch. Each pair is timed in turn, and medians compared.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_models import unified  # noqa: E402

import moe  # noqa: E402
import select_proxies  # noqa: E402
from metamoe.backbones import load_backbone  # noqa: E402
from metamoe.backbones.embedding import public_features  # noqa: E402
from metamoe.backbones.training import epoch_batches
from metamoe.data import bigbench


def bare_forwards(backbone, records, tokens):
    """Seconds of forwards over the records, tokenised and padded beforehand, in their order of length, `tokens` at a time."""
    ids = sorted((backbone.encode({"prompt": record["prompt"]})[0] for record in records), key=len)
    batches = [
        backbone.collate([(ids[i], []) for i in batch])[:2]
        for batch in backbone.batches([len(i) for i in ids], tokens)
    ]
    start = time.perf_counter()
    with torch.no_grad():
        for batch, mask in batches:
            with backbone.autocast():
                backbone.model.model(input_ids=batch, attention_mask=mask, use_cache=False)
    return time.perf_counter() - start


def embedding(backbone, public, private, rounds):
    """(bare samples/s, the stage's, the stage's with the relevance heads)."""
    bare, stage, heads = [], [], []
    best = min((512, 1024, 2048, 4096), key=lambda tokens: bare_forwards(backbone, public[:500], tokens))
    own = [np.concatenate([values for _, values in backbone.embed(records)]) for records in private]
    for _ in range(rounds):
        bare.append(bare_forwards(backbone, public, best))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "public").mkdir()
            start = time.perf_counter()
            with contextlib.redirect_stdout(None):
                features = public_features(Path(folder), backbone, public, "auto")
            stage.append(time.perf_counter() - start)
            start = time.perf_counter()
            for embedded in own:
                select_proxies.relevance(features, embedded, 0)
            heads.append(time.perf_counter() - start)
    bare, stage, heads = (statistics.median(times) for times in (bare, stage, heads))
    return len(public) / bare, len(public) / stage, len(public) / (stage + heads)


def steps(backbone, records, batch_size, ours, plain, count):
    """Median seconds of a step of `ours` (the stages' own loop) and of `plain`, a PEFT model, on the same batches."""
    times = {"ours": [], "plain": []}
    lengths = [sum(map(len, backbone.example(record))) for record in records]
    batches, losses = epoch_batches(lengths, batch_size, count, 0), None
    optimisers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for name, model in (("ours", ours), ("plain", plain))
    }

    def step(name, loss):
        loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad(set_to_none=True)

    losses = backbone.losses(ours, records, (), batch_size, count, 0)
    for number, batch in enumerate(batches):
        start = time.perf_counter()
        step("ours", next(losses))
        if hasattr(ours, "routing"):
            moe.clamp_(ours)
        times["ours"].append(time.perf_counter() - start)
        ids, real, _, labels = backbone.collate([backbone.example(records[i]) for i in batch])
        start = time.perf_counter()
        with backbone.autocast():
            loss = plain(input_ids=ids, attention_mask=real, labels=labels, use_cache=False).loss
        step("plain", loss)
        times["plain"].append(time.perf_counter() - start)
    warm = count // 5
    return statistics.median(times["ours"][warm:]), statistics.median(times["plain"][warm:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--public", type=int, default=1000, help="public records to embed (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed rounds of the embedding (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=25, help="timed training steps (default: %(default)s)")
    args = parser.parse_args()
    name = "smollm2-135m"
    archive = bigbench.read_archive({}, bigbench.CLIENTS)
    public = bigbench.public_records(args.public, archive)
    sizes = {"train": 400, "validation": 0, "test": 1}
    private = [task.load(client, sizes, 0, archive)["train"] for client, task in bigbench.CLIENTS.items()]
    fresh = lambda: load_backbone(name)  # noqa: E731 - PEFT and the MoE change a model in place
    backbone = fresh()
    print(
        f"{name}, {backbone.device.type}, {backbone.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n",
        flush=True,
    )
    print("| | bare | here | ratio |\n|---|---:|---:|---:|")
    bare, stage, whole = embedding(backbone, public, private, args.rounds)
    print(f"| embedding D_0, samples/s | {bare:.1f} | {stage:.1f} | {stage / bare:.2f} |")
    print(
        f"| with three clients' relevance heads | {bare:.1f} | {whole:.1f} | {whole / bare:.2f} |", flush=True
    )
    for label, batch_size, build in (
        ("a step of an expert, ms", 8, lambda b: b.add_lora(16, 32, 0)),
        ("a step of the final training, ms", 16, lambda b: unified(b.model, b.ffn_names)),
    ):
        ours = fresh()
        model, plain = build(ours), fresh().add_lora(16, 32, 0)
        here, there = steps(ours, private[0] + private[1], batch_size, model, plain, args.steps)
        print(f"| {label} | {1e3 * there:.0f} | {1e3 * here:.0f} | {here / there:.2f}x |", flush=True)
