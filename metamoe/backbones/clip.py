"""CLIP models of open_clip: images decoded by worker processes, class prompts, losses, scores."""

import contextlib
import logging
import os
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from metamoe.backbones.architectures import check_checkpoint, import_open_clip
from metamoe.backbones.base import Backbone, chunks, dtype_name, unwrap
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import epoch_batches
from metamoe.data.decoding import BadImage, open_image
from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.rundir import atomic, check_input, finish_file, finished_file, read_json, sha256


class ClipBackbone(Backbone):
    """A CLIP of open_clip: the visual tower is the seed model, the frozen text tower makes the classifier."""

    ffn_linears = ["c_fc", "c_proj"]
    task_type = None

    def __init__(self, preset, source, device, dtype, workers=None):
        self.source, self.device, self.dtype, self.preprocessing = str(source), device, dtype, {}
        self.template, self.flip = preset["template"], preset["flip"]
        default = os.cpu_count() if device.type == "cuda" else 0
        self.workers = default if workers is None else workers
        model, self.tokenizer = self._load(preset)
        self.model = model.to(device).eval().requires_grad_(False)
        visual = model.visual
        # Without its projection the tower returns the post-LN CLS feature, which relevance and DPP work on.
        self.projection, visual.proj = visual.proj.detach().float(), None  # (d, e)
        visual.to(dtype)
        self.scale = model.logit_scale.exp().item()
        self.size, self.width = visual.image_size[0], self.projection.shape[0]
        self.resize = preset["resize"] * self.size // preset["image_size"]
        self.mean, self.std = visual.image_mean, visual.image_std
        self.interpolation = self.preprocessing.get("interpolation", "bicubic")
        blocks = range(len(visual.transformer.resblocks))
        self.ffn_names = [f"visual.transformer.resblocks.{i}.mlp" for i in blocks]
        self.class_features, self.unreadable = {}, []

    def _load(self, preset):
        open_clip, architecture = import_open_clip(), preset["architecture"]
        try:
            if preset["data"] == "glyphs":
                from metamoe.data.glyphs.model import WEIGHTS, create

                return create(self.source or WEIGHTS)
            self.preprocessing = check_checkpoint(architecture, self.source)
            options = {"force_preprocess_cfg": self.preprocessing, "weights_only": True}
            with no_log():
                model = open_clip.create_model(architecture, pretrained=self.source, **options)
            return model, open_clip.get_tokenizer(architecture)
        except UserError:
            raise
        except Exception as error:  # open_clip passes on what the hub, pickle, safetensors and torch raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"seed model {self.source}: open_clip cannot load it as {architecture} ({reason})"
            raise UserError(f"{problem}; give a local checkpoint with --seed-model") from None

    # --- images

    def transform(self, image, rng=None):
        """PIL image -> (3, size, size): resize, centre crop, normalise. With `rng`: random crop and flip."""
        from torchvision.transforms import InterpolationMode, functional

        image = functional.resize(image, self.resize, InterpolationMode(self.interpolation))
        if rng is None:
            image = functional.center_crop(image, self.size)
        else:
            top, left = rng.integers(image.height - self.size + 1), rng.integers(image.width - self.size + 1)
            image = functional.crop(image, top, left, self.size, self.size)
            if self.flip and rng.random() < 0.5:
                image = functional.hflip(image)
        return functional.normalize(functional.to_tensor(image), self.mean, self.std)

    def load(self, records, batches, label=None, start=0, seed=None, strict=True):
        """Yield (indices, images (b, 3, size, size) on the device) batch by batch, decoded by the workers.

        An image that cannot be decoded raises UserError, or without `strict` is left out and goes to
        self.unreadable. label, start: of the progress bar.
        """
        self.unreadable, self.seconds = [], 0.0
        keys = [[(index, step) for index in batch] for step, batch in enumerate(batches)]
        data = Images(records, self.transform, seed)
        loader = DataLoader(data, batch_sampler=keys, num_workers=self.workers, collate_fn=list)
        show = label is not None
        with progress(total=len(records), initial=start, desc=label, unit="image", show=show) as bar:
            waiting = time.perf_counter()
            for items in loader:
                self.seconds += time.perf_counter() - waiting
                self.unreadable += [(index, error) for index, _, error in items if error]
                if strict and self.unreadable:
                    raise UserError(f"{self.unreadable[0][1]}: repair it or take it out of the data")
                good = [(index, image) for index, image, error in items if not error]
                images = torch.empty(0, 3, self.size, self.size)
                if good:
                    images = torch.stack([image for _, image in good])
                yield [index for index, _ in good], images.to(self.device)
                bar.update(len(good))
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
        for names in progress(chunks(new, 64), desc="class prompts", show=len(new) > 64):
            tokens = self.tokenizer([self.template.format(name) for name in names]).to(self.device)
            features = self.model.encode_text(tokens, normalize=True)
            self.class_features |= zip(names, features, strict=True)
        return torch.stack([self.class_features[name] for name in classes])

    def public_classes(self, folder):
        """The public set's classes. Their text features are computed once and kept in classes.safetensors."""
        classes, cache = read_json(check_input(folder / "classes.json")), folder / "classes.safetensors"
        made_from = {"classes.json": sha256(folder / "classes.json"), "dtype": dtype_name(self.dtype)}
        if not finished_file(cache, {}, made_from=made_from):
            features = self.text_features(classes).cpu()
            if not processes().is_main_process:
                return classes
            with atomic(cache) as temporary:
                save_file({"features": features}, temporary)
                finish_file(temporary, cache, {}, made_from)
        self.class_features |= zip(classes, load_file(cache)["features"].to(self.device), strict=True)
        return classes

    # --- the interface that the stages use (base.Backbone)

    @torch.no_grad()
    def embed(self, records, label="embedding", skip=0, every=1, batch=256):
        """The post-LN CLS feature of each readable image."""
        batches = chunks(range(len(records)), batch)[skip::every]
        for indices, images in self.load(records, batches, label, skip * batch, strict=False):
            yield indices, self.pool(self.model, images).cpu().numpy()

    def prompt_batches(self, model, records, label):
        width = self.model.visual.positional_embedding.shape[0]
        for indices, images in self.load(records, chunks(range(len(records)), 128), label):
            tokens = torch.ones(len(indices), width, dtype=torch.bool, device=self.device)
            yield indices, tokens, partial(self.pool, model, images)

    def losses(self, model, records, classes, batch_size, steps, seed):
        """Each step's samples and their cross-entropy over `classes`."""
        texts, targets = self.text_features(classes), self.targets(records, classes)
        state = processes()
        batches = list(epoch_batches([1] * len(records), batch_size, steps, seed))
        mine = [batch[state.process_index :: state.num_processes] for batch in batches]
        # A process that a short batch leaves nothing loads one image, which then counts nothing.
        loaded = self.load(records, [p or b[:1] for p, b in zip(mine, batches, strict=True)], seed=seed)
        for part, batch, (indices, images) in zip(mine, batches, loaded, strict=True):
            with self.attention():
                logits = self.classify(model, images, texts)  # (b, C)
            yield indices, F.cross_entropy(logits, targets[indices]) * (len(part) / len(batch))

    def sample_losses(self, model, records, classes, batches, seed):
        texts, targets = self.text_features(classes), self.targets(records, classes)
        for indices, images in self.load(records, batches, seed=seed):
            with self.attention():
                logits = self.classify(model, images, texts)  # (b, C)
            yield F.cross_entropy(logits, targets[indices], reduction="sum")

    def targets(self, records, classes):
        """Each record's class as its index."""
        numbers = {name: i for i, name in enumerate(classes)}
        return torch.tensor([numbers[record["answer"]] for record in records], device=self.device)

    def attention(self):
        # On the CPU the fused attention's backward is slower on so few tokens: a fifth of a step.
        cpu = self.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if cpu else contextlib.nullcontext()

    @torch.no_grad()
    def scores(self, model, records, label="scoring", scoring=None):
        """Logits of each record's choices."""
        texts = self.text_features(records[0]["choices"])
        result = []
        for _, images in self.load(records, chunks(range(len(records)), 128), label):
            result += [*self.classify(model, images, texts).double().cpu().numpy()]
        return result


@contextlib.contextmanager
def no_log():
    """open_clip writes its errors to the root log before it raises them."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class Images(Dataset):
    """Decoded and transformed images; a key is (index, step). With a random seed the transform is random."""

    def __init__(self, records, transform, seed):
        self.records, self.transform, self.seed = records, transform, seed

    def __getitem__(self, key):
        """(index, image (3, H, W), "") or (index, None, what is wrong with it)."""
        index, step = key
        image = self.records[index]["image"]
        try:
            if isinstance(image, dict) and "char" in image:  # a letter to draw
                from metamoe.data.glyphs.world import draw  # here: it imports matplotlib

                image = draw(image)
            else:
                image = open_image(image)
        except BadImage as error:
            return index, None, str(error)
        rng = None if self.seed is None else np.random.default_rng([self.seed, step, index])
        return index, self.transform(image, rng), ""
