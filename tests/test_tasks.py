"""BIG-bench: records, splits and the public set; the statistics of the table."""

import json
import random
import re
from itertools import chain, combinations

import numpy as np
import pytest

from metamoe import methods
from metamoe.data import bigbench, fetch
from metamoe.data.bigbench import Archive, to_record
from metamoe.errors import UserError
from metamoe.report import costs, paper, pooled, statistics, tables
from metamoe.rivals import btm

# --- containment


def test_normalise():
    texts = ["It's  GREAT,\n really!", "", "?!", "Żółw 3.5", "under_score"]
    wanted = ["it s great really", "", "", "żółw 3 5", "under_score"]
    assert [bigbench.normalise(text) for text in texts] == wanted


@pytest.mark.parametrize("seed", range(30))
def test_the_containment_filter_agrees_with_brute_force(seed):
    """Few words, so that prefixes, repeats and overlaps of the needles are common; needles of 1 to 7 words."""
    rng = random.Random(seed)
    words = ["a", "b", "ab", "ba", "c"][: rng.randint(2, 5)]
    least = 1 if seed % 3 else 4
    needles = [" ".join(rng.choices(words, k=rng.randint(least, 7))) for _ in range(rng.randint(1, 6))] + [""]
    contains = bigbench.containment_filter(needles)
    for _ in range(150):
        said = [w.upper() if rng.random() < 0.2 else w for w in rng.choices(words, k=rng.randint(0, 12))]
        text = rng.choice([" ", ", ", "\n"]).join(said)
        brute = any(f" {t} " in f" {bigbench.normalise(text)} " for t in needles if t)
        assert contains(text) == brute, (needles, text)
    assert contains(f"x {needles[0]} x")


def test_the_filter_respects_word_boundaries():
    contains = bigbench.containment_filter(["the cat sat down"])
    texts = ["Well: THE cat... sat; down!", "the cat sat downstairs", "the cat sat"]
    assert [contains(text) for text in texts] == [True, False, False]


def test_client_texts_are_the_input_and_its_fields():
    record = {"input": "Passage: The river is very long.\nClaim: It is long."}
    whole = "passage the river is very long claim it is long"
    # "It is long": too short to say anything
    assert bigbench.client_texts(record) == [whole, "the river is very long"]


# --- records


def test_to_record_takes_the_single_best_choice():
    example = {"input": " How? ", "target_scores": {"yes": 0, "no ": 1}}
    wanted = {
        "source": "t",
        "input": "How?",
        "prompt": "Q: How?\nA:",
        "answer": " no",
        "choices": [" yes", " no"],
    }
    assert to_record(example, "t", "Q: {input}\nA:") == wanted


def test_to_record_gives_a_generation_task_its_choices_and_leaves_out_other_targets():
    made = [
        to_record({"input": "x", "target": target}, "t", "{input}", ["a", "b"])
        for target in (["b"], ["a", "b"], ["c"])
    ]
    assert made[0]["choices"] == [" a", " b"] and made[0]["answer"] == " b" and made[1:] == [None, None]


@pytest.mark.parametrize("target", ["a word", ["a word", "another"]])
def test_to_record_takes_the_first_target(target):
    wanted = {"source": "t", "input": "x", "prompt": "x", "answer": " a word"}
    assert to_record({"input": "x", "target": target}, "t", "{input}") == wanted


LEFT_OUT = {
    "two best": {"input": "x", "target_scores": {"yes": 1, "no": 1}},
    "no answer": {"input": "x", "target": "  "},
    "long prompt": {"input": "x" * (bigbench.MAX_CHARS + 1), "target": "y"},
    "long answer": {"input": "x", "target": "y" * (bigbench.MAX_ANSWER_CHARS + 1)},
}


@pytest.mark.parametrize("why", LEFT_OUT)
def test_to_record_leaves_out(why):
    assert to_record(LEFT_OUT[why], "t", "{input}") is None


# --- splits

SIZES = {"train": 30, "validation": 10, "test": 20}


