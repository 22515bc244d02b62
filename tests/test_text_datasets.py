"""The paper's language datasets in every layout that is read, written in the hub's exact schema."""

import csv
import json
import random

import datasets
import numpy as np
import pytest
import tiny
import torch

from metamoe import backbones, presets
from metamoe.backbones import base
from metamoe.data import questions, registry
from metamoe.errors import UserError
from metamoe.records import write_records
from metamoe.rundir import read_json

ALL = {"train": 0, "validation": 0, "test": 0}
KINDS = ["disk", "parquet", "json", "original"]
COUNTS = {"commonsenseqa": 5, "cosmosqa": 4, "socialiqa": 3}  # choices of each


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def row_of(name, i):
    """A row as the hub has it; two questions on each context."""
    if name == "commonsenseqa":
        choices = {"label": list("ABCDE"), "text": [f"place {i}{c}" for c in "abcde"]}
        row = {"id": f"{i:032x}", "question": f"Where would you put thing {i}? ", "question_concept": "thing"}
        return row | {"choices": choices, "answerKey": "ABCDE"[i % 5]}
    if name == "cosmosqa":
        row = {"id": f"3Q{i}##1", "context": f'It was day {i // 2} , and "all" of us ran ,'}
        row["question"] = f"Why did run {i} happen ?"
        return row | {f"answer{c}": f"Because of {i}{c} ." for c in range(4)} | {"label": i % 4}
    if name == "socialiqa":
        row = {"context": f"Taylor saw {i // 2} friends.", "question": f"What will Taylor want {i}?"}
        return row | {f"answer{c}": f"to do {i}{c}" for c in "ABC"} | {"label": str(i % 3 + 1)}
    row = {"instruction": f"Name item {i}.", "input": f"of list {i}" if i % 2 else ""}
    return row | {"output": "" if i == 3 else f"Item {i}\nof the list.", "text": f"Below is {i}"}


def rows_of(name, count, start=0):
    return [row_of(name, i) for i in range(start, start + count)]


# the first record of each, by hand: input, prompt, choices; the first choice is right
FIRST = {
    "commonsenseqa": (
        "Where would you put thing 0?",
        "Question: Where would you put thing 0?\nAnswer:",
        [" place 0a", " place 0b", " place 0c", " place 0d", " place 0e"],
    ),
    "cosmosqa": (
        'It was day 0 , and "all" of us ran ,\nWhy did run 0 happen ?',
        'Context: It was day 0 , and "all" of us ran ,\nQuestion: Why did run 0 happen ?\nAnswer:',
        [" Because of 00 .", " Because of 01 .", " Because of 02 .", " Because of 03 ."],
    ),
    "socialiqa": (
        "Taylor saw 0 friends.\nWhat will Taylor want 0?",
        "Context: Taylor saw 0 friends.\nQuestion: What will Taylor want 0?\nAnswer:",
        [" to do 0A", " to do 0B", " to do 0C"],
    ),
}


def hub_dataset(rows):
    """Rows with the hub's column types."""
    text = datasets.Value("string")
    columns = dict.fromkeys(rows[0], text)
    if "choices" in columns:
        columns["choices"] = datasets.Sequence({"label": text, "text": text})
    if isinstance(rows[0].get("label"), int):
        columns["label"] = datasets.Value("int32")
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


