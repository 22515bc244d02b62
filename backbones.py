"""The seed models: loading, and what the stages ask of one - features, loss, choice scores, routing vectors.

A backbone is one class with the methods the stages call. Everything that is particular to language models (tokens, prompts,
answers, padding) is inside `TextBackbone`, everything particular to CLIP (images, transforms, class prompts) inside
`ClipBackbone`. Text runs on batches grouped by length; images are decoded by worker processes.
"""

import contextlib
import json
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import fetch
import tasks
from moe import fix_torchvision
from rundir import UserError, atomic, read_json

# The paper's settings for CLIP. Sizes of 0: all there is.
PAPER_CLIP = {
    "kind": "clip", "data": "images", "template": "This is a photo of a {}", "resize": 256, "flip": True,
    "train_size": 0, "validation_size": 0, "test_size": 0, "public_size": 0, "candidates": 3000, "proxies": 500,
    "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 10, "expert_lr": 0.01, "expert_batch": 128, "warmup_steps": 0,
    "optimizer": "sgd", "weight_decay": 1e-4, "final_epochs": 5, "final_batch": 128, "lambda_lr": 1e-3, "lambda_init": 0.3,
    "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-3, "btx": 1e-3, "unrestricted": 1e-3},
}
# The settings of the paper for its backbones, and those of the embedded defaults. A stage's flag overrides its preset.
PRESETS = {
    "vit-b-32": PAPER_CLIP | {"architecture": "ViT-B-32-quickgelu", "pretrained": "openai"},
    "vit-b-16": PAPER_CLIP | {"architecture": "ViT-B-16-quickgelu", "pretrained": "openai"},
    # The embedded vision default: a CLIP small enough to train here, on drawn letters (glyph_clip/).
    "glyph-clip": {
        "kind": "clip", "data": "glyphs", "architecture": "glyph-clip", "pretrained": "", "template": "{}", "resize": 32, "flip": False,
        "train_size": 600, "validation_size": 150, "test_size": 300, "public_size": 6000, "candidates": 480, "proxies": 80,
        "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 10, "expert_lr": 1e-3, "expert_batch": 64, "warmup_steps": 0,
        "optimizer": "adamw", "weight_decay": 0.0, "final_epochs": 5, "final_batch": 64, "lambda_lr": 1e-3, "lambda_init": 0.3,
        "final_lr": {"metamoe": 1e-4, "flexolmo": 1e-3, "btx": 1e-4, "unrestricted": 1e-4},
    },
    "smollm2-135m": {
        "kind": "text", "data": "bigbench", "optimizer": "adamw", "weight_decay": 0.0,
        "train_size": 400, "validation_size": 80, "test_size": 200, "public_size": 5000,
        "candidates": 900, "proxies": 150, "max_length": 256,
        "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 4, "expert_lr": 5e-4, "expert_batch": 8, "warmup_steps": 10,
        "final_epochs": 1, "final_batch": 16, "lambda_lr": 1e-3, "lambda_init": 1.0,
        # of 1e-4 (the paper's, also on a tie) and 1e-3: the better average accuracy on the validation parts of seed 0 (README)
        "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-4, "btx": 1e-4, "unrestricted": 1e-4},
    },
}


def import_transformers():
    fix_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights, a second or two
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's, of no concern to the user
    return transformers


def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown, choose auto, cpu or cuda") from None


