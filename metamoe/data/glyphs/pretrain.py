"""Train the embedded vision default's seed model, as CLIP is: images and captions of D_0's world alone.

    python metamoe/data/glyphs/pretrain.py

Every step draws its images anew. One (character, face) pair in twenty is never trained on; accuracy is
measured on those. A killed run goes on where it was when the same command is given again, and ends with the
same weights.
"""

import argparse
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from metamoe.backbones.base import dtype_name, pick_dtype  # noqa: E402
from metamoe.data.glyphs import model as glyph_model  # noqa: E402
from metamoe.data.glyphs.world import caption, draw, faces_of, world  # noqa: E402
from metamoe.errors import UserError, run_main  # noqa: E402
from metamoe.progress import progress  # noqa: E402
from metamoe.records import write_records  # noqa: E402
from metamoe.rundir import atomic  # noqa: E402


def is_held_out(char, face):
    """Whether this pair is kept from training: one in twenty, the same ones for everybody."""
    return zlib.crc32(f"{char} {face}".encode()) % 20 == 0


def split_world():
    """({character: its faces in training}, [(character, face) held out, of those characters])."""
    training, held_out = {}, []
    for char in sorted({char for char, _ in world()}):
        faces = faces_of(char)
        rest = [face for face in faces if not is_held_out(char, face)]
        if rest:
            training[char] = rest
            held_out += [(char, face) for face in faces if face not in rest]
    return training, held_out


def sample_batch(training, size, seed, step):
    """`size` recipes of a step, no two of one character: each image has one right caption in its batch."""
    rng, chars = np.random.default_rng([seed, step]), list(training)
    faces = np.array([len(training[char]) for char in chars])
    recipes = []
    for i in rng.choice(len(chars), size, replace=False, p=faces / faces.sum()):  # by faces, as in D_0
        face = training[chars[i]][rng.integers(faces[i])]
        recipes.append({"char": chars[i], "face": face, "seed": int(rng.integers(2**62))})
    return recipes


def contrastive_loss(model, images, ids):
    """Symmetric InfoNCE, (CE(s I T^t, diagonal) + CE(s T I^t, diagonal)) / 2.

    I, T (B, d): unit features of images and texts; s: learned scale.
    """
    image_features, text_features, scale = model(images, ids)
    logits = scale.float() * image_features.float() @ text_features.float().T  # (B, B)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def zero_shot_accuracy(model, tokenizer, pairs, limit=1000):
    """(accuracy, number of captions) on `limit` held-out pairs, told apart by all their captions."""
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:limit]]
    captions = sorted({caption(char) for char, _ in pairs})
    recipes = [{"char": char, "face": face, "seed": i} for i, (char, face) in enumerate(pairs)]
    images, ids = drawn(recipes), tokenizer(captions)
    image_features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(100)])
    text_features = torch.cat([model.encode_text(part, normalize=True) for part in ids.split(100)])
    answers = (image_features @ text_features.T).argmax(1).tolist()
    right = sum(captions[answer] == caption(char) for answer, (char, _) in zip(answers, pairs, strict=True))
    return right / len(pairs), len(captions)


def drawn(recipes):
    return glyph_model.to_tensor([draw(recipe) for recipe in recipes])


