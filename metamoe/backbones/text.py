"""Causal language models: prompts and answers as tokens, losses, scores. Batches hold texts of like length."""

import os
import re
import string

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from metamoe.backbones.base import Backbone, import_transformers, masked_mean, unwrap
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import epoch_batches
from metamoe.errors import UserError
from metamoe.progress import progress

WINDOW = 8192  # texts that are tokenised at a time to be grouped by length


class TextBackbone(Backbone):
    """A causal language model of the LLaMA kind (gated FFN: gate_proj, up_proj, down_proj) and its tokenizer."""

    ffn_linears = ["gate_proj", "up_proj", "down_proj"]
    task_type = "CAUSAL_LM"
    unreadable, seconds = (), 0.0

    def __init__(
        self, source, device, dtype, max_length=256, embedded="prompt", answers="text", loss="answer"
    ):
        transformers = import_transformers()
        self.source, self.device, self.dtype, self.max_length, self.embedded = (
            str(source),
            device,
            dtype,
            max_length,
            embedded,
        )
        self.letters, self.whole_text = answers == "letters", loss == "text"
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
            # The frozen weights are stored in the compute dtype, so that autocast casts the small trained ones only.
            # Eager attention on the CPU: the fused kernel's backward is twice as slow at the lengths of short texts.
            attention = "eager" if device.type == "cpu" else "sdpa"
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.source, dtype=dtype, attn_implementation=attention
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"seed model {self.source}: cannot be loaded as a causal language model ({str(error).splitlines()[0]}); name a local "
                "folder with --seed-model, or log in to the hub (hf auth login) where it asks for that"
            ) from None
        self.ffn_names = [name for name, _ in model.named_modules() if name.endswith(".mlp")]
        if not self.ffn_names or not all(
            hasattr(model.get_submodule(ffn), linear) for ffn in self.ffn_names for linear in self.ffn_linears
        ):
            raise UserError(
                f"seed model {self.source}: a {type(model).__name__} has no FFNs of gate_proj, up_proj and down_proj in every layer; "
                "LLaMA, Mistral, Qwen, SmolLM and their like do"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.width = self.model.config.hidden_size
        self.pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )

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
        letters = [
            self.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
            for letter in string.ascii_uppercase
        ]
        shared = os.path.commonprefix(letters)
        ids = [letter[len(shared)] for letter in letters if len(letter) > len(shared)]
        if len(set(ids)) < len(letters):
            raise UserError(
                f"seed model {self.source}: its tokenizer does not tell the letters A to Z apart: score with --scoring likelihood"
            )
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
        with progress(total=len(records), desc=label, unit="text") as bar:
            for number, (indices, encoded) in enumerate(
                self.windows(records, lambda record: {"prompt": record[self.embedded]})
            ):
                if number >= skip and (number - skip) % every == 0:
                    ids, real, prompts, _ = self.collate(encoded)
                    with self.autocast():
                        states = self.hidden(self.model, ids, real, prompts)
                    yield indices, masked_mean(states.float(), real).cpu().numpy()
                bar.update(len(indices))

    def prompt_batches(self, model, records, label):
        """Yield (token mask (B, T), a function that runs the prompts through the model) batch by batch."""
        with progress(total=len(records), desc=label, unit="text") as bar:
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
        bar = progress(records, desc="measuring lengths", unit="text", show=len(records) > 10_000)
        lengths = np.fromiter(
            (sum(map(len, self.example(record))) for record in bar), np.int32, len(records)
        )  # the tokens themselves need not fit
        for batch in epoch_batches(lengths, batch_size, steps, seed):
            encoded = [self.example(records[i]) for i in batch]
            mine = encoded[state.process_index :: state.num_processes]
            share = sum(map(self.count, mine)) / sum(
                map(self.count, encoded)
            )  # 1 for one process, 0 where a short batch leaves nothing
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
            encoded = [
                (prompt, [answer]) for prompt, answer in (self.encode(r, r["answer"]) for r in records)
            ]
        result = [None] * len(records)
        with progress(total=len(records), desc=label, unit="text") as bar:
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
        found = self._token_log_probs(
            model, encoded, lambda part: part >= 0 if self.whole_text else part == 0
        )  # as in training
        return [np.array(tokens) for (tokens,) in found]

    def _score_letters(self, model, encoded):
        shared, letters = self.letter_ids()
        ids, real, prompts, _ = self.collate([(prompt, shared) for prompt, _ in encoded])
        with self.autocast():
            states = self.hidden(model, ids, real, real if self.whole_text else prompts)[
                range(len(encoded)), real.sum(1) - 1
            ]  # (B, d)
        logits = (
            states.float() @ unwrap(model).lm_head.weight[letters].float().T
        )  # (B, 26); bfloat16 would tie likely letters
        return [row[: len(choices)].double().cpu().numpy() for row, (_, choices) in zip(logits, encoded)]

    def _generate(self, model, encoded):
        from transformers import GenerationConfig

        lm, width = unwrap(model), max(len(prompt) for prompt, _ in encoded)
        ids = torch.tensor(
            [[self.pad] * (width - len(prompt)) + prompt for prompt, _ in encoded], device=self.device
        )
        real = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in encoded], device=self.device
        )
        # not the seed's own configuration, which may sample or punish repetition
        config = GenerationConfig(
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=self.pad,
            eos_token_id=self.tokenizer.eos_token_id,
            use_cache=lm.config.use_cache,
        )
        if hasattr(lm, "routing"):
            lm.routing.context_mask = lm.routing.token_mask = None
        with self.autocast():
            texts = self.tokenizer.batch_decode(
                lm.generate(input_ids=ids, attention_mask=real, generation_config=config)[:, width:],
                skip_special_tokens=True,
            )
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
        rows, sources, targets, owners = (
            [],
            [],
            [],
            [],
        )  # each scored token: row, position that predicts it, id, choice
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
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=self.device).masked_fill(
            ~sees, torch.finfo(self.dtype).min
        )
        with self.autocast():
            # The routing counts are those of the prompt: wrong choices say nothing of a client's tokens.
            states = self.hidden(
                model, ids, part == 0, context(part), attention_mask=mask[:, None], position_ids=position
            )
            logits = unwrap(model).lm_head(states[rows, sources])
        log_probs = F.log_softmax(logits.float(), -1).gather(
            1, torch.tensor(targets, device=self.device)[:, None]
        )[:, 0]
        values = [[[] for _ in choices] for _, choices in encoded]
        for row, owner, value in zip(rows, owners, log_probs.double().tolist()):
            values[row][owner].append(value)
        return values

    def checkpoint(self, model):
        """Keep no activations but each layer's input; the backward computes them again. The same losses, a third slower."""
        unwrap(model).activation_checkpointing_enable({"use_reentrant": False})