def pick_dtype(name, device):
    """bfloat16 where the hardware computes in it, else float32."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        name = "bfloat16" if fast else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_backbone(name, seed_model=None, device="auto", dtype="auto", workers=None):
    """The backbone `name` of PRESETS, its seed from `seed_model` (hub id, local folder or checkpoint) instead if given."""
    if name not in PRESETS:
        raise UserError(f"backbone {name!r}: unknown, choose from {', '.join(PRESETS)}")
    preset, device = PRESETS[name], pick_device(device)
    dtype = pick_dtype(dtype, device)
    if preset["kind"] == "clip":
        return ClipBackbone(preset, seed_model or preset["pretrained"], device, dtype, workers)
    return TextBackbone(seed_model or default_seed(name), device, dtype, preset["max_length"])


def default_seed(name):
    """The embedded default's seed model as a Hugging Face folder in the cache, converted from GGUF once."""
    folder = fetch.cache_dir() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        transformers = import_transformers()
        gguf = fetch.open_gguf(fetch.fetch(**fetch.SMOLLM2))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.float32
        )
        with atomic(folder) as temporary:
            model.save_pretrained(temporary)
            transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
    return str(folder)


class Backbone:
    """What a language model and a CLIP share. Attributes of both: source, device, dtype, model (the frozen seed),
    ffn_names (module paths of its FFNs), ffn_linears, width (d of features and routing vectors)."""

    def autocast(self):
        # Entered at every step: left on, its cache of cast weights would hide the optimiser's updates.
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def features(self, records, label="embedding"):
        """Seed-model embeddings (n, d) float32 of a client's records; UserError if one cannot be read."""
        out = np.full((len(records), self.width), np.nan, np.float32)
        for batch, values in self.embed(records, label):
            out[batch] = values
        if self.unreadable:
            raise UserError(f"private sample {self.unreadable[0][1]}: repair it or take it out of the client's data")
        return out

    @torch.no_grad()
    def routing_vectors(self, model, records, label="routing vectors"):
        """(L, d) float32: mean over samples of the token mean of each FFN's input (a text's prompt, as in the router's context)."""
        lm, mask = unwrap(model), None
        sums = torch.zeros(len(self.ffn_names), self.width, dtype=torch.float64)

        def add_to(layer):
            def hook(module, inputs):
                sums[layer] += masked_mean(inputs[0].float(), mask).sum(0).double().cpu()

            return hook

        hooks = [lm.get_submodule(name).register_forward_pre_hook(add_to(i)) for i, name in enumerate(self.ffn_names)]
        try:
            for mask, forward in self.prompt_batches(model, records, label):
                with self.autocast():
                    forward()
        finally:
            for hook in hooks:
                hook.remove()
        return (sums / len(records)).float()

    # --- experts

    def add_lora(self, rank, alpha, seed):
        """The model with fresh PEFT LoRA factors on the FFN linears; nothing else trains."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        targets = [f"{ffn}.{linear}" for ffn in self.ffn_names for linear in self.ffn_linears]
        return get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type=self.task_type))

    def train_full_ffn(self):
        """The model with its FFN weights themselves trainable, in float32."""
        for ffn in self.ffn_names:
            self.model.get_submodule(ffn).float().requires_grad_(True)
        return self.model

    def with_adapter(self, folder):
        """The model with a client's or the soup's expert in place (PEFT adapter, or ffn.safetensors beside it)."""
        if (Path(folder) / "adapter").exists():
            from peft import PeftModel

            return PeftModel.from_pretrained(self.model, Path(folder) / "adapter").eval()
        self.model.load_state_dict({k: v.to(self.dtype) for k, v in load_file(Path(folder) / "ffn.safetensors").items()}, strict=False)
        return self.model.eval()


class TextBackbone(Backbone):
    """A causal language model of the LLaMA kind (gated FFN: gate_proj, up_proj, down_proj) and its tokenizer."""

    ffn_linears = ["gate_proj", "up_proj", "down_proj"]
    task_type = "CAUSAL_LM"
    unreadable, seconds = (), 0.0

    def __init__(self, source, device, dtype, max_length=256):
        transformers = import_transformers()
        self.source, self.device, self.dtype, self.max_length = str(source), device, dtype, max_length
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
            # The frozen weights are stored in the compute dtype, so that autocast casts the small trained ones only.
            # Eager attention on the CPU: the fused kernel's backward is twice as slow at the lengths of short texts.
            attention = "eager" if device.type == "cpu" else "sdpa"
            model = transformers.AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype, attn_implementation=attention)
        except (OSError, ValueError) as error:
            raise UserError(f"seed model {self.source}: cannot be loaded as a causal language model ({str(error).splitlines()[0]})") from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.ffn_names = [name for name, _ in self.model.named_modules() if name.endswith(".mlp")]
        self.width = self.model.config.hidden_size
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def public_classes(self, folder):
        return []  # the label set is the vocabulary

    # --- records to tokens

    def encode(self, record, answer=None):
        """(prompt ids, answer ids): the prompt keeps its end where it is too long, an answer ends with EOS."""
        prompt = self.tokenizer(record["prompt"])["input_ids"]
        ids = [] if answer is None else self.tokenizer(answer, add_special_tokens=False)["input_ids"][: self.max_length // 2]
        return prompt[-(self.max_length - len(ids) - 1) :], ids

    def collate(self, encoded):
        """Pad (prompt, answer) pairs on the right: ids, attention mask, prompt mask, answer labels; each (B, T)."""
        width = max(len(prompt) + len(answer) for prompt, answer in encoded)
        ids = torch.full((len(encoded), width), self.pad)
        real, prompts = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(encoded):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            real[row, :end], prompts[row, : len(prompt)] = True, True
            labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        return [t.to(self.device) for t in (ids, real, prompts, labels)]

    def batches(self, lengths, tokens=2048):
        """Indices in batches of like length, at most about `tokens` padded tokens each: little work on padding."""
        order, batch = np.argsort(lengths, kind="stable"), []
        for i in order:
            if batch and (len(batch) + 1) * lengths[i] > tokens:
                yield batch
                batch = []
            batch.append(int(i))
        if batch:
            yield batch

    # --- what the stages ask

    def hidden(self, model, ids, real, prompts, **kwargs):
        """Last hidden states (B, T, d). The router's context is the mean over the prompt (see README, Differences)."""
        lm = unwrap(model)
        if hasattr(lm, "routing"):
            lm.routing.context_mask, lm.routing.token_mask = prompts, real
        kwargs.setdefault("attention_mask", real)
        return lm.model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state

    @torch.no_grad()
    def embed(self, records, label="embedding", skip=0):
        """Yield (indices, features (b, d) float32) batch by batch: mean over the prompt's tokens of the seed's last hidden
        state. The batches are always the same; the first `skip` are left out."""
        encoded = [self.encode(record) for record in records]
        batches = list(self.batches([len(prompt) for prompt, _ in encoded]))
        with tqdm(total=len(records), initial=sum(map(len, batches[:skip])), desc=label, unit="text", disable=None) as bar:
            for batch in batches[skip:]:
                ids, real, prompts, _ = self.collate([encoded[i] for i in batch])
                with self.autocast():
                    states = self.hidden(self.model, ids, real, prompts)
                yield batch, masked_mean(states.float(), real).cpu().numpy()
                bar.update(len(batch))

    def prompt_batches(self, model, records, label):
        """Yield (token mask (B, T), a function that runs the prompts through the model) batch by batch."""
        encoded = [self.encode(record) for record in records]
        with tqdm(total=len(records), desc=label, unit="text", disable=None) as bar:
            for batch in self.batches([len(prompt) for prompt, _ in encoded]):
                ids, mask, prompts, _ = self.collate([encoded[i] for i in batch])
                yield mask, lambda: self.hidden(model, ids, mask, prompts)
                bar.update(len(batch))

    def losses(self, model, records, classes, batch_size, steps, seed):
        """Yield each step's loss (with its graph): batches of texts of like length, an answer ends with EOS."""
        encoded = []
        for record in records:
            prompt, answer = self.encode(record, record["answer"])
            encoded.append((prompt, answer + [self.tokenizer.eos_token_id]))
        for batch in epoch_batches([len(p) + len(a) for p, a in encoded], batch_size, steps, seed):
            yield self.loss(model, [encoded[i] for i in batch])

    def loss(self, model, encoded):
        """Mean cross-entropy over the answers' tokens; the head runs on those positions alone."""
        ids, real, prompts, labels = self.collate(encoded)
        with self.autocast():
            states = self.hidden(model, ids, real, prompts)
            predicts = labels[:, 1:] != -100
            logits = unwrap(model).lm_head(states[:, :-1][predicts])  # (answer tokens, V)
        return F.cross_entropy(logits.float(), labels[:, 1:][predicts])

    @torch.no_grad()
    def scores(self, model, records, label="scoring"):
        """Log-likelihood of each choice's text after the prompt: a list of float64 arrays, one per record.

        Prompt and choices make one sequence, in which a choice sees the prompt and itself and is placed right after
        the prompt: the prompt's work is done once, and the result is that of a sequence for every choice.
        """
        encoded = [(self.encode(r)[0], [self.encode(r, c)[1] for c in r["choices"]]) for r in records]
        result = [None] * len(records)
        with tqdm(total=len(records), desc=label, unit="text", disable=None) as bar:
            for batch in self.batches([len(p) + sum(map(len, cs)) for p, cs in encoded]):
                for i, values in zip(batch, self._score_batch(model, [encoded[i] for i in batch])):
                    result[i] = values
                bar.update(len(batch))
        return result

    def _score_batch(self, model, encoded):
        width = max(len(p) + sum(map(len, cs)) for p, cs in encoded)
        ids = torch.full((len(encoded), width), self.pad)
        part = torch.full_like(ids, -1)  # 0: prompt, 1, 2, ...: that choice, -1: padding
        position = torch.zeros_like(ids)
        rows, sources, targets, owners = [], [], [], []  # each scored token: row, position that predicts it, id, choice
        for row, (prompt, choices) in enumerate(encoded):
            end = len(prompt)
            ids[row, :end], part[row, :end], position[row, :end] = torch.tensor(prompt), 0, torch.arange(end)
            for number, choice in enumerate(choices, 1):
                span = slice(end, end + len(choice))
                ids[row, span], part[row, span] = torch.tensor(choice), number
                position[row, span] = torch.arange(len(prompt), len(prompt) + len(choice))
                rows += [row] * len(choice)
                sources += [len(prompt) - 1] + list(range(end, end + len(choice) - 1))
                targets += choice
                owners += [number - 1] * len(choice)
                end += len(choice)
        ids, part, position = ids.to(self.device), part.to(self.device), position.to(self.device)
        sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])  # (B, T, T)
        sees &= torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=self.device).masked_fill(~sees, torch.finfo(self.dtype).min)
        with self.autocast():
            # The routing counts are those of the prompt: wrong choices say nothing of a client's tokens.
            states = self.hidden(model, ids, part == 0, part == 0, attention_mask=mask[:, None], position_ids=position)
            logits = unwrap(model).lm_head(states[rows, sources])
        log_probs = F.log_softmax(logits.float(), -1).gather(1, torch.tensor(targets, device=self.device)[:, None])[:, 0]
        values = [np.zeros(len(choices)) for _, choices in encoded]
        for row, owner, value in zip(rows, owners, log_probs.double().tolist()):
            values[row][owner] += value
        return values

