"""The paper's language datasets: CommonsenseQA, CosmosQA, SocialIQA, and Alpaca as the public set.

A record is as BIG-bench's; `input` is the text that relevance is judged by. The prompt does not list the
choices, and public records have none.
"""

import csv
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np

from metamoe.data.sources import dataset_at, holds_dataset, locate, open_dataset
from metamoe.data.splits import digest, grouped, hold_out
from metamoe.data.user import own_file
from metamoe.errors import UserError
from metamoe.records import Records

TRAIN_CAP = 10_000  # private samples a client, where --train-size does not say otherwise


ALPACA = ("tatsu-lab/alpaca", ["alpaca", "alpaca_data.json", "stanford_alpaca"])


SPLIT_FILES = {
    "train": r"(train|alpaca_data)([-_.].*)?\.(jsonl|json|csv)",
    "validation": r"(validation|valid|val|dev)([-_.].*)?\.(jsonl|json|csv)",
}


def question_record(source, context, question, choices, number):
    """A multiple-choice record; ValueError where `number` is not that of a choice (an unlabelled row)."""
    context, question = context.strip(), question.strip()
    if not 0 <= number < len(choices):
        raise ValueError(f"label {number}")
    choices = [" " + choice.strip() for choice in choices]
    prompt = f"Question: {question}\nAnswer:"
    if context:
        prompt = f"Context: {context}\n{prompt}"
    return {
        "source": source,
        "input": f"{context}\n{question}".strip(),
        "prompt": prompt,
        "answer": choices[number],
        "choices": choices,
    }


def commonsenseqa(row):
    """A row of tau/commonsense_qa: `question`, `choices` {"label", "text"}, `answerKey`; in the authors'
    file question and choices are nested.
    """
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    return question_record(
        "commonsenseqa", "", question, choices["text"], choices["label"].index(row["answerKey"])
    )


def cosmosqa(row):
    """A row of allenai/cosmos_qa, also as its authors' CSV has it: `context`, `question`, `answer0` ...
    `answer3`, `label` from 0.
    """
    return question_record(
        "cosmosqa", row["context"], row["question"], [row[f"answer{i}"] for i in range(4)], int(row["label"])
    )


def socialiqa(row):
    """A row of allenai/social_i_qa: `context`, `question`, `answerA` ... `answerC`, `label` from "1"."""
    return question_record(
        "socialiqa",
        row["context"],
        row["question"],
        [row[f"answer{letter}"] for letter in "ABC"],
        int(row["label"]) - 1,
    )


def alpaca(row):
    """A row of tatsu-lab/alpaca: `instruction`, `input` (often empty), `output`. None where the output is
    empty.
    """
    instruction, given, output = row["instruction"].strip(), row["input"].strip(), row["output"].strip()
    if not output:
        return None
    prompt = f"Question: {instruction}\n"
    if given:
        prompt += f"Input: {given}\n"
    return {
        "source": "alpaca",
        "input": f"{instruction}\n{given}".strip(),
        "prompt": prompt + "Answer:",
        "answer": " " + output,
    }


# client name -> (hub id, names of its folder below --data-root, row to record)
TEXT_CLIENTS = {
    "commonsenseqa": ("tau/commonsense_qa", ["commonsenseqa", "commonsense_qa", "csqa"], commonsenseqa),
    "cosmosqa": ("allenai/cosmos_qa", ["cosmosqa", "cosmos_qa", "cosmos"], cosmosqa),
    "socialiqa": (
        "allenai/social_i_qa",
        ["socialiqa", "social_i_qa", "social_iqa", "siqa", "socialiqa-train-dev"],
        socialiqa,
    ),
}


def load_text(clients, sizes, seed, sources):
    """{client: {"train" | "validation" | "test": records}} of the paper's language clients.

    The test part is the dataset's validation split (its test split has no labels), the validation part is
    cut out of train, no context in both. `sizes`: {"train": n, "validation": n, "test": n}, a random subset
    each, fixed by the seed; a train of 0 is all that is left, up to TRAIN_CAP, a test of 0 the whole
    validation split. `sources`: as for load_images. Raises UserError where data are missing, damaged or
    fewer than asked for.
    """
    parts = {}
    for name in clients:
        hub_id, spellings, make = TEXT_CLIENTS[name]
        where, flag = locate(name, hub_id, spellings, sources)
        splits = read_splits(where, flag, hub_id)
        if "validation" not in splits:
            raise UserError(
                f"{flag}: no validation split there, which the paper tests on: name a copy that has it "
                f"(hub id: {hub_id})"
            )
        train, test = (
            to_records(splits[split], make, flag, split, hub_id) for split in ("train", "validation")
        )
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        order, keys = grouped([digest(record["input"].split("\n")[0]) for record in train], rng)
        if sizes["validation"] + max(sizes["train"], 2) > len(train) or sizes["test"] > len(test):
            raise UserError(
                f"client {name}: its train split has {len(train)} records for --train-size "
                f"{sizes['train']} + --validation-size "
                f"{sizes['validation']}, its validation split {len(test)} for --test-size "
                f"{sizes['test']}: lower one of them"
            )
        validation, rest = hold_out(order, keys, sizes["validation"])
        if sizes["train"] > len(rest):
            raise UserError(
                f"client {name}: --train-size {sizes['train']}: {len(rest)} records share no context with "
                f"the validation part: lower it"
            )
        rest = rng.permutation(rest)[: sizes["train"] or TRAIN_CAP]
        chosen = rng.permutation(len(test))[: sizes["test"] or len(test)]
        parts[name] = {
            "train": [train[i] for i in np.sort(rest)],
            "validation": [train[i] for i in np.sort(validation)],
            "test": [test[i] for i in np.sort(chosen)],
        }
    return parts


