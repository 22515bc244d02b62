"""Train the embedded vision default's seed model, as CLIP is: images and captions of D_0's world, and
nothing else.

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
from metamoe.backbones.base import pick_dtype  # noqa: E402
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
    """({character: its faces in training}, [(character, face) held out, of a character that is trained in
    other faces]).
    """
    training, held_out = {}, []
    for char in sorted({char for char, _ in world()}):
        faces = faces_of(char)
        rest = [face for face in faces if not is_held_out(char, face)]
        if rest:
            training[char] = rest
            held_out += [(char, face) for face in faces if face not in rest]
    return training, held_out


def sample_batch(training, size, seed, step):
    """`size` recipes of step `step`, no two of one character: each image has one right caption in its
    batch.
    """
    rng, chars = np.random.default_rng([seed, step]), list(training)
    # as in D_0, a character counts as often as it has faces
    faces = np.array([len(training[char]) for char in chars])
    recipes = []
    for i in rng.choice(len(chars), size, replace=False, p=faces / faces.sum()):
        face = training[chars[i]][rng.integers(faces[i])]
        recipes.append({"char": chars[i], "face": face, "seed": int(rng.integers(2**62))})
    return recipes


def contrastive_loss(model, images, ids):
    """Symmetric InfoNCE, (CE(s I T^t, diagonal) + CE(s T I^t, diagonal)) / 2: unit features I, T (B, d),
    learned scale s.
    """
    image_features, text_features, scale = model(images, ids)
    logits = scale.float() * image_features.float() @ text_features.float().T  # (B, B)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def zero_shot_accuracy(model, tokenizer, pairs, limit=1000):
    """(accuracy, number of captions): `limit` held-out pairs, each drawn once, told apart by all their
    captions.
    """
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:limit]]
    captions = sorted({caption(char) for char, _ in pairs})
    images = glyph_model.to_tensor(
        [draw({"char": char, "face": face, "seed": i}) for i, (char, face) in enumerate(pairs)]
    )
    image_features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(100)])
    text_features = torch.cat(
        [model.encode_text(part, normalize=True) for part in tokenizer(captions).split(100)]
    )
    answers = (image_features @ text_features.T).argmax(1).tolist()
    right = sum(captions[answer] == caption(char) for answer, (char, _) in zip(answers, pairs, strict=True))
    return right / len(pairs), len(captions)


def train(out, *, steps, batch, seed, lr, warmup, log_every, checkpoint_every, dtype, limit=1000):
    """AdamW, linear warm-up, cosine to zero; writes the weights as float16 to `out`, the log beside it;
    returns the log.

    log: rows {"step", "loss" (mean since the row before), "accuracy", "captions", "seconds"}, the settings
    in the first. UserError if a checkpoint of other settings is there, or a number makes no sense.
    """
    training, held_out = split_world()
    if min(steps, warmup, log_every) < 1 or not 1 < batch <= len(training):
        raise UserError(
            f"--steps, --warmup and --log-every start at 1, --batch lies between 2 and {len(training)}, "
            f"the characters there are"
        )
    out, dtype = Path(out), pick_dtype(dtype, torch.device("cpu"))
    settings = {
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "lr": lr,
        "warmup": warmup,
        "dtype": str(dtype).removeprefix("torch."),
    }
    torch.manual_seed(seed)
    model, tokenizer = glyph_model.create(None)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    state = {"settings": settings, "step": 0, "log": [settings], "losses": [], "seconds": 0.0}
    checkpoint, log_file = out.with_suffix(".checkpoint"), out.with_name("pretrain.log")
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != settings:
            raise UserError(
                f"{checkpoint} belongs to a run with other settings ({saved['settings']}): repeat that "
                f"command, or remove the file"
            )
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = saved
    started = saved_at = time.monotonic() - state["seconds"]

    def write_row():
        accuracy, captions = zero_shot_accuracy(model.eval(), tokenizer, held_out, limit)
        state["log"].append(
            {
                "step": state["step"],
                "loss": round(float(np.mean(state["losses"])), 4),
                "accuracy": round(accuracy, 4),
                "captions": captions,
                "seconds": round(time.monotonic() - started),
            }
        )
        state["losses"] = []
        write_records(log_file, state["log"])

    for step in progress(
        range(state["step"], steps), initial=state["step"], total=steps, desc="pretrain", unit="step"
    ):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        recipes = sample_batch(training, batch, seed, step)
        images, ids = (
            glyph_model.to_tensor([draw(recipe) for recipe in recipes]),
            tokenizer([caption(r["char"]) for r in recipes]),
        )
        # the fused attention's backward is slower on so few tokens: a fifth of a step
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = contrastive_loss(model.train(), images, ids)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.logit_scale.data.clamp_(0, math.log(100))  # as CLIP does
        state["losses"].append(loss.item())
        state["step"] = step + 1
        if state["step"] % log_every == 0 and state["step"] < steps:
            write_row()
        if time.monotonic() - saved_at >= checkpoint_every:
            saved_at = time.monotonic()
            state["seconds"] = saved_at - started
            with atomic(checkpoint) as temporary:
                torch.save(
                    {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary
                )
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)  # the last row is of the weights as they are written
    write_row()
    with atomic(out) as temporary:
        save_file(weights, temporary)
    checkpoint.unlink(missing_ok=True)
    return state["log"]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2200, help="training steps (2200)")
    parser.add_argument("--batch", type=int, default=256, help="image-caption pairs a step (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the drawings (0)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (1e-3)")
    parser.add_argument("--warmup", type=int, default=100, help="steps to the highest learning rate (100)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the arithmetic; auto: bfloat16 where the CPU has it",
    )
    parser.add_argument("--log-every", type=int, default=50, help="steps between measurements (50)")
    parser.add_argument(
        "--checkpoint-every", type=float, default=180, help="seconds between checkpoints (180)"
    )
    parser.add_argument(
        "--out", default=glyph_model.WEIGHTS, help="the weights; pretrain.log goes beside them"
    )
    train(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
