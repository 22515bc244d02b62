"""BIG-bench: records, splits and the public set; the statistics of the table."""

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
from metamoe.rundir import write_json

# --- containment


def test_normalise():
    texts = ["It's  GREAT,\n really!", "", "?!", "Żółw 3.5", "under_score"]
    wanted = ["it s great really", "", "", "żółw 3 5", "under_score"]
    assert [bigbench.normalise(text) for text in texts] == wanted


@pytest.mark.parametrize("seed", range(12))
def test_the_containment_filter_agrees_with_brute_force(seed):
    """Few words, so that prefixes, repeats and overlaps are common; needles of 1 to 7 words."""
    rng = random.Random(seed)
    words = ["a", "b", "ab", "ba", "c"][: rng.randint(2, 5)]
    least = 1 if seed % 3 else 4
    needles = [" ".join(rng.choices(words, k=rng.randint(least, 7))) for _ in range(rng.randint(1, 6))]
    contains = bigbench.containment_filter([*needles, ""])
    for _ in range(300):
        said = [w.upper() if rng.random() < 0.2 else w for w in rng.choices(words, k=rng.randint(0, 12))]
        text = rng.choice([" ", ", ", "\n"]).join(said)
        brute = any(f" {needle} " in f" {bigbench.normalise(text)} " for needle in needles)
        assert contains(text) == brute, (needles, text)
    assert contains(f"x {needles[0]} x")


def test_client_texts_are_the_input_and_its_fields():
    record = {"input": "Passage: The river is very long.\nClaim: It is long."}
    whole = "passage the river is very long claim it is long"
    # "It is long": too short to say anything
    assert bigbench.client_texts(record) == [whole, "the river is very long"]


# --- records


@pytest.mark.parametrize(
    "example, choices, wanted",
    [
        ({"target_scores": {"yes": 0, "no ": 1}}, None, {"answer": " no", "choices": [" yes", " no"]}),
        ({"target_scores": {"yes": 1, "no": 1}}, None, None),
        ({"target": "a word"}, None, {"answer": " a word"}),
        ({"target": ["a word", "another"]}, None, {"answer": " a word"}),
        ({"target": ["b"]}, ["a", "b"], {"answer": " b", "choices": [" a", " b"]}),
        ({"target": ["a", "b"]}, ["a", "b"], None),
        ({"target": ["c"]}, ["a", "b"], None),
        ({"target": "  "}, None, None),
        ({"target": "y" * (bigbench.MAX_ANSWER_CHARS + 1)}, None, None),
        ({"input": "x" * (bigbench.MAX_CHARS + 1), "target": "y"}, None, None),
    ],
)
def test_to_record_takes_the_single_best_answer_or_leaves_the_example_out(example, choices, wanted):
    if wanted:
        wanted = {"source": "t", "input": "How?", "prompt": "Q: How?\nA:"} | wanted
    assert to_record({"input": " How? "} | example, "t", "Q: {input}\nA:", choices) == wanted


# --- splits

SIZES = {"train": 30, "validation": 10, "test": 20}


