"""FlexOlmo's anchored experts: trained beside the frozen seed model, sent with a bias, unified with e_0."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CLIENTS, SIZES, flags_of, forge, public_records, refused, stage

import moe
import unify_moe
from metamoe import backbones
from metamoe.backbones import training
from metamoe.expert_training import Anchored
from metamoe.rundir import read_json
from metamoe.uploads import ROUTER, read_uploads

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANT = "anchored-similarity"
LORA = 4, 8, 0, False


@pytest.fixture(scope="module")
def kept(tmp_path_factory, finished):
    """A copy of the finished run with anchored uploads."""
    folder = tmp_path_factory.mktemp("anchored") / "run"
    shutil.copytree(finished[0], folder)
    few = flags_of("train_expert", folder, "--data")[4:]
    made = stage("train_expert", folder, "--data", "anchored", "--selection", "similarity", *few)
    assert made.code == 0, made.err
    return folder


@pytest.fixture
def backbone(seed_model):
    return backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")


def fill(layer):
    """Give the client's expert factors B and a bias."""
    with torch.no_grad():
        for key, stack in layer.experts.items():
            stack[1] += torch.randn_like(stack[1]) * key.endswith("_B")
        layer.router.bias[1] = -0.3


@pytest.mark.parametrize("name", ("smollm2-135m", "glyph-clip"))
def test_the_pair_is_the_seed_models_ffn_and_the_lora_weighted_by_a_softmax(seed_model, name):
    source = seed_model if name == "smollm2-135m" else None
    backbone = backbones.load_backbone(name, source, "cpu", "float32")
    L, d = len(backbone.ffn_names), backbone.width
    ffn, (mean, own) = backbone.model.get_submodule(backbone.ffn_names[0]), torch.randn(2, L, d)
    pair, x = Anchored(backbone, mean, own, LORA), torch.randn(2, 5, d)
    layer = pair.layers[backbone.ffn_names[0]]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ffn(x))  # B is 0
        fill(layer)
        weight = torch.stack([x @ mean[0], x @ own[0] - 0.3], -1).softmax(-1)
        y, public = layer(x), ffn(x)
        model, sent = pair.take_apart()
        tuned = model.get_base_model().get_submodule(backbone.ffn_names[0])(x)
        torch.testing.assert_close(y, weight[..., :1] * public + weight[..., 1:] * tuned)
    assert (tuned - public).abs().max() > 0.1
    assert torch.equal(sent["vectors"], own) and sent["bias"].tolist() == pytest.approx(
        [-0.3] + [0] * (L - 1)
    )


@pytest.mark.parametrize("optimizer, harmful", (("adamw", False), ("adamw", True), ("sgd", False)))
def test_training_leaves_the_seed_models_half_bit_for_bit_and_no_bias_above_0(backbone, optimizer, harmful):
    """The bias of an expert that helps stays at 0, that of one which does harm falls."""
    torch.manual_seed(0)
    pair = Anchored(backbone, *torch.randn(2, 2, 32) / 10, LORA)
    for layer in pair.layers.values() if harmful else ():
        fill(layer)
    before = {name: t.detach().clone() for name, t in pair.model.named_parameters()}
    largest = []

    def after_step():
        pair.hold()
        largest.append(max(layer.router.bias.max().item() for layer in pair.layers.values()))

    groups = [{"params": [p for p in pair.model.parameters() if p.requires_grad], "lr": 0.05}]
    options = dict(steps=8, batch_size=4, warmup_steps=0, weight_decay=0.1, seed=0, label="test")
    records = public_records(random.Random(0), 16)
    training.train(
        backbone, pair.model, records, groups, optimizer=optimizer, after_step=after_step, **options
    )
    assert len(largest) == 8 and max(largest) == 0
    for name, now in pair.model.named_parameters():
        trained = ".experts." in name or name.endswith(("router.vectors", "router.bias"))
        assert torch.equal(now[:1], before[name][:1]) if trained else torch.equal(now, before[name]), name
        if trained and not name.endswith("bias"):
            assert not torch.equal(now[1], before[name][1]), name
    biases = [layer.router.bias[1].item() for layer in pair.layers.values()]
    assert (min(biases) < -0.31) == harmful and (max(biases) == 0) != harmful


def test_fixed_a_trains_b_alone(backbone):
    pair = Anchored(backbone, *torch.randn(2, 2, 32), (*LORA[:3], True))
    trained = {name.split(".")[-1] for name, p in pair.model.named_parameters() if p.requires_grad}
    assert "gate_proj_B" in trained and "gate_proj_A" not in trained


