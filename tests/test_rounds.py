"""Simulated federations that exchange weights in every round: FedAvg and CoMiGS, against plain torch."""

import copy
import random

import drive
import pytest
import torch
import torch.nn.functional as F
from tiny import CLIENTS, record, refused, stage

import moe
from metamoe.backbones import load_backbone
from metamoe.backbones.training import train
from metamoe.data.glyphs import world
from metamoe.errors import UserError
from metamoe.records import read_records
from metamoe.rivals.comigs import mixture, router_part
from metamoe.rivals.rounds import Client, run_rounds
from metamoe.rundir import read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"name": "test", "epochs": 4, "batch_size": 4, "lr": 0.01, "optimizer": "adamw", "seed": 3}
SETTINGS |= {"weight_decay": 0.01, "warmup_steps": 10}
FEW = "--epochs 2 --batch-size 4 --lr 0.02".split()


@pytest.fixture(params=["smollm2-135m", "glyph-clip"])
def federation(request, seed_model):
    """(what makes a new backbone, [(records, classes)] of clients with 20 and 12 records)."""
    source = seed_model if request.param == "smollm2-135m" else None
    if source:
        rng = random.Random(1)
        data = [
            ([record(name, rng, True) for _ in range(n)], []) for name, n in (("intent", 20), ("hotels", 12))
        ]
    else:
        sizes = {"train": 20, "validation": 0, "test": 0}
        parts = world.load_glyphs(["greek", "cyrillic"], sizes, 0, seed=0)[1].values()
        data = [(part["train"], part["train"][0]["choices"]) for part in parts]
        data[1] = data[1][0][:12], data[1][1]
    return lambda: load_backbone(request.param, source, "cpu", "float32"), data


def federate(backbone, model, data, rounds):
    clients = [Client(f"client{i}", *own, backbone, model, SETTINGS) for i, own in enumerate(data)]
    losses = run_rounds(model, clients, rounds, "test")
    return clients, losses


def steps_of(batches, parameters, optimizer, rates):
    """Plain steps, one for each rate: nothing but `parameters` gets a gradient."""
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        loss = next(batches)[1]
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        optimizer.step()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.01)


def close(found, expected):
    """As a whole: where a gradient is nearly 0, Adam makes a rounding error of single weights larger."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_one_round_of_fedavg_is_the_weighted_mean_of_the_experts(federation):
    load, data = federation
    means = []
    for own, (records, classes) in enumerate(data):
        backbone = load()
        model = backbone.add_lora(4, 8, seed=5)
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {key: SETTINGS[key] for key in ("batch_size", "optimizer", "weight_decay", "seed")}
        options |= {
            "classes": classes,
            "label": "expert",
            "steps": (20, 12)[own],
            "warmup_steps": (2, 1)[own],
        }
        train(backbone, model, records, [{"params": trained, "lr": 0.01}], **options)
        means.append([p.detach() * len(records) / 32 for p in trained])
    backbone = load()
    clients, losses = federate(backbone, backbone.add_lora(4, 8, seed=5), data, rounds=1)
    close(clients[0].weights, [a + b for a, b in zip(*means, strict=True)])
    assert len(losses) == 1 and len(losses[0]) == 32


def test_more_rounds_of_fedavg_start_adam_anew_and_go_on_with_the_data(federation):
    load, data = federation
    backbones = [load() for _ in data]
    models = [backbone.add_lora(4, 8, seed=5) for backbone in backbones]
    plain = [[p for p in model.parameters() if p.requires_grad] for model in models]
    batches = []
    for backbone, model, own, steps in zip(backbones, models, data, (20, 12), strict=True):
        batches.append(backbone.losses(model, *own, 4, steps, 3))
    rates = [[0.005] + [0.01] * 19, [0.01] * 12]  # a tenth of the steps is warm-up
    for number in range(4):
        for own, each in enumerate((5, 3)):
            these = rates[own][each * number :][:each]
            steps_of(batches[own], plain[own], adamw(plain[own]), these)
        for tensors in zip(*plain, strict=True):
            mean = (20 * tensors[0].detach() + 12 * tensors[1].detach()) / 32
            for tensor in tensors:
                tensor.data.copy_(mean)
    backbone = load()
    clients, losses = federate(backbone, backbone.add_lora(4, 8, seed=5), data, rounds=4)
    for client in clients:
        close(client.weights, plain[0])
    assert [len(each) for each in losses] == [8] * 4


class Mixed(torch.nn.Module):
    """CoMiGS's FFN by hand: softmax(W z)_0 FFN_0(z) + softmax(W z)_1 FFN_1(z), each with its own factors."""

    def __init__(self, ffn, layer):
        super().__init__()
        self.ffn, self.W = ffn, torch.nn.Parameter(layer.router.vectors.detach().clone())
        self.experts = torch.nn.ModuleList()
        for p in (0, 1):
            own = {key: torch.nn.Parameter(stack[p].detach().clone()) for key, stack in layer.experts.items()}
            self.experts.append(torch.nn.ParameterDict(own))

    def forward(self, z):
        share = torch.softmax(z @ self.W.T, -1)
        return sum(share[..., p : p + 1] * self.expert(self.experts[p], z) for p in (0, 1))

    def expert(self, own, z):
        def linear(name, x):
            return getattr(self.ffn, name)(x) + 2.0 * (x @ own[f"{name}_A"].T @ own[f"{name}_B"].T)

        if hasattr(self.ffn, "gate_proj"):
            return linear("down_proj", F.silu(linear("gate_proj", z)) * linear("up_proj", z))
        return linear("c_proj", self.ffn.gelu(linear("c_fc", z)))


