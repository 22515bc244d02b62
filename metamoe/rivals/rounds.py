"""The rounds of a simulated federation, FedAvg's or CoMiGS's: local steps at each client, then one mean.

FedAvg of LoRA factors (FedIT, arXiv 2305.05644): in every round all clients go on from the same A and B on
the FFNs. These become the means of the clients' A and of their B, weighted by the numbers of records.
CoMiGS: see comigs.py. Its mean is not weighted, and is of one expert alone.

A client takes as many steps as its private-only expert, epochs x ceil(records / batch), in equal parts a
round.
"""

import math

import torch

import moe
from metamoe.backbones.training import check_finite, enough_memory, linear_warm_up, make_optimizer, update
from metamoe.progress import progress
from metamoe.rivals.comigs import ROUTER_EVERY, ROUTER_STEPS, router_part


class Client:
    """A client of the simulation: its weights, batches and optimisers, kept from round to round.

    model: FedAvg's, with LoRA factors to train, or comigs.mixture's; all clients start with its weights.
    records: the client's training records. classes: the label set of an image classifier.
    """

    def __init__(self, name, records, classes, backbone, model, settings):
        self.name, self.settings, self.losses = name, settings, []
        self.count, size, seed = len(records), settings["batch_size"], settings["seed"]
        self.steps = settings["epochs"] * math.ceil(self.count / size)  # of the experts, in all rounds
        self.experts, self.routers = trained(model)
        self.weights = [p.detach().clone() for p in self.experts + self.routers]
        self.optimizer = None
        if self.routers:
            self.every = max(1, round(ROUTER_EVERY * self.steps))
            self.turns = max(1, round(ROUTER_STEPS * self.steps))
            steps = self.turns * (self.steps // self.every)
            records, own = router_part(name, records, seed)
            self.router_batches = backbone.losses(model, own, classes, size, steps, seed)
        # one iterator for all rounds: FedAvg's batches are those of the client's expert
        self.batches = backbone.losses(model, records, classes, size, self.steps, seed)

    def take_model(self):
        """Let the model compute with this client's weights, and train them."""
        for parameter, weight in zip(self.experts + self.routers, self.weights, strict=True):
            parameter.data = weight

    def shared(self):
        """The weights that are averaged: FedAvg's factors, or those of CoMiGS's expert 0."""
        experts = self.weights[: len(self.experts)]
        return [stack[0] for stack in experts] if self.routers else experts

    def start_optimizers(self):
        kind, decay, lr = (self.settings[key] for key in ("optimizer", "weight_decay", "lr"))
        self.optimizer = make_optimizer(kind, [{"params": self.experts, "lr": lr}], decay)
        steps = min(self.settings["warmup_steps"], self.steps // 10)
        self.warmup = linear_warm_up(self.optimizer, steps, start=len(self.losses))
        if self.routers:
            self.router_optimizer = make_optimizer(kind, [{"params": self.routers, "lr": lr}], decay)

    def train(self, steps, bar):
        """So many steps of the experts, and those of the router that fall due."""
        self.take_model()
        if not self.routers or self.optimizer is None:  # FedAvg's factors are others now: Adam starts anew
            self.start_optimizers()
        for _ in range(steps):
            self.losses.append(self.step(self.optimizer, self.batches))
            check_finite(self.losses, f"{self.settings['name']}, {self.name}")
            self.warmup.step()
            bar.update()
            if self.routers and len(self.losses) % self.every == 0:
                found = [self.step(self.router_optimizer, self.router_batches) for _ in range(self.turns)]
                check_finite(found, f"{self.settings['name']}, {self.name}, router")

    def step(self, optimizer, batches):
        loss = update(optimizer, next(batches)[1])
        for parameter in self.experts + self.routers:
            parameter.grad = None  # else the router's would add up during the experts' steps
        return loss


def trained(model):
    """(parameters of the experts, of the routers) that a client trains; without routers it is FedAvg's."""
    if hasattr(model, "moe_config"):
        return moe.expert_parameters(model), moe.router_parameters(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad], []


@torch.no_grad()
def fold(clients):
    """The clients' shared weights become their mean."""
    shares = [1 if client.routers else client.count for client in clients]
    for tensors in zip(*(client.shared() for client in clients), strict=True):
        mean = sum(share * tensor for share, tensor in zip(shares, tensors, strict=True)) / sum(shares)
        for tensor in tensors:
            tensor.copy_(mean)


def run_rounds(model, clients, rounds, label):
    """Train the clients' weights in place; returns each round's losses.

    rounds: how many; fewer where a client has fewer steps.
    """
    rounds = min(rounds, *(client.steps for client in clients))
    total, losses = sum(client.steps for client in clients), []
    model.train()
    with enough_memory(label), progress(total=total, desc=label, unit="step") as bar:
        for number in range(rounds):
            bar.set_description_str(f"{label}, round {number + 1} of {rounds}", refresh=False)
            losses.append([])
            for client in clients:
                steps = client.steps * (number + 1) // rounds - len(client.losses)
                client.train(steps, bar)
                losses[-1] += client.losses[-steps:]
            fold(clients)
    model.eval().requires_grad_(False)
    return losses
