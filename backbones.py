"""The seed models: loading, and what the stages ask of one - features, loss, choice scores, routing vectors.

A backbone is one class with the methods the stages call. Everything that is particular to language models (tokens, prompts,
answers, padding) is inside `TextBackbone`, everything particular to CLIP (images, transforms, class prompts) inside
`ClipBackbone`. Text runs on batches grouped by length; images are decoded by worker processes.
"""

import contextlib
import datetime
import json
import math
import os
import re
import string
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fetch
import tasks
from metamoe.serving.seed_model import fix_torchvision
from rundir import UserError, atomic, read_json

# The paper's settings for CLIP. Sizes of 0: all there is.
PAPER_CLIP = {
    "kind": "clip", "data": "images", "template": "This is a photo of a {}", "resize": 256, "flip": True,
    "train_size": 0, "validation_size": 0, "test_size": 0, "public_size": 0, "candidates": 3000, "proxies": 500,
    "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 10, "expert_lr": 0.01, "expert_batch": 128, "warmup_steps": 0,
    "optimizer": "sgd", "weight_decay": 1e-4, "final_epochs": 5, "final_batch": 128, "lambda_lr": 1e-3, "lambda_init": 0.3,
    "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-3, "btx": 1e-3, "unrestricted": 1e-3},
}
# The paper's settings for LLaMA. Here a training size of 0 is all there is, up to the paper's 10,000 samples a client.
PAPER_LLAMA = {
    "kind": "text", "data": "qa", "optimizer": "adamw", "weight_decay": 0.0, "max_length": 256,
    "embed": "input",  # the text that relevance and the DPP work on: the question alone, not the prompt around it
    "loss": "text", "answers": "letters", "scoring": "letters",
    "train_size": 0, "validation_size": 500, "test_size": 0, "public_size": 0, "candidates": 3000, "proxies": 500,
    "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 10, "expert_lr": 1e-4, "expert_batch": 32, "warmup_steps": 200,
    "final_epochs": 1, "final_batch": 32, "lambda_lr": 1e-3, "lambda_init": 1.0,
    "final_lr": {"metamoe": 1e-4, "flexolmo": 1e-4, "btx": 1e-4, "unrestricted": 1e-4},
}
# The settings of the paper for its backbones, and those of the embedded defaults. A stage's flag overrides its preset.
PRESETS = {
    "vit-b-32": PAPER_CLIP | {"architecture": "ViT-B-32-quickgelu", "pretrained": "openai"},
    "vit-b-16": PAPER_CLIP | {"architecture": "ViT-B-16-quickgelu", "pretrained": "openai"},
    "llama-3.2-3b": PAPER_LLAMA | {"seed_model": "meta-llama/Llama-3.2-3B"},
    "llama-3.1-8b": PAPER_LLAMA | {"seed_model": "meta-llama/Llama-3.1-8B", "gradient_checkpointing": True},  # for 80 GB
    # The embedded vision default: a CLIP small enough to train here, on drawn letters (glyph_clip/).
    "glyph-clip": {
        "kind": "clip", "data": "glyphs", "architecture": "glyph-clip", "pretrained": "", "template": "{}", "resize": 32, "flip": False,
        "train_size": 500, "validation_size": 150, "test_size": 300, "public_size": 6000, "candidates": 480, "proxies": 80,
        "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 6, "expert_lr": 1e-3, "expert_batch": 16, "warmup_steps": 0,
        "optimizer": "adamw", "weight_decay": 0.0, "final_epochs": 2, "final_batch": 32, "lambda_lr": 1e-3, "lambda_init": 1.0,
        # of 1e-5, 1e-4 and 1e-3: the best average accuracy on the validation parts of seed 0 (README)
        "final_lr": {"metamoe": 1e-5, "flexolmo": 1e-3, "btx": 1e-4, "unrestricted": 1e-3},
    },
    "smollm2-135m": {
        "kind": "text", "data": "bigbench", "optimizer": "adamw", "weight_decay": 0.0, "embed": "prompt",
        "loss": "answer", "answers": "text", "scoring": "likelihood",
        "train_size": 400, "validation_size": 80, "test_size": 200, "public_size": 5000,
        "candidates": 900, "proxies": 150, "max_length": 256,
        "lora_rank": 16, "lora_alpha": 32, "expert_epochs": 4, "expert_lr": 5e-4, "expert_batch": 8, "warmup_steps": 10,
        "final_epochs": 1, "final_batch": 16, "lambda_lr": 1e-3, "lambda_init": 1.0,
        # of 1e-4 (the paper's, also on a tie) and 1e-3: the better average accuracy on the validation parts of seed 0 (README)
        "final_lr": {"metamoe": 1e-3, "flexolmo": 1e-4, "btx": 1e-4, "unrestricted": 1e-4},
    },
}

