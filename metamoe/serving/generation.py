"""Generation with a unified model: the router's context over the tokens that a key-value cache holds.

With a cache a forward sees the new tokens alone, but the context of Eq. 6 is a mean over earlier ones too.
The sums that it needs are kept in the cache (`Past`), so that they are copied, cropped and reordered with it.
`unify` calls `attach` for a model that has `generate`. This file needs torch alone and may lie beside moe.py
in a package.

Shapes: B sequences, T tokens, d width, s kept positions.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

CROP = 32  # the running sums of the last 32 positions are kept: speculative decoding takes tokens back


class Past:
    """The router's sums over the tokens in a key-value cache; the attribute `routing_past` of that cache.

    mode: RoutingState's. length: tokens in the cache. prompt: how many of them the "fixed" mean covers.
    sums: {layer: (sums (B, s, d), numbers (B, s, 1))} up to each of the last s <= CROP tokens; s = 1 if
    fixed.
    """

    def __init__(self, mode, length, prompt, sums):
        self.mode, self.length = mode, length
        self.prompt, self.sums = prompt, sums

    def upto(self, length, mode):
        """The sums now that the cache holds `length` tokens. ValueError where the router cannot know them."""
        if mode != self.mode:
            raise ValueError(
                f"the key-value cache was filled in mode {self.mode!r}, the mode is {mode!r} now: "
                "begin with an empty one"
            )
        back = self.length - length  # tokens that were taken back
        if back < 0:
            raise ValueError(
                f"the key-value cache holds {length} tokens, {-back} of which the router has not seen: "
                "fill it with the unified model alone"
            )
        if mode == "fixed":
            if length < self.prompt:
                raise ValueError(
                    f"the key-value cache was cropped to {length} of the {self.prompt} tokens whose mean is "
                    "the context: begin with an empty one"
                )
            return self.sums
        if back and any(back >= sums.shape[1] for sums, _ in self.sums.values()):
            raise ValueError(
                f"{back} tokens were taken back from the key-value cache, the router can go back by "
                f"{CROP - 1} at most: begin with an empty one"
            )
        return {layer: tuple(t[:, : t.shape[1] - back] for t in pair) for layer, pair in self.sums.items()}

    def keep_in(self, cache):
        """Become an attribute of `cache`, whose methods that change its batch then change the sums too."""
        if not hasattr(cache, "routing_past"):
            for change in (reorder_cache, batch_select_indices, batch_repeat_interleave):
                setattr(cache, change.__name__, MethodType(change, cache))
        cache.routing_past = self

    def change(self, function):
        """Apply `function`, which selects or repeats sequences, to all sums."""
        self.sums = {layer: tuple(map(function, pair)) for layer, pair in self.sums.items()}


def reorder_cache(self, beam_idx):
    type(self).reorder_cache(self, beam_idx)
    self.routing_past.change(lambda t: t.index_select(0, beam_idx.to(t.device)))


def batch_select_indices(self, indices):
    type(self).batch_select_indices(self, indices)
    self.routing_past.change(lambda t: t[indices.to(t.device)])


def batch_repeat_interleave(self, repeats):
    type(self).batch_repeat_interleave(self, repeats)
    self.routing_past.change(lambda t: t.repeat_interleave(repeats, dim=0))


def past_of(cache, length, mode):
    """The sums of the `length` tokens in `cache`. ValueError where another model filled it."""
    if length == 0 or mode == "none":  # an empty cache may still hold the sums of an earlier prompt
        return {}
    if not hasattr(cache, "routing_past"):
        raise ValueError(
            f"the key-value cache holds {length} tokens that the router has not seen: "
            "fill it with the unified model"
        )
    return cache.routing_past.upto(length, mode)


class Bookkeeper:
    """RoutingState.cached: carries the sums of a forward from its key-value cache into it.

    before: the sums of the cache's tokens, as in `Past`. after: the sums that the cache will keep, None for
    no cache.
    prompt: inside `generate` the prompt's length, else None. mask: inside `generate` the (B, tokens so far)
    attention mask.
    """

    def __init__(self):
        self.before, self.after = {}, None
        self.prompt, self.mask = None, None

    def begin(self, model, mode, given, length):
        """Before a forward with the arguments `given` and `length` tokens in the cache."""
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        self.before = past_of(cache, length, mode)
        if use_cache is None:
            use_cache = model.config.use_cache
        self.after = {} if cache is not None or use_cache else None

    def attention_mask(self, ids, mask, mode, length):
        """(B, tokens so far): the mask; inside `generate` in mode "fixed" that of the prompt alone."""
        if self.prompt is None:
            return mask
        mask = self.mask  # a static cache makes generate pass another one, of four dimensions
        if mode != "fixed":
            return mask
        B, T = ids.shape[:2]
        place = torch.arange(length, length + T, device=ids.device).expand(B, T)  # in the whole sequence
        prompt = place < self.prompt  # (B, T)
        return prompt if mask is None else prompt & mask[:, -T:].bool().to(ids.device)

    def extend(self, layer, mode, sums_of, z):
        """(sums, numbers) for z (B, T, d) of one layer; sums_of(z) gives those without the cache's tokens."""
        past = self.before.get(layer)
        if mode == "fixed" and past is not None:
            sums, numbers = past  # the first forward's tokens, the prompt
        else:
            sums, numbers = sums_of(z)  # (B, 1 or T, d), (1 or B, 1 or T, 1)
            if past is not None:
                sums, numbers = sums + past[0][:, -1:], numbers + past[1][:, -1:]
        if self.after is not None:
            self.keep(layer, mode, sums, numbers.expand(len(sums), -1, -1))
        return sums, numbers

    def keep(self, layer, mode, sums, numbers):
        """Remember the last CROP positions: after taking back as many tokens the running mean is still
        known."""
        if mode == "prefix" and layer in self.before and sums.shape[1] < CROP:
            sums, numbers = (
                torch.cat(pair, 1) for pair in zip(self.before[layer], (sums, numbers), strict=True)
            )
        last = 1 if mode == "fixed" else CROP
        # clone: a view would keep the whole tensor in memory
        self.after[layer] = sums[:, -last:].clone(), numbers[:, -last:].clone()

    def end(self, mode, kwargs, output):
        """After the forward: its sums go into the cache that it filled."""
        if self.after and mode != "none":
            values = output.values() if isinstance(output, dict) else output
            cache = next((v for v in values if hasattr(v, "get_seq_length")), kwargs.get("past_key_values"))
            if cache is not None:
                length = int(cache.get_seq_length())
                prompt = cache.routing_past.prompt if self.before else min(length, self.prompt or length)
                Past(mode, length, prompt, self.after).keep_in(cache)
        self.after = None
        if not torch.is_grad_enabled():  # else a backward that recomputes the forward needs them again
            self.before = {}


