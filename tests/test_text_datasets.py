"""The paper's language datasets: every layout that questions.load_text and public_text read, written here in the hub's exact schema."""

import csv
import json

import drive
import numpy as np
import pytest
import tiny
import torch

from metamoe import backbones, presets
from metamoe.backbones import base
from metamoe.data import questions
from metamoe.errors import UserError
from metamoe.rundir import read_json

ALL = {"train": 0, "validation": 0, "test": 0}


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def rows_of(name, count, start=0):
    """Rows as the hub has them: {split: ...} of their columns; two questions on each context."""
    numbers = range(start, start + count)
    if name == "commonsenseqa":
        return [
            {
                "id": f"{i:032x}",
                "question": f"Where would you put thing {i}? ",
                "question_concept": "thing",
                "choices": {"label": list("ABCDE"), "text": [f"place {i}{c}" for c in "abcde"]},
                "answerKey": "ABCDE"[i % 5],
            }
            for i in numbers
        ]
    if name == "cosmosqa":
        return [
            {
                "id": f"3Q{i}##1",
                "context": f'It was day {i // 2} , and "all" of us ran ,',
                "question": f"Why did run {i} happen ?",
                **{f"answer{c}": f"Because of {i}{c} ." for c in range(4)},
                "label": i % 4,
            }
            for i in numbers
        ]
    if name == "socialiqa":
        return [
            {
                "context": f"Taylor saw {i // 2} friends.",
                "question": f"What will Taylor want {i}?",
                **{f"answer{c}": f"to do {i}{c}" for c in "ABC"},
                "label": str(i % 3 + 1),
            }
            for i in numbers
        ]
    return [
        {
            "instruction": f"Name item {i}.",
            "input": f"of list {i}" * (i % 2),
            "output": f"Item {i}\nof the list." * (i != 3),
            "text": f"Below is {i}",
        }
        for i in numbers
    ]


# the first record of each, by hand
FIRST = {
    "commonsenseqa": {
        "input": "Where would you put thing 0?",
        "prompt": "Question: Where would you put thing 0?\nAnswer:",
        "answer": " place 0a",
        "choices": [" place 0a", " place 0b", " place 0c", " place 0d", " place 0e"],
    },
    "cosmosqa": {
        "input": 'It was day 0 , and "all" of us ran ,\nWhy did run 0 happen ?',
        "answer": " Because of 00 .",
        "prompt": 'Context: It was day 0 , and "all" of us ran ,\nQuestion: Why did run 0 happen ?\nAnswer:',
        "choices": [" Because of 00 .", " Because of 01 .", " Because of 02 .", " Because of 03 ."],
    },
    "socialiqa": {
        "input": "Taylor saw 0 friends.\nWhat will Taylor want 0?",
        "prompt": "Context: Taylor saw 0 friends.\nQuestion: What will Taylor want 0?\nAnswer:",
        "answer": " to do 0A",
        "choices": [" to do 0A", " to do 0B", " to do 0C"],
    },
}


def features_of(name):
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int32")
    columns = {
        "commonsenseqa": {
            "id": text,
            "question": text,
            "question_concept": text,
            "choices": datasets.Sequence({"label": text, "text": text}),
            "answerKey": text,
        },
        "cosmosqa": {
            "id": text,
            "context": text,
            "question": text,
            "answer0": text,
            "answer1": text,
            "answer2": text,
            "answer3": text,
            "label": number,
        },
        "socialiqa": {
            "context": text,
            "question": text,
            "answerA": text,
            "answerB": text,
            "answerC": text,
            "label": text,
        },
        "alpaca": {"instruction": text, "input": text, "output": text, "text": text},
    }
    return datasets.Features(columns[name])


