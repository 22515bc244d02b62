"""What differential privacy costs: accuracy on glyph-clip at several epsilons, and of each part.

Runs the stages into OUT/SETTING-seedSEED; a second call goes on with what is there. Prints a line a setting,
mean and standard deviation over the random seeds: MetaMoE on each client's test part, then its mean over the
clients, and the mean of the own experts on theirs. `epsilon inf`: all parts, without noise and clipping.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import command_line, header, row

import moe
from metamoe.backbones import load_backbone
from metamoe.records import read_records
from metamoe.rundir import read_json, write_json
from metamoe.uploads import read_expert

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("greek", "cyrillic", "armenian")
SETTINGS = {"none": []}
SETTINGS |= {f"epsilon {value}": ["--epsilon", value] for value in ("8", "4", "1")}
for part in ("relevance", "vectors", "expert"):
    SETTINGS[f"epsilon 4, {part} alone"] = ["--epsilon", "4", "--private-parts", part]
SETTINGS["epsilon inf"] = ["--epsilon", "inf"]


def run(script, run_dir, *flags):
    command = [sys.executable, ROOT / f"{script}.py", "--run-dir", run_dir, "--device", "cpu", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def accuracy(backbone, model, records):
    scores = backbone.scores(model, records)
    right = [
        own["choices"][np.argmax(found)] == own["answer"] for own, found in zip(records, scores, strict=True)
    ]
    return 100 * float(np.mean(right))


def measure(run_dir):
    """[MetaMoE's accuracies, the experts' accuracies], one a client."""
    found, tests = (
        [[], []],
        [read_records(run_dir / "clients" / n / "private" / "test.jsonl") for n in CLIENTS],
    )
    backbone = load_backbone("glyph-clip", "", "cpu", "auto")
    for name, records in zip(CLIENTS, tests, strict=True):
        expert = read_expert(run_dir / "clients" / name / "experts" / "aligned-dpp", backbone.ffn_names)
        own = load_backbone("glyph-clip", "", "cpu", "auto")
        found[1].append(accuracy(own, own.with_expert(expert), records))
    model = moe.load(run_dir / "moe" / "metamoe", backbone.model)
    found[0] = [accuracy(backbone, model, records) for records in tests]
    return found


def one_run(out, setting, seed, budget, expert):
    """The accuracies of one setting at one random seed; made once."""
    run_dir = out / f"{setting.replace(' ', '-').replace(',', '')}-seed{seed}"
    kept, flags = run_dir / "privacy-accuracy.json", list(SETTINGS[setting])
    if kept.exists():
        return read_json(kept)
    plain = out / f"none-seed{seed}"
    if not run_dir.exists() and plain.exists():  # D_0 is embedded once
        skip = shutil.ignore_patterns(
            "selection", "experts", "upload", "moe", "packed.json", "*-accuracy.json"
        )
        shutil.copytree(plain, run_dir, ignore=skip)
    if flags:
        flags += budget
    run("select_proxies", run_dir, "--backbone", "glyph-clip", "--seed", str(seed), *flags)
    dpsgd = flags and ("--private-parts" not in flags or "expert" in flags)
    run("train_expert", run_dir, *flags, *(expert if dpsgd else []))
    run("unify_moe", run_dir, "--method", "metamoe")
    write_json(kept, measure(run_dir))
    return read_json(kept)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--out", default="runs/privacy", help="folder of the run directories")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="of the table's lines")
    parser.add_argument("--delta", default="0.001")
    more = "flags of train_expert.py where the expert is private, in one word"
    parser.add_argument("--expert", default="", help=more)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    columns = [*(f"MetaMoE, {name}" for name in CLIENTS), "MetaMoE", "experts"]
    header(" | ".join(["budget", *columns]), "l" + "r" * len(columns))
    for setting in args.settings:
        budget, expert = ["--delta", args.delta], args.expert.split()
        found = np.array([one_run(out, setting, seed, budget, expert) for seed in args.seeds])  # (S, 2, C)
        values = [*found[:, 0].T, found[:, 0].mean(1), found[:, 1].mean(1)]  # of (S,) each
        spread = [f" ± {own.std(ddof=1):.2f}" if len(own) > 1 else "" for own in values]
        row(setting, *(f"{own.mean():.2f}{more}" for own, more in zip(values, spread, strict=True)))


if __name__ == "__main__":
    main()
