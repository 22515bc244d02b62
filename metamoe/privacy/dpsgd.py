"""DP-SGD on an expert's trained parameters: each private record's gradient is clipped, the sum gets noise.

Opacus' hooks give the per-sample gradients; the model is not wrapped, PEFT's modules stay as they are. The
proxies are public: they add their plain gradient.
"""

import contextlib
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from metamoe.backbones.base import chunks
from metamoe.backbones.training import enough_memory, linear_warm_up, make_optimizer
from metamoe.errors import UserError
from metamoe.privacy.mechanisms import clip_factors
from metamoe.progress import progress


@contextlib.contextmanager
def sample_gradients(model):
    """Opacus' hooks on the model, in training mode; nothing of them is left afterwards."""
    from opacus.grad_sample import GradSampleHooks

    model.train()
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # a layer of frozen inputs
            yield hooks
    finally:
        hooks.cleanup()
        for module in model.modules():  # what a loss without its backward left
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)


def gradients(losses, trained):
    """Yield each loss with its samples' gradients, [(b, *shape)] float32 in the order of the parameters
    `trained`, and the lengths (b,) of these over all parameters."""
    for loss in losses:
        loss.backward()
        found = [parameter.grad_sample.float() for parameter in trained]
        for parameter in trained:  # grad has the sum without clipping: it is not used
            parameter.grad = parameter.grad_sample = None
        squares = sum(grad.flatten(1).square().sum(1) for grad in found)
        yield loss.item(), found, squares.sqrt()


def clipped_sum(losses, trained, bound):
    """(sum of the samples' gradients, each clipped to the length `bound`, float32; sum of the losses)."""
    sums, total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained], 0.0
    for loss, found, lengths in gradients(losses, trained):
        factors, total = clip_factors(lengths, bound), total + loss
        for own, grad in zip(sums, found, strict=True):
            own += torch.einsum("b...,b->...", torch.nan_to_num(grad), factors)
    return sums, total


def public_bound(backbone, model, trained, sample, classes, batch, seed):
    """The length to clip at: the median length of the gradients of D_0's samples."""
    batches = chunks(range(len(sample)), batch)
    losses = backbone.sample_losses(model, sample, classes, batches, seed)
    return torch.cat([lengths for _, _, lengths in gradients(losses, trained)]).median().item()


def poisson(count, rate, steps, rng):
    """For each step the indices of a Poisson sample: each one of `count` with probability `rate`."""
    return [np.flatnonzero(rng.random(count) < rate).tolist() for _ in range(steps)]


def batches_of(records, indices, size):
    """The indices in batches of texts of like length."""
    return chunks(sorted(indices, key=lambda i: len(records[i].get("prompt", ""))), size)


@dataclass(frozen=True)
class Mechanism:
    """What DP-SGD is accounted by, and its secret generator."""

    count: float  # the noisy number of private records
    rate: float  # at which a step samples them
    noise: float  # the noise multiplier
    bound: float  # the length that gradients are clipped at
    steps: int
    rng: np.random.Generator


def set_gradients(trained, sums, scale, deviation, rng):
    """Add the noisy sums, scaled, to the plain gradients that the parameters have."""
    for parameter, total in zip(trained, sums, strict=True):
        if deviation:
            drawn = rng.standard_normal(total.shape, dtype=np.float32)
            total = total + deviation * torch.from_numpy(drawn).to(total.device)
        plain = 0 if parameter.grad is None else parameter.grad
        parameter.grad = scale * total + plain


def train_privately(
    backbone, model, private, proxies, groups, mechanism, *, batch_size, seed, label, classes, **options
):
    """Train in place; returns each step's loss over its private records, for the client's eyes alone.

    A step's gradient estimates the mean over private records and proxies: the noisy sum over a Poisson sample
    of the private records, over its expected size, and the plain mean over a batch of proxies.
    batch_size: samples that are computed at a time. options: optimizer, weight_decay and warmup_steps
    of `train`.
    """
    count, rate, steps, rng = mechanism.count, mechanism.rate, mechanism.steps, mechanism.rng
    trained, losses = [parameter for group in groups for parameter in group["params"]], []
    optimizer = make_optimizer(options["optimizer"], groups, options["weight_decay"])
    warmup = linear_warm_up(optimizer, options["warmup_steps"])
    share = count / (count + len(proxies))
    deviation = mechanism.noise * mechanism.bound if mechanism.noise else 0.0
    samples = [batches_of(private, own, batch_size) for own in poisson(len(private), rate, steps, rng)]
    # A secret random seed for the images' crops: with the public one a record more would change all others'.
    flat, secret = [batch for own in samples for batch in own], int(rng.integers(2**32))
    own_losses = backbone.sample_losses(model, private, classes, flat, secret)
    size = min(batch_size, max(1, round(rate * len(proxies))))
    plain = backbone.losses(model, proxies, classes, size, steps, seed) if proxies else None
    with sample_gradients(model) as hooks, enough_memory(label), progress(total=steps, desc=label) as bar:
        for own in samples:
            hooks.enable_hooks()
            sums, loss = clipped_sum((next(own_losses) for _ in own), trained, mechanism.bound)
            hooks.disable_hooks()
            if plain:
                ((1 - share) * next(plain)[1]).backward()
            set_gradients(trained, sums, share / (rate * count), deviation, rng)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            warmup.step()
            losses.append(loss / max(1, sum(map(len, own))))
            bar.update()
    if not all(parameter.isfinite().all() for parameter in trained):  # not the losses: they are private
        raise UserError(f"{label}: its weights became infinite: lower the learning rate")
    model.eval().requires_grad_(False)
    return losses
