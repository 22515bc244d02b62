"""unify_moe.py --compress: which experts are merged, what becomes of their weights, tokens and names."""

import random

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import CLIENTS, logits, refused, stage

import moe
from metamoe import backbones
from metamoe.data.glyphs import model as glyph
from metamoe.errors import UserError
from metamoe.rundir import read_json
from metamoe.serving import compression

pytestmark = pytest.mark.usefixtures("one_thread")
METAMOE = ["--method", "metamoe"]
RECORDS = [tiny.record(name, random.Random(i), False) for i, name in enumerate(tiny.TOPICS)]


def done(run, name, *flags):
    result = stage(name, run, *flags)
    assert result.code == 0, result.err
    return result.out


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def backbone(seed_model):
    return backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")


@pytest.mark.parametrize("d_in, d_out", [(30, 40), (7, 40), (30, 6), (3, 5)])
def test_factors_are_those_of_the_whole_products_svd(d_in, d_out):
    A, B, scale = normal(3, 4, d_in), normal(3, d_out, 4, seed=1), torch.tensor([0.1, 0.7, 1.3])
    new_A, new_B, (lost, whole) = compression.truncated_mean(A, B, scale.double())
    assert new_A.shape == (4, d_in) and new_B.shape == (d_out, 4)
    product = sum(s * (b @ a) for s, a, b in zip(scale.double(), A, B, strict=True)).numpy()
    U, S, V = np.linalg.svd(product, full_matrices=False)
    np.testing.assert_allclose((new_B @ new_A).numpy(), (U[:, :4] * S[:4]) @ V[:4], atol=1e-9)
    np.testing.assert_allclose([lost, whole], [(S[4:] ** 2).sum(), (product**2).sum()], atol=1e-9)


def test_average_linkage_on_made_up_distances():
    def groups(points, count):
        return compression.like_experts(np.abs(np.subtract.outer(points, points)), count)

    # single linkage would chain 0, 1 and 2.1
    assert groups([0, 1, 2.1, 3.3], 2) == [[0, 1], [2, 3]]
    assert groups([0, 9, 0.5, 9.1], 2) == [[0, 2], [1, 3]] and groups([0, 9, 0.5, 9.1], 3) == [
        [0],
        [1, 3],
        [2],
    ]
    same = 1 - np.eye(5)
    assert [len(compression.like_experts(same, count)) for count in (1, 2, 3, 4)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="NaN"):
        compression.like_experts(np.array([[0, np.nan], [np.nan, 0]]), 1)


def dense(layer, p, z):
    """LLaMA's FFN with the weights W + s B A of expert p."""

    def weight(name):
        A, B = layer.experts[f"{name}_A"][p], layer.experts[f"{name}_B"][p]
        return getattr(layer, name).weight + layer.scaling[p] * B @ A

    hidden = F.silu(F.linear(z, weight("gate_proj"))) * F.linear(z, weight("up_proj"))
    return F.linear(hidden, weight("down_proj"))


@torch.no_grad()
def test_distances_and_usage_are_those_of_the_unified_model(backbone):
    model, inputs = tiny.unified(backbone), {}
    hooks = [
        x.register_forward_pre_hook(lambda x, z: inputs.update({x.index: z[0]})) for x in moe.layers(model)
    ]
    want, model.routing.record = 0, True
    [(_, tokens, forward)] = backbone.prompt_batches(model, RECORDS, label="test")  # one batch
    forward()
    model.routing.record, usage = False, moe.counts(model)
    for hook in hooks:
        hook.remove()
    for layer in moe.layers(model):
        out = torch.stack([dense(layer, p, inputs[layer.index][tokens]) for p in range(3)])  # (3, n, d)
        apart = (out[:, None] - out[None]).square().sum((2, 3))
        want = want + (apart / (out.square().sum() / 3)).sqrt() / len(moe.layers(model))
    distances, counted = compression.measure(backbone, model, RECORDS)
    np.testing.assert_allclose(distances, want.numpy(), rtol=1e-4)
    assert torch.equal(counted.long(), usage) and usage.sum() == 2 * tokens.sum()


