"""Causal language models: texts as tokens, embeddings, losses. A batch holds texts of like length."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from metamoe.backbones.base import Backbone, import_transformers, masked_mean, unwrap
from metamoe.backbones.distributed import processes
from metamoe.backbones.letters import lettered
from metamoe.backbones.probe import after_head, check_computes
from metamoe.backbones.scoring import ScoringMixin, pack
from metamoe.backbones.tokens import TokensMixin
from metamoe.backbones.training import epoch_batches
from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.serving.seed_model import SAFE

WINDOW = 8192  # texts that are tokenised at a time to be grouped by length


class TextBackbone(TokensMixin, ScoringMixin, Backbone):
    """A causal language model like LLaMA (gated FFN: gate_proj, up_proj, down_proj) and its tokenizer."""

    ffn_linears = ["gate_proj", "up_proj", "down_proj"]
    task_type = "CAUSAL_LM"
    unreadable, seconds = (), 0.0  # of images

    def __init__(
        self, preset, source, device, dtype, answers, loss, chat_template=True, max_length=None, probe=True
    ):
        self.source, self.device, self.dtype = str(source), device, dtype
        self.max_length, self.embedded = max_length or preset["max_length"], preset["embed"]
        self.chat_template, self.cut, self.longest = chat_template, 0, 0
        self.letters, self.whole_text = answers == "letters", loss == "text"
        self.tokenizer, model = self._load()
        self.ffn_names = [name for name, _ in model.named_modules() if name.endswith(".mlp")]
        ffns = [model.get_submodule(name) for name in self.ffn_names]
        if not ffns or not all(hasattr(ffn, linear) for ffn in ffns for linear in self.ffn_linears):
            lacks = f"a {type(model).__name__} has no FFNs of gate_proj, up_proj and down_proj in every layer"
            others = "LLaMA, Mistral, Qwen, SmolLM and their like do"
            raise UserError(f"seed model {self.source}: {lacks}; {others}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.width = model.config.get_text_config().hidden_size
        self.after_head = after_head(model)
        if probe:
            check_computes(self.model, self.ffn_names, self.ffn_linears, self.source)
        self.take_vocabulary(model)

    def _load(self):
        transformers = import_transformers()
        # Eager attention on the CPU: the fused kernel's backward is twice as slow on short texts.
        attention = "eager" if self.device.type == "cpu" else "sdpa"
        # Frozen weights are stored in the compute dtype; autocast then casts only the small trained ones.
        options = {"dtype": self.dtype, "attn_implementation": attention, **SAFE}
        try:
            check_code(self.source)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
            return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(self.source, **options)
        except UserError:
            raise
        except Exception as error:  # transformers passes on what tokenizers, safetensors and torch raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            reason = f"cannot be loaded as a causal language model ({why})"
            remedy = "name a local folder of safetensors, or log in to the hub (hf auth login) where it "
            raise UserError(f"seed model {self.source}: {reason}; {remedy}asks for that") from None

    def public_classes(self, folder):
        return []  # the label set is the vocabulary

    # --- records to tokens

    def form(self, record):
        """The record as this run trains on it: a multiple choice in letters with `answers` "letters"."""
        return lettered(record) if self.letters else record

    def example(self, record):
        """(prompt ids, answer ids with EOS, where the tokenizer has one) of a record to train on."""
        record = self.form(record)
        prompt, answer = self.encode(record, record["answer"])
        return prompt, answer + self.end

    def collate(self, encoded):
        """Pad (prompt, answer) pairs on the right: ids, token mask, prompt mask, labels; each (B, T)."""
        ids, part, _ = pack([(prompt, [answer]) for prompt, answer in encoded], self.pad)
        labels = ids.masked_fill(part != 1, -100)
        return [t.to(self.device) for t in (ids, part >= 0, part == 0, labels)]

    def batches(self, lengths, tokens=2048):
        """Yield batches of indices of like length, each of at most about `tokens` padded tokens."""
        batch = []
        for i in np.argsort(lengths, kind="stable"):
            if batch and (len(batch) + 1) * lengths[i] > tokens:
                yield batch
                batch = []
            batch.append(int(i))
        if batch:
            yield batch

    # --- the interface that the stages use (base.Backbone)

    def hidden(self, model, ids, real, context, **kwargs):
        """Last hidden states (B, T, d).

        real: (B, T), the tokens that count as routed; also the attention mask where kwargs have none.
        context: (B, T), the tokens averaged into the router's context: the prompt's, or all.
        """
        lm = unwrap(model)
        if hasattr(lm, "routing"):
            lm.routing.context_mask = context
            lm.routing.token_mask = real
        kwargs.setdefault("attention_mask", real)
        return lm.model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state

    @torch.no_grad()
    def embed(self, records, label="embedding", skip=0, every=1):
        """The mean of the last hidden states over the tokens of the prompt, or the input (preset `embed`)."""
        batches = self.windows(records, lambda record: {"prompt": record[self.embedded]}, label)
        for number, (indices, encoded) in enumerate(batches):
            if number >= skip and (number - skip) % every == 0:
                ids, real, prompts, _ = self.collate(encoded)
                with self.autocast():
                    states = self.hidden(self.model, ids, real, prompts)  # (b, T, d)
                yield indices, masked_mean(states.float(), real).cpu().numpy()

    def prompt_batches(self, model, records, label):
        for indices, encoded in self.windows(records, self.form, label):
            ids, real, prompts, _ = self.collate(encoded)
            yield indices, real, partial(self.hidden, model, ids, real, prompts)

    def windows(self, records, form, label):
        """Yield (indices, encoded prompts of form(record)) batch by batch.

        Texts are batched by length within a window of WINDOW records, so memory holds only a window's tokens.
        """
        bar = progress(total=len(records), desc=label, unit="text")
        with self.telling_cuts(label, len(records)), bar:
            for start in range(0, len(records), WINDOW):
                encoded = [self.encode(form(record)) for record in records[start : start + WINDOW]]
                for batch in self.batches([len(prompt) for prompt, _ in encoded]):
                    yield [start + i for i in batch], [encoded[i] for i in batch]
                    bar.update(len(batch))

    def losses(self, model, records, classes, batch_size, steps, seed):
        """Each step's loss over a batch of texts of like length, a mean over all tokens of the batch."""
        state = processes()
        bar = progress(records, desc="measuring lengths", unit="text", show=len(records) > 10_000)
        # Only the lengths are kept: the tokens of all records may not fit in memory.
        with self.telling_cuts("training", len(records)):
            found = (sum(map(len, self.example(record))) for record in bar)
            lengths = np.fromiter(found, np.int32, len(records))
        for batch in epoch_batches(lengths, batch_size, steps, seed):
            mine = batch[state.process_index :: state.num_processes]
            encoded = {i: self.example(records[i]) for i in batch}
            # 1 for one process; 0 where a short batch leaves this process nothing.
            share = sum(self.count(encoded[i]) for i in mine) / sum(map(self.count, encoded.values()))
            mine = mine or batch[:1]
            yield mine, self.loss(model, [encoded[i] for i in mine]) * share

    def sample_losses(self, model, records, classes, batches, seed):
        for batch in batches:
            yield self.loss(model, [self.example(records[i]) for i in batch], each=True)

    def count(self, example):
        """Number of an example's tokens in the loss."""
        prompt, answer = example
        return len(prompt) + len(answer) - 1 if self.whole_text else len(answer)

    def loss(self, model, encoded, each=False):
        """Mean cross-entropy over the answers' tokens; with `loss` "text" over all tokens but the first.

        each: the sum over texts of each one's own mean.
        """
        ids, real, context, labels = self.collate(encoded)
        if self.whole_text:
            context, labels = real, ids.masked_fill(~real, -100)  # the router's context is the prefix
        with self.autocast():
            states = self.hidden(model, ids, real, context)  # (B, T, d)
            predicts = labels[:, 1:] != -100  # the head runs on these positions alone
            chosen = states[:, :-1][predicts], labels[:, 1:][predicts]
            weights = (predicts / predicts.sum(1, keepdim=True))[predicts] if each else None
            return head_loss(unwrap(model).lm_head, *chosen, self.after_head, weights=weights)

    def checkpoint(self, model):
        """Keep only each layer's input; the backward computes the rest again. Same losses, a third slower."""
        unwrap(model).activation_checkpointing_enable({"use_reentrant": False})


