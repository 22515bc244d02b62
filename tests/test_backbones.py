"""The language-model backbone against plain one-by-one computations, on a tiny LLaMA."""

import os
import random
import stat
import tempfile

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import score_alone, teach, unified

import moe
from metamoe import backbones, rundir, uploads
from metamoe.backbones import base, training
from metamoe.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backbone(seed_model):
    return backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")


@pytest.fixture(scope="module")
def records():
    """Of many lengths, with choices of 1 to 5 tokens, some of them beginnings of others."""
    rng = random.Random(1)
    out = [tiny.record(topic, rng, False) for topic in list(tiny.TOPICS) * 6]
    for i, record in enumerate(out):
        record["prompt"] = " ".join(["long story"] * (i % 5) + [record["prompt"]])
        record["choices"] = record["choices"] + [" play music", " play", record["answer"] + " indeed so"]
        record["choices"] = list(dict.fromkeys(record["choices"]))
    return out


def model_of(backbone, kind):
    return (
        backbone.model if kind == "seed" else unified(backbone, **({"top_k": 2} if kind == "top-2" else {}))
    )


# --- scores


@pytest.mark.parametrize("kind", ["seed", "fixed", "top-2"])
def test_scores_equal_separate_sequences(backbone, records, kind):
    """Prompt and choices packed in one sequence with a tree mask: as if every choice had been scored alone."""
    model = model_of(backbone, kind)
    got = backbone.scores(model, records)
    for record, values in zip(records, got, strict=True):
        prompt = backbone.encode(record)[0]
        want = [
            score_alone(backbone, model, prompt, backbone.encode(record, choice)[1])
            for choice in record["choices"]
        ]
        assert values == pytest.approx(want, abs=1e-4)
    assert len({len(backbone.encode(record)[0]) for record in records}) > 5


@pytest.mark.parametrize("kind", ["seed", "fixed"])
def test_scores_depend_neither_on_the_batch_nor_on_the_order(backbone, records, kind):
    model = model_of(backbone, kind)
    together = backbone.scores(model, records)
    alone = [backbone.scores(model, [record])[0] for record in records]
    order = np.random.default_rng(0).permutation(len(records))
    shuffled = backbone.scores(model, [records[i] for i in order])
    for i, record in enumerate(records):
        assert together[i] == pytest.approx(alone[i], abs=1e-4)
        assert shuffled[list(order).index(i)] == pytest.approx(alone[i], abs=1e-4)
        reverse = backbone.scores(model, [record | {"choices": record["choices"][::-1]}])[0]
        assert reverse[::-1] == pytest.approx(alone[i], abs=1e-4)


def test_a_moe_does_score_otherwise_than_its_seed(backbone, records):
    """The tests above would pass on a MoE that is the seed."""
    before = backbone.scores(backbone.model, records)
    after = backbone.scores(unified(backbone), records)
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 1


def test_routing_counts_are_those_of_the_prompts_tokens(backbone, records):
    model = unified(backbone)
    model.routing.record = True
    backbone.scores(model, records)
    counts = moe.counts(model)
    assert counts.sum(1).tolist() == [sum(len(backbone.encode(record)[0]) for record in records)] * 2
    assert (counts > 0).sum() > 3


# --- loss


@pytest.mark.parametrize("kind", ["seed", "fixed"])
def test_loss_is_the_cross_entropy_of_the_answers_tokens(backbone, records, kind):
    model = model_of(backbone, kind)
    encoded = [backbone.encode(record, record["answer"]) for record in records]
    encoded = [(prompt, answer + [backbone.tokenizer.eos_token_id]) for prompt, answer in encoded]
    want = -sum(score_alone(backbone, model, *pair) for pair in encoded) / sum(
        len(answer) for _, answer in encoded
    )
    assert backbone.loss(model, encoded).item() == pytest.approx(want, abs=1e-4)


def test_padding_does_not_reach_the_loss(backbone, records):
    encoded = [backbone.encode(record, record["answer"]) for record in records[:6]]
    before = backbone.loss(backbone.model, encoded)
    backbone.pad = 77
    assert torch.equal(backbone.loss(backbone.model, encoded), before)


# --- features and routing vectors


def test_features_equal_those_of_single_texts(backbone, records):
    got = backbone.features(records)
    assert got.shape == (len(records), 32) and got.dtype == np.float32
    for record, row in zip(records, got, strict=True):
        ids = torch.tensor([backbone.tokenizer(record["prompt"])["input_ids"]])
        with torch.no_grad():
            want = backbone.model.model(ids).last_hidden_state[0].mean(0)
        assert row == pytest.approx(want.numpy(), abs=1e-4)


def test_embedding_goes_on_at_any_batch(backbone, records):
    """The same batches each time: what was embedded before a kill and what comes after it make one whole."""
    whole = list(backbone.embed(records * 20))
    assert len(whole) > 2 and sorted(i for batch, _ in whole for i in batch) == list(range(20 * len(records)))
    for skip in (1, len(whole) - 1, len(whole)):
        rest = list(backbone.embed(records * 20, skip=skip))
        assert len(rest) == len(whole) - skip
        assert all(
            a == b and np.array_equal(x, y) for (a, x), (b, y) in zip(rest, whole[skip:], strict=False)
        )


