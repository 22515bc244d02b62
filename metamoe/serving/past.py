"""The router's sums over the tokens in a key-value cache: an attribute of that cache.

Shapes: B sequences, d width, s kept positions.
"""

from functools import partial

CROP = 32  # the running sums of the last 32 positions are kept: speculative decoding takes tokens back


class Past:
    """The router's sums over the tokens in a key-value cache; the attribute `routing_past` of that cache.

    mode: RoutingState's. length: tokens in the cache. prompt: how many of them the "fixed" mean covers.
    sums: {layer: (sums (B, s, d), numbers (B, s, 1))} up to each of the last s tokens; s = 1 if fixed.
    """

    def __init__(self, mode, length, prompt, sums):
        self.mode, self.length = mode, length
        self.prompt, self.sums = prompt, sums

    def upto(self, length, mode, draft):
        """The sums now that the cache holds `length` tokens. ValueError where the router cannot know them.

        draft: of an assistant, which takes back the prompt's last tokens to read the same again.
        """
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
            if length < self.prompt and not draft:
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
                setattr(cache, change.__name__, partial(change, cache))  # a method would be lost in a pickle
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


def past_of(cache, length, mode, draft):
    """The sums of the `length` tokens in `cache`. ValueError where another model filled it."""
    if length == 0 or mode == "none":  # an empty cache may still hold the sums of an earlier prompt
        return {}
    if not hasattr(cache, "routing_past"):
        raise ValueError(
            f"the key-value cache holds {length} tokens that the router has not seen: "
            "fill it with the unified model"
        )
    return cache.routing_past.upto(length, mode, draft)
