"""The ways in: a method, a rule, a data set, each added as docs/extending.md says and run end to end."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny
from tiny import COMMON, REPO

from metamoe.rundir import read_json

pytestmark = pytest.mark.slow
PAGE = (REPO / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SIZES = "--public-size 40 --candidates 20 --proxies 4".split()
FEW = "--epochs 1 --rank 4 --alpha 8 --batch-size 4".split()


def example(start):
    found = [code for code in EXAMPLES if code.lstrip().startswith(start)]
    assert len(found) == 1, start
    return found[0]


def insert(path, table, entry, function=""):
    """Put an entry of docs/extending.md into a table of a file, and its function before the table."""
    text, head = path.read_text(encoding="utf-8"), f"\n{table} = {{\n"
    assert text.count(head) == 1
    path.write_text(text.replace(head, f"\n{function}\n{head}{entry}"), encoding="utf-8")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def method_commands(project, run_dir, seed_model):
    """What run_all.sh does for the new method."""
    rng = random.Random(3)
    flags = ["--seed-model", seed_model, *COMMON, *SIZES]
    for name in ("hotels", "question"):
        file = write(project / "data" / f"{name}.jsonl", [tiny.record(name, rng, True) for _ in range(60)])
        flags += ["--client", f"{name}={file}"]
    flags += ["--public", write(project / "data" / "public.jsonl", tiny.public_records(rng, 60))]
    flags += ["--methods", "metamoe", "metamoe-top2", "--run-dir", run_dir]
    command = ["bash", "run_all.sh", "--plan", "smollm2-135m", *map(str, flags)]
    environment = tiny.environment(PYTHON=sys.executable, METAMOE_VENV="")
    found = subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True, text=True)
    return [shlex.split(line) for line in found.stdout.splitlines()]


def rule_commands(run_dir):
    model = ["--method", "metamoe", "--selection", "least", "--name", "metamoe-least"]
    return [
        ["select_proxies", "--run-dir", run_dir, *COMMON, "--selection", "least"],
        ["train_expert", "--run-dir", run_dir, *COMMON, "--selection", "least", *FEW],
        ["unify_moe", "--run-dir", run_dir, *COMMON, *model],
        ["evaluate", "--run-dir", run_dir, *COMMON, "--figure"],
    ]


def data_commands(folder, run_dir, seed_model):
    rng = random.Random(4)
    for name in ("train", "validation"):
        rows = []
        for i in range(30):
            record = tiny.record("hotels", rng, True)
            labels = list("ABC"[: len(record["choices"])])
            right = labels[record["choices"].index(record["answer"])]
            choices = {"label": labels, "text": record["choices"]}
            rows.append({"question": f"{i} {record['prompt']}", "choices": choices, "answerKey": right})
        write(folder / f"{name}.jsonl", rows)
    public = write(folder.parent / "public.jsonl", tiny.public_records(rng, 60))
    data = ["--clients", "arc", "--dataset", f"arc={folder}", "--public", public, *SIZES]
    data += "--train-size 12 --validation-size 4 --test-size 8 --backbone llama-3.2-3b".split()
    return [
        ["select_proxies", "--run-dir", run_dir, *COMMON, "--seed-model", seed_model, *data],
        ["train_expert", "--run-dir", run_dir, *COMMON, *FEW],
        ["unify_moe", "--run-dir", run_dir, *COMMON, "--method", "metamoe"],
        ["evaluate", "--run-dir", run_dir, *COMMON, "--models", "zeroshot", "metamoe"],
    ]


@pytest.fixture(scope="module")
def extended(tmp_path_factory, finished, seed_model):
    """A folder with a copy of the project that has the entries, and the runs of `method`, `rule`, `data`."""
    folder = tmp_path_factory.mktemp("extending")
    project = folder / "project"
    shutil.copytree(REPO / "metamoe", project / "metamoe", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*REPO.glob("*.py"), REPO / "run_all.sh", REPO / "requirements.txt"]:
        shutil.copy(path, project)
    (project / "tests").mkdir()
    shutil.copy(REPO / "tests" / "drive.py", project / "tests")
    insert(project / "metamoe" / "methods.py", "METHODS", example('"metamoe-top2"'))
    insert(project / "select_proxies.py", "RULES", example('"least"'), example("def least_relevant"))
    insert(project / "metamoe" / "data" / "questions.py", "CLIENTS", example('"arc"'), example("def arc"))
    shutil.copytree(finished[0], folder / "rule")
    commands = method_commands(project, folder / "method", seed_model) + rule_commands(folder / "rule")
    commands += data_commands(folder / "arc", folder / "data", seed_model)
    commands = [[str(word).removesuffix(".py") for word in command] for command in commands]
    report = tiny.drive(repo=project, commands=commands)
    assert report["code"] == 0, report["stderr"]
    return folder


def test_a_method_is_one_entry(extended):
    assert "| MetaMoE, top-2 |" in (extended / "method" / "results.md").read_text()
    assert read_json(extended / "method" / "moe" / "metamoe-top2" / "moe_config.json")["top_k"] == 2


def test_a_rule_is_one_entry(extended):
    results = read_json(extended / "rule" / "results.json")
    assert "metamoe-least" in [row["model"] for row in results["rows"]]
    assert "least" in results["coverage"]["hotels"]


def test_a_data_set_is_one_entry(extended):
    assert read_json(extended / "data" / "results.json")["n"] == {"arc": 8}
