"""The paper's language datasets: CommonsenseQA, CosmosQA, SocialIQA, and Alpaca as the public set.

A record is as BIG-bench's; `input` is the text that relevance is judged by. The prompt does not list the
choices, and public records have none.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metamoe.data import forms
from metamoe.data.sources import dataset_at, holds_dataset, locate, open_dataset
from metamoe.data.splits import digest, grouped, hold_out, public_subset, rng_of
from metamoe.data.user import own_file
from metamoe.errors import UserError

TRAIN_CAP = 10_000  # private samples a client, where --train-size does not say otherwise
SPLIT_NAMES = {"train": ["train", "trn"], "validation": ["validation", "valid", "val", "dev"]}
FILE_NAMES = {"train": ["train", "trn", "alpaca_data"], "validation": SPLIT_NAMES["validation"]}


def question_record(context, question, choices, number):
    """A multiple-choice record; ValueError where `number` is not that of a choice (an unlabelled row)."""
    text = f"{context.strip()}\n{question.strip()}".strip()
    prompt = forms.question(context, question, choices, number)["prompt"]
    choices = [" " + choice.strip() for choice in choices]
    same = {"number": number} if len(set(choices)) < len(choices) else {}  # the text does not say which
    return {"input": text, "prompt": prompt, "answer": choices[number], "choices": choices} | same


def commonsenseqa(row):
    """A row of tau/commonsense_qa: `question`, `choices` {"label", "text"}, `answerKey`."""
    question, choices = forms.stem_and_choices(row["question"], row.get("choices"))
    return question_record("", question, choices["text"], choices["label"].index(row["answerKey"]))


def cosmosqa(row):
    return question_record(*forms.cosmosqa(row))


def socialiqa(row):
    return question_record(*forms.socialiqa(row))


def alpaca(row):
    """A row of tatsu-lab/alpaca: `instruction`, `input` (often empty), `output`; None without an output."""
    instruction, output = row["instruction"].strip(), row["output"].strip()
    given = (row.get("input") or "").strip()
    if not output:
        return None
    text, prompt = f"{instruction}\n{given}".strip(), forms.instruction_prompt(instruction, given)
    return {"input": text, "prompt": prompt, "answer": " " + output}


class TextSet(NamedTuple):
    """A data set of rows: where it lies, and how a row becomes a record."""

    hub_id: str
    spellings: list  # names of its folder below --data-root, in any case and spelling of `_` and `-`
    record: Callable  # from a row (dict) to a question_record; None: the row is left out
    family = "qa"

    def load(self, name, sizes, seed, sources):
        """{"train" | "validation" | "test": records}, each a random subset, fixed by the random seed.

        The test part is the dataset's validation split (its test split has no labels), the validation part
        is cut out of train, no context in both. Sizes: a train of 0 is all that is left, up to TRAIN_CAP, a
        test of 0 the whole validation split. `sources`: as for `locate`. Raises UserError where data are
        missing, damaged or fewer than asked for.
        """
        where, flag = locate(name, self.hub_id, self.spellings, sources)
        splits = read_splits(where, flag, self.hub_id)
        if "validation" not in splits:
            why = "no validation split there, which the paper tests on"
            raise UserError(f"{flag}: {why}: name a copy that has it (hub id: {self.hub_id})")
        train, test = (self.records(name, splits, split, flag) for split in ("train", "validation"))
        return cut(name, train, test, sizes, seed)

    def records(self, name, splits, split, flag):
        """The records of a split; UserError naming the first row that is not of the data set's schema."""
        records = []
        for number, row in enumerate(splits[split]):
            try:
                record = self.record(row)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                why = f"is not one of {self.hub_id} ({type(error).__name__}: {error})"
                place = f"row {number} of its {split} split"
                raise UserError(f"{flag}: {place} {why}: name a copy of that dataset") from None
            if record:
                records.append({"source": name, **record})
        return records


ALPACA = TextSet("tatsu-lab/alpaca", ["alpaca", "alpaca_data.json", "stanford_alpaca"], alpaca)
CSQA = ["commonsenseqa", "commonsense_qa", "csqa"]
SIQA = ["socialiqa", "social_i_qa", "social_iqa", "siqa", "socialiqa-train-dev"]
CLIENTS = {
    "commonsenseqa": TextSet("tau/commonsense_qa", CSQA, commonsenseqa),
    "cosmosqa": TextSet("allenai/cosmos_qa", ["cosmosqa", "cosmos_qa", "cosmos"], cosmosqa),
    "socialiqa": TextSet("allenai/social_i_qa", SIQA, socialiqa),
}


