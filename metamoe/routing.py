"""Beyond Eq. 6: routing vectors of one length, and losses of the router beside the task loss."""

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


class RouterLoss:
    """A loss of the routers, to be called after the forward of a batch; `remove` ends its hooks.

    The tokens are those of model.routing.token_mask. seen: every layer's log pi (B, T, K) of that forward.
    """

    def __init__(self, model, weight):
        self.model, self.weight, self.seen = model, weight, []
        self.hooks = [layer.router.register_forward_hook(self._see) for layer in moe.layers(model)]

    def _see(self, router, inputs, pi):
        self.seen.append(router.logits(*inputs).log_softmax(-1))  # log pi of a hopeless expert is -inf

    def __call__(self, batch):
        """weight times the mean of the layers' losses on the samples `batch`."""
        seen, self.seen = self.seen, []
        mask = moe.tokens_in(self.model.routing, "token_mask", seen[0])  # (B, T)
        pairs = zip(moe.layers(self.model), seen, strict=True)
        return self.weight * torch.stack([self.loss(layer, pi, mask, batch) for layer, pi in pairs]).mean()

    def remove(self):
        for hook in self.hooks:
            hook.remove()


class RoutingLoss(RouterLoss):
    """Cross-entropy of pi against the samples' clients, mean over the tokens.

    targets: (n, K), `proxy_targets` of the training's samples.
    """

    def __init__(self, model, targets, weight):
        super().__init__(model, weight)
        self.targets = targets

    def loss(self, layer, log_pi, mask, batch):
        targets = self.targets[batch].to(log_pi.device).unsqueeze(1)  # (B, 1, K)
        return -(targets * log_pi).sum(-1)[mask].mean()


class BalancingLoss(RouterLoss):
    """K sum_p u_p p_p (BTX, arXiv 2403.07816): u_p is the share of choices of expert p, p_p its mean pi.

    It is 1 where both are the same for all experts, and more where one expert takes the tokens.
    """

    def loss(self, layer, log_pi, mask, batch):
        pi = log_pi.exp()[mask]  # (tokens, K)
        chosen = layer.choose(pi)[0]  # (tokens, k)
        share = chosen.flatten().bincount(minlength=pi.shape[1]) / chosen.numel()
        return pi.shape[1] * (share * pi.mean(0)).sum()


def router_losses(model, uploads, settings):
    """The losses that a method adds to its task loss."""
    losses = []
    if settings.get("routing_loss"):
        targets = proxy_targets(uploads, model.moe_config["names"])
        losses.append(RoutingLoss(model, targets, settings["routing_loss"]))
    if settings.get("balancing_loss"):
        losses.append(BalancingLoss(model, settings["balancing_loss"]))
    return losses