class ClipBackbone(Backbone):
    """A CLIP of open_clip. Its visual tower is the seed; the frozen text tower turns class names into the classifier."""

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
                from glyph_clip.model import WEIGHTS, create

                model, self.tokenizer = create(self.source or WEIGHTS)
            else:
                model = open_clip.create_model(preset["architecture"], pretrained=self.source)
                self.tokenizer = open_clip.get_tokenizer(preset["architecture"])
        except UserError:
            raise
        except Exception as error:  # open_clip passes on what the hub, pickle, safetensors and torch raise
            raise UserError(f"seed model {self.source}: open_clip cannot load it as {preset['architecture']} ({(str(error).splitlines() or [type(error).__name__])[0]}); "
                            "give a local checkpoint with --seed-model") from None
        self.model = model.to(device).eval().requires_grad_(False)
        visual = self.model.visual
        # Without its projection the tower returns the post-LN CLS feature, which relevance and DPP work on.
        self.projection, visual.proj = visual.proj.detach().float(), None  # (d, e)
        visual.to(dtype)
        self.scale = self.model.logit_scale.exp().item()
        self.size, self.width = visual.image_size[0], self.projection.shape[0]
        self.mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        self.std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
        self.ffn_names = [f"visual.transformer.resblocks.{i}.mlp" for i in range(len(visual.transformer.resblocks))]
        self.class_features, self.unreadable = {}, []

    # --- images

    def transform(self, image, rng=None):
        """PIL image -> (3, size, size): resize, centre crop, normalise; with an `rng` a random crop and flip (training)."""
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
        """Yield (indices, images (b, 3, size, size) on the device) batch by batch, decoded by the worker processes.

        An image that cannot be decoded is left out and goes to self.unreadable as (index, message). self.seconds is the
        time this loop waited for images, which is the decoding's where there are no workers.
        """
        dataset = Images(records, self.transform, seed)
        keys = [[(index, step) for index in batch] for step, batch in enumerate(batches)]
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=self.workers, collate_fn=list)
        self.unreadable, self.seconds = [], 0.0
        waiting = time.perf_counter()
        for items in loader:
            self.seconds += time.perf_counter() - waiting
            self.unreadable += [(index, error) for index, _, error in items if error]
            good = [(index, image) for index, image, error in items if not error]
            images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, self.size, self.size)
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
        for start in tqdm(range(0, len(new), 64), desc="class prompts", disable=None if len(new) > 64 else True):
            names = new[start : start + 64]
            tokens = self.tokenizer([self.template.format(name) for name in names]).to(self.device)
            self.class_features |= zip(names, self.model.encode_text(tokens, normalize=True))
        return torch.stack([self.class_features[name] for name in classes])

    def public_classes(self, folder):
        """The public set's classes; their text features are computed once, then every stage takes them from classes.safetensors."""
        classes, cache = read_json(folder / "classes.json"), folder / "classes.safetensors"
        if not cache.exists():
            with atomic(cache) as temporary:
                save_file({"features": self.text_features(classes).cpu()}, temporary)
        self.class_features |= zip(classes, load_file(cache)["features"].to(self.device))
        return classes

    # --- what the stages ask

    @torch.no_grad()
    def embed(self, records, label="embedding", skip=0, batch=256):
        """Yield (indices, features (b, d) float32) batch by batch: the seed's post-LN CLS feature of each readable image."""
        batches = chunks(len(records), batch)
        with tqdm(total=len(records), initial=skip * batch, desc=label, unit="image", disable=None) as bar:
            for indices, images in self.load(records, batches[skip:]):
                yield indices, self.pool(self.model, images).cpu().numpy()
                bar.update(len(indices))

    def prompt_batches(self, model, records, label):
        """Yield (token mask (B, T), a function that runs the images through the model) batch by batch."""
        width = self.model.visual.positional_embedding.shape[0]
        with tqdm(total=len(records), desc=label, unit="image", disable=None) as bar:
            for indices, images in self.load(records, chunks(len(records), 128)):
                tokens = torch.ones(len(indices), width, dtype=torch.bool, device=self.device)
                yield tokens, lambda: self.pool(model, images)
                bar.update(len(indices))
        self.refuse_unreadable()

    def losses(self, model, records, classes, batch_size, steps, seed):
        """Yield each step's loss (with its graph): cross-entropy over the label set `classes`."""
        texts, label = self.text_features(classes), {name: i for i, name in enumerate(classes)}
        targets = torch.tensor([label[record["answer"]] for record in records], device=self.device)
        for indices, images in self.load(records, epoch_batches([1] * len(records), batch_size, steps, seed), seed):
            self.refuse_unreadable()
            yield F.cross_entropy(self.classify(model, images, texts), targets[indices])

    @torch.no_grad()
    def scores(self, model, records, label="scoring"):
        """Logits of each record's choices: a list of float64 arrays, one per record."""
        result, texts = [None] * len(records), self.text_features(records[0]["choices"])
        with tqdm(total=len(records), desc=label, unit="image", disable=None) as bar:
            for indices, images in self.load(records, chunks(len(records), 128)):
                for i, values in zip(indices, self.classify(model, images, texts).double().cpu().numpy()):
                    result[i] = values
                bar.update(len(indices))
        self.refuse_unreadable()
        return result

    def refuse_unreadable(self):
        if self.unreadable:
            raise UserError(f"{self.unreadable[0][1]}: repair it or take it out of the data")