def cut(name, train, test, sizes, seed):
    """The parts of a client out of the records of its train and of its validation split."""
    rng = rng_of(seed, name)
    order, keys = grouped([digest(record["input"].split("\n")[0]) for record in train], rng)
    if sizes["validation"] + max(sizes["train"], 2) > len(train) or sizes["test"] > len(test):
        flags = f"--train-size {sizes['train']} + --validation-size {sizes['validation']}"
        has = f"its train split has {len(train)} records for {flags}"
        tested = f"its validation split {len(test)} for --test-size {sizes['test']}"
        raise UserError(f"client {name}: {has}, {tested}: lower one of them")
    validation, rest = hold_out(order, keys, sizes["validation"])
    if sizes["train"] > len(rest):
        left = f"{len(rest)} records share no context with the validation part"
        raise UserError(f"client {name}: --train-size {sizes['train']}: {left}: lower it")
    rest = rng.permutation(rest)[: sizes["train"] or TRAIN_CAP]
    chosen = rng.permutation(len(test))[: sizes["test"] or len(test)]
    return {
        "train": [train[i] for i in np.sort(rest)],
        "validation": [train[i] for i in np.sort(validation)],
        "test": [test[i] for i in np.sort(chosen)],
    }


def read_splits(where, flag, hub_id):
    """{"train", "validation" where it is there: rows} of a Hugging Face dataset or of its authors' files."""
    if os.path.isfile(where):
        return {"train": read_rows_of(where)}
    if os.path.isabs(where) and not holds_dataset(where):
        return read_files(Path(where), flag, hub_id)
    splits = open_dataset(dataset_at(where), flag)
    return {part: splits[name] for part, names in SPLIT_NAMES.items() for name in names if name in splits}


def read_files(folder, flag, hub_id):
    """As read_splits, of a folder of CSV or JSON files; of several for a split, the shortest name counts."""
    found = {}
    for place in (folder, folder / "data", folder / "socialiqa-train-dev"):
        files = place.iterdir() if place.is_dir() else ()
        for file in sorted(files, key=lambda file: (len(file.name), file.name)):
            for split, names in FILE_NAMES.items():
                if re.fullmatch(rf"(.*[-_])?({'|'.join(names)})([-_.].*)?\.(jsonl|json|csv)", file.name):
                    found.setdefault(split, file)
    if "train" not in found:
        files = "no parquet files and no train file (train*.jsonl, .json or .csv)"
        none = f"{folder} holds no saved Hugging Face dataset, {files}"
        raise UserError(f"{flag}: {none}: put the dataset there (hub id: {hub_id})")
    return {split: read_rows_of(found[split]) for split in FILE_NAMES if split in found}


def read_rows_of(path):
    """The rows of a CSV or JSON file; a file NAME-labels.lst beside it gives each its `label`."""
    path, rows = Path(path), forms.read_rows(path)
    labels = path.with_name(f"{path.stem}-labels.lst")
    if not labels.exists():
        return rows
    values = labels.read_text().split()
    if len(values) != len(rows):
        counts = f"{len(values)} labels for the {len(rows)} records of {path.name}"
        raise UserError(f"{labels} has {counts}: download both again")
    return [{**row, "label": label} for row, label in zip(rows, values, strict=True)]


def public_text(size, sources, skip_bad=False):
    """D_0: `size` records (0: all), a uniform subset, of Alpaca or of the user's own JSON lines."""
    where, flag = locate("public", ALPACA.hub_id, ALPACA.spellings, sources, file_ok=True)
    if os.path.isfile(where) and not alpaca_file(where):
        records, _ = own_file(where, flag, Path(where).stem, skip_bad, mixed=True)
        chosen = public_subset(len(records), size, f"{flag} has {len(records)} records")
        return records.take(chosen)
    records = ALPACA.records("alpaca", read_splits(where, flag, ALPACA.hub_id), "train", flag)
    return [records[i] for i in public_subset(len(records), size, f"{flag} has {len(records)} records")]


def alpaca_file(path):
    """Whether a file is Alpaca's (one JSON list, or lines with an `instruction`), not the user's own."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return first.lstrip().startswith("[")
    return isinstance(row, list) or isinstance(row, dict) and "instruction" in row and "prompt" not in row
