"""The options of run_all.sh and the stages' commands that it runs, settled before anything is installed.

    python3 -m metamoe.plan [BACKBONE] [options]

prints a line a stage: its share of the work, its title and its command, with tabs between. Needs Python's
standard library alone.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from metamoe import flag_values
from metamoe.flag_values import count, number, one_line, random_seed
from metamoe.methods import METHODS, main_rows, plan
from metamoe.presets import PRESETS

QUICK = dict(train_size=24, validation_size=8, test_size=16, public_size=240, candidates=60, proxies=12)
SIZES = tuple(QUICK)
# Shares of the work, roughly, of a stage on the embedded defaults; the first selection also embeds D_0.
WORK = dict(select_proxies=1, train_expert=34, unify_moe=3, evaluate=24)
EMBEDDING, UPPER_BOUND = 10, 8
STAGES = tuple(WORK)
PAPER_DATA = ("oxford_pets", "oxford_flowers", "eurosat")
ABOUT = """MetaMoE end to end on one backbone: select proxies, train experts, unify, evaluate.

BACKBONE:
  smollm2-135m  a real LLaMA and BIG-bench, fetched with pip; CPU or CUDA
  glyph-clip    a small CLIP on letters drawn from fonts; CPU or CUDA, nothing to download
  vit-b-32, vit-b-16   the paper's CLIPs; need its datasets (--data-root, --public) and a CUDA GPU
  llama-3.2-3b, llama-3.1-8b   the paper's LLaMAs, from the hub or --seed-model FOLDER (any model of LLaMA's
                kind); datasets from the hub or --data-root; need a CUDA GPU
  default: vit-b-32 where there is a CUDA GPU and --data-root (data/) holds the datasets, else smollm2-135m

Every option is also an environment variable (--run-dir: RUN_DIR), but --client and the stages' own flags.
METAMOE_CACHE: where downloads are kept (~/.cache/metamoe). PYTHON: the Python to use, where it has the
packages of requirements.txt; else a .venv is made. METAMOE_VENV=never: use it as it is.