def read_splits(where, flag, hub_id):
    """{split: rows (dicts)} of a Hugging Face dataset (hub id, saved folder, parquet) or of the files that
    a dataset's authors distribute.
    """
    if os.path.isfile(where):
        return {"train": read_rows_of(where)}
    if os.path.isabs(where) and not holds_dataset(where):
        found = {}
        for split, pattern in SPLIT_FILES.items():
            files = [
                f
                for place in (Path(where), Path(where) / "data", Path(where) / "socialiqa-train-dev")
                if place.is_dir()
                for f in sorted(place.iterdir(), key=lambda f: (len(f.name), f.name))
                if re.fullmatch(pattern, f.name)
            ]
            if files:
                found[split] = read_rows_of(files[0])
        if "train" not in found:
            raise UserError(
                f"{flag}: {where} holds no saved Hugging Face dataset, no parquet files and no train file "
                f"(train*.jsonl, .json or "
                f".csv): put the dataset there (hub id: {hub_id})"
            )
        return found
    splits = open_dataset(dataset_at(where), flag)
    return {
        split: splits[name]
        for split, names in (("train", ["train"]), ("validation", ["validation", "valid", "val", "dev"]))
        for name in names
        if name in splits
    }


def read_rows_of(path):
    """The rows of a CSV file with a header, of JSON lines or of one JSON list; a file NAME-labels.lst
    beside it gives each its `label`.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                text = file.read()
                rows = (
                    json.loads(text)
                    if text.lstrip().startswith("[")
                    else [json.loads(line) for line in text.split("\n") if line.strip()]
                )
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): download it again") from None
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.exists():
        values = labels.read_text().split()
        if len(values) != len(rows):
            raise UserError(
                f"{labels} has {len(values)} labels for the {len(rows)} records of {path.name}: download "
                f"both again"
            )
        rows = [{**row, "label": label} for row, label in zip(rows, values, strict=True)]
    return rows


def to_records(rows, make, flag, split, hub_id):
    """The rows as records; UserError naming the first that is not of the dataset's schema."""
    records = []
    for number, row in enumerate(rows):
        try:
            record = make(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{flag}: row {number} of its {split} split is not one of {hub_id} "
                f"({type(error).__name__}: {error}): name a copy of that dataset"
            ) from None
        if record:
            records.append(record)
    return records


def public_text(n_public, sources, skip_bad=False):
    """D_0 of language models: `n_public` records (0: all), a uniform subset, of Alpaca or of the user's own
    JSON lines (`own_record`).
    """
    where, flag = locate("public", *ALPACA, sources, file_ok=True)
    if os.path.isfile(where) and not alpaca_file(where):
        records, starts, _ = own_file(where, flag, Path(where).stem, skip_bad, mixed=True)
    else:
        records = starts = to_records(
            read_splits(where, flag, ALPACA[0])["train"], alpaca, flag, "train", ALPACA[0]
        )
    if n_public > len(records):
        raise UserError(f"--public-size {n_public}: {flag} has {len(records)} records: lower it (0: all)")
    if not n_public:
        return records
    # one public set for everybody, as in public_records
    chosen = np.sort(np.random.default_rng(0).permutation(len(records))[:n_public])
    return (
        [records[i] for i in chosen] if records is starts else Records(where, starts[chosen], records.convert)
    )


def alpaca_file(path):
    """Whether a file is in Alpaca's format (one JSON list, or lines with an `instruction`), not in the
    user's own.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    try:
        row = json.loads(first)
        return isinstance(row, list) or isinstance(row, dict) and "instruction" in row and "prompt" not in row
    except (ValueError, RecursionError):
        return first.lstrip().startswith("[")
