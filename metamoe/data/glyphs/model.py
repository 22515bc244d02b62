"""The embedded vision default's seed model: a small CLIP of open_clip's kind that reads letter by letter."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from metamoe.errors import UserError
from metamoe.serving.seed_model import fix_torchvision

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "model.safetensors"
# The characters of Unicode names; their ids are 1, 2, ..., and 0 is padding.
LETTERS = " -0123456789abcdefghijklmnopqrstuvwxyz"
START, END = len(LETTERS) + 1, len(LETTERS) + 2  # open_clip takes a text's feature at its highest id


class Tokenizer:
    """Texts to ids (B, context_length), one a letter; drops other characters, and cuts long texts.

    UserError for a text of other characters alone: all such texts would be one.
    """

    def __init__(self, context_length):
        self.context_length = context_length

    def __call__(self, texts):
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            letters = [LETTERS.index(letter) + 1 for letter in text.lower() if letter in LETTERS]
            if not letters and text.strip():
                why = "glyph-clip reads the letters a to z and digits"
                raise UserError(f"the class name or text {text!r} has none of its letters: {why}")
            tokens = [START, *letters[: self.context_length - 2], END]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def decode(self, ids):
        """The text of one row of ids."""
        return "".join(LETTERS[i - 1] for i in ids.tolist() if 0 < i < START)


def create(weights=WEIGHTS):
    """(open_clip model in float32 and evaluation mode, tokenizer); `weights`: a file, None: newly drawn."""
    fix_torchvision()
    from open_clip.model import CLIP

    config = json.loads((FOLDER / "config.json").read_text())
    model = CLIP(**config).eval()
    model.visual.image_mean = model.visual.image_std = (0.5, 0.5, 0.5)  # what to_tensor does
    if weights:
        if not Path(weights).exists():
            raise UserError(f"{weights} is missing: make it with python metamoe/data/glyphs/pretrain.py")
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model, Tokenizer(config["text_cfg"]["context_length"])


def to_tensor(images):
    """RGB images of 32 x 32 as the model takes them: (B, 3, 32, 32), 0 ... 255 mapped to -1 ... 1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
