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


def start_vectors(vectors, init, seed):
    """The routing vectors K x (L, d) that a model starts with; init: "uploaded", "unit" or "random"."""
    if init == "unit":
        return of_one_length(vectors)
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(v.shape, generator=generator) / v.shape[1] ** 0.5 for v in vectors]
    return vectors


def proxy_targets(uploads, names):
    """(n, K): by which experts the proxies should be routed, in the order of their indices into D_0.

    uploads: {client: its Upload}. names: of the K experts. Where several clients chose a sample, each has an
    equal share.
    """
    proxies = {name: upload.proxies for name, upload in uploads.items()}
    row = {index: i for i, index in enumerate(sorted(set().union(*proxies.values())))}
    targets = torch.zeros(len(row), len(names))
    for p, name in enumerate(names):
        targets[[row[index] for index in proxies.get(name, ())], p] = 1
    return targets / targets.sum(1, keepdim=True)


class RoutingLoss:
    """weight times the cross-entropy of every layer's pi against the samples' clients, mean over the tokens.

    targets: (n, K), `proxy_targets` of the training's samples. To be called after the forward of a batch. The
    tokens are those of model.routing.token_mask. It sees the routers' inputs through hooks until `remove`.
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
