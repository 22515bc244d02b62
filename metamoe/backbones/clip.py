"""CLIP models of open_clip: images decoded by worker processes, class prompts, losses, scores."""

import contextlib
import os
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamoe.backbones.base import Backbone, unwrap
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import epoch_batches
from metamoe.data.decoding import BadImage, open_image
from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.rundir import atomic, read_json
from metamoe.serving.seed_model import fix_torchvision


class ClipBackbone(Backbone):
    """A CLIP of open_clip: the visual tower is the seed model, the frozen text tower makes the classifier."""

    ffn_linears = ["c_fc", "c_proj"]
    task_type = None

    def __init__(self, preset, source, device, dtype, workers=None):
        fix_torchvision()
        import open_clip

        self.source, self.device, self.dtype = str(source), device, dtype
        self.template, self.resize, self.flip = preset["template"], preset["resize"], preset["flip"]
        self.workers = (os.cpu_count() if device.type == "cuda" else 0) if workers is None else workers
        try:
            if preset["data"] == "glyphs":
                from metamoe.data.glyphs.model import WEIGHTS, create

                model, self.tokenizer = create(self.source or WEIGHTS)
            else:
                model = open_clip.create_model(preset["architecture"], pretrained=self.source)
                self.tokenizer = open_clip.get_tokenizer(preset["architecture"])
        except UserError:
            raise
        except Exception as error:  # open_clip passes on what the hub, pickle, safetensors and torch raise
            raise UserError(
                f"seed model {self.source}: open_clip cannot load it as {preset['architecture']} "
                f"({(str(error).splitlines() or [type(error).__name__])[0]}); "
                "give a local checkpoint with --seed-model"
            ) from None
        self.model = model.to(device).eval().requires_grad_(False)
        visual = self.model.visual
        # Without its projection the tower returns the post-LN CLS feature, which relevance and DPP work on.
        self.projection, visual.proj = visual.proj.detach().float(), None  # (d, e)
        visual.to(dtype)
        self.scale = self.model.logit_scale.exp().item()
        self.size, self.width = visual.image_size[0], self.projection.shape[0]
        self.mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        self.std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
        self.ffn_names = [
            f"visual.transformer.resblocks.{i}.mlp" for i in range(len(visual.transformer.resblocks))
        ]
        self.class_features, self.unreadable = {}, []

    # --- images

    def transform(self, image, rng=None):
        """PIL image -> (3, size, size): resize, centre crop, normalise. With `rng`: random crop and flip."""
        from torchvision.transforms import InterpolationMode, functional

        image = functional.resize(image, self.resize, InterpolationMode.BICUBIC)
        if rng is None:
            image = functional.center_crop(image, self.size)
        else:
            top, left = rng.integers(image.height - self.size + 1), rng.integers(image.width - self.size + 1)
            image = functional.crop(image, top, left, self.size, self.size)
            if self.flip and rng.random() < 0.5:
                image = functional.hflip(image)
        return functional.normalize(functional.to_tensor(image), self.mean, self.std)

    def load(self, records, batches, seed=None):
        """Yield (indices, images (b, 3, size, size) on the device) batch by batch, decoded by the workers.

        An image that cannot be decoded is left out and goes to self.unreadable as (index, message).
        self.seconds is the time this loop waited for images, which is the decoding's where there are no
        workers.
        """
        dataset = Images(records, self.transform, seed)
        keys = [[(index, step) for index in batch] for step, batch in enumerate(batches)]
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=keys, num_workers=self.workers, collate_fn=list
        )
        self.unreadable, self.seconds = [], 0.0
        waiting = time.perf_counter()
        for items in loader:
            self.seconds += time.perf_counter() - waiting
            self.unreadable += [(index, error) for index, _, error in items if error]
            good = [(index, image) for index, image, error in items if not error]
            images = (
                torch.stack([image for _, image in good]) if good else torch.empty(0, 3, self.size, self.size)
            )
            yield [index for index, _ in good], images.to(self.device)
            waiting = time.perf_counter()

    def pool(self, model, images):
        """Post-LN CLS features (b, d) float32 of images (b, 3, size, size)."""
        if not len(images):  # all of a batch unreadable
            return images.new_zeros(0, self.width)
        with self.autocast():
            return unwrap(model).visual(images.to(self.dtype)).float()

    def classify(self, model, images, texts):
        """Logits (b, C) of images against unit text features (C, e)."""
        return self.scale * F.normalize(self.pool(model, images) @ self.projection, dim=-1) @ texts.T

    @torch.no_grad()
    def text_features(self, classes):
        """Unit text features (C, e) of the class prompts; each class is encoded once."""
        new = [name for name in classes if name not in self.class_features]
        for start in progress(range(0, len(new), 64), desc="class prompts", show=len(new) > 64):
            names = new[start : start + 64]
            tokens = self.tokenizer([self.template.format(name) for name in names]).to(self.device)
            self.class_features |= zip(names, self.model.encode_text(tokens, normalize=True), strict=False)
        return torch.stack([self.class_features[name] for name in classes])

    def public_classes(self, folder):
        """The public set's classes. Their text features are computed once and kept in classes.safetensors."""
        classes, cache = read_json(folder / "classes.json"), folder / "classes.safetensors"
        if not cache.exists():
            with atomic(cache) as temporary:
                save_file({"features": self.text_features(classes).cpu()}, temporary)
        self.class_features |= zip(classes, load_file(cache)["features"].to(self.device), strict=False)
        return classes

    # --- what the stages ask

    @torch.no_grad()
    def embed(self, records, label="embedding", skip=0, every=1, batch=256):
        """Yield (indices, features (b, d) float32): the post-LN CLS feature of each readable image;
        after the first `skip` batches each `every`-th."""
        batches = chunks(len(records), batch)
        with progress(total=len(records), initial=skip * batch, desc=label, unit="image") as bar:
            for indices, images in self.load(records, batches[skip::every]):
                yield indices, self.pool(self.model, images).cpu().numpy()
                bar.update(len(indices))

    def prompt_batches(self, model, records, label):
        """Yield (token mask (B, T), a function that runs the images through the model) batch by batch."""
        width = self.model.visual.positional_embedding.shape[0]
        with progress(total=len(records), desc=label, unit="image") as bar:
            for indices, images in self.load(records, chunks(len(records), 128)):
                tokens = torch.ones(len(indices), width, dtype=torch.bool, device=self.device)
                yield tokens, partial(self.pool, model, images)
                bar.update(len(indices))
        self.refuse_unreadable()

    def losses(self, model, records, classes, batch_size, steps, seed):
        """Yield each step's loss (with its graph): cross-entropy over `classes`; under accelerate this
        process's part of the batch, so that the sum over processes is the mean over the whole batch."""
        texts, label = self.text_features(classes), {name: i for i, name in enumerate(classes)}
        targets = torch.tensor([label[record["answer"]] for record in records], device=self.device)
        state, batches = processes(), list(epoch_batches([1] * len(records), batch_size, steps, seed))
        mine = [batch[state.process_index :: state.num_processes] for batch in batches]
        for whole, part, (indices, images) in zip(
            batches,
            mine,
            self.load(records, [part or whole[:1] for whole, part in zip(batches, mine, strict=False)], seed),
            strict=False,
        ):
            self.refuse_unreadable()
            # On the CPU the fused attention's backward is slower on so few tokens: a fifth of a step.
            with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext():
                logits = self.classify(model, images, texts)
            yield F.cross_entropy(logits, targets[indices]) * (len(part) / len(whole))

    @torch.no_grad()
    def scores(self, model, records, label="scoring", scoring=None):
        """Logits of each record's choices: a list of float64 arrays, one per record."""
        result, texts = [None] * len(records), self.text_features(records[0]["choices"])
        with progress(total=len(records), desc=label, unit="image") as bar:
            for indices, images in self.load(records, chunks(len(records), 128)):
                for i, values in zip(
                    indices, self.classify(model, images, texts).double().cpu().numpy(), strict=False
                ):
                    result[i] = values
                bar.update(len(indices))
        self.refuse_unreadable()
        return result

    def refuse_unreadable(self):
        if self.unreadable:
            raise UserError(f"{self.unreadable[0][1]}: repair it or take it out of the data")


class Images(torch.utils.data.Dataset):
    """Decoded and transformed images of records. A key is (index, step).

    With a random seed the transform is random, and fixed by all three.
    """

    def __init__(self, records, transform, seed):
        self.records, self.transform, self.seed = records, transform, seed

    def __len__(self):
        return len(self.records)

    def __getitem__(self, key):
        """(index, image (3, H, W), "") or (index, None, what is wrong with it)."""
        index, step = key
        try:
            image = self.records[index]["image"]
            if isinstance(image, dict) and "char" in image:
                from metamoe.data.glyphs import (
                    world,  # here: it imports matplotlib, which nothing else in training needs
                )

                image = world.draw(image)
            else:
                image = open_image(image)
        except BadImage as error:
            return index, None, str(error)
        return (
            index,
            self.transform(
                image, None if self.seed is None else np.random.default_rng([self.seed, step, index])
            ),
            "",
        )


def chunks(count, size):
    """Ranges over 0 ... count - 1 of `size` each, the last of what is left."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