def write(kind, name, folder, splits):
    """A copy of a dataset, {split: rows}, as `datasets` or (kind "original") as its authors distribute it."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    made = {
        split: datasets.Dataset.from_list(rows, features=features_of(name)) for split, rows in splits.items()
    }
    if kind == "disk":
        datasets.DatasetDict(made).save_to_disk(str(folder))
    elif kind == "parquet":
        (folder / "data").mkdir()
        for split, dataset in made.items():
            dataset.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    elif kind == "json":
        for split, dataset in made.items():
            dataset.to_json(str(folder / f"{split}.json"))
    else:
        for split, rows in splits.items():
            write_original(name, folder, split, rows)


def write_original(name, folder, split, rows):
    lines = lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    if name == "commonsenseqa":
        nested = [
            {
                "answerKey": r["answerKey"],
                "id": r["id"],
                "question": {
                    "question_concept": r["question_concept"],
                    "stem": r["question"],
                    "choices": [
                        {"label": label, "text": text}
                        for label, text in zip(r["choices"]["label"], r["choices"]["text"], strict=False)
                    ],
                },
            }
            for r in rows
        ]
        lines(
            folder
            / {
                "train": "train_rand_split.jsonl",
                "validation": "dev_rand_split.jsonl",
                "test": "test_rand_split_no_answers.jsonl",
            }[split],
            nested,
        )
    elif name == "cosmosqa":
        with open(
            folder / {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}[split],
            "w",
            newline="",
        ) as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif name == "socialiqa":
        stem = {"train": "train", "validation": "dev", "test": "tst"}[split]
        lines(folder / f"{stem}.jsonl", [{key: r[key] for key in r if key != "label"} for r in rows])
        (folder / f"{stem}-labels.lst").write_text("".join(r["label"] + "\n" for r in rows))
    else:
        (folder / "alpaca_data.json").write_text(
            json.dumps([{key: r[key] for key in ("instruction", "input", "output")} for r in rows], indent=4)
        )


def fails(*parts, clients=("socialiqa",), sizes=ALL, sources=None):
    with pytest.raises(UserError) as error:
        questions.load_text(list(clients), sizes, 0, sources or {})
    for part in parts:
        assert str(part) in str(error.value), error.value


@pytest.mark.parametrize("kind", ["disk", "parquet", "json", "original"])
@pytest.mark.parametrize("name", list(questions.TEXT_CLIENTS))
def test_every_layout_gives_the_same_records(tmp_path, name, kind):
    write(kind, name, tmp_path / name, {"train": rows_of(name, 12), "validation": rows_of(name, 6, 100)})
    parts = questions.load_text([name], ALL, 0, {"root": str(tmp_path)})[name]
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [12, 0, 6]
    assert parts["train"][0] == FIRST[name] | {"source": name}
    for part, start in (("train", 0), ("test", 100)):  # answers against the rows' own labels
        for i, record in enumerate(parts[part], start):
            number = i % {"commonsenseqa": 5, "cosmosqa": 4, "socialiqa": 3}[name]
            assert (
                record["answer"] == record["choices"][number]
                and str(i) in record["prompt"]
                and record["choices"][0] not in record["prompt"]
            )
    assert json.loads(json.dumps(parts)) == parts


@pytest.mark.parametrize("kind", ["disk", "parquet", "json", "original"])
def test_alpaca_in_every_layout(tmp_path, kind):
    write(kind, "alpaca", tmp_path / "stanford_alpaca", {"train": rows_of("alpaca", 9)})
    records = questions.public_text(0, {"root": str(tmp_path)})
    assert len(records) == 8  # the fourth has no output
    assert records[0] == {
        "source": "alpaca",
        "input": "Name item 0.",
        "prompt": "Question: Name item 0.\nAnswer:",
        "answer": " Item 0\nof the list.",
    }
    assert (
        records[1]["prompt"] == "Question: Name item 1.\nInput: of list 1\nAnswer:"
        and records[1]["input"] == "Name item 1.\nof list 1"
    )
    few = questions.public_text(5, {"root": str(tmp_path)})
    assert (
        len(few) == 5
        and few == [record for record in records if record in few]
        and few == questions.public_text(5, {"root": str(tmp_path)})
    )
    with pytest.raises(UserError, match="--public-size 9.*8 records"):
        questions.public_text(9, {"root": str(tmp_path)})


def test_alpacas_own_file_by_its_path(tmp_path):
    write_original("alpaca", tmp_path, "train", rows_of("alpaca", 9))
    for given in (tmp_path / "alpaca_data.json", tmp_path):
        assert len(questions.public_text(0, {"public": str(given)})) == 8
    assert len(questions.public_text(0, {"root": str(tmp_path)})) == 8


# --- splits


def test_sizes_cap_and_seed(tmp_path, monkeypatch):
    write(
        "original",
        "cosmosqa",
        tmp_path / "cosmos_qa",
        {"train": rows_of("cosmosqa", 40), "validation": rows_of("cosmosqa", 10, 100)},
    )
    load = lambda seed, **sizes: questions.load_text(
        ["cosmosqa"], ALL | sizes, seed, {"root": str(tmp_path)}
    )["cosmosqa"]  # noqa: E731
    parts = load(0, validation=5, test=4)
    # a context has two questions: the sixth may not be trained on
    assert [len(parts[part]) for part in parts] == [34, 5, 4]
    contexts = [{record["input"].split("\n")[0] for record in part} for part in parts.values()]
    assert not contexts[0] & contexts[1] and not contexts[1] & contexts[2]
    assert parts == load(0, validation=5, test=4) and all(
        parts[part] != load(1, validation=5, test=4)[part] for part in parts
    )
    # a part does not hang on another's size
    assert load(0, validation=5, train=7)["validation"] == parts["validation"]
    monkeypatch.setattr(questions, "TRAIN_CAP", 20)
    capped = load(0, validation=5)
    assert (
        len(capped["train"]) == 20
        and all(record in parts["train"] for record in capped["train"])
        and len(capped["test"]) == 10
    )
    assert len(load(0, validation=5, train=30)["train"]) == 30
    fails(
        "--train-size 36",
        "40 records",
        clients=["cosmosqa"],
        sizes={"train": 36, "validation": 5, "test": 0},
        sources={"root": str(tmp_path)},
    )
    fails(
        "--train-size 35",
        "34 records",
        clients=["cosmosqa"],
        sizes={"train": 35, "validation": 5, "test": 0},
        sources={"root": str(tmp_path)},
    )
    fails(
        "--test-size 11",
        "10",
        clients=["cosmosqa"],
        sizes=ALL | {"test": 11},
        sources={"root": str(tmp_path)},
    )


# --- missing and damaged data


def test_missing_data_says_what_was_looked_for(tmp_path):
    # the tests are offline
    fails("--data socialiqa=allenai/social_i_qa", "does not load", "--data NAME=FOLDER")
    fails(
        f"--data-root {tmp_path}",
        "socialiqa",
        "social_i_qa",
        "--data socialiqa=",
        "allenai/social_i_qa",
        sources={"root": str(tmp_path)},
    )
    (tmp_path / "social_iqa").mkdir()
    fails(
        "no saved Hugging Face dataset",
        "train*.jsonl",
        "allenai/social_i_qa",
        sources={"root": str(tmp_path)},
    )
    write_original("socialiqa", tmp_path / "social_iqa", "train", rows_of("socialiqa", 8))
    fails("no validation split", "allenai/social_i_qa", sources={"root": str(tmp_path)})
    with pytest.raises(UserError, match="--public tatsu-lab/alpaca .the default"):
        questions.public_text(0, {})
    with pytest.raises(UserError, match="--public nowhere.jsonl: no such file"):
        questions.public_text(0, {"public": "nowhere.jsonl"})


@pytest.mark.parametrize(
    "damage, say",
    [
        (lambda folder: (folder / "train.jsonl").write_text('{"context": \n'), "train.jsonl is damaged"),
        (lambda folder: (folder / "train-labels.lst").write_text("1\n2\n"), "2 labels for the 8 records"),
        (
            lambda folder: (folder / "train-labels.lst").write_text("0\n" * 8),
            "row 0 of its train split is not one of allenai/social_i_qa",
        ),
        (lambda folder: (folder / "train-labels.lst").unlink(), "'label'"),
        (
            lambda folder: (folder / "dev.jsonl").write_text('{"text": "of something else"}\n' * 8),
            "row 0 of its validation split",
        ),
    ],
    ids=["half a line", "few labels", "no answer", "no labels", "another dataset"],
)
def test_damaged_data(tmp_path, damage, say):
    write(
        "original",
        "socialiqa",
        tmp_path / "siqa",
        {"train": rows_of("socialiqa", 8), "validation": rows_of("socialiqa", 8)},
    )
    questions.load_text(["socialiqa"], ALL, 0, {"socialiqa": str(tmp_path / "siqa")})
    damage(tmp_path / "siqa")
    fails(say, sources={"socialiqa": str(tmp_path / "siqa")})


def test_a_hub_dataset_with_a_script_comes_from_the_hubs_parquet(monkeypatch):
    """allenai/social_i_qa is a script, which `datasets` no longer runs; the hub keeps a parquet conversion on a branch of its own."""
    import datasets

    asked = []

    def load(name, config, revision=None):
        asked.append((name, config, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found social_i_qa.py")
        return datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_list(rows_of("socialiqa", 8)),
                "validation": datasets.Dataset.from_list(rows_of("socialiqa", 4)),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(questions.load_text(["socialiqa"], ALL, 0, {})["socialiqa"]["test"]) == 4
    assert asked == [
        ("allenai/social_i_qa", None, None),
        ("allenai/social_i_qa", None, "refs/convert/parquet"),
    ]


# --- the presets


def test_the_presets_are_the_papers():
    for name, hub_id in (
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
    ):
        preset = presets.PRESETS[name]
        assert preset["seed_model"] == hub_id and (preset["candidates"], preset["proxies"]) == (3000, 500)
        assert (
            preset["lora_rank"],
            preset["lora_alpha"],
            preset["expert_epochs"],
            preset["expert_lr"],
            preset["expert_batch"],
        ) == (16, 32, 10, 1e-4, 32)
        assert (
            preset["warmup_steps"],
            preset["weight_decay"],
            preset["final_epochs"],
            preset["final_batch"],
        ) == (200, 0, 1, 32)
        assert set(preset["final_lr"].values()) == {1e-4} and (
            preset["lambda_init"],
            preset["max_length"],
            preset["optimizer"],
        ) == (1.0, 256, "adamw")


def test_selection_on_the_papers_datasets(tmp_path, seed_model):
    """The command line of a LLaMA preset, on a tiny seed: D_0's features are those of the question, without what stands around it."""
    sources = tmp_path / "data"
    for name in ("commonsenseqa", "socialiqa"):
        write(
            "original",
            name,
            sources / name,
            {"train": rows_of(name, 30), "validation": rows_of(name, 8, 100)},
        )
    write("disk", "alpaca", sources / "alpaca", {"train": rows_of("alpaca", 40)})
    command = [
        "--run-dir",
        tmp_path / "run",
        *tiny.COMMON,
        "--backbone",
        "llama-3.2-3b",
        "--seed-model",
        seed_model,
        "--data-root",
        sources,
        "--clients",
        "commonsenseqa",
        "socialiqa",
        "--validation-size",
        4,
        "--candidates",
        12,
        "--proxies",
        4,
    ]
    result = drive.call("select_proxies", *command)
    assert result.code == 0, result.err
    done = {
        name: read_json(tmp_path / "run" / "clients" / name / "private" / "done.json")
        for name in ("commonsenseqa", "socialiqa")
    }
    assert done == {
        "commonsenseqa": {"seed": 0, "train": 26, "validation": 4, "test": 8},
        "socialiqa": {"seed": 0, "train": 26, "validation": 4, "test": 8},
    }
    assert sorted(p.name for p in (tmp_path / "run" / "public").iterdir()) == [
        "done.json",
        "features.npy",
        "records.jsonl",
        "timing.json",
        "unreadable.json",
    ]
    assert "skipped" in drive.call("select_proxies", *command).out
    features = np.load(tmp_path / "run" / "public" / "features.npy")
    backbone = backbones.load_backbone("llama-3.2-3b", seed_model, "cpu", "float32")
    for i, record in enumerate(questions.public_text(0, {"root": str(sources)})):
        ids = torch.tensor([backbone.tokenizer(record["input"])["input_ids"]])
        with torch.no_grad():
            assert features[i] == pytest.approx(
                backbone.model.model(ids).last_hidden_state[0].mean(0).numpy(), abs=1e-4
            )