def lettered(record):
    """A multiple-choice record as letters: the choices are listed before the prompt's last line ("Answer:"), and answer and
    choices are " A", " B", ... A record without choices comes back as it is. Raises UserError beyond 26 choices."""
    if "choices" not in record:
        return record
    letters = [f" {letter}" for letter in string.ascii_uppercase[: len(record["choices"])]]
    if len(letters) < len(record["choices"]):
        raise UserError(
            f"a record has {len(record['choices'])} choices, letters reach 26: make the run with --answers text and score with --scoring likelihood (its prompt: {record['prompt'][:60]!r})"
        )
    head, _, last = record["prompt"].rpartition("\n")
    if not last.endswith(":"):
        head, last = record["prompt"], "Answer:"
    lines = (
        [head] * bool(head)
        + ["Choices:"]
        + [f"{letter.strip()}. {choice.strip()}" for letter, choice in zip(letters, record["choices"])]
        + [last]
    )
    return record | {
        "prompt": "\n".join(lines),
        "choices": letters,
        "answer": letters[record["choices"].index(record["answer"])],
    }


def head_loss(head, states, targets, logit_bytes=2**29):
    """Mean cross-entropy of head(states) (n, V) against targets (n,), with at most `logit_bytes` of float32 logits at a time:
    beyond that they are made in chunks, and once more in the backward."""
    chunk = max(1, logit_bytes // (4 * head.out_features))
    if len(states) <= chunk:
        return F.cross_entropy(head(states).float(), targets)

    def part(states, targets):
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    parts = [
        checkpoint(part, *pair, use_reentrant=False)
        for pair in zip(states.split(chunk), targets.split(chunk))
    ]
    return torch.stack(parts).sum() / len(states)
