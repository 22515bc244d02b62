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
from metamoe import backbones, rundir, sending, uploads
from metamoe.backbones import training
from metamoe.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def load(seed_model):
    return lambda dtype="float32": backbones.load_backbone("smollm2-135m", seed_model, "cpu", dtype)


@pytest.fixture
def backbone(load):
    return load()


@pytest.fixture(scope="module")
def records():
    """Of many lengths, with choices of 1 to 5 tokens, some of them beginnings of others."""
    rng = random.Random(1)
    out = [tiny.record(topic, rng, False) for topic in list(tiny.TOPICS) * 4]
    for i, record in enumerate(out):
        record["prompt"] = " ".join(["long story"] * (i % 5) + [record["prompt"]])
        more = [" play music", " play", record["answer"] + " indeed so"]
        record["choices"] = list(dict.fromkeys(record["choices"] + more))
    return out


def furthest(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


@pytest.fixture(params=["seed model", "fixed"])
def model(request, backbone):
    return backbone.model if request.param == "seed model" else unified(backbone)


# --- scores


def check_scores(backbone, model, records):
    """Prompt and choices packed in one sequence with a tree mask: as if every choice were scored alone."""
    together = backbone.scores(model, records)
    for record, values in zip(records, together, strict=True):
        pairs = [backbone.encode(record, choice) for choice in record["choices"]]
        assert values == pytest.approx([score_alone(backbone, model, *pair) for pair in pairs], abs=1e-4)
    return together


def test_scores_are_those_of_single_choices_whatever_the_batch_and_the_order(backbone, model, records):
    assert len({len(backbone.encode(record)[0]) for record in records}) > 5
    together = check_scores(backbone, model, records)
    order = np.random.default_rng(0).permutation(len(records))
    shuffled = backbone.scores(model, [records[i] for i in order])
    assert furthest(shuffled, [together[i] for i in order]) < 1e-4
    for record, values in zip(records[:6], together, strict=False):
        assert backbone.scores(model, [record])[0] == pytest.approx(values, abs=1e-4)
        reverse = backbone.scores(model, [record | {"choices": record["choices"][::-1]}])[0]
        assert reverse[::-1] == pytest.approx(values, abs=1e-4)


def test_scores_of_two_experts_a_token_are_those_of_single_choices(backbone, records):
    check_scores(backbone, unified(backbone, top_k=2), records[:8])


def test_a_moe_scores_otherwise_than_its_seed_model_and_counts_its_prompts_tokens(backbone, records):
    """The tests above would pass on a MoE that is the seed model."""
    before = backbone.scores(backbone.model, records)
    model = unified(backbone)
    model.routing.record = True
    assert furthest(backbone.scores(model, records), before) > 1
    counts = moe.counts(model)
    assert counts.sum(1).tolist() == [sum(len(backbone.encode(record)[0]) for record in records)] * 2
    assert (counts > 0).sum() > 3


# --- loss


def test_loss_is_the_cross_entropy_of_the_answers_tokens(backbone, model, records):
    encoded = [backbone.example(record) for record in records]
    assert all(answer[-1] == backbone.tokenizer.eos_token_id for _, answer in encoded)
    total = sum(score_alone(backbone, model, *pair) for pair in encoded)
    got = backbone.loss(model, encoded)
    assert got.item() == pytest.approx(-total / sum(len(answer) for _, answer in encoded), abs=1e-4)
    backbone.pad = 77  # padding does not reach the loss
    assert torch.equal(backbone.loss(model, encoded), got)


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
    records = records * 12
    whole = list(backbone.embed(records))
    assert len(whole) > 2 and sorted(i for batch, _ in whole for i in batch) == list(range(len(records)))
    for skip in (1, len(whole) - 1, len(whole)):
        for (a, x), (b, y) in zip(backbone.embed(records, skip=skip), whole[skip:], strict=True):
            assert a == b and np.array_equal(x, y)


@pytest.mark.parametrize("lora", [False, True])
def test_routing_vectors_equal_those_of_single_texts(backbone, records, lora):
    """The mean over samples of the mean over tokens: long texts weigh no more than short ones."""
    model = backbone.model
    if lora:
        model = backbone.add_lora(4, 8, 0).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    got = backbone.routing_vectors(model, records)
    seen = []  # inputs (T, d) of the first FFN, of the second, of the first with the next text, ...
    for name in backbone.ffn_names:
        ffn = backbone.model.get_submodule(name)
        assert not ffn._forward_pre_hooks  # none is left
        ffn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for record in records:
            model(input_ids=torch.tensor([backbone.tokenizer(record["prompt"])["input_ids"]]))
    texts = [torch.stack(pair) for pair in zip(seen[::2], seen[1::2], strict=True)]  # (2, T, d) each
    want = torch.stack([text.mean(1) for text in texts]).mean(0)
    assert got.shape == (2, 32) and torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(got, torch.cat(texts, 1).mean(1), atol=1e-3)


# --- tokens


def test_encode_cuts_the_prompts_beginning_and_keeps_the_answer(backbone):
    record = {"prompt": " ".join(f"word{i}" for i in range(300))}
    whole = backbone.tokenizer(record["prompt"])["input_ids"]
    answer = backbone.tokenizer(" play music", add_special_tokens=False)["input_ids"]
    prompt, ids = backbone.encode(record, " play music")
    assert ids == answer and len(prompt) + len(ids) + 1 == backbone.max_length == 256  # 1: EOS in training
    assert prompt == whole[-len(prompt) :]
    short = backbone.tokenizer("word1 word2")["input_ids"]
    assert backbone.encode({"prompt": "word1 word2"}) == (short, [])


def test_collate_marks_prompts_answers_and_padding(backbone):
    pairs = [([5, 6, 7], [8]), ([9], [10, 11]), ([12, 13], [])]
    ids, real, prompts, labels = (tensor.tolist() for tensor in backbone.collate(pairs))
    assert ids == [[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0]]
    assert real == [[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2]
    assert prompts == [[True] * 3 + [False], [True] + [False] * 3, [True] * 2 + [False] * 2]
    assert labels == [[-100, -100, -100, 8], [-100, 10, 11, -100], [-100] * 4]


def test_batches_hold_every_index_once_within_the_budget(backbone):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 300, 100)
        batches = list(backbone.batches(lengths.tolist(), tokens=1000))
        assert sorted(i for batch in batches for i in batch) == list(range(100))
        assert all(len(batch) * lengths[batch].max() <= 1000 for batch in batches if len(batch) > 1)


@pytest.mark.parametrize("count, size", [(1, 4), (7, 4), (64, 4), (65, 4), (333, 16), (5, 100)])
def test_an_epochs_batches_hold_every_index_once(count, size):
    lengths = np.random.default_rng(0).integers(1, 50, count).tolist()
    steps = -(-count // size)

    def batches(steps, seed=1):
        return list(training.epoch_batches(lengths, size, steps, seed))

    two = batches(2 * steps)
    assert len(two) == 2 * steps and all(1 <= len(batch) <= size for batch in two)
    for epoch in (two[:steps], two[steps:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(count))
    assert two[: steps + 1] == batches(steps + 1)
    if count > 64:
        assert two[:steps] != two[steps:] and two != batches(2 * steps, seed=2)


# --- training


def teach_and_compare(backbone, model, records, **kwargs):
    """(the last five losses over the first five, the names of the weights that moved)."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = teach(backbone, model, records, **kwargs)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return sum(losses[-5:]) / sum(losses[:5]), moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_training_lowers_the_loss_and_touches_the_ffn_factors_alone(load, records, dtype):
    """Frozen weights are stored in the compute dtype, and factors train in float32."""
    backbone = load(dtype)
    frozen = sorted(p.double().sum().item() for p in backbone.model.parameters())
    model = backbone.add_lora(4, 8, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and all(".mlp." in name and ".lora_" in name for name in trained)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name in trained else getattr(torch, dtype)), name
    share, moved = teach_and_compare(backbone, model, records, steps=20)
    assert share < 0.6 and moved == trained and not any(p.requires_grad for p in model.parameters())
    rest = [p for name, p in model.named_parameters() if name not in trained]
    assert sorted(p.double().sum().item() for p in rest) == frozen  # PEFT renamed the weights, no more


def test_full_ffn_training_touches_the_ffn_weights_alone(backbone, records):
    model = backbone.train_full_ffn()
    share, moved = teach_and_compare(backbone, model, records)
    assert share < 0.6 and moved == {name for name, _ in model.named_parameters() if ".mlp." in name}


def test_final_training_of_a_moe_moves_routers_and_experts_alone(backbone, records):
    model = unified(backbone, weighting="stopgrad")
    slow = moe.router_parameters(model) + moe.expert_parameters(model)
    fast = moe.lambda_parameters(model)
    # at this rate lambda would leave [0, 1] without the projection
    groups, lams = [{"params": slow, "lr": 0.01}, {"params": fast, "lr": 1.0}], []

    def after_step():
        moe.clamp_(model)
        lams.extend(lam.item() for lam in fast)

    share, moved = teach_and_compare(backbone, model, records, groups=groups, after_step=after_step)
    assert share < 0.7
    assert all(0 <= lam <= 1 for lam in lams) and len(set(lams)) > 1
    mine = {id(p) for p in slow + fast}
    assert moved == {name for name, p in model.named_parameters() if id(p) in mine}


def test_training_repeats_itself(load, records):
    losses = []
    for seed in (0, 0, 1):
        backbone = load()
        losses.append(teach(backbone, backbone.add_lora(4, 8, seed), records, steps=3))
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 3


def test_the_presets_warm_up_is_at_most_a_tenth_and_the_flags_stays(capsys):
    assert training.warm_up(None, 10, 200) == 10 and not capsys.readouterr().out
    assert training.warm_up(None, 200, 20) == 2 and "2 of 20 steps" in capsys.readouterr().out
    assert training.warm_up(15, 15, 20) == 15 and not capsys.readouterr().out


def test_the_first_and_the_last_losses_do_not_overlap():
    assert training.ends([4.0]) == (4.0, 4.0)
    assert training.ends([4.0, 3.0, 1.0]) == (4.0, 1.0)
    assert training.ends(list(map(float, range(20)))) == (2.0, 17.0)


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
def test_a_saved_expert_is_the_trained_one(load, records, tmp_path, full):
    """Through with_expert, as evaluate.py reads it, and in a MoE of it alone, as unify_moe.py does."""
    backbone = load()
    model = backbone.train_full_ffn() if full else backbone.add_lora(4, 8, 0)
    teach(backbone, model, records, steps=10)
    want = backbone.scores(model, records)
    sending.save_expert(model, backbone, tmp_path, full)
    fresh = load()
    assert furthest(fresh.scores(fresh.model, records), want) > 0.5
    assert furthest(fresh.scores(fresh.with_expert(uploads.read_expert(tmp_path)), records), want) < 1e-5
    fresh = load()
    merged = moe.unify(fresh.model, fresh.ffn_names, [uploads.read_expert(tmp_path)], [torch.zeros(2, 32)])
    assert furthest(fresh.scores(merged, records), want) < 1e-4


def test_the_saved_adapter_is_the_same_bytes_whatever_the_order_of_its_targets(backbone, tmp_path):
    model = backbone.add_lora(4, 8, 0)
    config, found = model.peft_config["default"], []
    for reverse in (False, True):
        folder = tmp_path / str(reverse)
        folder.mkdir()
        config.target_modules = set(sorted(config.target_modules, reverse=reverse))
        sending.save_expert(model, backbone, folder, False)
        found.append({path.name: path.read_bytes() for path in (folder / "adapter").iterdir()})
    assert found[0] == found[1] and set(found[0]) == {"adapter_config.json", "adapter_model.safetensors"}


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
    for args, say in ((["gpt-9"], "gpt-9"), (["smollm2-135m", seed_model, "abacus"], "abacus")):
        with pytest.raises(UserError, match=say):
            backbones.load_backbone(*args)
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load_backbone("smollm2-135m", tmp_path, "cpu")


def test_bfloat16_scores_are_near_those_of_float32(load, records):
    one, other = (np.concatenate(b.scores(b.model, records)) for b in (load(), load("bfloat16")))
    assert other == pytest.approx(one, abs=0.05 * np.abs(one).max()) and not np.array_equal(one, other)
