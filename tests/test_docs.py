"""What README.md and docs/ promise: examples that run, links that lead somewhere, flags that exist."""

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import drive
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
SCRIPT = re.compile(r"\S+\.(py|sh)")


def blocks(page, language):
    """The code of every fenced block of this language ("" for a block without one)."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [code for kind, code in fenced if kind.strip() == language]


def prose(page):
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def script_and_flags(command):
    """("tests/run.sh", ["--flag"]) of a command that runs a script of this project; else None."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # QUICK=1 bash run_all.sh
        words.pop(0)
    if not words:
        return None
    at = next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
    if at is None or at > 0 and words[0] not in ("python", "bash", "accelerate"):
        return None
    return words[at], [word.split("=")[0] for word in words[at + 1 :] if word.startswith("--")]


def commands(page):
    """Commands of the blocks without a language, and those that stand in the prose between backticks."""
    lines = []
    for block in blocks(page, ""):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    for line in lines:
        if re.match(r"([A-Z_]+=\S* )*(python|bash|accelerate|\S+\.(py|sh))\s", line):
            found = script_and_flags(line)
            if found:
                yield line, *found


def anchors(page):
    """GitHub's names of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def known_flags(script):
    """The flags in a script's --help; of a Python script in this process, which has its imports already."""
    if script.endswith(".py"):
        result = drive.call(script.removesuffix(".py"), "--help")
        code, text = result.code, result.out
    else:
        done = subprocess.run(["bash", script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        code, text = done.returncode, done.stdout
    assert code == 0, f"{script} --help"
    return set(re.findall(r"--[a-z][\w-]*", text))


def test_readme_examples_run(tmp_path, monkeypatch):
    """As they stand, each in a namespace of its own; the shapes are those that their comments say."""
    import moe

    monkeypatch.chdir(tmp_path)  # one of them writes a folder
    names = []
    for example in blocks(README, "python"):
        names.append({"__name__": "readme"})
        exec(compile(example, "README.md", "exec"), names[-1])
    select, unify = names
    assert select["proxies"].shape == (50,)
    assert unify["logits"].shape == (1, 12, 100)
    assert len(moe.layers(unify["model"])) == unify["L"]


def test_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 400


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@each_page
def test_commands_have_flags_that_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")  # whose scripts import one another
    # "# make_data.py: ..."
    own = {block.split()[1].rstrip(":") for block in blocks(page, "python") if block.startswith("# ")}
    for line, script, flags in commands(page):
        if script in own:
            continue
        assert (ROOT / script).exists(), f"{page.name}: {line}"
        unknown = [flag for flag in flags if flag not in known_flags(script)]
        assert not unknown, f"{page.name}: {line}: {unknown}"


def test_the_tests_and_versions_of_the_compatibility_table_are_there():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    named = [re.search(r"`(\w+\.py)::(\w+)` \|$", row) for row in rows]
    assert all(named) and len(rows) > 40
    for file, name in (found.groups() for found in named):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
    versions = re.findall(r"`(\w+==[\d.]+)`", text)
    assert len(versions) == 5 and set(versions) <= set((ROOT / "requirements.txt").read_text().split())


LINES = {
    "QUICK=1 bash run_all.sh --seed 1  # a comment --no": ("run_all.sh", ["--seed"]),
    "accelerate launch --multi_gpu train_expert.py --run-dir RUN": ("train_expert.py", ["--run-dir"]),
    "bash run_all.sh --client a=b.jsonl --seed 0": ("run_all.sh", ["--client", "--seed"]),
    "lm_eval --model hf --tasks intent": None,
}


def test_the_parser_above_finds_scripts_and_flags():
    assert {line: script_and_flags(line) for line in LINES} == LINES
    assert len(list(commands(README))) > 5
