"""Differential privacy: noise of the stated size, clipping that holds, an accountant that others agree with,
a ledger that no way of running the stages again can outwit."""

import json
import math
import random
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from scipy.stats import norm
from tiny import CLIENTS, refused, stage

from metamoe import backbones
from metamoe.backbones import text
from metamoe.errors import UserError
from metamoe.privacy import accounting, dpsgd, mechanisms
from metamoe.privacy.ledger import Budget, one_query, open_budget
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ["relevance", "vectors", "expert"]
TERMS = {"epsilon": 4.0, "delta": 1e-3, "parts": PARTS}
FLAGS = "--epsilon 4 --delta 0.001".split()
EXPERT = "--rank 2 --alpha 4 --epochs 1 --lr 0.01 --client intent".split()


def records(count, seed=0):
    rng = random.Random(seed)
    return [tiny.record("hotels", rng, True) for _ in range(count)]


@pytest.fixture
def lora(seed_model):
    """A backbone and its model with LoRA factors, of which none is zero."""
    backbone = backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")
    model = backbone.add_lora(2, 4, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return backbone, model


def trained_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- the accountant


def gaussian_delta(mu, epsilon):
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def poisson_delta(sigma, rate, epsilon):
    """Of one Gaussian release on a Poisson sample, where a record is removed."""
    at = sigma**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 0.5
    mixture = (1 - rate) * norm.sf(at / sigma) + rate * norm.sf((at - 1) / sigma)
    return mixture - math.exp(epsilon) * norm.sf(at / sigma)


def check_epsilon(releases, delta_of):
    """An upper bound that is at most 0.01 too high."""
    found = accounting.spent_epsilon(releases, 1e-3)
    assert delta_of(found) <= 1e-3 < delta_of(found - 0.011)
    return found


@pytest.mark.parametrize("sigma, epsilon", [(4.61, 0.5), (2.58, 1), (1.45, 2), (0.82, 4), (0.48, 8)])
def test_the_accountant_agrees_with_the_gaussian_formula(sigma, epsilon):
    found = check_epsilon([(sigma, 1.0, 1)], lambda e: gaussian_delta(1 / sigma, e))
    assert found == pytest.approx(epsilon, rel=0.01, abs=0.011)
    assert accounting.least_noise(lambda s: [(s, 1.0, 1)], epsilon, 1e-3) == pytest.approx(sigma, rel=0.025)


def test_the_accountant_agrees_with_the_formulas_of_sums_and_samples():
    for sigma, rate in ((0.8, 0.25), (1.5, 0.1)):
        check_epsilon([(sigma, rate, 1)], partial(poisson_delta, sigma, rate))
    check_epsilon([(2.0, 1.0, 1), (1.0, 1.0, 4)], lambda e: gaussian_delta(math.sqrt(0.25 + 4), e))


def losses_of(sigma, rate, added, step, size):
    """The distribution of one step's privacy loss, on a grid of `size` steps around 0, for one direction."""
    x = np.linspace(-12 * sigma - 1, 12 * sigma + 2, 400_001)
    without = norm.pdf(x, 0, sigma)
    ratio = np.log1p(rate * np.expm1((2 * x - 1) / (2 * sigma**2)))  # of the density with the record
    weights, loss = (without, -ratio) if added else (without * np.exp(ratio), ratio)
    places = np.clip(np.rint(loss / step).astype(int), -size // 2, size // 2 - 1) % size
    return np.bincount(places, weights, size) / weights.sum()


def convolved_epsilon(releases, delta, added, step=1e-3, size=2**16):
    """As spent_epsilon: the distributions of all steps' losses convolved."""
    total = np.prod([np.fft.fft(losses_of(s, q, added, step, size)) ** k for s, q, k in releases], axis=0)
    density = np.fft.ifft(total).real.clip(0)
    losses = step * ((np.arange(size) + size // 2) % size - size // 2)
    return brentq(lambda e: density @ -np.expm1(np.minimum(e - losses, 0)) - delta, 0, 30)


def test_the_accountant_agrees_with_a_convolution_in_both_directions():
    for releases in ([(3.7, 1.0, 1), (2.6, 1.0, 2), (1.41, 0.25, 24)], [(1.0, 0.25, 40)]):
        found = accounting.spent_epsilon(releases, 1e-3)
        assert convolved_epsilon(releases, 1e-3, added=False) == pytest.approx(found, abs=0.011)
        assert convolved_epsilon(releases, 1e-3, added=True) < found


@pytest.mark.parametrize("epsilon, sigma", [(1, 4.30), (4, 1.53), (8, 1.00)])
def test_the_noise_of_the_steps_of_dpsgd(epsilon, sigma):
    assert accounting.least_noise(lambda s: [(s, 0.25, 40)], epsilon, 1e-3) == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize("parts", [PARTS, ["vectors"], ["relevance", "vectors"], ["expert"]])
def test_all_parts_together_spend_the_whole_budget(tmp_path, parts):
    budget = Budget(tmp_path / "privacy.json", TERMS | {"parts": parts}, None)
    spent = [(budget.noise(part), 1.0, 1) for part in ("count", *parts) if part != "expert"]
    if "expert" in parts:
        spent.append((budget.expert_noise(0.25, 24), 0.25, 24))
    assert 3.9 < accounting.spent_epsilon(spent, 1e-3) <= 4.01


# --- the noise


def test_the_noise_of_sums_of_zeros_has_the_stated_size():
    rng = np.random.default_rng(0)
    total = mechanisms.noisy_sum(np.zeros((7, 20_000)), 3.0, rng)
    assert total.std() == pytest.approx(3, rel=0.03) and abs(total.mean()) < 0.1


def same_rows(rows, layers, width):
    """A backbone whose records have these token means in every layer."""

    def input_sums(model, records, label, width, of):
        return torch.stack([of(layer, rows[records]).sum(0).double() for layer in range(layers)])

    names = ["ffn"] * layers
    return SimpleNamespace(input_sums=input_sums, ffn_names=names, width=width, device="cpu")


def test_the_noise_of_routing_vectors_has_the_stated_size():
    layers, width = 4, 5_000
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    public = list(range(30))
    backbone = same_rows(rows, layers, width)
    centre, length = mechanisms.public_scale(backbone, None, public)
    rows = torch.cat([rows, rows.mean(0, keepdim=True)])  # a record that adds nothing
    backbone, rng = same_rows(rows, layers, width), np.random.default_rng(1)
    vectors, clipped_at = mechanisms.private_vectors(backbone, None, [30] * 3, public, 50.0, 2.0, rng)
    found = (vectors - centre) / length[:, None]
    assert found.std() == pytest.approx(2.0 * math.sqrt(layers) / 50, rel=0.03)
    assert clipped_at == pytest.approx(length.tolist())


def test_one_record_moves_the_routing_vectors_by_the_length_it_is_clipped_at():
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    for far in (1e6, math.inf, math.nan):
        backbone = same_rows(torch.cat([rows, torch.full((1, 8), far)]), 3, 8)
        found = []
        for private in ([*range(10)], [*range(10), 20]):
            still = SimpleNamespace(standard_normal=np.zeros)
            found.append(mechanisms.private_vectors(backbone, None, private, range(20), 10.0, 1.0, still)[0])
        length = mechanisms.public_scale(backbone, None, range(20))[1]
        moved = (found[1] - found[0]).norm(dim=1)
        assert moved.isfinite().all() and (moved <= length / 10 * 1.001).all()


def zeros_backbone(parameter):
    def sample_losses(model, records, classes, batches, seed):
        for batch in batches:
            yield model(torch.zeros(len(batch), 1)).sum() * 0

    return SimpleNamespace(sample_losses=sample_losses)


SGD = dict(optimizer="sgd", weight_decay=0.0, warmup_steps=0, seed=0, label="test", classes=())


def test_the_noise_of_a_step_of_dpsgd_has_the_stated_size():
    model = torch.nn.Linear(1, 20_000, bias=False)
    before, groups = model.weight.detach().clone(), [{"params": [model.weight], "lr": 1.0}]
    mechanism, size = (40.0, 0.25, 3.0, 0.5, 1), 8
    rng = np.random.default_rng(0)
    dpsgd.train_privately(
        zeros_backbone(model),
        model,
        [{}] * 40,
        [],
        groups,
        dpsgd.Mechanism(*mechanism, rng),
        batch_size=size,
        **SGD,
    )
    moved = (model.weight - before) / 1.9  # Nesterov's first step
    assert moved.std().item() == pytest.approx(3.0 * 0.5 / (0.25 * 40), rel=0.03)


# --- clipping


def one_at_a_time(backbone, model, rows, classes=()):
    found = []
    for index in range(len(rows)):
        (loss,) = backbone.sample_losses(model, rows, classes, [[index]], 0)
        found.append(torch.autograd.grad(loss, trained_of(model)))
    return found


def check_sample_gradients(backbone, model, rows, classes=(), tolerance=1e-5):
    trained = trained_of(model)
    with dpsgd.sample_gradients(model):
        losses = backbone.sample_losses(model, rows, classes, [list(range(len(rows)))], 0)
        ((_, found, lengths),) = dpsgd.gradients(losses, trained)
    alone = one_at_a_time(backbone, model, rows, classes)
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
    for i, grads in enumerate(alone):
        own = [grad[i] for grad in found]
        for left, right in zip(own, grads, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=tolerance * right.abs().max().item())
        assert lengths[i] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in own)), rel=1e-4)


def test_gradients_of_texts_are_those_of_one_text_at_a_time(lora):
    check_sample_gradients(*lora, records(5))


def test_gradients_of_images_are_those_of_one_image_at_a_time():
    backbone = backbones.load_backbone("glyph-clip", "", "cpu", "float32")
    model = backbone.add_lora(2, 4, 0)
    for parameter in trained_of(model):
        torch.nn.init.normal_(parameter, std=0.1)
    rows = glyphs()
    check_sample_gradients(backbone, model, rows, [row["answer"] for row in rows])


def glyphs():
    from metamoe.data.registry import DATASETS

    sizes = {"train": 4, "validation": 1, "test": 1}
    found = DATASETS["greek"].load("greek", sizes, 0, None)["train"]
    return list({row["answer"]: row for row in found}.values())


def test_what_is_short_enough_is_not_changed():
    lengths = torch.tensor([0.0, 0.1, 0.5, 2.0, math.inf, math.nan])
    assert mechanisms.clip_factors(lengths, 0.5).tolist() == [1, 1, 1, 0.25, 0, 0]
    assert mechanisms.clip_factors(lengths, math.inf).tolist() == [1, 1, 1, 1, 0, 0]


def test_gradients_in_bfloat16_are_added_up_in_float32(lora):
    backbone, model = lora
    backbone.dtype = torch.bfloat16
    with dpsgd.sample_gradients(model):
        for loss in backbone.sample_losses(model, records(4), (), [[0, 1, 2, 3]], 0):
            loss.backward()
            assert all(parameter.grad_sample.dtype == torch.bfloat16 for parameter in trained_of(model))
            backward = SimpleNamespace(backward=lambda: None, item=lambda: 0.0)  # it has run
            ((_, found, lengths),) = dpsgd.gradients([backward], trained_of(model))
    assert {tensor.dtype for tensor in [*found, lengths]} == {torch.float32}


@pytest.mark.parametrize("size", [1e6, math.inf, math.nan])
def test_a_record_with_a_huge_gradient_moves_the_sum_by_what_it_is_clipped_at(lora, size):
    backbone, model = lora
    plain, rows, bound = backbone.loss, records(5), 0.05

    def sums_of(batch):
        backbone.loss = lambda model, encoded, each: plain(model, encoded, each=each) * size_of[0]
        with dpsgd.sample_gradients(model):
            found = []
            for index in batch:
                size_of[0] = size if index == 4 else 1.0
                losses = list(backbone.sample_losses(model, rows, (), [[index]], 0))
                found.append(dpsgd.clipped_sum(losses, trained_of(model), bound)[0])
        return torch.cat([torch.stack(own).sum(0).flatten() for own in zip(*found, strict=True)])

    size_of = [1.0]
    moved = (sums_of(range(5)) - sums_of(range(4))).norm().item()
    assert moved <= bound * 1.0001
    assert moved == pytest.approx(bound if size == 1e6 else 0, abs=1e-5)


def test_a_step_holds_nothing_of_the_gradients_before_clipping(lora):
    backbone, model = lora
    before = [parameter.detach().clone() for parameter in trained_of(model)]
    groups = [{"params": trained_of(model), "lr": 1.0}]
    mechanism, size = (8.0, 1.0, 0.0, 1e-3, 1), 4
    rng = np.random.default_rng(0)
    dpsgd.train_privately(
        backbone, model, records(8), [], groups, dpsgd.Mechanism(*mechanism, rng), batch_size=size, **SGD
    )
    after = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    moved = sum((new - old).square().sum().item() for new, old in zip(after, before, strict=True))
    assert 0 < math.sqrt(moved) / 1.9 <= 1e-3 * 1.0001


# --- without noise and clipping


def test_without_noise_the_routing_vectors_are_the_plain_means(lora):
    backbone, model = lora
    private, public = records(9), records(12, seed=1)
    found, _ = mechanisms.private_vectors(backbone, model, private, public, 9.0, 0.0, np.random.default_rng())
    torch.testing.assert_close(found, backbone.routing_vectors(model, private), rtol=1e-4, atol=1e-5)


def test_without_noise_a_step_on_all_records_is_the_plain_step(lora):
    """Of SGD: the gradient of the mean over private records and proxies, each text's loss its own mean."""
    backbone, model = lora
    private, proxies, trained = records(8), records(2, seed=1), trained_of(model)
    before = [parameter.detach().clone() for parameter in trained]
    losses = [backbone.loss(model, [backbone.example(row)]) for row in private]
    public = backbone.loss(model, [backbone.example(row) for row in proxies])
    want = torch.autograd.grad((sum(losses) + 2 * public) / 10, trained)
    mechanism, size = (8.0, 1.0, 0.0, math.inf, 1), 3
    groups, rng = [{"params": trained, "lr": 1.0}], np.random.default_rng(0)
    dpsgd.train_privately(
        backbone, model, private, proxies, groups, dpsgd.Mechanism(*mechanism, rng), batch_size=size, **SGD
    )
    for parameter, start, gradient in zip(trained, before, want, strict=True):
        torch.testing.assert_close((start - parameter) / 1.9, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("limit", [2**29, 5_000])
def test_weighted_losses_are_the_same_in_chunks(limit):
    torch.manual_seed(0)
    head, states = torch.nn.Linear(4, 50), torch.randn(70, 4)
    targets, weights = torch.arange(70) % 50, torch.rand(70)
    found = text.head_loss(head, states, targets, lambda logits: logits, limit, weights)
    each = torch.nn.functional.cross_entropy(head(states), targets, reduction="none")
    torch.testing.assert_close(found, each @ weights)


def test_relevance_under_a_budget_finds_the_public_samples_that_are_alike():
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((4, 16))
    public = kinds[np.arange(400) % 4] + rng.standard_normal((400, 16))
    private = kinds[1] + rng.standard_normal((300, 16))
    for noise in (0.0, 3.0):
        scores = mechanisms.private_relevance(public, private, 300.0, noise, 0, None, rng)
        best = np.argsort(-scores)[:50]
        assert (best % 4 == 1).mean() > 0.9
        assert 0 <= scores.min() and scores.max() <= 1
        assert scores[1::4].mean() > 3 * scores[np.arange(400) % 4 != 1].mean()


# --- the ledger


def test_a_part_is_paid_for_once_and_the_ledger_remembers(tmp_path):
    budget = open_budget(tmp_path, TERMS)
    bill = one_query("vectors", budget.noise("vectors"))
    budget.settle(bill, "the expert a")
    before = (tmp_path / "privacy.json").read_bytes()
    budget = open_budget(tmp_path, TERMS)
    budget.settle(bill, "the expert a")  # the same one, after an interruption
    assert (tmp_path / "privacy.json").read_bytes() == before
    for refuses in (
        lambda: budget.settle(bill, "the expert b"),
        lambda: budget.check("vectors", "the expert a"),
    ):
        with pytest.raises(UserError, match="one release"):
            refuses()
    with pytest.raises(UserError, match="budget"):
        budget.settle(one_query("expert", 0.1), "the expert a")
    assert (tmp_path / "privacy.json").read_bytes() == before
    assert (tmp_path / "privacy.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [None, TERMS | {"epsilon": 5.0}, TERMS | {"parts": ["expert"]}])
def test_another_budget_than_the_ledgers_is_refused(tmp_path, other):
    open_budget(tmp_path, TERMS).count([])
    with pytest.raises(UserError, match="epsilon 4"):
        open_budget(tmp_path, other)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"spent": []}'])
def test_a_damaged_ledger_is_refused(tmp_path, text):
    (tmp_path / "privacy.json").write_text(text)
    for terms in (None, TERMS):
        with pytest.raises(UserError, match="put it back"):
            open_budget(tmp_path, terms)


def test_the_number_of_records_is_drawn_once(tmp_path):
    budget = open_budget(tmp_path, TERMS)
    budget.rng = np.random.default_rng(0)
    drawn = np.random.default_rng(0).standard_normal()
    assert budget.count([0] * 100) == pytest.approx(100 + budget.noise("count") * drawn)
    assert open_budget(tmp_path, TERMS).count([0] * 500) == budget.count([])


# --- the stages


@pytest.fixture(scope="module")
def under_budget(tmp_path_factory, pristine):
    """A run whose client intent has selected and trained under a budget."""
    run_dir = tmp_path_factory.mktemp("budget") / "run"
    shutil.copytree(pristine, run_dir)
    for command in (["select_proxies", *FLAGS], ["train_expert", *EXPERT, *FLAGS]):
        result = stage(command[0], run_dir, *command[1:])
        assert result.code == 0, result.err
    return run_dir


@pytest.fixture
def spent(tmp_path, under_budget):
    shutil.copytree(under_budget, tmp_path / "run")
    return tmp_path / "run"


def ledger(run_dir):
    return read_json(run_dir / "clients" / "intent" / "privacy.json")


def test_the_ledger_has_what_each_part_spent_and_the_manifest_claims_it(under_budget):
    kept = ledger(under_budget)
    assert [entry["part"] for entry in kept["spent"]] == ["count", "relevance", "expert", "vectors"]
    upload = under_budget / "clients" / "intent" / "upload" / "aligned-dpp"
    claim = read_json(upload / "manifest.json")["privacy"]
    assert {key: claim[key] for key in TERMS} == TERMS and set(claim["clipping"]) == set(PARTS)
    assert len(claim["clipping"]["vectors"]) == 2
    assert not list(upload.rglob("privacy.json"))


def test_what_is_finished_is_not_made_again_nor_paid_again(spent):
    files = [spent / "clients/intent" / name for name in ("privacy.json", "upload/aligned-dpp/manifest.json")]
    before = [file.read_bytes() for file in files]
    assert "skipped" in stage("select_proxies", spent, *FLAGS).out
    assert "skipped" in stage("train_expert", spent, *EXPERT, *FLAGS).out
    assert [file.read_bytes() for file in files] == before


def test_a_stage_that_was_killed_before_it_paid_pays_when_it_runs_again(spent):
    path, kept = spent / "clients" / "intent" / "privacy.json", ledger(spent)
    path.write_text(json.dumps(kept | {"spent": kept["spent"][:2]}))
    assert "skipped" in stage("train_expert", spent, *EXPERT, *FLAGS).out
    assert ledger(spent) == kept


@pytest.mark.parametrize(
    "flags, about",
    [
        ([*FLAGS, "--lr", "0.02", "--force"], "one release"),
        ([*FLAGS, "--data", "private"], "one release"),
        (["--force"], "epsilon 4"),
        (["--epsilon", "5", "--delta", "0.001", "--force"], "epsilon 4"),
        (["--epsilon", "4", "--force"], "delta 1e-05"),
        ([*FLAGS, "--private-parts", "expert", "--force"], "for expert"),
    ],
)
def test_no_way_of_training_again_spends_more(spent, flags, about):
    assert about in refused("train_expert", spent, *EXPERT, *flags)


def test_no_way_of_selecting_again_spends_more(spent):
    (spent / "clients/intent/selection/relevance.npy").unlink()
    again = ["--selection", "similarity", *FLAGS]
    result = stage("select_proxies", spent, "--client", "intent", *again)
    assert result.code == 2 and "one release" in result.err
    assert "epsilon 4" in refused("select_proxies", spent, "--client", "intent", "--force")


def test_a_lost_expert_is_not_trained_a_second_time(spent):
    shutil.rmtree(spent / "clients/intent/experts/aligned-dpp")
    assert "one release" in refused("train_expert", spent, *EXPERT, *FLAGS)


def test_proxies_that_were_chosen_without_the_budget_are_refused(fresh):
    assert stage("select_proxies", fresh).code == 0
    assert "select_proxies.py" in refused("train_expert", fresh, *EXPERT, *FLAGS)


@pytest.mark.parametrize(
    "stage_name, flags, about",
    [
        ("select_proxies", ["--delta", "0.1"], "--epsilon"),
        ("select_proxies", ["--private-parts", "expert"], "--epsilon"),
        ("select_proxies", ["--epsilon", "0"], "--epsilon"),
        ("select_proxies", ["--epsilon", "nan"], "--epsilon"),
        ("select_proxies", ["--epsilon", "1", "--delta", "1"], "--delta"),
        ("train_expert", ["--epsilon", "1", "--full-ffn"], "--full-ffn"),
        ("train_expert", ["--epsilon", "1", "--gradient-checkpointing"], "--gradient-checkpointing"),
        ("train_expert", ["--fixed-a", "--full-ffn"], "--fixed-a"),
    ],
)
def test_flags_that_do_not_fit_are_refused(fresh, stage_name, flags, about):
    assert about in refused(stage_name, fresh, *flags)


def sent(run_dir, file):
    return load_file(run_dir / "clients/intent/upload/aligned-dpp" / file)


@pytest.mark.slow
def test_a_part_alone_leaves_the_others_as_they_are_without_a_budget(fresh, tmp_path):
    only = [*FLAGS, "--private-parts", "vectors"]
    results = []
    for number, flags in enumerate(([], only, only)):
        run_dir = tmp_path / str(number)
        shutil.copytree(fresh, run_dir)
        assert stage("select_proxies", run_dir, *flags).code == 0
        assert stage("train_expert", run_dir, *EXPERT, *flags).code == 0
        results.append(run_dir)
    plain, one, two = results
    adapters = [sent(run_dir, "adapter/adapter_model.safetensors") for run_dir in results]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    vectors = [sent(run_dir, "router.safetensors")["vectors"] for run_dir in results]
    assert not torch.equal(vectors[1], vectors[2])  # the noise is not that of the run's random seed
    proxies = [read_json(r / "clients/intent/upload/aligned-dpp/proxies.json") for r in results]
    assert proxies[0] == proxies[1]
    assert [entry["part"] for entry in ledger(one)["spent"]] == ["count", "vectors"]


@pytest.mark.slow
def test_with_fixed_a_the_factors_a_stay(fresh):
    assert stage("select_proxies", fresh, *FLAGS).code == 0
    assert stage("train_expert", fresh, *EXPERT, *FLAGS, "--fixed-a").code == 0
    local = read_json(fresh / "local.json")
    start = backbones.load_backbone("smollm2-135m", local["seed_model"], "cpu", "float32").add_lora(2, 4, 0)
    begun = {name: parameter for name, parameter in start.named_parameters() if "lora_" in name}
    for key, value in sent(fresh, "adapter/adapter_model.safetensors").items():
        same = torch.equal(value, begun[key.replace(".weight", ".default.weight")])
        assert same == ("lora_A" in key)


@pytest.mark.slow
def test_epsilon_inf_claims_nothing_and_spends_nothing(fresh):
    flags = ["--epsilon", "inf", "--delta", "0.001"]
    assert stage("select_proxies", fresh, *flags).code == 0
    assert stage("train_expert", fresh, *EXPERT, *flags).code == 0
    assert read_json(fresh / "clients/intent/upload/aligned-dpp/manifest.json")["privacy"] is None
    assert ledger(fresh)["count"] == tiny.SIZES["train_size"]
    assert "epsilon inf" in refused("train_expert", fresh, *EXPERT, *FLAGS, "--force")


# --- the server

CLAIM = TERMS | {
    "unit": "one private record, added or removed",
    "clipping": {"expert": 1.0, "vectors": [1.0]},
}


@pytest.mark.parametrize(
    "changed",
    [
        0,
        {},
        CLAIM | {"epsilon": -1},
        CLAIM | {"epsilon": "4"},
        CLAIM | {"delta": 1.5},
        CLAIM | {"unit": "a client"},
        CLAIM | {"parts": []},
        CLAIM | {"parts": ["expert", "vectors"]},
        CLAIM | {"parts": [["expert"]]},
        CLAIM | {"clipping": {"proxies": 1.0}},
        CLAIM | {"clipping": {"expert": True}},
        CLAIM | {"clipping": {"expert": [[1.0]]}},
        CLAIM | {"more": 1},
    ],
)
def test_a_claim_of_another_form_is_refused(run, changed):
    upload = run / "clients" / CLIENTS[0] / "upload" / "aligned-dpp"
    tiny.forge(upload, read_json(run / "run.json"), privacy=changed)
    line = refused("unify_moe", run, "--method", "metamoe", "--force")
    assert CLIENTS[0] in line and "privacy" in line


def test_the_server_says_what_a_client_claims(run):
    upload = run / "clients" / CLIENTS[0] / "upload" / "aligned-dpp"
    tiny.forge(upload, read_json(run / "run.json"), privacy=CLAIM)
    result = stage("unify_moe", run, "--method", "metamoe", "--force")
    assert result.code == 0, result.err
    assert f"{CLIENTS[0]}: its upload claims epsilon 4, delta 0.001" in result.out
    assert f"{CLIENTS[1]}: its upload claims" not in result.out