def check_code(source):
    """UserError where a seed model has code of its own: it is never run, whatever transformers would ask."""
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    configs = {"config.json": PretrainedConfig.get_config_dict(source)[0]}
    configs["tokenizer_config.json"] = get_tokenizer_config(source)
    for file, config in configs.items():
        if "auto_map" in config:
            why = f"has code of its own (auto_map in {file}), which is never run"
            raise UserError(f"seed model {source}: {why}; name a model that transformers loads without")


def head_loss(head, states, targets, after_head, logit_bytes=2**29, weights=None):
    """Mean cross-entropy of the logits against targets; states (n, d), targets (n,), logits (n, V).

    after_head: what the model does to the logits of its `head`. weights: of the targets, for a sum (n,).
    At most `logit_bytes` of float32 logits exist at a time. Where all of them are more, they are computed in
    chunks, and again in the backward.
    """
    chunk = max(1, logit_bytes // (4 * head.out_features))
    if len(states) <= chunk and weights is None:
        return F.cross_entropy(after_head(head(states)).float(), targets)

    def part(states, targets, weights=None):
        logits = after_head(head(states)).float()
        if weights is None:
            return F.cross_entropy(logits, targets, reduction="sum")
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    tensors = (states, targets) if weights is None else (states, targets, weights)
    split = zip(*(tensor.split(chunk) for tensor in tensors), strict=True)
    parts = [checkpoint(part, *own, use_reentrant=False) for own in split]
    return torch.stack(parts).sum() / (len(states) if weights is None else 1)
