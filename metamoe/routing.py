"""Beyond Eq. 6: routing vectors of one length, and a loss that tells the router whose proxy a sample is."""

import torch

import moe


def of_one_length(vectors, length=None):
    """The routing vectors, K x (L, d), scaled in each layer to their mean length, or to `length` (L,).

    Eq. 6 takes products. Where the clients' means point alike, the longest vector wins them all.
    """
    lengths = torch.stack([v.norm(dim=1) for v in vectors])  # (K, L)
    length = lengths.mean(0) if length is None else length
    return [v * (length / own.clamp(min=1e-12)).unsqueeze(1) for v, own in zip(vectors, lengths, strict=True)]


def targets_of(records, chosen_by):
    """(n, K): the distribution over experts that each sample should be routed by.

    chosen_by: {expert: the indices of the samples that are its client's}. Where several chose a sample, each
    has an equal share.
    """
    targets = torch.zeros(len(records), len(chosen_by))
    for p, samples in enumerate(chosen_by.values()):
        targets[sorted(samples), p] = 1
    return targets / targets.sum(1, keepdim=True)


class RoutingLoss:
    """weight times the cross-entropy of every layer's pi against the samples' clients, mean over the tokens.

    targets: (n, K), `targets_of` the training's samples. To be called after the forward of a batch; counted
    are the tokens of model.routing.token_mask. It sees the routers' inputs through hooks until `remove`.
    """

    def __init__(self, model, targets, weight):
        self.model, self.targets, self.weight, self.seen = model, targets, weight, []
        self.hooks = [layer.router.register_forward_hook(self._see) for layer in moe.layers(model)]

    def _see(self, router, inputs, pi):
        self.seen.append(router.logits(*inputs).log_softmax(-1))  # log pi of a hopeless expert is -inf

    def __call__(self, batch):
        """The loss of the samples `batch`, indices into targets, in the order of the forward's."""
        seen, self.seen = self.seen, []
        targets = self.targets[batch].to(seen[0].device).unsqueeze(1)  # (B, 1, K)
        mask = moe.tokens_in(self.model.routing, "token_mask", seen[0])  # (B, T)
        losses = [-(targets * log_pi).sum(-1)[mask].mean() for log_pi in seen]
        return self.weight * torch.stack(losses).mean()

    def remove(self):
        for hook in self.hooks:
            hook.remove()