def test_identical_experts_are_merged_without_loss_and_their_tokens_go_on(backbone, tmp_path, seed_model):
    model = tiny.unified(backbone)
    with torch.no_grad():
        for layer in moe.layers(model):
            for stack in layer.experts.values():
                stack[2] = stack[0]
            v = layer.router.vectors
            v[2], v[0], v[1] = v[0] + 0.05 * v[2], v[0] - 0.05 * v[2], -v[0]
    moe.save(model, tmp_path / "three")
    distances, usage = compression.measure(backbone, model, RECORDS)
    groups = compression.like_experts(distances, 2)
    assert groups == [[0, 2], [1]] and distances[0, 2] == 0 and (usage > 0).all()
    config, tensors, (lost, whole) = compression.merge(*moe.read(tmp_path / "three"), groups, usage)
    assert config["names"] == ["expert1+expert3", "expert2"] and lost < 1e-9 * whole
    other = backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")
    two = moe.assemble(other.model, config, tensors)
    model.routing.context_mask = model.routing.token_mask = None
    ids = torch.randint(2, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    assert (logits(two, ids) - logits(model, ids)).abs().max() < 1e-5
    _, after = compression.measure(other, two, RECORDS)
    assert torch.equal(after, torch.stack([usage[:, 0] + usage[:, 2], usage[:, 1]], 1))


def test_weights_are_the_usage_of_each_layer_and_uniform_where_there_is_none():
    config = {
        "names": ["a", "b", "c"],
        "ffn_names": ["x", "y"],
        "kind": "full",
        "scaling": [None, None],
        "top_k": 3,
    }
    tensors = {}
    for i, ffn in enumerate(config["ffn_names"]):
        tensors[f"{ffn}.router.vectors"], tensors[f"{ffn}.router.lam"] = (
            normal(3, 4, seed=i),
            torch.tensor(0.5),
        )
        tensors[f"{ffn}.experts.up_proj.weight"] = normal(3, 6, 4, seed=5 + i)
        tensors[f"{ffn}.experts.up_proj.bias"] = normal(3, 6, seed=7 + i)
    usage = torch.tensor([[3, 5, 1], [0, 9, 0]]).double()
    new, out, _ = compression.merge(config, tensors, [[0, 2], [1]], usage)
    assert new["names"] == ["a+c", "b"] and new["members"] == {"a+c": ["a", "c"]} and new["top_k"] == 2
    for ffn, (first, last) in {"x": (0.75, 0.25), "y": (0.5, 0.5)}.items():
        for key in ("router.vectors", "experts.up_proj.weight", "experts.up_proj.bias"):
            own = tensors[f"{ffn}.{key}"]
            want = torch.stack([first * own[0] + last * own[2], own[1]])
            torch.testing.assert_close(out[f"{ffn}.{key}"], want)
        assert out[f"{ffn}.router.lam"] == 0.5
    unit = {key: F.normalize(t, dim=1) * 3 if key.endswith("vectors") else t for key, t in tensors.items()}
    for one_length, same in ((True, True), (False, False)):
        _, out, _ = compression.merge(config, unit, [[0, 2], [1]], usage, one_length)
        assert torch.allclose(out["x.router.vectors"].norm(dim=1), torch.full((2,), 3.0).double()) == same


def test_compressing_through_the_command_line(run, tmp_path):
    out, name = done(run, "unify_moe", *METAMOE, "--compress", 2), "metamoe-compressed-2"
    folder = run / "moe" / name
    config, before = (
        read_json(folder / "moe_config.json"),
        read_json(run / "moe" / "metamoe" / "moe_config.json"),
    )
    (group, members), *rest = config["members"].items()
    assert not rest and group == "+".join(members) in config["names"] and len(config["names"]) == 2
    assert sorted("+".join(config["names"]).split("+")) == sorted(before["names"])
    assert f"{group} are one expert" in out and "squared norm" in out
    assert read_json(folder / "done.json")["compressed"] == 2
    assert "is there already, skipped" in done(run, "unify_moe", *METAMOE, "--compress", 2)
    done(run, "unify_moe", *METAMOE, "--name", name, "--compress", 1)
    done(run, "evaluate", "--models", "metamoe", name, f"{name}-compressed-1")
    rows = {row["model"]: row for row in read_json(run / "results.json")["rows"]}
    assert rows[name]["title"] == "MetaMoE, compressed to 2" and rows[name]["experts"] == config["names"]
    text = (run / "results.md").read_text()
    assert "| MetaMoE, compressed to 2, compressed to 1 |" in text and "no expert" not in text
    done(run, "evaluate", "--model", folder)
    done(run, "unify_moe", *METAMOE, "--compress", 2, "--export", tmp_path / "export")
    exported = read_json(tmp_path / "export" / "config.json")["moe"]
    assert exported["names"] == config["names"] and exported["members"] == config["members"]
    model = moe.load(folder)
    with pytest.raises(ValueError, match=members[0]) as error:
        moe.disable_expert(model, members[0])
    assert group in str(error.value)
    moe.save(model, tmp_path / "again")
    assert read_json(tmp_path / "again" / "moe_config.json")["members"] == config["members"]
    for *flags, say in (
        ("unify_moe", *METAMOE, "--name", name, "--without", members[0], group),
        ("evaluate", "--models", name, "--opt-out", name, group),
        ("unify_moe", *METAMOE, "--name", "new", "--extend", name, group),
        ("unify_moe", *METAMOE, "--compress", "3", "less than 3"),
        ("unify_moe", *METAMOE, "--compress", "0", "--compress 0"),
        ("unify_moe", *METAMOE, "--name", name, "--compress", "2", "less than 2"),
        ("unify_moe", "--method", "soup", "--compress", "2", "there is no MoE soup"),
        ("unify_moe", *METAMOE, "--compress", "2", "--without", CLIENTS[0], "one after the other"),
    ):
        assert say in refused(flags[0], run, *flags[1:])


@pytest.mark.slow
def test_compressing_an_image_model_of_full_ffns_and_unit_vectors(tmp_path):
    torch.manual_seed(0)
    save_file(glyph.create(weights=None)[0].state_dict(), tmp_path / "random.safetensors")
    run, few, full = tmp_path / "run", ["--epochs", 1, "--batch-size", 8], ["--full-ffn"]
    sizes = "--train-size 8 --validation-size 2 --test-size 4 --public-size 40 --candidates 20 --proxies 4"
    done(
        run,
        "select_proxies",
        "--backbone",
        "glyph-clip",
        "--pretrained",
        tmp_path / "random.safetensors",
        *sizes.split(),
    )
    done(run, "train_expert", *few, *full)
    unit = ["--method", "metamoe-unit", *few, *full]
    done(run, "unify_moe", *unit)
    assert "squared norm" not in done(run, "unify_moe", *unit, "--compress", 2)  # nothing is truncated
    done(run, "evaluate")
    config, tensors = moe.read(run / "moe" / "metamoe-unit-compressed-2")
    before = moe.read(run / "moe" / "metamoe-unit")[1]
    for ffn in config["ffn_names"]:
        key = f"{ffn}.router.vectors"
        length, old = tensors[key].norm(dim=1), before[key].norm(dim=1)
        assert len(length) == 2 and old.min() * 0.999 < length.min() <= length.max() < old.max() * 1.001
    titles = [row["title"] for row in read_json(run / "results.json")["rows"]]
    assert "MetaMoE, unit vectors, compressed to 2" in titles