def by_hand(backbone, ours):
    """The seed model with Mixed in the place of the layers of `ours`: (experts 0, experts 1, W)."""
    for name, layer in zip(backbone.ffn_names, moe.layers(ours), strict=True):
        backbone.model.set_submodule(name, Mixed(backbone.model.get_submodule(name), layer))
    layers = [backbone.model.get_submodule(name) for name in backbone.ffn_names]
    keys = list(moe.layers(ours)[0].experts)
    experts = [[layer.experts[p][key] for layer in layers for key in keys] for p in (0, 1)]
    return *experts, [layer.W for layer in layers]


def test_comigs_is_that_of_plain_torch(federation):
    """The router's own data and steps: its gradient of the experts' steps is nowhere in the plain one."""
    load, data = federation
    backbone = load()
    model = mixture(backbone, 4, 8, seed=5)
    plain, turns = [], []
    for own, (records, classes) in enumerate(data):
        other = load()
        first, second, W = by_hand(other, model)
        mine, held = router_part(f"client{own}", records, 3)
        batches = other.losses(other.model, mine, classes, 4, (20, 12)[own], 3)
        for_router = other.losses(other.model, held, classes, 4, (6, 6)[own], 3)
        plain.append((first, second, W))
        turns.append((batches, for_router, adamw(first + second), adamw(W)))
    rates = [[0.005] + [0.01] * 19, [0.01] * 12]
    for number in range(4):
        for own, (each, due) in enumerate(
            ((5, 3), (3, 2))
        ):  # 0.15 of 20 and of 12 steps; then one of the router
            (first, second, W), (batches, for_router, experts, routers) = plain[own], turns[own]
            for step in range(number * each, (number + 1) * each):
                steps_of(batches, first + second, experts, [rates[own][step]])
                if (step + 1) % due == 0:
                    steps_of(for_router, W, routers, [0.01])
        for tensors in zip(plain[0][0], plain[1][0], strict=True):
            mean = (tensors[0].detach() + tensors[1].detach()) / 2
            for tensor in tensors:
                tensor.data.copy_(mean)
    start = copy.deepcopy(moe.router_parameters(model))
    clients, _ = federate(backbone, model, data, rounds=4)
    for client, (first, second, W) in zip(clients, plain, strict=True):
        client.take_model()
        stacks = moe.expert_parameters(model)
        close([stack[0] for stack in stacks], first)
        close([stack[1] for stack in stacks], second)
        close(moe.router_parameters(model), W)
        assert all(not torch.equal(a, b) for a, b in zip(moe.router_parameters(model), start, strict=True))
    for one, other in zip(*(client.weights for client in clients), strict=True):
        assert not torch.equal(one[1], other[1])
    for one, other in zip(*(client.shared() for client in clients), strict=True):
        assert torch.equal(one, other)


