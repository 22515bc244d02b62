"""evaluate.py through its command line: the scores, the table, the timings."""

import json
import re

import numpy as np
import pytest
import tiny
from tiny import CLIENTS, SIZES, refused, stage

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def test_results_json_adds_up(finished):
    run_dir, _ = finished
    results = read_json(run_dir / "results.json")
    assert results["n"] == dict.fromkeys(CLIENTS, SIZES["test_size"])
    for row in results["rows"]:
        for name in CLIENTS:
            cell = row["clients"][name]
            assert (
                cell["n"] == SIZES["test_size"]
                and isinstance(cell["correct"], int)
                and 0 <= cell["correct"] <= cell["n"]
            )
            assert cell["accuracy"] == pytest.approx(100 * cell["correct"] / cell["n"])
            assert cell["wilson"][0] <= cell["accuracy"] <= cell["wilson"][1]
        assert row["average"] == pytest.approx(
            np.mean([row["clients"][name]["accuracy"] for name in CLIENTS])
        )
    ours = {row["model"]: row["average"] for row in results["rows"]}
    for row in results["rows"]:
        if row["model"] != "metamoe":
            assert row["metamoe_minus"]["difference"] == pytest.approx(ours["metamoe"] - row["average"])
        for shares in row.get("routing", {}).values():
            assert np.shape(shares) == (2, 3) and np.sum(shares, 1) == pytest.approx([1, 1])
    assert {row["model"] for row in results["rows"] if "routing" in row} == {
        "btx",
        "flexolmo",
        "metamoe",
        "unrestricted",
        "from-proxies",
    }
    for name in CLIENTS:
        upload = run_dir / "clients" / name / "upload" / "aligned-dpp"
        assert results["uploaded_bytes"][f"{name}/aligned-dpp"] == sum(
            p.stat().st_size for p in upload.rglob("*") if p.is_file()
        )


def test_scores_agree_with_the_table(finished):
    """Accuracy counted anew from RUN/scores and the private test parts."""
    run_dir, _ = finished
    rows = {row["model"]: row for row in read_json(run_dir / "results.json")["rows"]}
    for model in ("zeroshot", "soup", "metamoe", "expert-intent"):
        for name in CLIENTS:
            scores = read_json(run_dir / "scores" / f"{model}.test.json")["scores"][name]
            records = [
                json.loads(line)
                for line in (run_dir / "clients" / name / "private" / "test.jsonl").read_text().splitlines()
            ]
            correct = sum(
                r["choices"][max(range(len(s)), key=s.__getitem__)] == r["answer"]
                for s, r in zip(scores, records, strict=True)
            )
            assert rows[model]["clients"][name]["correct"] == correct


def test_the_table_has_the_papers_rows_in_its_order(finished):
    lines = (finished[0] / "results.md").read_text().splitlines()
    start = lines.index("| | intent | hotels | question | Average |") + 2
    titles = [line.split("|")[1].strip() for line in lines[start : lines.index("", start)]]
    assert titles == [
        "UnrestrictedMoE",
        "ZeroShot",
        "Expert I (intent)",
        "Expert II (hotels)",
        "Expert III (question)",
        "BTM",
        "ModelSoup",
        "BTX",
        "FlexOlmo",
        "MetaMoE",
        "from-proxies",
    ]
    rows = read_json(finished[0] / "results.json")["rows"]
    for line, row in zip(lines[start:], rows, strict=False):
        cells = [float(cell) for cell in line.split("|")[2:-1]]
        assert cells == [
            pytest.approx(v, abs=0.006)
            for v in [*(row["clients"][name]["accuracy"] for name in CLIENTS), row["average"]]
        ]


def test_clocks_are_read_into_the_timings_alone(finished):
    run_dir, _ = finished
    timings = read_json(run_dir / "timings.json")
    selection, relevance = timings.pop("selection_seconds"), timings.pop("relevance_seconds")
    assert (
        timings.pop("embedding_seconds") > 0
        and relevance.keys() == set(CLIENTS)
        and min(relevance.values()) > 0
    )
    assert selection.keys() == set(CLIENTS) and all(
        t.keys() == {"dpp", "random", "similarity"} and min(t.values()) > 0 for t in selection.values()
    )
    assert set(timings) == {row["model"] for row in read_json(run_dir / "results.json")["rows"]}
    assert (
        all(t["samples_per_second"] > 0 for t in timings.values()) and timings["metamoe"]["unify_seconds"] > 0
    )
    for name in ("results.json", "results.md"):
        assert not re.search(r"second|time", (run_dir / name).read_text())
    table = (run_dir / "timings.md").read_text()
    assert (
        f"| MetaMoE | {timings['metamoe']['unify_seconds']:.2f} | {timings['metamoe']['samples_per_second']:.1f} |"
        in table
    )
    assert "| ZeroShot |  |" in table and f"| DPP | {selection[CLIENTS[0]]['dpp']:.3f} |" in table


def test_evaluate_scores_each_model_once(run):
    before = {p: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    results = (run / "results.json").read_bytes(), (run / "results.md").read_bytes()
    assert stage("evaluate", run).code == 0
    assert {p: p.stat().st_mtime_ns for p in (run / "scores").iterdir()} == before
    assert ((run / "results.json").read_bytes(), (run / "results.md").read_bytes()) == results


def test_a_remade_model_is_scored_anew(run):
    before = {p.name: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    assert stage("unify_moe", run, "--method", "metamoe", "--force", "--lr", "0.5").code == 0
    assert stage("evaluate", run).code == 0
    after = {p.name: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"metamoe.test.json"}


def test_validation_results_stand_beside_the_test_results(run):
    before = (run / "results.json").read_bytes()
    assert stage("evaluate", run, "--split", "validation", "--models", "zeroshot", "metamoe", "btm").code == 0
    results = read_json(run / "results.validation.json")
    assert (
        results["n"] == dict.fromkeys(CLIENTS, SIZES["validation_size"])
        and (run / "results.json").read_bytes() == before
    )
    assert [row["title"] for row in results["rows"]] == ["ZeroShot", "BTM", "MetaMoE"]


def test_validation_scoring_needs_validation_samples(tmp_path, seed_model):
    tiny.make_run(tmp_path / "run", seed_model, validation_size=0)
    assert "--validation-size" in refused("evaluate", tmp_path / "run", "--split", "validation")


def test_evaluate_without_the_clients_data_says_so(run):
    (run / "clients" / "hotels" / "private" / "test.jsonl").unlink()
    assert "test.jsonl" in refused("evaluate", run)