def write(kind, name, folder, splits):
    """A copy of a dataset, {split: rows}, as `datasets` or (kind "original") as its authors distribute it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if kind == "disk":
        made = {split: hub_dataset(rows) for split, rows in splits.items()}
        datasets.DatasetDict(made).save_to_disk(str(folder))
        return
    for split, rows in splits.items():
        if kind == "original":
            write_original(name, folder, split == "train", rows)
        elif kind == "parquet":
            hub_dataset(rows).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
        else:
            hub_dataset(rows).to_json(str(folder / f"{split}.json"))


def write_original(name, folder, train, rows):
    if name == "commonsenseqa":
        write_records(folder / f"{'train' if train else 'dev'}_rand_split.jsonl", map(nested, rows))
    elif name == "cosmosqa":
        with open(folder / f"{'train' if train else 'valid'}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif name == "socialiqa":
        stem = "train" if train else "dev"
        write_records(folder / f"{stem}.jsonl", without(rows, "label"))
        (folder / f"{stem}-labels.lst").write_text("".join(row["label"] + "\n" for row in rows))
    else:
        (folder / "alpaca_data.json").write_text(json.dumps(without(rows, "text"), indent=4))


def without(rows, column):
    return [{key: value for key, value in row.items() if key != column} for row in rows]


def nested(row):
    """A row of CommonsenseQA as its authors have it."""
    pairs = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    choices = [{"label": label, "text": text} for label, text in pairs]
    question = {"question_concept": "thing", "stem": row["question"], "choices": choices}
    return {"answerKey": row["answerKey"], "id": row["id"], "question": question}


def write_copy(name, folder, train, test, kind="original"):
    write(kind, name, folder, {"train": rows_of(name, train), "validation": rows_of(name, test, 100)})


def load(name, sources, seed=0, **sizes):
    return registry.DATASETS[name].load(name, ALL | sizes, seed, sources)


def fails(*parts, name="socialiqa", sources=None, **sizes):
    with pytest.raises(UserError) as error:
        load(name, sources or {}, **sizes)
    for part in parts:
        assert str(part) in str(error.value), error.value


def test_version_1_4_of_socialiqa_is_read_as_the_others(tmp_path):
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    write_copy("socialiqa", tmp_path / "old", 8, 4)
    parts = {"trn": rows_of("socialiqa", 8), "dev": rows_of("socialiqa", 4, 100)}
    for part, rows in parts.items():
        rows = [{**row, "correct": "ABC"[int(row["label"]) - 1]} for row in rows]
        rows = without(rows, "label")
        write_records(tmp_path / "new" / f"socialIQa_v1.4_{part}.jsonl", rows)
    old, new = (load("socialiqa", {"socialiqa": str(tmp_path / folder)}) for folder in ("old", "new"))
    assert old == new


def test_alpaca_rows_may_lack_an_input():
    row = {"instruction": "Greet.", "output": "Hi."}
    assert questions.alpaca(row) == questions.alpaca(row | {"input": ""})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COUNTS)
def test_every_layout_gives_the_same_records(tmp_path, name, kind):
    write_copy(name, tmp_path / name, 12, 6, kind)
    parts = load(name, {"root": str(tmp_path)})
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [12, 0, 6]
    text, prompt, choices = FIRST[name]
    first = {"source": name, "input": text, "prompt": prompt, "answer": choices[0], "choices": choices}
    assert parts["train"][0] == first
    for part, start in (("train", 0), ("test", 100)):  # answers against the rows' own labels
        for i, record in enumerate(parts[part], start):
            assert record["answer"] == record["choices"][i % COUNTS[name]]
            assert str(i) in record["prompt"] and record["choices"][0] not in record["prompt"]
    assert json.loads(json.dumps(parts)) == parts


@pytest.mark.parametrize("kind", KINDS)
def test_alpaca_in_every_layout(tmp_path, kind):
    write(kind, "alpaca", tmp_path / "stanford_alpaca", {"train": rows_of("alpaca", 9)})
    sources = {"root": str(tmp_path)}
    records = questions.public_text(0, sources)
    assert len(records) == 8  # the fourth has no output
    first = {"source": "alpaca", "input": "Name item 0.", "prompt": "Question: Name item 0.\nAnswer:"}
    assert records[0] == first | {"answer": " Item 0\nof the list."}
    assert records[1]["prompt"] == "Question: Name item 1.\nInput: of list 1\nAnswer:"
    assert records[1]["input"] == "Name item 1.\nof list 1"
    few = questions.public_text(5, sources)
    assert len(few) == 5 and few == [record for record in records if record in few]
    assert few == questions.public_text(5, sources)
    with pytest.raises(UserError, match="--public-size 9.*8 records"):
        questions.public_text(9, sources)


@pytest.mark.parametrize("flag, below", [("public", "alpaca_data.json"), ("public", ""), ("root", "")])
def test_alpacas_own_file_by_its_path(tmp_path, flag, below):
    write_original("alpaca", tmp_path, True, rows_of("alpaca", 9))
    assert len(questions.public_text(0, {flag: str(tmp_path / below)})) == 8


# --- splits


def test_sizes_cap_and_seed(tmp_path, monkeypatch):
    write_copy("cosmosqa", tmp_path / "Cosmos-QA", 40, 10)
    sources = {"root": str(tmp_path)}

    def of(seed, **sizes):
        return load("cosmosqa", sources, seed, validation=5, **sizes)

    parts, other = of(0, test=4), of(1, test=4)
    # a context has two questions: the sixth may not be trained on
    assert [len(parts[part]) for part in parts] == [34, 5, 4]
    train, validation, test = ({record["input"].split("\n")[0] for record in part} for part in parts.values())
    assert not train & validation and not validation & test
    assert parts == of(0, test=4) and all(parts[part] != other[part] for part in parts)
    # a part does not hang on another's size
    assert of(0, train=7)["validation"] == parts["validation"]
    monkeypatch.setattr(questions, "TRAIN_CAP", 20)
    capped = of(0)
    assert len(capped["train"]) == 20 and all(record in parts["train"] for record in capped["train"])
    assert len(capped["test"]) == 10 and len(of(0, train=30)["train"]) == 30
    fails("--train-size 36", "40 records", name="cosmosqa", sources=sources, train=36, validation=5)
    fails("--train-size 35", "34 records", name="cosmosqa", sources=sources, train=35, validation=5)
    fails("--test-size 11", "10", name="cosmosqa", sources=sources, test=11)


# --- missing and damaged data


def test_missing_data_says_what_was_looked_for(tmp_path):
    hub_id, root = "allenai/social_i_qa", {"root": str(tmp_path)}
    # the tests are offline
    fails(f"--dataset socialiqa={hub_id}", "does not load", "--dataset NAME=FOLDER")
    fails(f"--data-root {tmp_path}", "socialiqa", "social_i_qa", "--dataset socialiqa=", hub_id, sources=root)
    (tmp_path / "social_iqa").mkdir()
    fails("no saved Hugging Face dataset", "train*.jsonl", hub_id, sources=root)
    write_original("socialiqa", tmp_path / "social_iqa", True, rows_of("socialiqa", 8))
    fails("no validation split", hub_id, sources=root)
    with pytest.raises(UserError, match="--public tatsu-lab/alpaca .the default"):
        questions.public_text(0, {})
    with pytest.raises(UserError, match="--public nowhere.jsonl: no such file"):
        questions.public_text(0, {"public": "nowhere.jsonl"})


# name -> (file, its new content or None for none, what the error says)
DAMAGE = {
    "half a line": ("train.jsonl", '{"context": \n', "train.jsonl is damaged"),
    "few labels": ("train-labels.lst", "1\n2\n", "2 labels for the 8 records"),
    "no answer": (
        "train-labels.lst",
        "0\n" * 8,
        "row 0 of its train split is not one of allenai/social_i_qa",
    ),
    "no labels": ("train-labels.lst", None, "'label'"),
    "another dataset": ("dev.jsonl", '{"text": "of something else"}\n' * 8, "row 0 of its validation split"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data(tmp_path, damage):
    write_copy("socialiqa", tmp_path, 8, 8)
    load("socialiqa", {"socialiqa": str(tmp_path)})
    file, content, say = DAMAGE[damage]
    (tmp_path / file).unlink()
    if content:
        (tmp_path / file).write_text(content)
    fails(say, sources={"socialiqa": str(tmp_path)})


def test_a_hub_dataset_with_a_script_comes_from_the_hubs_parquet(monkeypatch):
    """`datasets` no longer runs the script of allenai/social_i_qa; the hub has a parquet copy on a branch."""
    asked = []

    def load_dataset(name, config, revision=None):
        asked.append((name, config, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found social_i_qa.py")
        counts = {"train": 8, "validation": 4}
        return {split: hub_dataset(rows_of("socialiqa", count)) for split, count in counts.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("socialiqa", {})["test"]) == 4
    assert asked == [("allenai/social_i_qa", None, revision) for revision in (None, "refs/convert/parquet")]


# --- the presets

LLAMAS = {"llama-3.2-3b": "meta-llama/Llama-3.2-3B", "llama-3.1-8b": "meta-llama/Llama-3.1-8B"}


@pytest.mark.parametrize("name", LLAMAS)
def test_the_presets_are_the_papers(name):
    paper = dict(candidates=3000, proxies=500, lora_rank=16, lora_alpha=32, max_length=256)
    paper |= dict(expert_epochs=10, expert_lr=1e-4, expert_batch=32, warmup_steps=200, optimizer="adamw")
    paper |= dict(weight_decay=0, final_epochs=1, final_batch=32, lambda_init=1.0, seed_model=LLAMAS[name])
    preset = presets.PRESETS[name]
    assert {key: preset[key] for key in paper} == paper and set(preset["final_lr"].values()) == {1e-4}


FEW = ["--validation-size", 4, "--candidates", 12, "--proxies", 4]


def test_selection_on_the_papers_datasets(tmp_path, seed_model):
    """The command of a LLaMA preset, on a tiny seed model: D_0's features are those of the question alone."""
    sources, names, run_dir = tmp_path / "data", ["commonsenseqa", "socialiqa"], tmp_path / "run"
    for name in names:
        write_copy(name, sources / name, 30, 8)
    write("disk", "alpaca", sources / "alpaca", {"train": rows_of("alpaca", 20)})
    flags = ["--backbone", "llama-3.2-3b", "--seed-model", seed_model, "--data-root", sources, *FEW]
    result = tiny.stage("select_proxies", run_dir, *flags, "--clients", *names)
    assert result.code == 0, result.err
    for name in names:
        done = read_json(run_dir / "clients" / name / "private" / "done.json")
        files = sorted(done.pop("files"))
        assert done == {"seed": 0, "train": 26, "validation": 4, "test": 8}
        assert files == ["source.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    files = ["done.json", "features.npy", "features.npy.json", "ffns.json", "records.jsonl"]
    files += ["timing.json", "unreadable.json"]
    assert sorted(p.name for p in (run_dir / "public").iterdir()) == files
    assert "skipped" in tiny.stage("select_proxies", run_dir, *flags, "--clients", *names).out
    features = np.load(run_dir / "public" / "features.npy")
    backbone = backbones.load_backbone("llama-3.2-3b", seed_model, "cpu", "float32")
    for row, record in zip(features, questions.public_text(0, {"root": str(sources)}), strict=True):
        ids = torch.tensor([backbone.tokenizer(record["input"])["input_ids"]])
        with torch.no_grad():
            hidden = backbone.model.model(ids).last_hidden_state[0]
        assert row == pytest.approx(hidden.mean(0).numpy(), abs=1e-4)


def test_without_the_hub_or_data_there_is_one_line(tmp_path, seed_model):
    write_copy("commonsenseqa", tmp_path / "data" / "commonsenseqa", 30, 8)
    write("original", "alpaca", tmp_path / "data" / "alpaca", {"train": rows_of("alpaca", 20)})
    local, tiny_model = ["--data-root", tmp_path / "data"], ["--seed-model", seed_model]
    for flags, say in (
        ([*local, "--clients", "commonsenseqa", *FEW], "meta-llama/Llama-3.1-8B"),
        (tiny_model, "tau/commonsense_qa"),
        ([*tiny_model, "--dataset", "intent=x"], "NAME one of commonsenseqa"),
        ([*tiny_model, *local, "--clients", "nobody"], "commonsenseqa, cosmosqa, socialiqa"),
    ):
        flags = ["--backbone", "llama-3.1-8b", *flags]
        assert say in tiny.refused("select_proxies", tmp_path / "run", *flags, watch=tmp_path)


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "GPT2"])
def test_any_model_with_gated_ffns_is_a_seed_model(tmp_path, seed_model, kind):
    transformers = base.import_transformers()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape["num_key_value_heads"] = 2
    if kind == "GPT2":
        shape = dict(n_embd=32, n_layer=2, n_head=4)
    make = getattr(transformers, f"{kind}Config")
    config = make(vocab_size=400, bos_token_id=None, eos_token_id=1, pad_token_id=0, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(seed_model).save_pretrained(tmp_path)
    if kind == "GPT2":
        with pytest.raises(UserError, match="GPT2.*gate_proj"):
            backbones.load_backbone("llama-3.2-3b", tmp_path, "cpu", "float32")
        return
    backbone = backbones.load_backbone("llama-3.2-3b", tmp_path, "cpu", "float32")
    assert backbone.ffn_names == ["model.layers.0.mlp", "model.layers.1.mlp"] and backbone.width == 32
    records = tiny.public_records(random.Random(0), 4)
    model = backbone.add_lora(2, 4, 0)
    assert backbone.features(records).shape == (4, 32)
    assert backbone.routing_vectors(model, records).shape == (2, 32)