def test_the_routers_part_is_a_fifth_of_the_training_records():
    records = list(range(30))
    mine, held = router_part("hotels", records, 3)
    assert len(held) == 6 and sorted(mine + held) == records
    assert router_part("hotels", records, 3) == (mine, held) != router_part("hotels", records, 4)
    assert [len(part) for part in router_part("hotels", records[:2], 3)] == [1, 1]
    with pytest.raises(UserError, match="client hotels.*2 training records"):
        router_part("hotels", records[:1], 3)


def test_both_rows_are_made_scored_and_counted(run):
    for method in ("fedavg", "comigs"):
        made = stage("unify_moe", run, "--method", method, *FEW)
        assert made.code == 0, made.err
        assert "THIS PROCESS READS ALL CLIENTS' PRIVATE TRAINING RECORDS" in made.out
        assert f"{method}: 6 rounds" in made.out  # 2 epochs of 12 records: there are no more steps
        assert "skipped" in stage("unify_moe", run, "--method", method, *FEW).out
    assert stage("unify_moe", run, "--method", "comigs", *FEW, "--rounds", "2", "--name", "two").code == 0
    assert stage("evaluate", run).code == 0
    results, text = read_json(run / "results.json"), (run / "results.md").read_text()
    factors = 2 * 3 * 16 * (32 + 64)  # layers, linears, rank, both sides
    size = {"sent": 6 * 4 * factors, "received": 6 * 4 * factors}
    assert results["exchanged"]["fedavg"] == {"rounds": 6, "personal": False, **size}
    assert results["exchanged"]["comigs"] == {"rounds": 6, "personal": True, **size}
    assert results["exchanged"]["two"]["sent"] == 2 * 4 * factors
    upload = results["uploaded_bytes"]["intent/aligned-dpp"]
    assert results["exchanged"]["metamoe"]["sent"] == pytest.approx(upload, rel=0.01)
    titles = [row["title"] for row in results["rows"]]
    assert "FedAvg" in titles and "CoMiGS (personalised)" in titles
    pooled = drive.call("evaluate", "--run-dir", run, run).out  # the table over several runs says the same
    for told in (text, pooled):
        assert "FedAvg, CoMiGS (personalised), two: simulated federations" in told
        assert f"| FedAvg | 6 | {size['sent']:,} | {size['received']:,} |" in told
    seed_model = read_json(run / "local.json")["seed_model"]
    scores = read_json(run / "scores" / "comigs.test.json")["scores"]
    for name in CLIENTS:  # each client's records by its own model
        backbone = load_backbone("smollm2-135m", seed_model, "cpu", "float32")
        model = moe.load(run / "moe" / "comigs" / "clients" / name, backbone.model)
        found = backbone.scores(model, read_records(run / "clients" / name / "private" / "test.jsonl"))
        assert [values.tolist() for values in found] == scores[name]


@pytest.mark.parametrize(
    "flags",
    (
        "--method metamoe --rounds 3",
        "--method fedavg --top-k 2",
        "--method comigs --full-ffn",
        "--method comigs --upload intent=x",
        "--method fedavg --selection dpp",
        "--method comigs --without intent",
        "--method comigs --export out",
    ),
)
def test_what_does_not_go_with_rounds_is_refused(fresh, flags):
    assert flags.split()[2] in refused("unify_moe", fresh, *flags.split())


def test_all_clients_data_must_be_here(fresh):
    write_json(fresh / "local.json", read_json(fresh / "local.json") | {"clients": ["intent"]})
    assert "hotels: its data are not here" in refused("unify_moe", fresh, "--method", "fedavg")
