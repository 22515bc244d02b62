"""The three parts of an upload under a budget: the noise of each, and what it is charged with."""

import math

from metamoe.backbones.training import warm_up
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.privacy.dpsgd import Mechanism, public_bound, sample_gradients, train_privately
from metamoe.privacy.flags import privacy_terms, told
from metamoe.privacy.ledger import LEDGER, one_query, open_budget
from metamoe.privacy.mechanisms import private_relevance, private_vectors, public_sample
from metamoe.records import read_records, usable_public
from metamoe.rundir import read_json, settings_of, write_json

RATE = 0.25  # of the private records in a step, where no --batch-size is given


def relevance_under(budget, features, private, seed, usable):
    """g of Eq. 7 over D_0."""
    budget.check("relevance", "other proxies")
    noise, count = budget.noise("relevance"), budget.count(private)
    return private_relevance(features, private, count, noise, seed, usable, budget.rng)


def settle_relevance(budget):
    """Pay for the scores that are there, before proxies are chosen by them."""
    if budget and budget.covers("relevance"):
        budget.settle(one_query("relevance", budget.noise("relevance")), "the proxies")


def budget_of(client, args):
    """The budget of the client's expert; UserError where its proxies were not chosen under the same."""
    budget, folder = open_budget(client, privacy_terms(args)), client / "selection" / args.selection
    if budget and budget.covers("relevance") and settings_of(folder).get("privacy") != told(budget.terms):
        how = f"the proxies were chosen under another budget than {told(budget.terms)}, or none"
        raise UserError(f"{folder}: {how}: run select_proxies.py --force with the same flags")
    return budget


def check_unspent(budget, data):
    """UserError where an expert that is trained on private data has no budget left."""
    if budget and data != "proxies":
        for part in ("expert", "vectors"):
            budget.check(part, "another expert")


def reference(run_dir, run):
    """The records of D_0 that give vectors and gradients their scale."""
    public = read_records(run_dir / "public" / "records.jsonl")
    return public_sample(public, usable_public(run_dir, public), run["seed"])


def expert_under(budget, run_dir, backbone, model, private, proxies, args, settings, run, options):
    """Train the expert in place by DP-SGD; returns each step's loss."""
    count, size = budget.count(private), PRESETS[run["backbone"]]["expert_batch"]
    rate = min(1.0, settings["batch_size"] / count) if settings["batch_size"] else RATE
    steps = max(1, round(settings["epochs"] / rate))
    noise, bound = budget.expert_noise(rate, steps), math.inf
    if noise:
        trained, seed = options["groups"][0]["params"], run["seed"]
        with sample_gradients(model):
            sample = reference(run_dir, run)
            bound = public_bound(backbone, model, trained, sample, options["classes"], size, seed)
    budget.charge("expert", bound, noise, rate, steps)
    options["warmup_steps"] = warm_up(args.warmup_steps, settings["warmup_steps"], steps)
    groups, mechanism = options.pop("groups"), Mechanism(count, rate, noise, bound, steps, budget.rng)
    how = f"{steps} steps, each on {100 * rate:.0f}% of the records, noise multiplier {noise:.2f}"
    print(f"train_expert: {options['label']}: DP-SGD: {how}", flush=True)
    return train_privately(backbone, model, private, proxies, groups, mechanism, batch_size=size, **options)


def vectors_under(budget, run_dir, backbone, model, private, run):
    """The routing vectors (L, d)."""
    noise, count, sample = budget.noise("vectors"), budget.count(private), reference(run_dir, run)
    vectors, lengths = private_vectors(backbone, model, private, sample, count, noise, budget.rng)
    budget.charge("vectors", lengths, noise)
    return vectors


def keep_bill(budget, folder):
    """Write what an expert costs beside it."""
    if budget:
        write_json(folder / LEDGER, budget.bill)


def settle(budget, folder):
    """Pay for the expert in this folder, before it is packed; returns the manifest's claim, or None."""
    if not budget:
        return None
    bill = read_json(folder / LEDGER)
    budget.settle(bill, f"the expert {folder.name}")
    return budget.claim(bill)