@pytest.mark.parametrize("lora", [False, True])
def test_routing_vectors_equal_those_of_single_texts(backbone, records, lora):
    """The mean over samples of the mean over tokens of each FFN's input: long texts weigh no more than short ones."""
    model = backbone.model
    if lora:
        model = backbone.add_lora(4, 8, 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.eval()
    got = backbone.routing_vectors(model, records)
    seen = {}
    hooks = [
        base.unwrap(model)
        .get_submodule(name)
        .register_forward_hook(
            lambda module, inputs, output, name=name: seen.setdefault(name, []).append(inputs[0])
        )
        for name in backbone.ffn_names
    ]
    with torch.no_grad():
        for record in records:
            model(input_ids=torch.tensor([backbone.tokenizer(record["prompt"])["input_ids"]]))
    for hook in hooks:
        hook.remove()
    want = torch.stack(
        [torch.stack([z[0].mean(0) for z in seen[name]]).mean(0) for name in backbone.ffn_names]
    )
    assert got.shape == (2, 32) and torch.allclose(got, want, atol=1e-5)
    tokens = torch.stack([torch.cat([z[0] for z in seen[name]]).mean(0) for name in backbone.ffn_names])
    assert not torch.allclose(got, tokens, atol=1e-3)


def test_routing_vectors_leave_no_hook(backbone, records):
    backbone.routing_vectors(backbone.model, records[:2])
    assert not any(backbone.model.get_submodule(name)._forward_pre_hooks for name in backbone.ffn_names)


# --- tokens


def test_encode_cuts_the_prompts_beginning_and_keeps_the_answer(backbone):
    words = [f"word{i}" for i in range(300)]
    record = {"prompt": " ".join(words)}
    whole = backbone.tokenizer(record["prompt"])["input_ids"]
    answer = backbone.tokenizer(" play music", add_special_tokens=False)["input_ids"]
    prompt, ids = backbone.encode(record, " play music")
    assert ids == answer and len(prompt) + len(ids) + 1 == backbone.max_length == 256  # 1: EOS in training
    assert prompt == whole[-len(prompt) :]
    short, nothing = backbone.encode({"prompt": "word1 word2"})
    assert nothing == [] and short == backbone.tokenizer("word1 word2")["input_ids"]


def test_collate_marks_prompts_answers_and_padding(backbone):
    ids, real, prompts, labels = (
        t.tolist() for t in backbone.collate([([5, 6, 7], [8]), ([9], [10, 11]), ([12, 13], [])])
    )
    assert ids == [[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0]]
    assert real == [[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2]
    assert prompts == [[True] * 3 + [False], [True] + [False] * 3, [True] * 2 + [False] * 2]
    assert labels == [[-100, -100, -100, 8], [-100, 10, 11, -100], [-100] * 4]


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_index_once_within_the_budget(backbone, seed):
    lengths = np.random.default_rng(seed).integers(1, 300, 100).tolist()
    batches = list(backbone.batches(lengths, tokens=1000))
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1000 for batch in batches if len(batch) > 1)


@pytest.mark.parametrize("count, size", [(1, 4), (7, 4), (64, 4), (65, 4), (333, 16), (5, 100)])
def test_an_epochs_batches_hold_every_index_once(count, size):
    lengths = np.random.default_rng(0).integers(1, 50, count).tolist()
    steps = -(-count // size)
    batches = list(training.epoch_batches(lengths, size, 2 * steps, 1))
    assert len(batches) == 2 * steps
    for epoch in (batches[:steps], batches[steps:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(count))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert batches[: steps + 1] == list(training.epoch_batches(lengths, size, steps + 1, 1))
    if count > 64:
        assert batches[:steps] != batches[steps:] and batches != list(
            training.epoch_batches(lengths, size, 2 * steps, 2)
        )


# --- training


def test_lora_training_lowers_the_loss_and_touches_the_ffn_factors_alone(backbone, records):
    frozen = {name: p.clone() for name, p in backbone.model.named_parameters()}
    model = backbone.add_lora(4, 8, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and all(".mlp." in name and ".lora_" in name for name in trained)
    start = {name: p.clone() for name, p in model.named_parameters() if name in trained}
    losses = teach(backbone, model, records)
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], start[name]) for name in trained)
    for name, before in frozen.items():
        matches = [
            p
            for key, p in after.items()
            if key.removeprefix("base_model.model.").replace(".base_layer", "") == name
        ]
        assert len(matches) == 1 and torch.equal(matches[0], before), name
    assert not any(p.requires_grad for p in model.parameters())


def test_full_ffn_training_touches_the_ffn_weights_alone(backbone, records):
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    model = backbone.train_full_ffn()
    losses = teach(backbone, model, records)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (".mlp." in name), name


def test_final_training_of_a_moe_moves_routers_and_experts_alone(backbone, records):
    model = unified(backbone, weighting="stopgrad")
    mine = {
        id(p)
        for p in [*moe.router_parameters(model), *moe.lambda_parameters(model), *moe.expert_parameters(model)]
    }
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = [
        {"params": moe.router_parameters(model) + moe.expert_parameters(model), "lr": 0.01},
        {"params": moe.lambda_parameters(model), "lr": 1.0},  # would leave [0, 1] without the projection
    ]
    lams = []

    def after_step():
        moe.clamp_(model)
        lams.extend(lam.item() for lam in moe.lambda_parameters(model))

    losses = teach(backbone, model, records, groups=groups, after_step=after_step)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert all(0 <= lam <= 1 for lam in lams) and len(set(lams)) > 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (id(p) in mine), name


def test_training_repeats_itself(seed_model, records):
    losses = []
    for seed in (0, 0, 1):
        backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
        losses.append(teach(backbone, backbone.add_lora(4, 8, seed), records, steps=5))
    assert losses[0] == losses[1] != losses[2]


def test_warm_up_is_linear_and_the_rate_constant_after_it(backbone, records, monkeypatch):
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    teach(backbone, backbone.add_lora(4, 8, 0), records, steps=6, lr=0.03)
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.03, 0.03, 0.03])