class Trainer:
    """The model in training, and `state`, what a checkpoint holds besides."""

    def __init__(self, out, settings):
        torch.manual_seed(settings["seed"])
        self.model, self.tokenizer = glyph_model.create(None)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.98))
        self.state = {"settings": settings, "step": 0, "log": [settings], "losses": [], "seconds": 0.0}
        self.checkpoint, self.log_file = out.with_suffix(".checkpoint"), out.with_name("pretrain.log")
        if self.checkpoint.exists():
            self.resume(settings)
        self.started = self.saved_at = time.monotonic() - self.state["seconds"]

    def resume(self, settings):
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved["settings"] != settings:
            other = f"{self.checkpoint} belongs to a run with other settings ({saved['settings']})"
            raise UserError(f"{other}: repeat that command, or remove the file")
        self.model.load_state_dict(saved.pop("model"))
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        self.state = saved

    def save(self):
        self.saved_at = time.monotonic()
        self.state["seconds"] = self.saved_at - self.started
        weights = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with atomic(self.checkpoint) as temporary:
            torch.save({**self.state, **weights}, temporary)

    def update(self, recipes, lr, dtype):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, ids = drawn(recipes), self.tokenizer([caption(recipe["char"]) for recipe in recipes])
        # the fused attention's backward is slower on so few tokens: a fifth of a step
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = contrastive_loss(self.model.train(), images, ids)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.logit_scale.data.clamp_(0, math.log(100))  # as CLIP does
        self.state["losses"].append(loss.item())
        self.state["step"] += 1

    def write_row(self, held_out, limit):
        """Add a row to the log: the mean loss since the row before, and the accuracy on held-out pairs."""
        loss = round(float(np.mean(self.state["losses"])), 4)
        accuracy, captions = zero_shot_accuracy(self.model.eval(), self.tokenizer, held_out, limit)
        row = {"step": self.state["step"], "loss": loss, "accuracy": round(accuracy, 4), "captions": captions}
        row["seconds"] = round(time.monotonic() - self.started)
        self.state["log"].append(row)
        self.state["losses"] = []
        write_records(self.log_file, self.state["log"])


def train(out, *, steps, batch, seed, lr, warmup, log_every, checkpoint_every, dtype, limit=1000):
    """AdamW, linear warm-up, cosine to zero. Writes the weights as float16 to `out` and the log beside it.

    Returns the log: the settings, then rows {"step", "loss", "accuracy", "captions", "seconds"}. UserError
    if a checkpoint of other settings is there, or a number makes no sense.
    """
    out, (training, held_out) = Path(out), split_world()
    if min(steps, warmup, log_every) < 1 or not 1 < batch <= len(training):
        most = f"{len(training)}, the characters there are"
        raise UserError(f"--steps, --warmup and --log-every start at 1, --batch lies between 2 and {most}")
    dtype = pick_dtype(dtype, torch.device("cpu"))
    settings = {"steps": steps, "batch": batch, "seed": seed, "lr": lr, "warmup": warmup}
    trainer = Trainer(out, {**settings, "dtype": dtype_name(dtype)})
    start = trainer.state["step"]
    for step in progress(range(start, steps), initial=start, total=steps, desc="pretrain", unit="step"):
        recipes = sample_batch(training, batch, seed, step)
        share = min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        trainer.update(recipes, lr * share, dtype)
        if (step + 1) % log_every == 0 and step + 1 < steps:
            trainer.write_row(held_out, limit)
        if time.monotonic() - trainer.saved_at >= checkpoint_every:
            trainer.save()
    weights = {name: tensor.half() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(weights)  # the last row is of the weights as they are written
    trainer.write_row(held_out, limit)
    with atomic(out) as temporary:
        save_file(weights, temporary)
    trainer.checkpoint.unlink(missing_ok=True)
    return trainer.state["log"]


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("--steps", type=int, default=2200, help="training steps (2200)")
    flag("--batch", type=int, default=256, help="image-caption pairs a step (256)")
    flag("--seed", type=int, default=0, help="of the initial weights and the drawings (0)")
    flag("--lr", type=float, default=1e-3, help="highest learning rate (1e-3)")
    flag("--warmup", type=int, default=100, help="steps to the highest learning rate (100)")
    dtypes = ["auto", "float32", "bfloat16"]
    flag("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 where the CPU has it")
    flag("--log-every", type=int, default=50, help="steps between measurements (50)")
    flag("--checkpoint-every", type=float, default=180, help="seconds between checkpoints (180)")
    flag("--out", default=glyph_model.WEIGHTS, help="the weights; pretrain.log goes beside them")
    train(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