Finished stages are skipped: run the same command again after an interruption. Another setting needs another
run directory."""


class Parser(flag_values.Parser):
    def error(self, message):
        fail(one_line(message))


def fail(message):
    """End with one line and status 2."""
    print(f"error: {message} (bash run_all.sh --help)", file=sys.stderr)
    sys.exit(2)


def parse_args(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("bash run_all.sh", description=ABOUT, formatter_class=raw, allow_abbrev=False)
    parser.add_argument(
        "backbone", nargs="*", metavar="BACKBONE", help="default: BACKBONE of the environment"
    )
    add_run_flags(parser)
    add_front_flags(parser)
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        fail(f"unknown option {word}: flags of one stage go into --train-expert='{word} ...' and its like")
    if len(args.backbone) > 1:
        fail(f"one backbone at a time, not {' and '.join(args.backbone)}")
    args.backbone = args.backbone[0] if args.backbone else os.environ.get("BACKBONE")
    for name in args.methods or []:
        if name not in METHODS:
            fail(f"--methods {name}: unknown, choose from {' '.join(METHODS)}")
    return args


def add_run_flags(parser):
    """What run.json keeps; select_proxies.py gets these as they are."""
    option(parser, "--clients", nargs="+", metavar="NAME", help="clients, or how many of the backbone's")
    own = (
        "a client with data of your own, once for each: JSON lines with prompt, choices, answer or with "
        "prompt, response; for CLIP a folder CLASS/IMAGE"
    )
    parser.add_argument("--client", action="append", default=[], metavar="NAME=PATH", help=own)
    public = (
        "public set: the same formats, or Alpaca (llama-*), ImageNet (vit-b-*) as a folder or a Hugging Face "
        "dataset (default: the backbone's own)"
    )
    option(parser, "--public", metavar="PATH", help=public)
    skip = "leave out and count the bad records of your own data, instead of ending at the first"
    switch(parser, "--skip-bad-records", "SKIP_BAD", skip)
    root = (
        "folder with oxford_pets/, oxford_flowers/, eurosat/ (CoOp's layout), or with commonsenseqa/, "
        "cosmosqa/, socialiqa/, alpaca/"
    )
    option(parser, "--data-root", metavar="DIR", help=root)
    copy = "vit-b-*, llama-*: a client's copy of its dataset: a folder, or a hub id"
    option(parser, "--dataset", nargs="+", metavar="NAME=SOURCE", help=copy)
    for size in SIZES:
        option(parser, f"--{size.replace('_', '-')}", type=count, metavar="N", help="as of select_proxies.py")
    model = "another seed model: hub id, local folder, or a checkpoint that open_clip reads"
    option(parser, "--seed-model", metavar="PATH", help=model)
    architecture = "vit-b-*: open_clip's name of the seed model's architecture (default: the preset's)"
    option(parser, "--architecture", metavar="NAME", help=architecture)
    answers = "language models train on a choice's text or its letter: text, letters"
    option(parser, "--answers", metavar="WAY", help=answers)
    option(
        parser, "--loss", metavar="WAY", help="their loss: of the answer, or of the whole text: answer, text"
    )


def add_front_flags(parser):
    """What is run, where and how."""
    folder = "everything is written here (default: runs/BACKBONE-seedSEED)"
    option(parser, "--run-dir", metavar="DIR", help=folder)
    seed = "the random seed of splits, initialisation, batches (default: 0)"
    option(parser, "--seed", type=random_seed, metavar="N", help=seed)
    option(
        parser,
        "--seeds",
        nargs="+",
        type=random_seed,
        metavar="N",
        help="several random seeds, then the table over all runs",
    )
    methods = "rows to make, of metamoe/methods.py (default: all of the main table)"
    option(parser, "--methods", nargs="+", metavar="NAME", help=methods)
    switch(parser, "--ablations", "ABLATIONS", "also the ablations of these methods, and --figure")
    switch(parser, "--figure", "FIGURE", "also draw Figure 2 and measure coverage")
    switch(parser, "--rivals", "RIVALS", "also the rows of more rival systems (metamoe/methods.py)")
    scoring = "how multiple choice is scored: letters, generate, likelihood"
    option(parser, "--scoring", metavar="WAY", help=scoring)
    option(parser, "--workers", type=number(int, 0, 1000), metavar="N", help="processes that decode images")
    option(parser, "--device", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    option(parser, "--dtype", metavar="NAME", help="auto, float32 or bfloat16 (default: auto)")
    quick = "the same stages on a few dozen samples: a smoke test, its numbers say nothing"
    switch(parser, "--quick", "QUICK", quick)
    parser.add_argument("--plan", action="store_true", help="print the stages' commands and end")
    for stage in STAGES:
        flags = f"more flags of {stage}.py, in one word: --{stage.replace('_', '-')}='--flag value ...'"
        parser.add_argument(f"--{stage.replace('_', '-')}", type=str, default="", metavar="FLAGS", help=flags)


def option(parser, flag, **keywords):
    """A flag whose default is the environment variable of its name."""
    variable = flag[2:].upper().replace("-", "_")
    value = os.environ.get(variable) or None
    if value and keywords.get("nargs"):
        try:
            value = [keywords.get("type", str)(word) for word in value.split()]
        except argparse.ArgumentTypeError as error:
            fail(f"{variable}={error}")
    parser.add_argument(flag, default=value, **keywords)


def switch(parser, flag, variable, text):
    parser.add_argument(flag, action="store_true", default=os.environ.get(variable) == "1", help=text)


def default_backbone(args):
    """(backbone, DIR of its datasets or None, why): the paper's own where it can run, else one that can."""
    if args.client:
        return "smollm2-135m", None, "--client: data of your own; for images name a CLIP"
    root = Path(args.data_root or "data")
    try:
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        gpus = ""
    if "GPU" not in gpus:
        return "smollm2-135m", None, "no CUDA GPU here"
    missing = [f"{name}/" for name in PAPER_DATA if not (root / name).is_dir()]
    if missing:
        return "smollm2-135m", None, f"{root}/ does not hold {', '.join(missing)} (--data-root)"
    if not args.public and not (root / "imagenet").is_dir():
        return "smollm2-135m", None, f"there is no {root}/imagenet/ and no --public"
    return "vit-b-32", str(root), f"a CUDA GPU and the paper's datasets in {root}/ are there"