def test_a_loss_that_explodes_is_the_users_to_put_right(backbone, records):
    with pytest.raises(UserError, match="lower the learning rate"):
        teach(backbone, backbone.add_lora(4, 8, 0), records, lr=1e30)


# --- experts on disk


@pytest.mark.parametrize("full", [False, True])
def test_a_saved_expert_is_the_trained_one(backbone, seed_model, records, tmp_path, full):
    """Through with_adapter (evaluate.py), and through read_expert and a MoE that has this expert alone (unify_moe.py)."""
    model = backbone.train_full_ffn() if full else backbone.add_lora(4, 8, 0)
    teach(backbone, model, records, steps=10)
    want = backbone.scores(model, records)
    (tmp_path / "expert").mkdir()
    uploads.save_expert(model, backbone, tmp_path / "expert", full)

    def check(make, tolerance):
        fresh = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
        for a, b in zip(fresh.scores(make(fresh), records), want, strict=True):
            assert a == pytest.approx(b, abs=tolerance)

    check(lambda fresh: fresh.with_adapter(tmp_path / "expert"), 1e-5)
    expert = uploads.read_expert(tmp_path / "expert")
    check(lambda fresh: moe.unify(fresh.model, fresh.ffn_names, [expert], [torch.zeros(2, 32)]), 1e-4)
    zero = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    assert max(np.abs(a - b).max() for a, b in zip(zero.scores(zero.model, records), want, strict=True)) > 0.5


def test_the_saved_adapter_is_the_same_bytes_whatever_the_order_of_its_targets(backbone, records, tmp_path):
    model = backbone.add_lora(4, 8, 0)
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        model.peft_config["default"].target_modules = set(
            sorted(model.peft_config["default"].target_modules, reverse=number == 2)
        )
        uploads.save_expert(model, backbone, tmp_path / str(number), False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "1" / "adapter" / name).read_bytes() == (
            tmp_path / "2" / "adapter" / name
        ).read_bytes()
    assert sorted(p.name for p in (tmp_path / "1" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_written_files_follow_the_umask(tmp_path, umask):
    """save_file and temporary files are the owner's alone until they are moved in."""
    before = os.umask(umask)
    try:
        with rundir.atomic(tmp_path / "features.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        with rundir.atomic(tmp_path / "model") as temporary:
            (temporary / "part").mkdir(parents=True, mode=0o700)
            os.close(tempfile.mkstemp(dir=temporary / "part")[0])
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask
    assert len(list(tmp_path.rglob("*"))) == 4


# --- loading


def test_an_unknown_backbone_or_device_is_the_users_to_put_right(seed_model, tmp_path):
    with pytest.raises(UserError, match="gpt-9"):
        backbones.load_backbone("gpt-9")
    with pytest.raises(UserError, match="abacus"):
        backbones.load_backbone("smollm2-135m", seed_model, "abacus")
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load_backbone("smollm2-135m", tmp_path, "cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_weights_are_stored_in_the_compute_dtype_and_factors_train_in_float32(
    seed_model, records, dtype
):
    backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", dtype)
    model = backbone.add_lora(4, 8, 0)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "lora_" in name else getattr(torch, dtype)), name
    losses = teach(backbone, model, records)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_bfloat16_scores_are_near_those_of_float32(seed_model, records):
    got = [
        np.concatenate(b.scores(b.model, records))
        for b in (
            backbones.load_backbone("smollm2-135m", seed_model, "cpu", d) for d in ("float32", "bfloat16")
        )
    ]
    assert got[1] == pytest.approx(got[0], abs=0.05 * np.abs(got[0]).max()) and not np.array_equal(*got)