def split(name, seed, count=400):
    """Parts of VitaminC's kind of records: every passage and every claim stands in several."""
    rng = random.Random(0)
    says = "number {} says something of substance"
    text = f"Passage: passage {says}\nClaim: claim {says}"
    numbers = [(rng.randrange(count // 2), rng.randrange(count // 2)) for _ in range(count)]
    records = [{"input": text.format(*pair)} for pair in numbers]
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


def test_a_clients_task_is_no_source_of_the_public_set(examples):
    records = bigbench.public_records(600, Archive(examples, ["strategyqa", "tense"]))
    assert {record["source"] for record in records} == set(examples) - {"strategyqa", "tense"}


def test_public_records_have_distinct_prompts_and_every_source(examples):
    examples["tense"] *= 2
    records = bigbench.public_records(600, Archive(examples, []))
    assert len({bigbench.normalise(record["prompt"]) for record in records}) == 600
    assert {record["source"] for record in records} == set(examples)
    assert records == bigbench.public_records(600, Archive(examples, []))
    with pytest.raises(UserError, match="--public-size 100000: only"):
        bigbench.public_records(100_000, Archive(examples, []))


REAL = {"train": 400, "validation": 80, "test": 200}


@pytest.fixture(scope="module")
def real():
    """Of the real archive: the public set, and {(client, random seed): parts} in the default's sizes."""
    try:
        fetch.fetch(**fetch.BIGBENCH)
    except UserError as error:
        pytest.skip(f"BIG-bench is not to be had: {error}")
    archive, parts = bigbench.read_archive({}, bigbench.CLIENTS), {}
    for name, task in bigbench.CLIENTS.items():
        for seed in (0, 1):
            parts[name, seed] = task.load(name, REAL, seed, archive)
    return bigbench.public_records(6000, archive), parts


@pytest.mark.slow
def test_real_public_records_are_distinct_and_short(real):
    assert len({bigbench.normalise(record["prompt"]) for record in real[0]}) == len(real[0]) == 6000
    for record in chain(real[0], *map(records_of, real[1].values())):
        assert len(record["prompt"]) <= bigbench.MAX_CHARS
        assert 1 < len(record["answer"]) <= bigbench.MAX_ANSWER_CHARS + 1


@pytest.mark.slow
def test_real_clients_are_disjoint_with_distinct_splits_a_seed(real):
    for parts in real[1].values():
        assert {name: len(part) for name, part in parts.items()} == REAL
        for record in records_of(parts):
            choices = record["choices"]
            assert record["answer"] in choices and 2 <= len(set(choices)) == len(choices)
        fields = [set(bigbench.client_texts(record)) for record in records_of(parts)]
        assert len(set().union(*fields)) == sum(map(len, fields))  # no field twice
    assert all(real[1][name, 0]["test"] != real[1][name, 1]["test"] for name in bigbench.CLIENTS)


@pytest.mark.slow
def test_no_real_public_text_contains_a_clients_text(real):
    """Checked without the filter: by plain `in`, each field of each client record in all public texts."""
    public = "\n".join(f" {text} " for text in normalised(real[0]))
    texts = set()
    for record in chain.from_iterable(map(records_of, real[1].values())):
        fields = record["input"].replace(" (Answer: ", "\n").splitlines()
        texts |= {record["input"], *(field.split(": ", 1)[-1] for field in fields)}
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    checked = [" ".join(text) for text in words if len(text) >= bigbench.MIN_WORDS]
    assert len(checked) > 2500
    assert [text for text in checked if f" {text} " in public] == []


# --- the statistics


def test_wilson_against_published_values():
    """81 of 263: Newcombe (1998), Table I, method 3 (0.2553, 0.3662)."""
    counts = [(8, 10), (0, 10), (10, 10), (50, 100), (81, 263)]
    intervals = [(49.02, 94.33), (0, 27.75), (72.25, 100), (40.38, 59.62), (25.53, 36.62)]
    for count, interval in zip(counts, intervals, strict=True):
        assert statistics.wilson(*count) == pytest.approx(interval, abs=0.01)


def test_bootstrap_is_paired_weights_clients_alike_and_follows_its_seed():
    rng = np.random.default_rng(0)
    theirs = {"a": rng.integers(0, 2, 400).astype(float), "b": rng.integers(0, 2, 50).astype(float)}
    ours = theirs | {"b": np.ones(50)}  # all wrong answers of b put right
    gap = statistics.paired_bootstrap(ours, theirs, 0)
    share = np.mean(theirs["b"] == 0)
    assert gap["difference"] == pytest.approx(50 * share)
    # a never differs: all the spread is b's, half of a binomial's
    spread = 50 * np.sqrt(share * (1 - share) / 50)
    assert gap["interval"] == pytest.approx([50 * share - 1.96 * spread, 50 * share + 1.96 * spread], abs=1.5)
    assert statistics.paired_bootstrap(ours, ours, 0) == {"difference": 0.0, "interval": [0.0, 0.0]}
    few = [statistics.paired_bootstrap(ours, theirs, seed, resamples=20)["interval"] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_ensemble_is_the_mean_of_the_probabilities():
    one = [[np.log(0.1), np.log(0.3)], [0.0, 0.0, np.log(2)]]
    other = [[np.log(8), np.log(2)], [-1000.0, -1000.0, -1000.0]]
    first, second = btm.ensemble([{"scores": {"a": one}}, {"scores": {"a": other}}])["a"]
    assert first == pytest.approx([(0.25 + 0.8) / 2, (0.75 + 0.2) / 2])
    assert second == pytest.approx([(1 / 4 + 1 / 3) / 2] * 2 + [(1 / 2 + 1 / 3) / 2])


def test_is_right_compares_the_likeliest_choices_text():
    records = [{"choices": [" a", " b"], "answer": " b"}] * 2
    assert statistics.is_right([[-2.0, -1.0], [-1.0, -2.0]], records).tolist() == [1.0, 0.0]


def test_shares_of_the_tokens_add_up_to_one():
    assert statistics.shares([[1, 3], [2, 2]]) == [[0.25, 0.75], [0.5, 0.5]]


# --- the tables


def write_results(run_dir, seed, ours, theirs):
    """A run's results.json with four test samples of one client, scored by two models."""
    rows = []
    for model, digits in (("zeroshot", theirs), ("metamoe", ours)):
        accuracy = 25.0 * digits.count("1")
        clients = {"a": {"accuracy": accuracy, "right": digits}}
        rows.append({"model": model, "title": model, "clients": clients, "average": accuracy})
    rows[1] |= {"experts": ["b", "a"], "routing": {"a": [[0.25, 0.75], [0.75 - seed / 2, 0.25 + seed / 2]]}}
    run_dir.mkdir()
    write_json(run_dir / "results.json", {"run": {"seed": seed, "clients": ["a"]}, "rows": rows})
    return run_dir


def test_pool_prints_means_deviations_and_paired_differences(tmp_path, capsys):
    first = write_results(tmp_path / "0", 0, "1111", "0000")
    second = write_results(tmp_path / "1", 1, "1110", "1000")
    pooled.pool([first, second], "results.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| zeroshot | 12.50 ± 17.68 | 12.50 ± 17.68 | +75.00 (")
    assert lines[3] == "| metamoe | 87.50 ± 17.68 | 87.50 ± 17.68 |  |"
    assert lines[-1] == "| metamoe | 62.5 ± 17.7 |"  # of 50 and 75% in the two runs
    with pytest.raises(UserError, match="evaluate it alone"):
        pooled.pool([first, tmp_path], "results.json")
    write_json(second / "results.json", {"run": {"seed": 1, "clients": ["b"]}, "rows": []})
    with pytest.raises(UserError, match="random seed"):
        pooled.pool([first, second], "results.json")


def test_the_papers_rows_average_to_the_papers_averages():
    """A slip in a constant would show: every printed average is the mean of its clients, to the rounding."""
    for backbone, rows in paper.PAPER.items():
        experts = {f"expert-{name}" for name in paper.PAPER_CLIENTS[backbone]}
        assert set(rows) <= {"zeroshot", *methods.METHODS, *experts}
        for model, numbers in rows.items():
            if len(numbers) > 1:
                assert np.mean(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.011), (backbone, model)


def test_results_of_the_papers_backbones_stand_beside_the_papers():
    names = ["flowers", "pets", "eurosat"]
    run = {"backbone": "vit-b-32", "seed": 0, "clients": names}
    run |= {"candidates": 3000, "proxies": 500}
    cell = {"accuracy": 50.0, "wilson": [40, 60]}
    row = {"clients": dict.fromkeys(names, cell), "average": 50.0}
    titles = {"metamoe": "MetaMoE", "flexolmo-dpp": "flexolmo-dpp"}
    rows = [row | {"model": model, "title": title} for model, title in titles.items()]
    results = {"split": "test", "n": dict.fromkeys(names, 4), "rows": rows, "uploaded_bytes": {}}

    def text(own=False, **changed):
        return tables.markdown(results | {"own_seed_model": own}, run | changed)

    # by name, not by place
    assert "| MetaMoE | 50.00 (93.67) | 50.00 (91.91) | 50.00 (97.98) | 50.00 (94.52) |" in text()
    assert "| FlexOlmo, DPP | 50.00 | 50.00 | 50.00 | 50.00 (93.20) |" in text()
    assert "are not the paper's" not in text()
    assert "proxies, seed_model are not the paper's" in text(own=True, proxies=9)
    for other in (text(backbone="glyph-clip"), text(clients=names[:2])):
        assert "91.91" not in other and "paper's" not in other


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
    text, other = (
        costs.cost_tables({"backbone": backbone, "clients": ["pets"]}, rows, timings)
        for backbone in ("vit-b-32", "glyph-clip")
    )
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
    assert "random" not in text and "paper:" not in other