def settle(args):
    """Fill in what the options leave open; ends the program where they cannot be."""
    if args.backbone is None:
        args.backbone, root, why = default_backbone(args)
        args.data_root = args.data_root or root
        print(f"run_all: no backbone named: taking {args.backbone} ({why})", file=sys.stderr)
    if args.backbone not in PRESETS:
        fail(f"backbone {args.backbone}: unknown, choose from {' '.join(PRESETS)}")
    if args.seeds and (args.run_dir or args.seed is not None):
        fail(
            "--seeds: each has its own run directory, runs/BACKBONE-seedSEED: leave --seed and --run-dir out"
        )
    for size in SIZES if args.quick else ():
        if getattr(args, size) is None:
            setattr(args, size, QUICK[size])
    for value in args.client:
        name, _, path = value.partition("=")
        if not (name and path):
            fail(f"--client {value}: give NAME=PATH")


def one_run(args, seed, run_dir):
    """[(work, title, command)] of one random seed: selections, experts and uploads, models, evaluation."""
    common = ["--run-dir", run_dir, "--device", args.device or "auto", "--dtype", args.dtype or "auto"]
    common += [] if args.workers is None else ["--workers", str(args.workers)]
    steps = []
    for line in plan(args.methods or main_rows(args.rivals), args.ablations):
        script, *flags = line.split()
        stage, title = script.removesuffix(".py"), line.replace(".py --", " ").replace(" --", ", ")
        share = WORK[stage] if steps else EMBEDDING
        if stage == "unify_moe":
            method = METHODS[flags[-1]]
            share *= UPPER_BOUND if method.samples == "private" or method.rounds else 1
        if stage == "select_proxies":
            flags += run_flags(args, seed)
        steps.append((share, title, [script, *flags, *shlex.split(getattr(args, stage)), *common]))
    flags = ["--scoring", args.scoring] if args.scoring else []
    show = args.quick and PRESETS[args.backbone]["data"] == "glyphs"
    flags += ["--figure"] if args.figure or args.ablations or show else []
    command = ["evaluate.py", *flags, *shlex.split(args.evaluate), *common]
    title = "evaluate (a smoke test: so few samples say nothing)" if args.quick else "evaluate"
    return [*steps, (WORK["evaluate"], title, command)]


def run_flags(args, seed):
    """The flags of select_proxies.py that make run.json."""
    flags = ["--backbone", args.backbone, "--seed", str(seed)]
    data = ("clients", "data_root", "dataset", "public")
    for name in ("seed_model", "architecture", "answers", "loss", *data, *SIZES):
        value = getattr(args, name)
        if value is not None:
            words = value if isinstance(value, list) else [str(value)]
            flags += [f"--{name.replace('_', '-')}", *words]
    for value in args.client:
        flags += ["--client", value]
    return flags + (["--skip-bad-records"] if args.skip_bad_records else [])


def main():
    args = parse_args(sys.argv[1:])
    settle(args)
    steps, folders = [], []
    for seed in args.seeds or [args.seed or 0]:
        name = f"{args.backbone}-quick-seed{seed}" if args.quick else f"{args.backbone}-seed{seed}"
        folders.append(args.run_dir or f"runs/{name}")
        steps += one_run(args, seed, folders[-1])
    if len(folders) > 1:
        steps.append((0, "the table over all runs", ["evaluate.py", "--run-dir", *folders]))
    for share, title, command in steps:
        print(shlex.join(command) if args.plan else f"{share}\t{title}\t{shlex.join(command)}")


if __name__ == "__main__":
    main()