def attach(model):
    """Let a unified language model forward and generate, with a key-value cache or without."""
    model.routing.cached = Bookkeeper()
    model.base_model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.base_model.register_forward_hook(after_forward, with_kwargs=True)
    for method in (generate, prepare_inputs_for_generation):
        setattr(model, method.__name__, MethodType(method, model))


def before_forward(module, args, kwargs):
    """Which tokens are real, and what the router knows of those in the cache."""
    state, book = module.routing, module.routing.cached
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    given = dict(zip(names, args, strict=False)) | kwargs
    ids = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if ids is None:
        return  # the forward has its own message
    cache = given.get("past_key_values")
    length = 0 if cache is None else int(cache.get_seq_length())
    book.begin(module, state.mode, given, length)
    mask = book.attention_mask(ids, given.get("attention_mask"), state.mode, length)
    state.real = None
    if torch.is_tensor(mask) and mask.dim() == 2:
        state.real = mask[:, -ids.shape[1] :].bool()  # (B, T)
    elif mask is not None and state.context_mask is None and state.mode != "none":
        raise ValueError(
            "the attention mask is not (B, T), and does not say which tokens are real: "
            "set routing.context_mask"
        )
    # transformers, too, takes documents apart where there is neither a mask nor a cache
    state.documents = documents(given.get("position_ids")) if mask is None and not length else None


def documents(places):
    """(B, T): each token's document, from 0, for position_ids (B, T); None where each sequence is one."""
    if not torch.is_tensor(places) or places.dim() != 2:
        return None
    begins = F.pad(places.diff() <= 0, (1, 0))  # positions restart where a document begins
    return begins.cumsum(1) if begins.any() else None


def after_forward(module, args, kwargs, output):
    """What the router knows now goes into the cache that the forward filled."""
    state = module.routing
    state.cached.end(state.mode, kwargs, output)
    if not torch.is_grad_enabled():  # else a backward that recomputes the forward needs it again
        state.real = None


def generate(self, inputs=None, *args, **kwargs):
    """The seed model's own generate; the context is the mean of the prompt ("fixed") or of the prefix.

    The masks of `routing` do not count here. ValueError for prefill_chunk_size in mode "fixed".
    """
    state, book = self.routing, self.routing.cached
    config = kwargs.get("generation_config") or self.generation_config
    chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk and state.mode == "fixed":
        raise ValueError(
            "prefill_chunk_size: the context is the mean of the whole prompt; leave it out, "
            "or set routing.mode to 'prefix'"
        )
    masks = state.context_mask, state.token_mask
    book.prompt = _prompt_length(inputs, kwargs)
    state.context_mask = state.token_mask = None  # of an earlier forward
    try:
        return type(self).generate(self, inputs, *args, **kwargs)
    finally:
        state.context_mask, state.token_mask = masks
        book.prompt = book.mask = None


def _prompt_length(inputs, kwargs) -> int:
    for prompt in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(prompt, Tensor):
            return max(1, prompt.shape[1])
    return 1  # no prompt: it begins with BOS


def prepare_inputs_for_generation(self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs):
    """The seed model's own, which also notes the attention mask of all tokens so far."""
    self.routing.cached.mask = attention_mask
    own = type(self).prepare_inputs_for_generation
    return own(self, input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
