"""The one training loop: experts and unified models, images and texts, one process or several."""

import contextlib
import math

import numpy as np
import torch

from metamoe.backbones.base import unwrap
from metamoe.backbones.distributed import ALONE, processes, sharding
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.progress import progress


def use_checkpointing(flag, run, backbone):
    """Whether to recompute activations: as --gradient-checkpointing says, None for the preset's way."""
    if flag and not hasattr(backbone, "checkpoint"):
        raise UserError("--gradient-checkpointing is for language models: leave it out")
    return PRESETS[run["backbone"]].get("gradient_checkpointing", False) if flag is None else flag


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


def train(
    backbone,
    model,
    records,
    groups,
    *,
    steps,
    batch_size,
    warmup_steps,
    optimizer,
    weight_decay,
    seed,
    label,
    classes=(),
    after_step=None,
    checkpointing=False,
):
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
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps))
    )
    losses, alone = [], processes() is ALONE
    if checkpointing:
        backbone.checkpoint(model)
    if sharding():
        shard(model)
    model.train()
    with enough_memory(label), progress(total=steps, desc=label, unit="step") as bar:
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
                raise UserError(
                    f"{label}: the loss became {losses[-1]} at step {len(losses)}: lower the learning rate"
                )
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
        raise UserError(
            f"{label}: the GPU's memory is full: use --gradient-checkpointing, a smaller --batch-size, or several GPUs (accelerate launch)"
        ) from None


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
