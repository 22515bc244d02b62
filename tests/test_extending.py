"""The three ways in: a method, a rule, a data set, each added as docs/extending.md says and run end to end."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import tiny

REPO = tiny.REPO
PAGE = (REPO / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SIZES = "--public-size 40 --candidates 20 --proxies 4".split()


@pytest.fixture
def project(tmp_path):
    """A copy of the project, for a test to change."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in [*REPO.glob("*.py"), REPO / "run_all.sh", REPO / "requirements.txt"]:
        shutil.copy(path, folder)
    shutil.copytree(REPO / "metamoe", folder / "metamoe", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def insert(path, behind, *code):
    """Put code of docs/extending.md behind a line of a file."""
    text = path.read_text(encoding="utf-8")
    assert text.count(behind) == 1
    path.write_text(text.replace(behind, behind + "".join(code)), encoding="utf-8")


def example(start):
    found = [code for code in EXAMPLES if code.lstrip().startswith(start)]
    assert len(found) == 1, start
    return found[0]


def run(project, *command):
    environment = tiny.environment(PYTHON=sys.executable, METAMOE_VENV="", PYTHONDONTWRITEBYTECODE="1")
    program = "bash" if command[0].endswith(".sh") else sys.executable
    done = subprocess.run(
        [program, *map(str, command)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def own_data(folder):
    """Flags of two clients with data of their own, and of a public set."""
    rng, flags = random.Random(3), []
    for name in ("hotels", "question"):
        records = [tiny.record(name, rng, True) for _ in range(60)]
        flags += ["--client", f"{name}={write(folder / f'{name}.jsonl', records)}"]
    return flags + ["--public", write(folder / "public.jsonl", tiny.public_records(rng, 60)), *SIZES]


def write(path, records):
    rows = ({key: record[key] for key in ("prompt", "choices", "answer")} for record in records)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_method_is_one_entry(project, tmp_path, seed_model):
    insert(project / "metamoe" / "methods.py", "METHODS = {\n", example('"metamoe-top2"'))
    flags = ["--seed-model", seed_model, "--device", "cpu", "--dtype", "float32", *own_data(tmp_path)]
    methods = ["--methods", "metamoe", "metamoe-top2"]
    run(project, "run_all.sh", "smollm2-135m", "--run-dir", tmp_path / "run", *methods, *flags)
    assert "| MetaMoE, top-2 |" in (tmp_path / "run" / "results.md").read_text()
    config = json.loads((tmp_path / "run" / "moe" / "metamoe-top2" / "moe_config.json").read_text())
    assert config["top_k"] == 2
    assert "metamoe-top2" in run(project, "run_all.sh", "--plan")


@pytest.mark.slow
def test_a_rule_is_one_entry(project, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    stage = project / "select_proxies.py"
    insert(
        stage, "private samples that a relevance head is fitted on\n", "\n\n", example("def least_relevant")
    )
    insert(stage, "RULES = {\n", example('"least"'))
    flags = ["--run-dir", run_dir, *tiny.COMMON]
    run(project, "select_proxies.py", *flags, "--selection", "least")
    few = "--epochs 1 --rank 4 --alpha 8 --batch-size 4".split()
    run(project, "train_expert.py", *flags, "--selection", "least", *few)
    model = ["--method", "metamoe", "--selection", "least", "--name", "metamoe-least"]
    run(project, "unify_moe.py", *flags, *model)
    run(project, "evaluate.py", *flags, "--figure")
    results = json.loads((run_dir / "results.json").read_text())
    assert "metamoe-least" in [row["model"] for row in results["rows"]]
    assert "least" in results["coverage"]["hotels"]


@pytest.mark.slow
def test_a_data_set_is_one_entry(project, tmp_path, seed_model):
    source = project / "metamoe" / "data" / "questions.py"
    text = source.read_text(encoding="utf-8")
    head = "class TextSet(NamedTuple):"
    source.write_text(text.replace(head, example("def arc") + "\n\n" + head), encoding="utf-8")
    insert(source, "CLIENTS = {\n", example('"arc"'))
    rng = random.Random(4)
    for name in ("train", "validation"):
        rows = []
        for i in range(30):
            record = tiny.record("hotels", rng, True)
            labels = "ABC"[: len(record["choices"])]
            right = labels[record["choices"].index(record["answer"])]
            choices = {"label": list(labels), "text": record["choices"]}
            rows.append({"question": f"{i} {record['prompt']}", "choices": choices, "answerKey": right})
        folder = tmp_path / "arc"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    public = write(tmp_path / "public.jsonl", tiny.public_records(rng, 60))
    run_dir, sizes = tmp_path / "run", "--train-size 12 --validation-size 4 --test-size 8".split()
    flags = ["--run-dir", run_dir, *tiny.COMMON]
    data = ["--clients", "arc", "--dataset", f"arc={folder}", "--public", public, *sizes, *SIZES]
    model = ["--backbone", "llama-3.2-3b", "--seed-model", seed_model]
    run(project, "select_proxies.py", *flags, *model, *data)
    run(project, "train_expert.py", *flags, *"--epochs 1 --rank 4 --alpha 8".split())
    run(project, "unify_moe.py", *flags, "--method", "metamoe")
    run(project, "evaluate.py", *flags, "--models", "zeroshot", "metamoe")
    assert json.loads((run_dir / "results.json").read_text())["n"] == {"arc": 8}