def test_without_the_hub_or_data_there_is_one_line(tmp_path, seed_model):
    write(
        "original",
        "commonsenseqa",
        tmp_path / "data" / "commonsenseqa",
        {"train": rows_of("commonsenseqa", 30), "validation": rows_of("commonsenseqa", 8, 100)},
    )
    write("disk", "alpaca", tmp_path / "data" / "alpaca", {"train": rows_of("alpaca", 40)})
    local = [
        "--data-root",
        tmp_path / "data",
        "--clients",
        "commonsenseqa",
        "--validation-size",
        4,
        "--candidates",
        12,
        "--proxies",
        4,
    ]
    before = sorted(tmp_path.rglob("*"))
    for flags, say in (
        (["--backbone", "llama-3.1-8b", *local], "meta-llama/Llama-3.1-8B"),
        (["--backbone", "llama-3.1-8b", "--seed-model", seed_model], "tau/commonsense_qa"),
        (
            ["--backbone", "llama-3.1-8b", "--seed-model", seed_model, "--data", "intent=x"],
            "NAME one of commonsenseqa",
        ),
    ):
        result = drive.call("select_proxies", "--run-dir", tmp_path / "run", *tiny.COMMON, *flags)
        assert result.code == 2 and say in result.err and result.err.count("error:") == 1, result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind, loads", [("Qwen2", True), ("Mistral", True), ("GPT2", False)])
def test_any_model_with_gated_ffns_is_a_seed(tmp_path, seed_model, kind, loads):
    transformers = base.import_transformers()
    shape = (
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        if loads
        else dict(n_embd=32, n_layer=2, n_head=4)
    )
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=400, bos_token_id=None, eos_token_id=1, pad_token_id=0, **shape
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(seed_model).save_pretrained(tmp_path)
    if not loads:
        with pytest.raises(UserError, match="GPT2.*gate_proj"):
            backbones.load_backbone("llama-3.2-3b", tmp_path, "cpu", "float32")
        return
    backbone = backbones.load_backbone("llama-3.2-3b", tmp_path, "cpu", "float32")
    assert backbone.ffn_names == ["model.layers.0.mlp", "model.layers.1.mlp"] and backbone.width == 32
    record = tiny.public_records(tiny.random.Random(0), 4)
    model = backbone.add_lora(2, 4, 0)
    assert backbone.features(record).shape == (4, 32) and backbone.routing_vectors(model, record).shape == (
        2,
        32,
    )