WINDOW = 8192  # texts that are tokenised at a time to be grouped by length


def import_transformers():
    fix_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights, a second or two
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's, of no concern to the user
    return transformers


ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, main_process_first=contextlib.nullcontext, wait_for_everyone=lambda: None)


def processes(device="auto"):
    """The processes of this run: accelerate's PartialState under `accelerate launch` (torchrun), else one that is alone.

    All of them go through the same lines of a stage; what they share out is a batch's samples (training) or the batches
    (embedding), and only the main process writes files. The first call says whether they are on the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    from accelerate import PartialState

    # the timeout: the others wait while the main process fits relevance heads and runs the DPP
    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=datetime.timedelta(hours=6))


def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown, choose auto, cpu or cuda") from None
    state = processes(device.type)
    return device if state is ALONE else state.device


def pick_dtype(name, device):
    """bfloat16 where the hardware computes in it, else float32."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        name = "bfloat16" if fast else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_backbone(name, seed_model=None, device="auto", dtype="auto", workers=None, answers=None, loss=None):
    """The backbone `name` of PRESETS, its seed from `seed_model` (hub id, local folder or checkpoint) instead if given.

    answers, loss: those of run.json, for a language model (None: the preset's).
    """
    if name not in PRESETS:
        raise UserError(f"backbone {name!r}: unknown, choose from {', '.join(PRESETS)}")
    preset, device = PRESETS[name], pick_device(device)
    dtype = pick_dtype(dtype, device)
    if preset["kind"] == "clip":
        return ClipBackbone(preset, seed_model or preset["pretrained"], device, dtype, workers)
    source = seed_model or preset.get("seed_model") or default_seed(name)
    return TextBackbone(source, device, dtype, preset["max_length"], preset["embed"], answers or preset["answers"], loss or preset["loss"])


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

    def shared_embed(self, records, label="embedding", skip=0):
        """Yield (indices, features, unreadable so far) batch by batch, as `embed`; under `accelerate launch` its batches are dealt to the processes and every process gets all."""
        state = processes()
        mine = self.embed(records, label, skip=skip + state.process_index, every=state.num_processes)
        if state is ALONE:
            yield from ((*batch, list(self.unreadable)) for batch in mine)
            return
        from accelerate.utils import gather_object

        unreadable = {}  # process -> its list
        while any(batch := gather_object([(*found, state.process_index, list(self.unreadable)) if (found := next(mine, None)) else None])):
            for indices, values, process, bad in filter(None, batch):
                unreadable[process] = bad
                yield indices, values, [item for items in unreadable.values() for item in items]

    def features(self, records, label="embedding"):
        """Seed-model embeddings (n, d) float32 of a client's records; UserError if one cannot be read."""
        out, unreadable = np.full((len(records), self.width), np.nan, np.float32), ()
        for batch, values, unreadable in self.shared_embed(records, label):
            out[batch] = values
        if unreadable:
            raise UserError(f"private sample {unreadable[0][1]}: repair it or take it out of the client's data")
        return out

    @torch.no_grad()
    def routing_vectors(self, model, records, label="routing vectors"):
        """(L, d) float32: mean over samples of the token mean of each FFN's input (a text's prompt, as in the router's context)."""
        lm, mask, state = unwrap(model), None, processes()
        dealt = state.num_processes > 1 and not sharding()  # sharded weights come together only where all processes run the same layers
        sums = torch.zeros(len(self.ffn_names), self.width, dtype=torch.float64)

        def add_to(layer):
            def hook(module, inputs):
                sums[layer] += masked_mean(inputs[0].float(), mask).sum(0).double().cpu()

            return hook

        hooks = [lm.get_submodule(name).register_forward_pre_hook(add_to(i)) for i, name in enumerate(self.ffn_names)]
        try:
            for number, (mask, forward) in enumerate(self.prompt_batches(model, records, label)):
                if not dealt or number % state.num_processes == state.process_index:
                    with self.autocast():
                        forward()
        finally:
            for hook in hooks:
                hook.remove()
        if dealt:
            from accelerate.utils import reduce

            sums = reduce(sums.to(self.device), "sum").cpu()
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

    def __init__(self, source, device, dtype, max_length=256, embedded="prompt", answers="text", loss="answer"):
        transformers = import_transformers()
        self.source, self.device, self.dtype, self.max_length, self.embedded = str(source), device, dtype, max_length, embedded
        self.letters, self.whole_text = answers == "letters", loss == "text"
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
            # The frozen weights are stored in the compute dtype, so that autocast casts the small trained ones only.
            # Eager attention on the CPU: the fused kernel's backward is twice as slow at the lengths of short texts.
            attention = "eager" if device.type == "cpu" else "sdpa"
            model = transformers.AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype, attn_implementation=attention)
        except (OSError, ValueError) as error:
            raise UserError(f"seed model {self.source}: cannot be loaded as a causal language model ({str(error).splitlines()[0]}); name a local "
                            "folder with --seed-model, or log in to the hub (hf auth login) where it asks for that") from None
        self.ffn_names = [name for name, _ in model.named_modules() if name.endswith(".mlp")]
        if not self.ffn_names or not all(hasattr(model.get_submodule(ffn), linear) for ffn in self.ffn_names for linear in self.ffn_linears):
            raise UserError(f"seed model {self.source}: a {type(model).__name__} has no FFNs of gate_proj, up_proj and down_proj in every layer; "
                            "LLaMA, Mistral, Qwen, SmolLM and their like do")
        self.model = model.to(device).eval().requires_grad_(False)
        self.width = self.model.config.hidden_size
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def public_classes(self, folder):
        return []  # the label set is the vocabulary

    # --- records to tokens

    def encode(self, record, answer=None):
        """(prompt ids, answer ids) of at most max_length - 1 (EOS): too long a prompt keeps its end (and its BOS, which
        language models rely on), an answer its beginning."""
        prompt = self.tokenizer(record["prompt"])["input_ids"]
        room = self.max_length // 2
        if self.whole_text:  # an answer may have all that a short prompt leaves
            room = max(room, self.max_length - 1 - len(prompt))
        ids = [] if answer is None else self.tokenizer(answer, add_special_tokens=False)["input_ids"][:room]
        begin = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
        room = self.max_length - len(ids) - 1
        return prompt if len(prompt) <= room else begin + prompt[len(prompt) - room + len(begin) :], ids

    def form(self, record):
        """The record as this run trains on it: of a multiple choice the answer's letter, with `answers` "letters"."""
        return lettered(record) if self.letters else record

    def example(self, record):
        """(prompt ids, answer ids with EOS) of a record to train on."""
        record = self.form(record)
        prompt, answer = self.encode(record, record["answer"])
        return prompt, answer + [self.tokenizer.eos_token_id]

    def letter_ids(self):
        """(ids that the answers " A", " B", ... all begin with, often none; the ids of A to Z that tell them apart).

        In many vocabularies " A" is one token, in others a space and a letter. Raises UserError where ids coincide.
        """
        letters = [self.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in string.ascii_uppercase]
        shared = os.path.commonprefix(letters)
        ids = [letter[len(shared)] for letter in letters if len(letter) > len(shared)]
        if len(set(ids)) < len(letters):
            raise UserError(f"seed model {self.source}: its tokenizer does not tell the letters A to Z apart: score with --scoring likelihood")
        return shared, ids

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

    def hidden(self, model, ids, real, context, **kwargs):
        """Last hidden states (B, T, d). real: the tokens that are counted as routed, and attended to where kwargs have no
        attention_mask. context: those that the router's context is the mean of - the prompt's, or all (see README, Differences)."""
        lm = unwrap(model)
        if hasattr(lm, "routing"):
            lm.routing.context_mask, lm.routing.token_mask = context, real
        kwargs.setdefault("attention_mask", real)
        return lm.model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state

    @torch.no_grad()
    def embed(self, records, label="embedding", skip=0, every=1):
        """Yield (indices, features (b, d) float32) batch by batch: mean over the tokens of the prompt (or the input: the
        preset's `embed`) of the seed's last hidden state. The batches are always the same; the first `skip` are left out,
        and of the rest all but each `every`-th."""
        with tqdm(total=len(records), desc=label, unit="text", disable=None) as bar:
            for number, (indices, encoded) in enumerate(self.windows(records, lambda record: {"prompt": record[self.embedded]})):
                if number >= skip and (number - skip) % every == 0:
                    ids, real, prompts, _ = self.collate(encoded)
                    with self.autocast():
                        states = self.hidden(self.model, ids, real, prompts)
                    yield indices, masked_mean(states.float(), real).cpu().numpy()
                bar.update(len(indices))

    def prompt_batches(self, model, records, label):
        """Yield (token mask (B, T), a function that runs the prompts through the model) batch by batch."""
        with tqdm(total=len(records), desc=label, unit="text", disable=None) as bar:
            for indices, encoded in self.windows(records, self.form):
                ids, mask, prompts, _ = self.collate(encoded)
                yield mask, lambda: self.hidden(model, ids, mask, prompts)
                bar.update(len(indices))

    def windows(self, records, form):
        """Yield (indices, encoded prompts of form(record)) batch by batch, of like length within a window: memory holds a window's tokens."""
        for start in range(0, len(records), WINDOW):
            encoded = [self.encode(form(record)) for record in records[start : start + WINDOW]]
            for batch in self.batches([len(prompt) for prompt, _ in encoded]):
                yield [start + i for i in batch], [encoded[i] for i in batch]

    def losses(self, model, records, classes, batch_size, steps, seed):
        """Yield each step's loss (with its graph) over batches of texts of like length; under `accelerate launch` this
        process's part of the batch, so that the sum over processes is the mean over the whole batch's tokens."""
        state = processes()
        bar = tqdm(records, desc="measuring lengths", unit="text", disable=None if len(records) > 10_000 else True)
        lengths = np.fromiter((sum(map(len, self.example(record))) for record in bar), np.int32, len(records))  # the tokens themselves need not fit
        for batch in epoch_batches(lengths, batch_size, steps, seed):
            encoded = [self.example(records[i]) for i in batch]
            mine = encoded[state.process_index :: state.num_processes]
            share = sum(map(self.count, mine)) / sum(map(self.count, encoded))  # 1 for one process, 0 where a short batch leaves nothing
            yield self.loss(model, mine or encoded[:1]) * share

    def count(self, example):
        """How many of an example's tokens the loss is over."""
        return len(example[0]) + len(example[1]) - 1 if self.whole_text else len(example[1])

    def loss(self, model, encoded):
        """Mean cross-entropy over the answers' tokens, or (`loss` "text") over all but the first; the head runs on those positions alone."""
        ids, real, prompts, labels = self.collate(encoded)
        if self.whole_text:
            labels, prompts = ids.masked_fill(~real, -100), real  # the prefix is the context
        with self.autocast():
            states = self.hidden(model, ids, real, prompts)
            predicts = labels[:, 1:] != -100
            return head_loss(unwrap(model).lm_head, states[:, :-1][predicts], labels[:, 1:][predicts])

    @torch.no_grad()
    def scores(self, model, records, label="scoring", scoring="likelihood"):
        """A list of float64 arrays, one per record.

        likelihood: log-likelihood of each choice's text after the prompt. letters: logit of each choice's letter after the
        lettered prompt, from one forward pass. generate: 1 for the choice whose letter stands first in 16 greedily
        generated tokens, 0 for the others; empty where none does. Records without choices: the log-probability of each
        token of the answer.
        """
        choices = "choices" in records[0]
        if choices and scoring != "likelihood":
            score = self._score_letters if scoring == "letters" else self._generate
            encoded = [(self.encode(lettered(r), " A")[0], [[]] * len(r["choices"])) for r in records]
        elif choices:
            score = self._score_choices
            encoded = [(self.encode(r)[0], [self.encode(r, c)[1] for c in r["choices"]]) for r in records]
        else:
            score = self._score_answers
            encoded = [(prompt, [answer]) for prompt, answer in (self.encode(r, r["answer"]) for r in records)]
        result = [None] * len(records)
        with tqdm(total=len(records), desc=label, unit="text", disable=None) as bar:
            for batch in self.batches([len(p) + sum(map(len, cs)) for p, cs in encoded]):
                for i, values in zip(batch, score(model, [encoded[i] for i in batch])):
                    result[i] = values
                bar.update(len(batch))
        return result

    def _score_choices(self, model, encoded):
        # The context is the prompt's mean for every choice's tokens, with a router on the prefix too: a choice must not route itself.
        found = self._token_log_probs(model, encoded, lambda part: part == 0)
        return [np.array([np.cumsum([0.0, *tokens])[-1] for tokens in choices]) for choices in found]

    def _score_answers(self, model, encoded):
        found = self._token_log_probs(model, encoded, lambda part: part >= 0 if self.whole_text else part == 0)  # as in training
        return [np.array(tokens) for (tokens,) in found]

    def _score_letters(self, model, encoded):
        shared, letters = self.letter_ids()
        ids, real, prompts, _ = self.collate([(prompt, shared) for prompt, _ in encoded])
        with self.autocast():
            states = self.hidden(model, ids, real, real if self.whole_text else prompts)[range(len(encoded)), real.sum(1) - 1]  # (B, d)
        logits = states.float() @ unwrap(model).lm_head.weight[letters].float().T  # (B, 26); bfloat16 would tie likely letters
        return [row[: len(choices)].double().cpu().numpy() for row, (_, choices) in zip(logits, encoded)]

    def _generate(self, model, encoded):
        from transformers import GenerationConfig

        lm, width = unwrap(model), max(len(prompt) for prompt, _ in encoded)
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt, _ in encoded], device=self.device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in encoded], device=self.device)
        # not the seed's own configuration, which may sample or punish repetition
        config = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=self.pad, eos_token_id=self.tokenizer.eos_token_id, use_cache=lm.config.use_cache)
        if hasattr(lm, "routing"):
            lm.routing.context_mask = lm.routing.token_mask = None
        with self.autocast():
            texts = self.tokenizer.batch_decode(lm.generate(input_ids=ids, attention_mask=real, generation_config=config)[:, width:], skip_special_tokens=True)
        values = []
        for text, (_, choices) in zip(texts, encoded):
            found = re.search(r"\b[A-Z]\b", text)
            number = ord(found.group()) - ord("A") if found else len(choices)
            values.append(np.eye(len(choices))[number] if number < len(choices) else np.array([]))
        return values

    def _token_log_probs(self, model, encoded, context):
        """Log-probability of each token of each choice: [[[float, ...] a choice] a record].

        Prompt and choices make one sequence, in which a choice sees the prompt and itself and is placed right after
        the prompt: the prompt's work is done once, and the result is that of a sequence for every choice. context: from
        the (B, T) parts - 0 the prompt, 1, 2, ... that choice, -1 padding - to the tokens that are the router's context.
        """
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
            states = self.hidden(model, ids, part == 0, context(part), attention_mask=mask[:, None], position_ids=position)
            logits = unwrap(model).lm_head(states[rows, sources])
        log_probs = F.log_softmax(logits.float(), -1).gather(1, torch.tensor(targets, device=self.device)[:, None])[:, 0]
        values = [[[] for _ in choices] for _, choices in encoded]
        for row, owner, value in zip(rows, owners, log_probs.double().tolist()):
            values[row][owner].append(value)
        return values

    def checkpoint(self, model):
        """Keep no activations but each layer's input; the backward computes them again. The same losses, a third slower."""
        unwrap(model).activation_checkpointing_enable({"use_reentrant": False})


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
    def embed(self, records, label="embedding", skip=0, every=1, batch=256):
        """Yield (indices, features (b, d) float32) batch by batch: the seed's post-LN CLS feature of each readable image;
        after the first `skip` batches each `every`-th."""
        batches = chunks(len(records), batch)
        with tqdm(total=len(records), initial=skip * batch, desc=label, unit="image", disable=None) as bar:
            for indices, images in self.load(records, batches[skip::every]):
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
        """Yield each step's loss (with its graph): cross-entropy over the label set `classes`; under `accelerate launch` this
        process's part of the batch, so that the sum over processes is the mean over the whole batch."""
        texts, label = self.text_features(classes), {name: i for i, name in enumerate(classes)}
        targets = torch.tensor([label[record["answer"]] for record in records], device=self.device)
        state, batches = processes(), list(epoch_batches([1] * len(records), batch_size, steps, seed))
        mine = [batch[state.process_index :: state.num_processes] for batch in batches]
        for whole, part, (indices, images) in zip(batches, mine, self.load(records, [part or whole[:1] for whole, part in zip(batches, mine)], seed)):
            self.refuse_unreadable()
            # On the CPU the fused attention's backward is slower on so few tokens: a fifth of a step.
            with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext():
                logits = self.classify(model, images, texts)
            yield F.cross_entropy(logits, targets[indices]) * (len(part) / len(whole))

    @torch.no_grad()
    def scores(self, model, records, label="scoring", scoring=None):
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


