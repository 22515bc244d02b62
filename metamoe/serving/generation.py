"""Generation with a unified model: the router's context over the tokens that a key-value cache holds.

With a cache a forward sees the new tokens alone, but the context of Eq. 6 is a mean over earlier ones too.
The sums that it needs are kept in the cache (past.py): they are copied, cropped and reordered with it. What
belongs to one forward is its Bookkeeper, what belongs to one `generate` its Answer: nothing is kept in
the model, which may be called by several threads, or inside its own `generate`.
`unify` calls `attach` for a model that has `generate`. This file and past.py need torch alone and may lie
beside moe.py in a package.

Shapes: B sequences, T tokens, d width, s kept positions.
"""

import threading
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .past import CROP, Past, past_of

THREAD = threading.local()  # its .answer: that of the innermost `generate` in this thread


class Answer:
    """One call of `generate`.

    prompt: its length. draft: an assistant's, for another model. assisted: tokens of the answer may be taken
    back. mask: (B, tokens so far), the attention mask of the next forward.
    """

    def __init__(self, prompt, options):
        self.prompt, self.mask = prompt, None
        self.draft = bool(options["is_assistant"])
        self.assisted = self.draft or bool(options["prompt_lookup_num_tokens"] or options["assistant_model"])

    def real(self, mode, length, ids):
        """The (B, T) tokens of a forward that count, None for all; if "fixed" the prompt's alone."""
        B, T = ids.shape[:2]
        mask = None if self.mask is None else self.mask[:, -T:].bool().to(ids.device)
        if mode != "fixed":
            return mask
        place = torch.arange(length, length + T, device=ids.device).expand(B, T)  # in the whole sequence
        prompt = place < self.prompt  # (B, T)
        return prompt if mask is None else prompt & mask


class Bookkeeper:
    """Carries the router's sums from the key-value cache into one forward, and back.

    before: the sums of the `length` tokens in the cache, as in `Past`. after: those that it will keep, None
    for no cache. documents: (B, T), each token's, counted from 0, or None. answer: None outside `generate`.
    """

    def __init__(self, model, mode, given, answer):
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        self.length = 0 if cache is None else int(cache.get_seq_length())
        self.before = past_of(cache, self.length, mode, answer is not None and answer.draft)
        if use_cache is None:
            use_cache = model.config.use_cache
        self.after = {} if cache is not None or use_cache else None
        self.answer, self.documents = answer, None
        # transformers, too, takes documents apart where there is neither a mask nor a cache
        if given.get("attention_mask") is None and not self.length:
            self.documents = documents(given.get("position_ids"))

    def extend(self, layer, mode, z, mask, add_up):
        """(sums, numbers) over tokens z (B, T, d) and mask (B, T, 1) of a layer, and over those in the cache.

        add_up: sums up one sequence, (B, 1 or T, ...).
        """
        past = self.before.get(layer)
        if mode == "fixed" and past is not None:
            sums, numbers = past  # the first forward's tokens, the prompt
        elif self.documents is not None:
            sums, numbers = (of_documents(t.float(), self.documents, mode) for t in (z, mask))
        else:
            sums, numbers = add_up(z), add_up(mask)
            if past is not None:
                sums, numbers = sums + past[0][:, -1:], numbers + past[1][:, -1:]
        if self.after is not None:
            self.keep(layer, mode, sums, numbers, z.shape[1])
        return sums, numbers

    def keep(self, layer, mode, sums, numbers, T):
        """Remember the last positions: after taking back as many tokens the running mean is still known."""
        last = 1 if mode == "fixed" else CROP
        if mode == "prefix" and self.answer is not None and self.answer.assisted:
            last += max(0, self.length + T - self.answer.prompt)  # the whole answer
        if mode == "prefix" and layer in self.before and T < last:
            earlier = self.before[layer]
            sums, numbers = torch.cat((earlier[0], sums), 1), torch.cat((earlier[1], numbers), 1)
        # clone: a view would keep the whole tensor in memory
        self.after[layer] = sums[:, -last:].clone(), numbers[:, -last:].clone()

    def end(self, mode, kwargs, output):
        """After the forward: its sums go into the cache that it filled."""
        if not self.after or mode == "none":
            return
        values = output.values() if isinstance(output, dict) else output
        cache = next((v for v in values if hasattr(v, "get_seq_length")), kwargs.get("past_key_values"))
        if cache is not None:
            length = int(cache.get_seq_length())
            prompt = min(length, self.answer.prompt) if self.answer else length
            if self.before:
                prompt = cache.routing_past.prompt
            Past(mode, length, prompt, self.after).keep_in(cache)


class Forward:
    """RoutingState.forward: what one forward knows. Other threads, and nested calls, have their own.

    context_mask, token_mask: RoutingState's, or the tokens that are `real`. before: the Forward that was kept
    when this one began. kept: it is over, and a backward may compute it again.
    """

    def __init__(self, state, real, context_mask, token_mask, cached):
        self.context_mask = real if context_mask is None else context_mask
        self.token_mask = real if token_mask is None else token_mask
        self.cached, self.kept = cached, False
        latest = state.latest
        self.before = latest if latest is None or latest.kept else latest.before
        state.latest = self
        if not torch.compiler.is_compiling():
            state.thread.forward = self

    def end(self, state, failed):
        self.kept = torch.is_grad_enabled() and not failed
        state.latest = self if self.kept else self.before
        if not torch.compiler.is_compiling():
            state.thread.forward = None


