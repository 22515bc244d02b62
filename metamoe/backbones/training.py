"""The training loop for experts and unified models, images and texts, one process or several."""

import contextlib
import math

import numpy as np
import torch
from torch.nn.utils import vector_to_parameters
from torch.optim.lr_scheduler import LambdaLR

from metamoe.backbones.base import chunks, unwrap
from metamoe.backbones.distributed import ALONE, processes, sharding
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.progress import progress


def use_checkpointing(flag, run, backbone):
    """Whether to recompute activations: --gradient-checkpointing, or the preset's value where it is None."""
    if flag and not hasattr(backbone, "checkpoint"):
        raise UserError("--gradient-checkpointing is for language models: leave it out")
    own = PRESETS[run["backbone"]].get("gradient_checkpointing", False)
    return own if flag is None else flag


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
    extra_loss=None,
    checkpointing=False,
):
    """Train in place: every record once an epoch, constant rate after a linear warm-up; returns the losses.

    groups: optimiser parameter groups, each with its own "lr". seed: the random seed of the batches.
    classes: the label set of an image classifier. after_step: called after each update.
    extra_loss: a function of a batch's indices, after its forward; added to the loss.
    checkpointing: recompute activations in the backward (language models).
    """
    optimizer = make_optimizer(optimizer, groups, weight_decay)
    warmup = linear_warm_up(optimizer, warmup_steps)
    if checkpointing:
        backbone.checkpoint(model)
    if sharding():
        shard(model)
    model.train()
    losses = []
    with enough_memory(label), progress(total=steps, desc=label, unit="step") as bar:
        for batch, loss in backbone.losses(model, records, classes, batch_size, steps, seed):
            total = loss + extra_loss(batch) if extra_loss else loss
            losses.append(update(optimizer, total))
            warmup.step()
            if after_step:
                after_step()
            check_finite(losses, label)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval().requires_grad_(False)
    return losses


def linear_warm_up(optimizer, steps, start=0):
    """The schedule: a linear rise over so many steps, then a constant rate. start: steps taken before."""
    return LambdaLR(optimizer, lambda step: min(1.0, (start + step + 1) / max(1, steps)))


def warm_up(flag, setting, steps):
    """Steps of warm-up: the setting's; of a preset (flag: None) at most a tenth of all, so that it trains."""
    if flag is None and setting > steps // 10:
        print(f"warm-up: {steps // 10} of {steps} steps, not the preset's {setting} (--warmup-steps)")
        return steps // 10
    return setting


def ends(losses):
    """The mean loss of the first steps and of the last: five each, of few steps at most a half each."""
    count = max(1, min(5, len(losses) // 2))
    return float(np.mean(losses[:count])), float(np.mean(losses[-count:]))


def check_finite(losses, label):
    if not math.isfinite(losses[-1]):
        step = f"the loss became {losses[-1]} at step {len(losses)}"
        raise UserError(f"{label}: {step}: lower the learning rate")


def make_optimizer(name, groups, weight_decay):
    """AdamW, or SGD with Nesterov momentum 0.9."""
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def update(optimizer, loss):
    """One step of the optimiser; returns the loss over all processes."""
    loss.backward()
    if processes() is not ALONE:
        loss = sum_over_processes(loss, [p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def sum_over_processes(loss, parameters):
    """Sum gradients (in place) and loss over the processes; returns the loss."""
    from accelerate.utils import reduce

    grads = [p.grad for p in parameters if p.grad is not None]
    summed = reduce(torch.cat([loss.detach().view(1), *(g.flatten() for g in grads)]), "sum")
    vector_to_parameters(summed[1:], grads)
    return summed[0]


def shard(model):
    """FSDP: shard each decoder layer's frozen weights over the processes; trained ones, small, stay whole."""
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in unwrap(model).model.layers:
        fully_shard(layer, ignored_params=trained, reshard_after_forward=True)


@contextlib.contextmanager
def enough_memory(label):
    try:
        yield
    except torch.OutOfMemoryError:
        remedy = "use --gradient-checkpointing, a smaller --batch-size, or several GPUs (accelerate launch)"
        raise UserError(f"{label}: the GPU's memory is full: {remedy}") from None


def epoch_batches(lengths, batch_size, steps, seed):
    """Yield `steps` batches of indices of like length, epoch after epoch; seed: the random seed."""
    generator = np.random.default_rng(seed)
    lengths, left = np.asarray(lengths), steps
    while left > 0:
        epoch = []  # sorted by length within windows of eight batches
        for window in chunks(generator.permutation(len(lengths)), 8 * batch_size):
            epoch += chunks(window[np.argsort(lengths[window], kind="stable")], batch_size)
        for i in generator.permutation(len(epoch))[::-1][:left]:
            yield epoch[i].tolist()
        left -= len(epoch)