def lettered(record):
    """A multiple-choice record as letters: the choices are listed before the prompt's last line ("Answer:"), and answer and
    choices are " A", " B", ... A record without choices comes back as it is. Raises UserError beyond 26 choices."""
    if "choices" not in record:
        return record
    letters = [f" {letter}" for letter in string.ascii_uppercase[: len(record["choices"])]]
    if len(letters) < len(record["choices"]):
        raise UserError(f"a record has {len(record['choices'])} choices, letters reach 26: make the run with --answers text and score with --scoring likelihood (its prompt: {record['prompt'][:60]!r})")
    head, _, last = record["prompt"].rpartition("\n")
    if not last.endswith(":"):
        head, last = record["prompt"], "Answer:"
    lines = [head] * bool(head) + ["Choices:"] + [f"{letter.strip()}. {choice.strip()}" for letter, choice in zip(letters, record["choices"])] + [last]
    return record | {"prompt": "\n".join(lines), "choices": letters, "answer": letters[record["choices"].index(record["answer"])]}


def head_loss(head, states, targets, logit_bytes=2**29):
    """Mean cross-entropy of head(states) (n, V) against targets (n,), with at most `logit_bytes` of float32 logits at a time:
    beyond that they are made in chunks, and once more in the backward."""
    chunk = max(1, logit_bytes // (4 * head.out_features))
    if len(states) <= chunk:
        return F.cross_entropy(head(states).float(), targets)

    def part(states, targets):
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    parts = [checkpoint(part, *pair, use_reentrant=False) for pair in zip(states.split(chunk), targets.split(chunk))]
    return torch.stack(parts).sum() / len(states)


def use_checkpointing(flag, run, backbone):
    """Whether to recompute activations: as --gradient-checkpointing says, None for the preset's way."""
    if flag and not hasattr(backbone, "checkpoint"):
        raise UserError("--gradient-checkpointing is for language models: leave it out")
    return PRESETS[run["backbone"]].get("gradient_checkpointing", False) if flag is None else flag


def sharding():
    """Whether accelerate's configuration asks for FSDP."""
    return processes() is not ALONE and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(model):
    """FSDP: the frozen weights of each decoder layer lie in parts on the processes, and come together while it runs. The
    trained ones (small: LoRA factors, routers) stay whole on each process, so all else is as in data parallel."""
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in unwrap(model).model.layers:
        fully_shard(layer, ignored_params=trained, reshard_after_forward=True)


def sum_over_processes(loss, parameters):
    """Sum gradients (in place) and loss over the processes; returns the loss."""
    from accelerate.utils import reduce

    grads = [p.grad for p in parameters if p.grad is not None]
    total = reduce(torch.cat([loss.detach().view(1), *(g.flatten() for g in grads)]), "sum")
    for grad, new in zip(grads, total[1:].split([g.numel() for g in grads])):
        grad.copy_(new.view_as(grad))
    return total[0]


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


def train(backbone, model, records, groups, *, steps, batch_size, warmup_steps, optimizer, weight_decay, seed, label, classes=(), after_step=None, checkpointing=False):
    """Train in place; every record once an epoch, `steps` steps, constant rate after a linear warm-up.

    groups: optimiser parameter groups, each with its own "lr". optimizer: "adamw", or "sgd" (Nesterov momentum 0.9).
    classes: the label set of an image classifier. checkpointing: recompute activations in the backward (language models).
    Returns the mean loss of each step. Under `accelerate launch` each process computes its part of every batch.
    """
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
    losses, alone = [], processes() is ALONE
    if checkpointing:
        backbone.checkpoint(model)
    if sharding():
        shard(model)
    model.train()
    with enough_memory(label), tqdm(total=steps, desc=label, unit="step", disable=None) as bar:
        for loss in backbone.losses(model, records, classes, batch_size, steps, seed):
            loss.backward()
            if not alone:
                loss = sum_over_processes(loss, parameters)
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


@contextlib.contextmanager
def enough_memory(label):
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{label}: the GPU's memory is full: use --gradient-checkpointing, a smaller --batch-size, or several GPUs (accelerate launch)") from None


def epoch_batches(lengths, batch_size, steps, seed):
    """Yield `steps` batches of indices, epoch after epoch: shuffled, sorted by length within windows of eight batches, shuffled again."""
    generator, lengths, left = np.random.default_rng(seed), np.asarray(lengths), steps
    while left > 0:
        order, epoch = generator.permutation(len(lengths)), []
        for start in range(0, len(order), 8 * batch_size):
            window = order[start : start + 8 * batch_size]
            window = window[np.argsort(lengths[window], kind="stable")]
            epoch += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        for i in generator.permutation(len(epoch))[::-1][:left]:
            yield epoch[i].tolist()
        left -= len(epoch)