def documents(places):
    """(B, T): each token's document, from 0, for position_ids (B, T); None where each sequence is one."""
    if not torch.is_tensor(places) or places.dim() != 2:
        return None
    begins = F.pad(places.diff() <= 0, (1, 0))  # positions restart where a document begins
    return begins.cumsum(1) if begins.any() else None


def of_documents(z, document, mode):
    """z (B, T, d) summed over each token's document, or over the document up to the token: (B, T, d)."""
    document = document.unsqueeze(-1).expand_as(z)
    totals = torch.zeros_like(z).scatter_add(1, document, z)  # row i: of document i
    if mode == "fixed":
        return totals.gather(1, document)
    return z.cumsum(1) - (totals.cumsum(1) - totals).gather(1, document)


def attach(model):
    """Let a unified language model forward and generate, with a key-value cache or without."""
    model.base_model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.base_model.register_forward_hook(after_forward, with_kwargs=True, always_call=True)
    for method in (generate, prepare_inputs_for_generation, init_continuous_batching):
        setattr(model, method.__name__, partial(method, model))  # a bound method would be lost in a pickle


def before_forward(module, args, kwargs):
    """Which tokens are real, and what the router knows of those in the cache.

    kwargs may hold context_mask: RoutingState's, for this forward alone; and `answer`, from `generate`.
    """
    state, answer = module.routing, kwargs.pop("answer", None)
    context_mask = kwargs.pop("context_mask", None)
    token_mask = None
    if answer is None:
        context_mask = state.context_mask if context_mask is None else context_mask
        token_mask = state.token_mask
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    given = dict(zip(names, args, strict=False)) | kwargs
    ids = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if ids is None:
        return args, kwargs  # the forward has its own message
    book, mask, real = Bookkeeper(module, state.mode, given, answer), given.get("attention_mask"), None
    if answer is not None:  # a static cache makes generate pass another mask, of four dimensions
        real = answer.real(state.mode, book.length, ids)
    elif torch.is_tensor(mask) and mask.dim() == 2:
        real = mask[:, -ids.shape[1] :].bool()  # (B, T)
    elif mask is not None and context_mask is None and state.mode != "none":
        raise ValueError(
            "the attention mask is not (B, T), and does not say which tokens are real: "
            "set routing.context_mask"
        )
    Forward(state, real, context_mask, token_mask, book)
    return args, kwargs


def after_forward(module, args, kwargs, output):
    """What the router knows now goes into the cache that the forward filled."""
    state, forward = module.routing, module.routing.forward
    failed = output is None  # an error was raised
    if forward is not None and not failed:
        forward.cached.end(state.mode, kwargs, output)
    if forward is not None:
        forward.end(state, failed)


def generate(self, inputs=None, *args, **kwargs):
    """The seed model's own generate; the context is the mean of the prompt ("fixed") or of the prefix.

    The masks of `routing` do not count here. ValueError, before anything is computed, for options with which
    the model, or the context, would change.
    """
    config = kwargs.get("generation_config") or self.generation_config
    options = {name: kwargs.get(name, getattr(config, name, None)) for name in OPTIONS}
    refuse(self.routing.mode, options)
    outer = getattr(THREAD, "answer", None)
    THREAD.answer = Answer(_prompt_length(inputs, kwargs), options)
    try:
        return type(self).generate(self, inputs, *args, **kwargs)
    finally:
        THREAD.answer = outer


OPTIONS = (
    "assistant_early_exit assistant_model prompt_lookup_num_tokens is_assistant prefill_chunk_size "
    "guidance_scale use_cache past_key_values"
).split()


def refuse(mode, options):
    """ValueError for options of `generate` that do not go with a unified model."""
    if options["assistant_early_exit"]:
        raise ValueError(
            "assistant_early_exit: it shortens the model for every call; pass prompt_lookup_num_tokens "
            "or an assistant_model"
        )
    if mode == "fixed" and options["prefill_chunk_size"]:
        raise ValueError(
            "prefill_chunk_size: the context is the mean of the whole prompt; leave it out, "
            "or set routing.mode to 'prefix'"
        )
    cache = None if options["is_assistant"] else options["past_key_values"]
    if mode == "fixed" and cache is not None and cache.get_seq_length():
        raise ValueError(
            "past_key_values: the context is the mean of the whole prompt, of which the cache holds a part; "
            "leave it out, or set routing.mode to 'prefix'"
        )
    guided = options["guidance_scale"] not in (None, 1)
    if mode == "fixed" and guided and options["use_cache"] is False:
        raise ValueError(
            "guidance_scale: without a key-value cache nothing tells where the second prompt ends; "
            "leave use_cache=False out, or set routing.mode to 'prefix'"
        )


def _prompt_length(inputs, kwargs) -> int:
    for prompt in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(prompt, Tensor):
            return max(1, prompt.shape[1])
    return 1  # no prompt: it begins with BOS


def prepare_inputs_for_generation(self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs):
    """The seed model's own; the forward is also told which answer it is of."""
    own, answer = type(self).prepare_inputs_for_generation, getattr(THREAD, "answer", None)
    given = own(self, input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
    if answer is not None:
        answer.mask = attention_mask
        given["answer"] = answer
    return given


def init_continuous_batching(self, *args, **kwargs):
    raise ValueError("continuous batching: its requests, packed in one row, have one context; use generate")
