"""The training loop for experts and unified models, images and texts, one process or several."""

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
    """Whether to recompute activations: --gradient-checkpointing, or the preset's value where it is None."""
    if flag and not hasattr(backbone, "checkpoint"):
        raise UserError("--gradient-checkpointing is for language models: leave it out")
    return PRESETS[run["backbone"]].get("gradient_checkpointing", False) if flag is None else flag


def shard(model):
    """FSDP: shard each decoder layer's frozen weights over the processes; they are gathered while it runs.

    The trained weights are small (LoRA factors, routers) and stay whole on each process. So the rest of the
    training is data parallel.
    """
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in unwrap(model).model.layers:
        fully_shard(layer, ignored_params=trained, reshard_after_forward=True)


def sum_over_processes(loss, parameters):
    """Sum gradients (in place) and loss over the processes; returns the loss."""
    from accelerate.utils import reduce

    grads = [p.grad for p in parameters if p.grad is not None]
    total = reduce(torch.cat([loss.detach().view(1), *(g.flatten() for g in grads)]), "sum")
    parts = total[1:].split([g.numel() for g in grads])
    for grad, new in zip(grads, parts, strict=True):
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
    """Train in place for `steps` steps: every record once an epoch, constant rate after a linear warm-up.

    groups: optimiser parameter groups, each with its own "lr". seed: the random seed of the batches.
    optimizer: "adamw", or "sgd" (Nesterov momentum 0.9).
    classes: the label set of an image classifier.
    after_step: called after each update.
    checkpointing: recompute activations in the backward (language models).
    Returns the mean loss of each step. Under `accelerate launch` each process computes its part of a batch.
    """
    optimizer = make_optimizer(optimizer, groups, weight_decay)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps))
    )

    def update(loss):
        """One step; returns the loss over all processes."""
        loss.backward()
        if processes() is not ALONE:
            loss = sum_over_processes(loss, parameters)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if after_step:
            after_step()
        return loss.item()

    if checkpointing:
        backbone.checkpoint(model)
    if sharding():
        shard(model)
    model.train()
    losses = run_steps(
        backbone.losses(model, records, classes, batch_size, steps, seed), update, steps, label
    )
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses


def make_optimizer(name, groups, weight_decay):
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def run_steps(batch_losses, update, steps, label):
    """Call `update` on each of the losses; returns what it returns. UserError where that is not finite."""
    losses = []
    with enough_memory(label), progress(total=steps, desc=label, unit="step") as bar:
        for batch_loss in batch_losses:
            loss = update(batch_loss)
            losses.append(loss)
            if not math.isfinite(loss):
                raise UserError(
                    f"{label}: the loss became {loss} at step {len(losses)}: lower the learning rate"
                )
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    return losses


@contextlib.contextmanager
def enough_memory(label):
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{label}: the GPU's memory is full: use --gradient-checkpointing, a smaller --batch-size, "
            "or several GPUs (accelerate launch)"
        ) from None


def epoch_batches(lengths, batch_size, steps, seed):
    """Yield `steps` batches of indices, epoch after epoch; seed: the random seed.

    An epoch's indices are shuffled and sorted by length within windows of eight batches; then its batches are
    shuffled.
    """
    generator = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    left = steps
    while left > 0:
        order = generator.permutation(len(lengths))
        epoch = []
        for start in range(0, len(order), 8 * batch_size):
            window = order[start : start + 8 * batch_size]
            window = window[np.argsort(lengths[window], kind="stable")]
            epoch += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        for i in generator.permutation(len(epoch))[::-1][:left]:
            yield epoch[i].tolist()
        left -= len(epoch)
