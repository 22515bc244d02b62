"""The audit of one client: what its uploads and the unified model tell of its records, measured."""

import numpy as np

import moe
from metamoe.audit import canaries, extraction, rehearsal, vectors
from metamoe.audit.membership import answer_losses, membership
from metamoe.backbones import run_backbone
from metamoe.backbones.embedding import private_features, public_features
from metamoe.errors import UserError
from metamoe.methods import METHODS
from metamoe.records import read_records, usable_public
from metamoe.rundir import read_json
from metamoe.uploads import expert_variant, read_upload, upload_variant

ROWS = ("metamoe", "flexolmo")  # the unified model that is audited: the first whose expert is there
LEFT_OUT = 12  # records that are left out in turn to see whether the proxies change


def audit(run_dir, run, local, args, choose):
    """What privacy.json holds, of the client args.audit, or the first that is here.

    choose: a function of (features of D_0, private features, usable indices into D_0, run) that gives the
    proxies as select_proxies.py does.
    """
    name = run["clients"][0] if args.audit is True else args.audit
    if name not in run["clients"]:
        raise UserError(f"--audit {name}: its data are not here; here are {', '.join(run['clients'])}")
    row = audited_row(run_dir, name)
    folder, parts = rehearsal.prepare(run_dir, run, name, args.canaries)
    unified = rehearsal.stages(run_dir, folder, name, row, args)
    agreed = read_json(folder / "run.json")
    variant = upload_variant(METHODS[row].data, METHODS[row].selection)
    upload = read_upload(folder, agreed, name, variant)
    models = {
        "seed model": lambda backbone: backbone.model,
        "expert": lambda backbone: backbone.with_expert(upload.expert),
    }
    if unified:
        models["unified model"] = lambda backbone: moe.load(unified, backbone.model)
    found = {"client": name, "method": row, "upload": variant, "members": len(parts[0])}
    found |= {"others": len(parts[1]), "n": agreed["candidates"], "m": agreed["proxies"]}
    found |= attack_models(models, lambda: run_backbone(agreed, local, args), parts, run["seed"])
    found["proxies"] = leave_one_out(folder, agreed, name, run_backbone(agreed, local, args), choose)
    return found


def audited_row(run_dir, name):
    for row in ROWS:
        expert = expert_variant(METHODS[row].data, METHODS[row].selection)
        if (run_dir / "clients" / name / "experts" / expert / "done.json").exists():
            return row
    raise UserError(f"--audit {name}: has no expert yet: run train_expert.py first")


def attack_models(models, load, parts, seed):
    """The attacks on the seed model (the control), the expert and the unified model."""
    members, others, changed, coins = parts
    records, losses = members + others + changed, {}
    found = {"membership": {}, "scores": {}, "extraction": {}, "canaries": {}}
    for label, make in models.items():
        backbone = load()
        model = make(backbone)
        losses[label] = answer_losses(backbone, model, records, f"losses of the {label}")
        if label == "expert":
            pool = vectors.sample_vectors(backbone, model, members + others, "vectors of each record")
            found["vectors"] = vectors.attack(pool, seed=seed)
        if "image" not in members[0]:
            found["extraction"][label] = extraction.extracted(backbone, model, members, seed)
    for label, own in losses.items():
        scores = -own if label == "seed model" else losses["seed model"] - own
        ours, theirs, inserted = np.split(scores, [len(members), len(members) + len(others)])
        found["membership"][label] = membership(ours, theirs, seed)
        found["scores"][label] = {"members": ours.tolist(), "others": theirs.tolist()}
        if len(coins):
            found["canaries"][label] = canary_bound(inserted, coins)
    return found


def canary_bound(scores, coins, delta=1e-3):
    """The lower bound on epsilon that the canaries give, and the highest that they could."""
    m, right = len(coins), canaries.guess(scores, coins)
    bound, ceiling = (canaries.lower_bound(v, m, m, delta) for v in (right, m))
    return {"canaries": m, "right": right, "delta": delta, "epsilon": bound, "ceiling": ceiling}


def leave_one_out(folder, run, name, backbone, choose):
    """How often, of LEFT_OUT times, leaving one private record out changes the proxies, and how many."""
    public = read_records(folder / "public" / "records.jsonl")
    features, usable = public_features(folder, backbone, public), usable_public(folder, public)
    private = private_features(folder, run, backbone, name)
    everyone, changed = set(choose(features, private, usable, run).tolist()), []
    for i in np.random.default_rng([run["seed"], 29]).permutation(len(private))[:LEFT_OUT]:
        without = choose(features, np.delete(private, i, 0), usable, run)
        changed.append(len(everyone - set(without.tolist())))
    times = sum(count > 0 for count in changed)
    return {"left_out": len(changed), "changed": times, "mean": float(np.mean(changed)), "most": max(changed)}