def split(name, seed, count=400):
    """Parts of VitaminC's kind of records: every passage and every claim stands in several."""
    rng = random.Random(0)
    number = lambda: rng.randrange(count // 2)  # noqa: E731
    text = "Passage: passage number {} says something of substance\nClaim: claim number {} says something of substance"
    records = [{"input": text.format(number(), number())} for _ in range(count)]
    return bigbench.split_client(name, records + [None] * 5, SIZES, seed)


def records_of(parts):
    return list(chain.from_iterable(parts.values()))


def test_splits_are_disjoint_share_no_field_and_are_those_of_their_seed():
    parts = split("intent", 0)
    assert {name: len(part) for name, part in parts.items()} == SIZES
    for a, b in combinations(records_of(parts), 2):
        assert not set(bigbench.client_texts(a)) & set(bigbench.client_texts(b))
    assert split("intent", 0) == parts != split("intent", 1) and split("hotels", 0) != parts


def test_a_client_that_is_too_small_is_refused():
    with pytest.raises(UserError, match=r"client intent: \d+ distinct .*60 asked for .*--train-size 30"):
        split("intent", 0, count=40)


# --- the public set


@pytest.fixture
def examples():
    """Forty examples of every public task."""
    names = [task for task in bigbench.PUBLIC if not task.endswith("*")]
    made = {}
    for name in [*names, *(f"natural_instructions/subtask{i}" for i in (1, 2, 3))]:
        words = re.sub(r"\W|\d", " ", name)
        texts = [f"{words} {name[-1]} question {i} and more" for i in range(40)]
        made[name] = [{"input": text, "target": f"answer {i}"} for i, text in enumerate(texts)]
    return made


def normalised(records):
    return [bigbench.normalise(record["prompt"] + record["answer"]) for record in records]


def test_no_public_record_contains_a_clients_text(examples):
    private = "guests were happy with the breakfast"
    examples["strategyqa"][3]["input"] = f"He wrote: '{private.upper()}', and left."
    examples["tense"][5]["target"] = private
    examples["cryptonite"][7]["input"] = private.replace("happy", "unhappy")  # no copy
    examples["natural_instructions/subtask0"] = [{"input": private}]
    records = bigbench.public_records(700, Archive(examples, ["natural_instructions/subtask0"]))
    assert len(records) == 700 and not any(private in text for text in normalised(records))
    del examples["natural_instructions/subtask0"]
    assert any(private in text for text in normalised(bigbench.public_records(900, Archive(examples, []))))


def test_public_records_have_distinct_prompts_and_every_source(examples):
    examples["tense"] *= 2
    records = bigbench.public_records(600, Archive(examples, []))
    assert len({bigbench.normalise(record["prompt"]) for record in records}) == 600
    assert {record["source"] for record in records} == set(examples)
    assert records == bigbench.public_records(600, Archive(examples, []))
    with pytest.raises(UserError, match="--public-size 100000: only"):
        bigbench.public_records(100_000, Archive(examples, []))


@pytest.fixture(scope="module")
def real():
    """The public set of the real archive, and its clients with the default's sizes for two random seeds."""
    try:
        fetch.fetch(**fetch.BIGBENCH)
    except UserError as error:
        pytest.skip(f"BIG-bench is not to be had: {error}")
    archive, clients = bigbench.read_archive({}, bigbench.CLIENTS), bigbench.CLIENTS.items()
    sizes = {"train": 400, "validation": 80, "test": 200}
    seeds = [{name: task.load(name, sizes, seed, archive) for name, task in clients} for seed in (0, 1)]
    return bigbench.public_records(6000, archive), seeds, sizes


@pytest.mark.slow
def test_real_sizes_and_lengths(real):
    public, (clients, _), sizes = real
    assert len({bigbench.normalise(record["prompt"]) for record in public}) == len(public) == 6000
    for record in public + [record for parts in clients.values() for record in records_of(parts)]:
        assert len(record["prompt"]) <= bigbench.MAX_CHARS
        assert 1 < len(record["answer"]) <= bigbench.MAX_ANSWER_CHARS + 1
    for parts in clients.values():
        assert {name: len(part) for name, part in parts.items()} == sizes
        for record in records_of(parts):
            choices = record["choices"]
            assert record["answer"] in choices and 2 <= len(set(choices)) == len(choices)


@pytest.mark.slow
def test_real_clients_are_disjoint_with_distinct_splits_a_seed(real):
    _, seeds, _ = real
    for parts in chain.from_iterable(clients.values() for clients in seeds):
        fields = [set(bigbench.client_texts(record)) for record in records_of(parts)]
        assert len(set().union(*fields)) == sum(map(len, fields))  # no field twice
    for name in bigbench.CLIENTS:
        assert seeds[0][name]["test"] != seeds[1][name]["test"]


@pytest.mark.slow
def test_no_real_public_text_contains_a_clients_text(real):
    """Checked without the filter: by plain `in`, each field of each client record in all public texts at once."""
    public = "\n".join(f" {text} " for text in normalised(real[0]))
    texts = set()
    for record in chain.from_iterable(records_of(parts) for clients in real[1] for parts in clients.values()):
        fields = record["input"].replace(" (Answer: ", "\n").splitlines()
        texts |= {record["input"], *(field.split(": ", 1)[-1] for field in fields)}
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    checked = [" ".join(text) for text in words if len(text) >= bigbench.MIN_WORDS]
    assert len(checked) > 2500
    assert [text for text in checked if f" {text} " in public] == []


# --- the statistics


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (8, 10, 49.02, 94.33),
        (0, 10, 0, 27.75),
        (10, 10, 72.25, 100),
        (50, 100, 40.38, 59.62),
        (81, 263, 25.53, 36.62),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    """81 of 263: Newcombe (1998), Table I, method 3 (0.2553, 0.3662)."""
    assert statistics.wilson(successes, n) == pytest.approx([low, high], abs=0.01)


def test_bootstrap_of_identical_rows_is_zero():
    row = {"a": np.array([1.0, 0, 1]), "b": np.array([0.0, 1])}
    assert statistics.paired_bootstrap(row, row, 0) == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_bootstrap_is_paired_weights_clients_alike_and_follows_its_seed():
    rng = np.random.default_rng(0)
    theirs = {"a": rng.integers(0, 2, 400).astype(float), "b": rng.integers(0, 2, 50).astype(float)}
    ours = {name: values.copy() for name, values in theirs.items()}
    ours["b"][theirs["b"] == 0] = 1.0  # all wrong answers of b put right
    gap = statistics.paired_bootstrap(ours, theirs, 0)
    share = 100 * np.mean(theirs["b"] == 0)
    assert gap["difference"] == pytest.approx(share / 2)
    # a never differs: all the spread is b's, half of a binomial's
    spread = 100 * np.sqrt(share / 100 * (1 - share / 100) / 50) / 2
    assert gap["interval"] == pytest.approx([share / 2 - 1.96 * spread, share / 2 + 1.96 * spread], abs=1.5)
    assert gap == statistics.paired_bootstrap(ours, theirs, 0)
    few = [statistics.paired_bootstrap(ours, theirs, seed, resamples=20)["interval"] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_ensemble_is_the_mean_of_the_probabilities():
    experts = [
        {"scores": {"a": [[np.log(0.1), np.log(0.3)], [0.0, 0.0, np.log(2)]]}},
        {"scores": {"a": [[np.log(8), np.log(2)], [-1000.0, -1000.0, -1000.0]]}},
    ]
    first, second = btm.ensemble(experts)["a"]
    assert first == pytest.approx([(0.25 + 0.8) / 2, (0.75 + 0.2) / 2])
    assert second == pytest.approx([(1 / 4 + 1 / 3) / 2] * 2 + [(1 / 2 + 1 / 3) / 2])


def test_is_right_compares_the_likeliest_choices_text():
    records = [{"choices": [" a", " b"], "answer": " b"}, {"choices": [" a", " b"], "answer": " b"}]
    assert statistics.is_right([[-2.0, -1.0], [-1.0, -2.0]], records).tolist() == [1.0, 0.0]


def test_shares_of_the_tokens_add_up_to_one():
    assert statistics.shares([[1, 3], [2, 2]]) == [[0.25, 0.75], [0.5, 0.5]]


def test_pool_prints_means_deviations_and_paired_differences(tmp_path, capsys):
    def write(seed, ours, theirs):
        def row(model, digits):
            values = [int(c) for c in digits]
            return {
                "model": model,
                "title": model,
                "clients": {"a": {"accuracy": 25.0 * sum(values), "right": digits}},
                "average": 25.0 * sum(values),
            }

        (tmp_path / str(seed)).mkdir()
        results = {
            "run": {"seed": seed, "clients": ["a"]},
            "rows": [row("zeroshot", theirs), row("metamoe", ours)],
        }
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
        return tmp_path / str(seed)

    runs = [write(0, "1111", "0000"), write(1, "1110", "1000")]
    pooled.pool(runs, "results.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| zeroshot | 12.50 ± 17.68 | 12.50 ± 17.68 | +75.00 (")
    assert lines[3] == "| metamoe | 87.50 ± 17.68 | 87.50 ± 17.68 |  |"
    with pytest.raises(UserError, match="evaluate it alone first"):
        pooled.pool([runs[0], tmp_path], "results.json")
    (runs[1] / "results.json").write_text(json.dumps({"run": {"seed": 1, "clients": ["b"]}, "rows": []}))
    with pytest.raises(UserError, match="only the random seed may differ"):
        pooled.pool(runs, "results.json")


RUN = {
    "backbone": "vit-b-32",
    "seed": 0,
    "seed_model": "",
    "clients": ["flowers", "pets", "eurosat"],
    "candidates": 3000,
    "proxies": 500,
}


def test_the_papers_rows_average_to_the_papers_averages():
    """A slip of the pen in a constant would show: every printed average is the mean of its clients, to the rounding."""
    for backbone, rows in paper.PAPER.items():
        assert set(rows) <= {
            "zeroshot",
            *methods.METHODS,
            *(f"expert-{name}" for name in paper.PAPER_CLIENTS[backbone]),
        }
        for model, numbers in rows.items():
            if len(numbers) > 1:
                assert np.mean(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.011), (backbone, model)


def test_results_of_the_papers_backbones_stand_beside_the_papers():
    names = RUN["clients"]
    row = {
        "model": "metamoe",
        "title": "MetaMoE",
        "clients": {name: {"accuracy": 50.0, "wilson": [40, 60]} for name in names},
        "average": 50.0,
    }
    one = {**row, "model": "flexolmo-dpp", "title": "flexolmo-dpp"}
    results = {"split": "test", "n": dict.fromkeys(names, 4), "rows": [row, one], "uploaded_bytes": {}}
    text = tables.markdown(results, RUN)
    # by name, not by place
    assert "| MetaMoE | 50.00 (93.67) | 50.00 (91.91) | 50.00 (97.98) | 50.00 (94.52) |" in text
    assert (
        "| FlexOlmo, DPP | 50.00 | 50.00 | 50.00 | 50.00 (93.20) |" in text
        and "are not the paper's" not in text
    )
    assert "proxies, seed_model are not the paper's" in tables.markdown(
        results, {**RUN, "proxies": 9, "seed_model": "x.pt"}
    )
    for other in ({**RUN, "backbone": "glyph-clip"}, {**RUN, "clients": names[:2]}):
        assert "91.91" not in tables.markdown(results, other) and "paper's" not in tables.markdown(
            results, other
        )


def test_cost_tables_are_means_over_the_runs():
    timings = [
        {
            "metamoe": {"unify_seconds": s, "samples_per_second": 10 * s},
            "zeroshot": {"samples_per_second": 5.0},
            "embedding_seconds": 60 * s,
            "relevance_seconds": {"pets": s},
            "selection_seconds": {"pets": {"dpp": s, "similarity": 0.5}},
        }
        for s in (1.0, 3.0)
    ]
    rows = [{"model": model, "title": model} for model in ("zeroshot", "metamoe")]
    text = costs.cost_tables({"backbone": "vit-b-32", "clients": ["pets"]}, rows, timings)
    for line in (
        "| embedding D_0, once for all clients | 120.00 |",
        "| private features and relevance head | 2.000 |",
        "| similarity | 0.500 |",
        "| DPP | 2.000 |",
        "6.41 min by similarity, 6.61 min by DPP",
        "| zeroshot |  | 5.0 |  |  |",
        "| metamoe | 2.00 | 20.0 | 12.15 | 1751.00 |",
    ):
        assert line in text
    assert "random" not in text
    assert "paper:" not in costs.cost_tables({"backbone": "glyph-clip", "clients": ["pets"]}, rows, timings)