class Images(torch.utils.data.Dataset):
    """Decoded and transformed images of records. A key is (index, step); with a seed the transform is random, fixed by all three."""

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
                from glyph_clip import world  # here: it imports matplotlib, which nothing else in training needs

                image = world.draw(image)
            else:
                image = tasks.open_image(image)
        except tasks.BadImage as error:
            return index, None, str(error)
        return index, self.transform(image, None if self.seed is None else np.random.default_rng([self.seed, step, index])), ""


def chunks(count, size):
    """Ranges over 0 ... count - 1 of `size` each, the last of what is left."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def unwrap(model):
    """The transformers model inside a PEFT one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def masked_mean(values, mask):
    """Mean over tokens (B, T, d), (B, T) -> (B, d)."""
    weight = mask[..., None].to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1)


def read_expert(upload):
    """An uploaded expert as moe.unify takes it: {FFN name: {"gate_proj.lora_A": tensor, ..., "scaling": float}}."""
    expert = {}
    if (Path(upload) / "adapter").exists():
        config = json.loads((Path(upload) / "adapter" / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        for key, tensor in load_file(Path(upload) / "adapter" / "adapter_model.safetensors").items():
            ffn, linear, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 2)
            expert.setdefault(ffn, {"scaling": scaling})[f"{linear}.{factor}"] = tensor
    else:
        for key, tensor in load_file(Path(upload) / "ffn.safetensors").items():
            ffn, linear, kind = key.rsplit(".", 2)
            expert.setdefault(ffn, {})[f"{linear}.{kind}"] = tensor
    return expert


def train(backbone, model, records, groups, *, steps, batch_size, warmup_steps, optimizer, weight_decay, seed, label, classes=(), after_step=None):
    """Train in place; every record once an epoch, `steps` steps, constant rate after a linear warm-up.

    groups: optimiser parameter groups, each with its own "lr". optimizer: "adamw", or "sgd" (Nesterov momentum 0.9).
    classes: the label set of an image classifier. Returns the mean loss of each step.
    """
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
    losses = []
    model.train()
    with tqdm(total=steps, desc=label, unit="step", disable=None) as bar:
        for loss in backbone.losses(model, records, classes, batch_size, steps, seed):
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if after_step:
                after_step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(f"{label}: the loss became {losses[-1]} at step {len(losses)}: lower the learning rate")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses


def epoch_batches(lengths, batch_size, steps, seed):
    """`steps` batches of indices, epoch after epoch: shuffled, sorted by length within windows of eight batches, shuffled again."""
    generator, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        order, epoch = generator.permutation(len(lengths)), []
        for start in range(0, len(order), 8 * batch_size):
            window = sorted(order[start : start + 8 * batch_size], key=lambda i: lengths[i])
            epoch += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [epoch[i] for i in generator.permutation(len(epoch))[::-1]]
    return batches[:steps]
