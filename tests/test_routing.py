"""Beyond Eq. 6: other starts of the routing vectors, and losses of the router beside the task loss."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.covariance import shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import CLIENTS, public_records, refused, stage, unified

import moe
from metamoe import backbones, lda, routing
from metamoe.data.glyphs import world
from metamoe.rundir import read_json
from metamoe.start import prototypes

pytestmark = pytest.mark.usefixtures("one_thread")
UNIT = ("--method", "metamoe-unit")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def kept(tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("routing") / "run"
    shutil.copytree(finished[0], folder)
    return folder


def test_vectors_of_one_length_point_where_they_did():
    vectors = [torch.randn(4, 8) * scale for scale in (1, 5, 0.2)]
    found = routing.of_one_length(vectors)
    for layer in range(4):
        lengths = torch.stack([v[layer].norm() for v in found])
        mean = torch.stack([v[layer].norm() for v in vectors]).mean()
        torch.testing.assert_close(lengths, mean.expand(3))
    for v, before in zip(found, vectors, strict=True):
        torch.testing.assert_close(torch.cosine_similarity(v, before, dim=1), torch.ones(4))
    (other,) = routing.of_one_length(vectors[:1], torch.full((4,), 2.0))
    torch.testing.assert_close(other.norm(dim=1), torch.full((4,), 2.0))
    assert torch.isfinite(routing.of_one_length([torch.zeros(4, 8), vectors[0]])[0]).all()


def test_targets_share_a_sample_that_several_chose():
    proxies = {"a": [7, 2], "b": [2, 40, 9], "c": []}
    found = routing.proxy_targets(
        {name: SimpleNamespace(proxies=own) for name, own in proxies.items()}, ["seed", "a", "b", "c"]
    )
    assert found.tolist() == [[0, 0.5, 0.5, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]  # 2, 7, 9, 40


def test_the_row_starts_at_the_uploads_vectors_of_one_length(kept):
    assert stage("unify_moe", kept, *UNIT, "--name", "start", "--train", "none").code == 0
    tensors = load_file(kept / "moe" / "start" / "moe.safetensors")
    uploads = [kept / "clients" / name / "upload" / "aligned-dpp" for name in CLIENTS]
    vectors = [load_file(upload / "router.safetensors")["vectors"].float() for upload in uploads]
    for layer in (0, 1):
        own = torch.stack([v[layer] for v in vectors])
        want = own / own.norm(dim=1, keepdim=True) * own.norm(dim=1).mean()
        torch.testing.assert_close(tensors[f"model.layers.{layer}.mlp.router.vectors"], want)


def test_a_client_that_joins_gets_a_vector_of_the_models_length(kept, tmp_path):
    run, settings = tmp_path / "run", read_json(kept / "run.json")
    shutil.copytree(kept, run)
    (run / "run.json").write_text(json.dumps({**settings, "clients": CLIENTS[:-1]}))
    assert stage("unify_moe", run, *UNIT, "--name", "few", "--train", "none").code == 0
    (run / "run.json").write_text(json.dumps(settings))
    extend = ["--extend", "few", "--name", "all", "--train", "none"]
    assert "--init uploaded" in refused("unify_moe", run, *UNIT, "--init", "uploaded", *extend)
    assert stage("unify_moe", run, *UNIT, *extend).code == 0
    vectors = load_file(run / "moe" / "all" / "moe.safetensors")["model.layers.1.mlp.router.vectors"]
    lengths = vectors.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(len(CLIENTS)))


@pytest.fixture(params=("smollm2-135m", "glyph-clip"))
def backbone(request, seed_model):
    source = seed_model if request.param == "smollm2-135m" else None
    return backbones.load_backbone(request.param, source, "cpu", "float32")


@pytest.mark.parametrize("lam", (0.0, 0.4, 1.0))
def test_the_covariance_is_that_of_what_is_routed(backbone, lam):
    records = public_records(random.Random(1), 9)
    if backbone.ffn_linears[0] == "c_fc":
        records = world.load_glyphs(["greek"], {"train": 1, "validation": 1, "test": 1}, 40, seed=0)[0][:9]
    ffn, rows, weights, inputs = backbone.model.get_submodule(backbone.ffn_names[1]), [], [], []
    hook = ffn.register_forward_pre_hook(lambda ffn, args: inputs.append(args[0].detach()[0]))
    for record in records:
        for _, _, forward in backbone.prompt_batches(backbone.model, [record], None):
            forward()
        z = inputs.pop().double().numpy()  # (T, d)
        rows.append((1 - lam) * z + lam * z.mean(0))
        weights += [1 / len(z)] * len(z)
    hook.remove()
    want = np.cov(np.concatenate(rows).T, aweights=weights, ddof=0)
    found = lda.routed_covariance(backbone, records, lam)
    assert found.shape == (len(backbone.ffn_names), backbone.width, backbone.width)
    np.testing.assert_allclose(found[1], want, atol=1e-5 * np.abs(want).max())


def test_the_start_is_linear_discriminant_analysis():
    rng, (K, L, d) = np.random.default_rng(0), (4, 2, 6)
    means, x = rng.normal(size=(K, L, d)), rng.normal(size=(50, d))
    spread = rng.normal(size=(L, d, 9))
    covariance = spread @ spread.transpose(0, 2, 1)
    vectors, bias = lda.discriminants(torch.from_numpy(means).float(), torch.from_numpy(covariance))
    for layer in range(L):
        given = SimpleNamespace(covariance_=shrunk_covariance(covariance[layer], lda.SHRINK))
        given.fit = lambda rows: None
        oracle = LinearDiscriminantAnalysis("lsqr", priors=[1 / K] * K, covariance_estimator=given)
        apart = np.concatenate([means[:, layer] + 1, means[:, layer] - 1])
        oracle.fit(apart, [*range(K), *range(K)])
        logits = x @ np.stack([v[layer] for v in vectors]).T + [b[layer].item() for b in bias]
        assert (logits.argmax(1) == oracle.predict(x)).all() and len(set(logits.argmax(1))) == K
        ratio = np.diff(logits) / np.diff(oracle.decision_function(x))
        np.testing.assert_allclose(ratio, d / np.trace(np.linalg.inv(given.covariance_)), rtol=1e-3)
    (same,), (offset,) = lda.discriminants(torch.ones(1, 1, d), torch.eye(d).double()[None])
    torch.testing.assert_close((same, offset), (torch.ones(1, d), torch.tensor([-d / 2])))


@pytest.mark.parametrize("method", ("metamoe-lda", "flexolmo-lda", "arrow"))
def test_a_client_that_joins_starts_as_if_it_had_been_there(kept, tmp_path, method):
    run, settings, command = tmp_path / "run", read_json(kept / "run.json"), ("unify_moe", tmp_path / "run")
    shutil.copytree(kept, run)
    flags = ["--method", method, "--top-k", "2", "--train", "none"]
    assert stage(*command, *flags, "--name", "all").code == 0
    (run / "run.json").write_text(json.dumps({**settings, "clients": CLIENTS[:-1]}))
    assert stage(*command, *flags, "--name", "few").code == 0
    (run / "run.json").write_text(json.dumps(settings))
    assert stage(*command, *flags, "--extend", "few", "--name", "grown").code == 0
    config, tensors = moe.read(run / "moe" / "all")
    other, grown = moe.read(run / "moe" / "grown")
    assert config == other and tensors.keys() == grown.keys()
    assert any(key.endswith("bias") for key in tensors) == (method != "arrow")
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, grown[key])


def test_the_discriminants_of_the_row_know_lambda(kept):
    """The token-level router has the covariance of tokens."""
    made = []
    for context in ("on", "off"):
        flags = [
            "--method",
            "metamoe-lda",
            "--train",
            "none",
            "--context",
            context,
            "--name",
            f"lda-{context}",
        ]
        assert stage("unify_moe", kept, *flags).code == 0
        made.append(moe.read(kept / "moe" / f"lda-{context}")[1]["model.layers.1.mlp.router.vectors"])
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert stage("unify_moe", kept, "--method", "metamoe-lda").code == 0
    key = "model.layers.1.mlp.router.bias"  # is trained
    start, end = (moe.read(kept / "moe" / name)[1][key] for name in ("lda-on", "metamoe-lda"))
    assert not torch.equal(start, end)


def test_arrow_routes_by_the_experts_own_singular_vectors(kept):
    assert stage("unify_moe", kept, "--method", "arrow").code == 0
    from peft import ArrowConfig  # here: the stage has mended torchvision
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    config, tensors = moe.read(kept / "moe" / "arrow")
    assert config["absolute"] and (config["top_k"], config["weighting"]) == (3, "renormalized")
    settings = ArrowConfig(rng_seed=0)
    settings.task_adapter_names = []
    peft = ArrowLoraLinearLayer(32, settings)
    for p, name in enumerate(CLIENTS):
        factors = load_file(kept / "clients" / name / "upload" / "private-similarity" / "adapter" / ADAPTER)
        for ffn in config["ffn_names"]:
            A, B = (factors[f"base_model.model.{ffn}.gate_proj.lora_{half}.weight"] for half in "AB")
            found = tensors[f"{ffn}.router.vectors"][p]
            *_, rows = np.linalg.svd((B @ A).double().numpy())
            assert abs(rows[0] @ found.numpy()) == pytest.approx(1, abs=1e-5)
            own = peft.top_right_singular_vec_from_BA(A, B, iters=1000)
            assert abs(own @ found).item() == pytest.approx(1, abs=1e-3)
    nothing = {"a": {"gate_proj.lora_A": torch.ones(2, 4), "gate_proj.lora_B": torch.zeros(5, 2)}}
    assert not prototypes("x", nothing, "gate_proj").any()


@pytest.mark.parametrize(
    "flags", ("--offset --init lda", "--seed-expert --init arrow", "--full-ffn --init arrow")
)
def test_starts_that_do_not_go_together_are_refused(kept, flags):
    first, _, start = flags.split()[:3]
    line = refused("unify_moe", kept, "--method=metamoe", "--name=no", *flags.split())
    assert f"{first}: " in line and start in line


def test_the_loss_is_the_cross_entropy_of_pi_over_the_counted_tokens(seed_model):
    backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    model = unified(backbone)
    targets = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    pis, loss = [], routing.RoutingLoss(model, targets, 0.3)
    hooks = [
        layer.router.register_forward_hook(lambda m, x, pi: pis.append(pi)) for layer in moe.layers(model)
    ]
    ids, mask = torch.randint(2, 300, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    model.routing.token_mask = model.routing.context_mask = mask
    model(ids, attention_mask=mask.long())
    terms = []
    for pi in pis:
        for b, sample in enumerate((2, 1)):
            for t in range(int(mask[b].sum())):
                terms.append(-(targets[sample] * pi[b, t].log()).sum())
    found = loss([2, 1])
    torch.testing.assert_close(found, 0.3 * torch.stack(terms).mean())
    found.backward()
    assert all(layer.router.vectors.grad.abs().max() > 0 for layer in moe.layers(model))
    loss.remove()
    for hook in hooks:
        hook.remove()
    model(ids)
    assert loss.seen == []


def test_the_loss_teaches_the_router_whose_samples_are_whose(seed_model):
    backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    model, ids = unified(backbone), torch.randint(2, 300, (3, 9))
    loss = routing.RoutingLoss(model, torch.eye(3), 1.0)
    optimizer, losses = torch.optim.AdamW(moe.router_parameters(model), 0.05), []
    for _ in range(40):
        model(ids)
        losses.append(loss([0, 1, 2]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 < 1 < losses[0]


@pytest.mark.parametrize("top_k", (1, 2))
def test_the_balancing_loss_is_btxs(seed_model, top_k):
    """K sum u p over the counted tokens; 1 for a router that treats all experts alike."""
    model = unified(backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32"))
    pis, loss = [], routing.BalancingLoss(model, 0.5)
    for layer in moe.layers(model):
        layer.top_k = top_k
        layer.router.register_forward_hook(lambda m, x, pi: pis.append(pi))
    ids, mask = torch.randint(2, 300, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    model.routing.token_mask = mask
    model(ids, attention_mask=mask.long())
    terms = []
    for pi in pis:
        used, mean = torch.zeros(3), torch.zeros(3)
        for row in pi[mask]:
            used[row.topk(top_k).indices] += 1 / (9 * top_k)
            mean += row / 9
        terms.append(3 * (used * mean).sum())
    torch.testing.assert_close(loss([0, 1]), 0.5 * torch.stack(terms).mean())
    for vectors in moe.router_parameters(model):
        vectors.data.zero_()
    model(ids, attention_mask=mask.long())
    torch.testing.assert_close(loss([0, 1]), torch.tensor(0.5))


def test_the_rivals_rows_are_made_as_their_entries_say(kept):
    for name in ("moa", "btx-paper"):
        assert stage("unify_moe", kept, "--method", name, "--lr", "0.01").code == 0
    moa, btx = (read_json(kept / "moe" / name / "done.json") for name in ("moa", "btx-paper"))
    assert (moa["routing_loss"], moa["train"], moa["init"]) == (1.0, "router", "random")
    assert btx["balancing_loss"] == 0.01 and "routing_loss" not in btx
    config = read_json(kept / "moe" / "btx-paper" / "moe_config.json")
    assert (config["top_k"], config["names"]) == (2, ["seed", *CLIENTS])
    before = load_file(kept / "clients" / "intent" / "upload" / "private-similarity" / "adapter" / ADAPTER)
    after = load_file(kept / "moe" / "moa" / "moe.safetensors")
    for key, tensor in before.items():  # its experts are the uploads'
        linear, factor = key.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        ffn, name = linear.rsplit(".", 1)
        assert torch.equal(after[f"{ffn}.experts.{name}.{factor}"][0], tensor)


def test_the_final_training_takes_the_loss(kept):
    flags = ["--method", "metamoe", "--train", "router", "--epochs", "2"]
    assert stage("unify_moe", kept, *flags, "--name", "task").code == 0
    assert stage("unify_moe", kept, *flags, "--name", "told", "--routing-loss", "1").code == 0
    losses, settings = (
        [read_json(kept / "moe" / name / file) for name in ("task", "told")]
        for file in ("losses.json", "done.json")
    )
    assert losses[1][0] > losses[0][0] + 0.1 and len(losses[0]) == len(losses[1])
    assert "routing_loss" not in settings[0] and settings[1]["routing_loss"] == 1


@pytest.mark.parametrize(
    "flags",
    (
        "--routing-loss -1",
        "--routing-loss nan",
        "--routing-loss 1 --train none",
        "--routing-loss 1 --samples public",
        "--balancing-loss 1 --train none",
    ),
)
def test_where_the_loss_cannot_be_taken_it_is_refused(kept, flags):
    assert flags.split()[0] in refused("unify_moe", kept, "--method=metamoe", "--name=no", *flags.split())