def test_an_upload_has_a_bias_and_the_model_e_0_and_all_experts(kept):
    assert (kept / "clients" / "intent" / "experts" / "anchored" / "done.json").exists()
    assert stage("unify_moe", kept, "--method", "flexolmo-anchored-untrained").code == 0
    assert stage("unify_moe", kept, "--method", "flexolmo-anchored", "--lr", "0.01").code == 0
    assert stage("evaluate", kept, "--models", "flexolmo-anchored").code == 0
    (config, start), (_, trained) = (
        moe.read(kept / "moe" / f"flexolmo-anchored{end}") for end in ("-untrained", "")
    )
    assert config["names"] == ["seed", *CLIENTS]
    assert [config[key] for key in ("top_k", "weighting", "context")] == [4, "renormalized", "none"]
    sent = [load_file(kept / "clients" / name / "upload" / VARIANT / ROUTER) for name in CLIENTS]
    assert all(own["bias"].shape == (2,) and (own["bias"] <= 0).all() for own in sent)
    for layer, ffn in enumerate(config["ffn_names"]):
        vectors, bias = start[f"{ffn}.router.vectors"], start[f"{ffn}.router.bias"]
        assert torch.equal(vectors[1:], torch.stack([own["vectors"][layer] for own in sent]).float())
        assert bias.tolist() == [0, *(own["bias"][layer].item() for own in sent)]
        assert not start[f"{ffn}.experts.up_proj.B"][0].any()
        assert not torch.equal(trained[f"{ffn}.router.bias"], bias)
        assert torch.equal(trained[f"{ffn}.experts.up_proj.B"], start[f"{ffn}.experts.up_proj.B"])


def test_a_client_joins_with_its_bias(kept, tmp_path):
    run, settings = tmp_path / "run", read_json(kept / "run.json")
    shutil.copytree(kept, run)
    flags = ["--method", "flexolmo-anchored-untrained", "--top-k", "2", "--name"]
    assert stage("unify_moe", run, *flags, "all").code == 0
    (run / "run.json").write_text(json.dumps({**settings, "clients": CLIENTS[:-1]}))
    assert stage("unify_moe", run, *flags, "few").code == 0
    (run / "run.json").write_text(json.dumps(settings))
    assert stage("unify_moe", run, *flags, "grown", "--extend", "few").code == 0
    (config, tensors), (other, grown) = (moe.read(run / "moe" / name) for name in ("all", "grown"))
    assert config == other and all(torch.equal(t, grown[key]) for key, t in tensors.items())


def test_the_router_learns_from_proxies_and_as_many_public_samples(kept):
    run = read_json(kept / "run.json")
    uploads = read_uploads(kept, run, VARIANT)
    found = {}
    for samples in ("proxies", "public", "proxies+public"):
        records = unify_moe.final_samples(kept, run, uploads, {"samples": samples})
        found[samples] = [record["prompt"] for record in records]
    assert found["proxies+public"] == found["proxies"] + found["public"]
    assert len(found["public"]) == 3 * SIZES["proxies"]


BAD = {
    "above 0": lambda own: own | {"bias": torch.tensor([-1.0, 0.01])},
    "of another shape": lambda own: own | {"bias": torch.zeros(3)},
    "of one number": lambda own: own | {"bias": torch.tensor(0.0)},
    "not finite": lambda own: own | {"bias": torch.tensor([torch.nan, -1])},
    "missing": lambda own: {"vectors": own["vectors"]},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_bias_is_refused(kept, tmp_path, kind):
    shutil.copytree(kept, tmp_path / "run")
    folder = tmp_path / "run" / "clients" / "hotels" / "upload" / VARIANT
    save_file(BAD[kind](load_file(folder / ROUTER)), folder / ROUTER)
    forge(folder, read_json(kept / "run.json"))
    line = refused("unify_moe", tmp_path / "run", "--method", "flexolmo-anchored", "--name", "new")
    assert "client hotels" in line and ROUTER in line and "bias" in line


def test_another_upload_with_a_bias_is_refused(run):
    folder = run / "clients" / "hotels" / "upload" / "aligned-dpp"
    save_file(load_file(folder / ROUTER) | {"bias": torch.zeros(2)}, folder / ROUTER)
    forge(folder, read_json(run / "run.json"))
    line = refused("unify_moe", run, "--method", "metamoe", "--name", "new")
    assert "client hotels" in line and f"{ROUTER}: bias" in line


@pytest.mark.parametrize("flags", ("--full-ffn", "--epsilon 4"))
def test_what_does_not_go_with_an_anchored_expert_is_refused(kept, flags):
    assert flags.split()[0] in refused("train_expert", kept, "--data", "anchored", *flags.split())


@pytest.mark.parametrize("flags", ("--init unit", "--offset"))
def test_a_start_that_would_drop_the_bias_is_refused(kept, flags):
    command = ["unify_moe", kept, "--method", "flexolmo-anchored", "--name", "new"]
    assert flags in refused(*command, *flags.split())
