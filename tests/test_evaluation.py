"""evaluate.py through its command line: the scores, the table, the timings, Figure 2's selections."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import CLIENTS, SIZES, refused, stage

from metamoe.methods import METHODS
from metamoe.report.figures import RULES, known_first
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results(finished):
    return read_json(finished[0] / "results.json")


def test_results_json_adds_up(finished, results):
    assert results["n"] == dict.fromkeys(CLIENTS, SIZES["test_size"])
    ours = {row["model"]: row["average"] for row in results["rows"]}
    for row in results["rows"]:
        cells = [row["clients"][name] for name in CLIENTS]
        for cell in cells:
            assert cell["n"] == SIZES["test_size"]
            assert isinstance(cell["correct"], int) and 0 <= cell["correct"] <= cell["n"]
            assert cell["accuracy"] == pytest.approx(100 * cell["correct"] / cell["n"])
            assert cell["wilson"][0] <= cell["accuracy"] <= cell["wilson"][1]
        assert row["average"] == pytest.approx(np.mean([cell["accuracy"] for cell in cells]))
        if row["model"] != "metamoe":
            assert row["metamoe_minus"]["difference"] == pytest.approx(ours["metamoe"] - row["average"])
        for shares in row.get("routing", {}).values():
            assert np.shape(shares) == (2, 3) and np.sum(shares, 1) == pytest.approx([1, 1])
    routed = {row["model"] for row in results["rows"] if "routing" in row}
    assert routed == {"btx", "flexolmo", "metamoe", "unrestricted", "from-proxies"}
    for name in CLIENTS:
        sent = filter(Path.is_file, (finished[0] / "clients" / name / "upload" / "aligned-dpp").rglob("*"))
        assert results["uploaded_bytes"][f"{name}/aligned-dpp"] == sum(path.stat().st_size for path in sent)


def test_scores_agree_with_the_table(finished, results):
    """Accuracy counted anew from RUN/scores and the private test parts."""
    rows = {row["model"]: row for row in results["rows"]}
    for model in ("zeroshot", "soup", "metamoe", "expert-intent"):
        scores = read_json(finished[0] / "scores" / f"{model}.test.json")["scores"]
        for name in CLIENTS:
            test = (finished[0] / "clients" / name / "private" / "test.jsonl").read_text()
            right = []
            for line, values in zip(test.splitlines(), scores[name], strict=True):
                record = json.loads(line)
                right.append(record["choices"][int(np.argmax(values))] == record["answer"])
            assert rows[model]["clients"][name]["correct"] == sum(right)


def test_the_table_has_the_papers_rows_in_its_order(finished, results):
    lines = (finished[0] / "results.md").read_text().splitlines()
    start = lines.index("| | intent | hotels | question | Average |") + 2
    table = [line.split("|")[1:-1] for line in lines[start : lines.index("", start)]]
    experts = ["Expert I (intent)", "Expert II (hotels)", "Expert III (question)"]
    rivals = ["BTM", "ModelSoup", "BTX", "FlexOlmo"]
    titles = ["UnrestrictedMoE", "ZeroShot", *experts, *rivals, "MetaMoE", "from-proxies"]
    assert [cells[0].strip() for cells in table] == titles
    for cells, row in zip(table, results["rows"], strict=True):
        want = [*(row["clients"][name]["accuracy"] for name in CLIENTS), row["average"]]
        assert [float(cell.strip("* ")) for cell in cells[1:]] == pytest.approx(want, abs=0.006)


def test_the_table_says_what_it_shows(finished, results):
    text = (finished[0] / "results.md").read_text()
    private = [row for row in results["rows"] if row["model"] in METHODS and row["model"] != "unrestricted"]
    best = max(row["average"] for row in private)
    assert text.count(f"**{best:.2f}**") == sum(row["average"] == best for row in private)
    assert "UnrestrictedMoE: trained on the clients' private data, NOT private" in text
    for name in CLIENTS:
        test = [json.loads(line) for line in open_test(finished[0], name)]
        guess = 100 * np.mean([1 / len(record["choices"]) for record in test])
        assert results["chance"][name] == pytest.approx(guess) and f"{name} {guess:.1f}" in text
    for row in (row for row in results["rows"] if row["model"] != "btm"):
        scores = read_json(finished[0] / "scores" / f"{row['model']}.test.json")["scores"]
        for name in CLIENTS:
            test = [json.loads(line)["choices"] for line in open_test(finished[0], name)]
            given = [choices[int(np.argmax(s))] for choices, s in zip(test, scores[name], strict=True)]
            most = max(map(given.count, given)) / len(given)
            assert ("one_choice" in row["clients"][name]) == (most > 0.9)
            assert (f"- {row['title']} answers" in text) >= (most > 0.9)
    for figure in ("routing.png", "losses.png"):
        assert (finished[0] / figure).read_bytes().startswith(b"\x89PNG")


def test_a_model_that_saw_private_data_is_called_so_by_any_name(run):
    flags = "--method metamoe --samples private --epochs 1 --name mine".split()
    assert stage("unify_moe", run, *flags).code == 0
    assert stage("unify_moe", run, *flags, "--without", "hotels").code == 0
    assert stage("evaluate", run, "--models", "mine", "mine-without-hotels", "metamoe").code == 0
    assert (
        "mine, mine-without-hotels: trained on the clients' private data" in (run / "results.md").read_text()
    )


def open_test(run_dir, name):
    return (run_dir / "clients" / name / "private" / "test.jsonl").read_text().splitlines()


def test_clocks_are_read_into_the_timings_alone(finished, results):
    timings = read_json(finished[0] / "timings.json")
    selection, relevance = timings.pop("selection_seconds"), timings.pop("relevance_seconds")
    assert selection.keys() == relevance.keys() == set(CLIENTS)
    for seconds in selection.values():
        assert seconds.keys() == {"dpp", "random", "similarity"}
        assert min(seconds.values()) > 0
    assert min(timings.pop("embedding_seconds"), *relevance.values()) > 0
    assert set(timings) == {row["model"] for row in results["rows"]}
    assert min(found["samples_per_second"] for found in timings.values()) > 0
    ours = timings["metamoe"]
    assert ours["unify_seconds"] > 0
    for name in ("results.json", "results.md"):
        assert not re.search(r"second|time", (finished[0] / name).read_text())
    table = (finished[0] / "timings.md").read_text()
    assert f"| MetaMoE | {ours['unify_seconds']:.2f} | {ours['samples_per_second']:.1f} |" in table
    assert "| ZeroShot |  |" in table
    assert f"| DPP | {selection[CLIENTS[0]]['dpp']:.3f} |" in table


def test_a_model_is_scored_once_and_a_remade_one_anew(run):
    def state():
        scores = {path.name: path.stat().st_mtime_ns for path in (run / "scores").iterdir()}
        return scores, [(run / name).read_bytes() for name in ("results.json", "results.md")]

    before = state()
    assert stage("evaluate", run).code == 0
    assert state() == before
    assert stage("unify_moe", run, "--method", "metamoe", "--force", "--lr", "0.5").code == 0
    assert stage("evaluate", run).code == 0
    before, after = before[0], state()[0]
    assert {name for name in after if after[name] != before.get(name)} == {"metamoe.test.json"}


def test_validation_results_stand_beside_the_test_results(run):
    before = (run / "results.json").read_bytes()
    assert stage("evaluate", run, "--split", "validation", "--models", "zeroshot", "metamoe", "btm").code == 0
    found = read_json(run / "results.validation.json")
    assert found["n"] == dict.fromkeys(CLIENTS, SIZES["validation_size"])
    assert [row["title"] for row in found["rows"]] == ["ZeroShot", "BTM", "MetaMoE"]
    assert (run / "results.json").read_bytes() == before


def test_the_selections_that_are_there_are_covered(run):
    """A rule without a label has its folder's name; one that a client lacks leaves its cells empty."""
    own = run / "clients" / "hotels" / "selection"
    shutil.copytree(own / "random", own / "a-rule")
    assert stage("evaluate", run, "--models", "zeroshot", "--figure").code == 0
    found, table = read_json(run / "results.json")["coverage"], (run / "results.md").read_text()
    rules = {"dpp", "random", "similarity"}
    assert {name: set(found[name]) for name in CLIENTS} == dict.fromkeys(CLIENTS, rules) | {
        "hotels": rules | {"a-rule"}
    }
    assert found["hotels"]["a-rule"] == found["hotels"]["random"]
    cells = "{distance:.4f} | {log_det:.1f}".format(**found["hotels"]["a-rule"])
    assert f"| a-rule |  |  | {cells} |  |  |" in table
    assert all((run / f"figure2-{name}.png").stat().st_size > 10_000 for name in CLIENTS)
    assert "a-rule" not in (run / "timings.md").read_text()  # not every client has its seconds
    assert known_first({"b", "dpp", "a", *RULES}) == ["random", "similarity", "dpp", "dpp-all", "a", "b"]


def test_what_evaluate_needs_is_named(tmp_path, seed_model, run):
    tiny.make_run(tmp_path / "none", seed_model, validation_size=0)
    assert "--validation-size" in refused("evaluate", tmp_path / "none", "--split", "validation")
    (run / "clients" / "hotels" / "private" / "test.jsonl").unlink()
    assert "test.jsonl" in refused("evaluate", run)
