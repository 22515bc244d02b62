"""The rehearsal that an audit attacks: RUN/audit/, a run in which one client's data are cut again at random.

All of the client's records are shuffled and cut into members, whom the expert is trained on, others, who come
from the same distribution, and canaries, of which the coin's half is trained on too. The stages then make
selection, expert and unified model as for the run itself, with the run's settings and the other uploads.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from metamoe.atomic import atomic
from metamoe.audit.canaries import make_canaries
from metamoe.errors import UserError
from metamoe.methods import METHODS
from metamoe.privacy.ledger import LEDGER, read_ledger
from metamoe.records import read_records, write_records
from metamoe.run_settings import PARTS
from metamoe.rundir import finish, finished, read_json, settings_of, versions, write_json
from metamoe.uploads import expert_variant, upload_variant

REPO = Path(__file__).resolve().parents[2]
# settings that the rehearsal takes from the run's own expert and model
TRAINING = ("epochs", "lr", "batch_size", "optimizer", "weight_decay")
EXPERT = ("rank", "alpha", "warmup_steps", *TRAINING)
UNIFIED = ("train", "init", "lambda_init", "lambda_lr", *TRAINING)


def cut(records, canaries, seed):
    """(members, others, canaries, the coins of the canaries (m,) bool) of a client's records."""
    rng = np.random.default_rng([seed, 23])
    order = [records[i] for i in rng.permutation(len(records))]
    changed = make_canaries(order[:canaries], rng)
    rest, coins = order[canaries:], rng.random(canaries) < 0.5
    return rest[: len(rest) // 2], rest[len(rest) // 2 :], changed, coins


def all_records(run_dir, name):
    """Every record that a client's parts hold."""
    folder = run_dir / "clients" / name / "private"
    return [record for part in PARTS for record in read_records(folder / f"{part}.jsonl")]


def prepare(run_dir, run, name, canaries):
    """RUN/audit/ with its data; returns (its folder, the cut)."""
    records, target = all_records(run_dir, name), run_dir / "audit"
    if canaries > len(records) // 3:
        raise UserError(f"--canaries {canaries}: {name} has {len(records)} records: at most a third of them")
    members, others, changed, coins = parts = cut(records, canaries, run["seed"])
    used = [record for record, coin in zip(changed, coins, strict=True) if coin]
    settings = {"client": name, "canaries": canaries, "seed": run["seed"]}
    private = target / "clients" / name / "private"
    sources = [path.relative_to(run_dir) for path in run_dir.glob("clients/*/upload/*/manifest.json")]
    sources = [path.as_posix() for path in sources if path.parts[1] != name]
    sources += [f"clients/{name}/private/{part}.jsonl" for part in PARTS]
    made_from = versions(run_dir, "public/records.jsonl", *sources)
    if target.exists() and finished(private, settings, True, made_from):
        return target, parts
    with atomic(target, private=True) as folder:
        own = folder / "clients" / name / "private"
        own.mkdir(parents=True)
        folder.chmod(0o700)
        write_records(own / "train.jsonl", members + used)
        write_records(own / "validation.jsonl", [])
        write_records(own / "test.jsonl", others)
        write_json(own / "source.json", {"dataset": "audit"})
        finish(own, settings, made_from)
        shutil.copytree(run_dir / "public", folder / "public")
        for other in run["clients"]:
            uploads = run_dir / "clients" / other / "upload"
            if other != name and uploads.is_dir():
                shutil.copytree(uploads, folder / "clients" / other / "upload")
        local = read_json(run_dir / "local.json") | {"clients": [name]}
        write_json(folder / "local.json", local, private=True)
        shutil.copyfile(run_dir / "run.json", folder / "run.json")
    return target, parts


def stages(run_dir, audit, name, row, args):
    """Run the stages in RUN/audit/: selection, expert and, where all uploads are there, the unified model.

    row: the method of the unified model. Returns the unified model's folder, or None.
    """
    method, machine = METHODS[row], ["--device", args.device, "--dtype", args.dtype]
    data, rule = method.data, method.selection
    own = ["--client", name, "--selection", rule, *budget_flags(run_dir / "clients" / name)]
    stage("select_proxies.py", audit, own + machine)
    expert = run_dir / "clients" / name / "experts" / expert_variant(data, rule)
    own += ["--fixed-a"] if settings_of(expert).get("fixed_a") else []
    stage("train_expert.py", audit, [*own, "--data", data, *flags_of(expert, EXPERT), *machine])
    variant = upload_variant(data, rule)
    clients = [path.parents[2].name for path in audit.glob(f"clients/*/upload/{variant}/manifest.json")]
    missing = sorted(set(read_json(audit / "run.json")["clients"]) - set(clients))
    if missing:
        print(f"evaluate: no audit of the unified model: no {variant} of {', '.join(missing)} is here")
        return None
    unified = run_dir / "moe" / row
    flags = flags_of(unified, UNIFIED) if (unified / "done.json").exists() else []
    stage("unify_moe.py", audit, ["--method", row, *flags, *machine])
    return audit / "moe" / row


def flags_of(folder, keys):
    """The flags that make a result with the settings of the one in `folder`."""
    found, flags = settings_of(folder), []
    for key in keys:
        if found[key] is not None:  # as DP-SGD's batch, which follows from the budget
            flags += [f"--{key.replace('_', '-')}", str(found[key])]
    return flags


def budget_flags(client):
    """The flags of the client's budget; the rehearsal is not sent, and has such a budget of its own."""
    if not (client / LEDGER).exists():
        return []
    kept = read_ledger(client / LEDGER)
    limits = ["--epsilon", str(kept["epsilon"]), "--delta", str(kept["delta"])]
    return [*limits, "--private-parts", *kept["parts"]]


def stage(script, run_dir, flags):
    """Run a stage of this project; what it prints is this program's."""
    done = subprocess.run([sys.executable, str(REPO / script), "--run-dir", str(run_dir), *flags])
    if done.returncode:
        raise UserError(f"--audit: {script} failed in {run_dir} (its message is above)")
