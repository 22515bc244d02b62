"""What the pipeline adds to the bare model; prints ratios, on the embedded default's seed model and texts.

Embedding: the stage's loop over D_0 (tokenising, batches by length, means, the memory map) and the relevance
heads, against a bare loop of forwards over tokens that are there, at the best of a few fixed batch sizes.
Training: a step of the stages, tokenising and bookkeeping in it, against a step of a plain PEFT model with
transformers' own loss on the same batch. Each pair is timed in turn, and medians are compared.
"""

import contextlib
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import MACHINE, command_line, header, row, timed, unified

import moe
import select_proxies
from metamoe.backbones import load_backbone
from metamoe.backbones.embedding import public_features
from metamoe.backbones.training import epoch_batches
from metamoe.data import bigbench

NAME = "smollm2-135m"


@torch.no_grad()
def forwards(backbone, batches):
    for ids, mask in batches:
        with backbone.autocast():
            backbone.model.model(input_ids=ids, attention_mask=mask, use_cache=False)


def padded(backbone, records, tokens):
    """The records as (ids, mask), in their order of length, `tokens` at a time."""
    ids = sorted((backbone.encode({"prompt": record["prompt"]})[0] for record in records), key=len)
    batches = backbone.batches([len(i) for i in ids], tokens)
    return [backbone.collate([(ids[i], []) for i in batch])[:2] for batch in batches]


def embedding(backbone, public, private, rounds):
    """(bare samples/s, the stage's, the stage's with the relevance heads)."""
    few = {tokens: padded(backbone, public[:500], tokens) for tokens in (512, 1024, 2048, 4096)}
    best = min(few, key=lambda tokens: timed(forwards, backbone, few[tokens])[1])
    batches, bare, stage, whole = padded(backbone, public, best), [], [], []
    own = [np.concatenate([values for _, values in backbone.embed(records)]) for records in private]
    for _ in range(rounds):
        bare.append(timed(forwards, backbone, batches)[1])
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            (Path(folder) / "public").mkdir()
            features, spent = timed(public_features, Path(folder), backbone, public)
        stage.append(spent)
        whole.append(spent + sum(timed(select_proxies.relevance, features, values, 0)[1] for values in own))
    return [len(public) / statistics.median(times) for times in (bare, stage, whole)]


def update(model, optimiser, loss):
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if hasattr(model, "routing"):
        moe.clamp_(model)


def steps(backbone, records, batch_size, ours, plain, count):
    """Median seconds of a step of a plain PEFT model and of `ours` in the stages' loop, on equal batches."""
    times, optimisers = {plain: [], ours: []}, {}
    for model in times:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimisers[model] = torch.optim.AdamW(trained, lr=1e-5)

    def plain_loss(batch):
        ids, real, _, labels = backbone.collate([backbone.example(records[i]) for i in batch])
        with backbone.autocast():
            return plain(input_ids=ids, attention_mask=real, labels=labels, use_cache=False).loss

    losses = (loss for _, loss in backbone.losses(ours, records, (), batch_size, count, 0))
    lengths = [sum(map(len, backbone.example(record))) for record in records]
    for batch in epoch_batches(lengths, batch_size, count, 0):
        for model, work in ((ours, lambda batch: next(losses)), (plain, plain_loss)):
            loss, forward = timed(work, batch)
            times[model].append(forward + timed(update, model, optimisers[model], loss)[1])
    return [statistics.median(found[count // 5 :]) for found in times.values()]


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--public", type=int, default=1000, help="public records to embed")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the embedding")
    parser.add_argument("--steps", type=int, default=25, help="timed training steps")
    args = parser.parse_args()
    archive, sizes = bigbench.read_archive({}, bigbench.CLIENTS), {"train": 400, "validation": 0, "test": 1}
    public = bigbench.public_records(args.public, archive)
    private = [task.load(client, sizes, 0, archive)["train"] for client, task in bigbench.CLIENTS.items()]
    backbone = load_backbone(NAME)
    print(f"{NAME}, {backbone.device.type}, {backbone.dtype}, {MACHINE}\n", flush=True)
    header(" | bare | here | ratio", "lrrr")
    bare, stage, whole = embedding(backbone, public, private, args.rounds)
    for what, here in (("embedding D_0, samples/s", stage), ("with three clients' relevance heads", whole)):
        row(what, f"{bare:.1f}", f"{here:.1f}", f"{here / bare:.2f}")
    for what, batch_size in (("a step of an expert, ms", 8), ("a step of the final training, ms", 16)):
        ours, plain = load_backbone(NAME), load_backbone(NAME).add_lora(16, 32, 0)  # both change in place
        if batch_size == 8:
            model = ours.add_lora(16, 32, 0)
        else:
            model = unified(ours.model, ours.ffn_names, ours.model.config.hidden_size)
        bare, here = steps(ours, private[0] + private[1], batch_size, model, plain, args.steps)
        row(what, f"{1e3 * bare:.0f}", f"{1e3 * here:.0f}", f"{here / bare:.2f}x")
