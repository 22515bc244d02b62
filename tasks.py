"""Where records come from: BIG-bench for the embedded default, the paper's datasets for LLaMA and CLIP, the user's own files."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import zlib
from array import array
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fetch import BIGBENCH, fetch, read_members
from rundir import Records, UserError

# ---------------------------------------------------------------------------------------------------------------
# BIG-bench: three client tasks and a public set. A record is a dict with `prompt`, `answer`, `source` and, for
# client records, `choices` (answers begin with a space: they are appended to the prompt as they are).

SENTIMENT = "Determine whether given opinion is positive, negative, neutral or ambivalent in terms of its sentiment.\nQ: {input}\nA:"

# client name -> (BIG-bench task, prompt, choices where the task does not list them)
CLIENTS = {
    "intent": ("intent_recognition", "{input}\nIntent:", None),
    "hotels": ("multiemo/hotels_sentence_en", SENTIMENT, None),
    # The type of a question's answer: a generation task with a closed set of answers; records with several are left out.
    "question": (
        "natural_instructions/subtask046_miscellaenous_question_typing", "{input}\nType:",
        ["Abbreviation.", "Date.", "Entity.", "Event.", "Facility.", "Humans.", "Law.", "Location.", "Money.", "Organization.", "Other.", "Quantity.", "Time."],
    ),
}

# public task -> (records, prompt): first relatives of the client tasks, then much that is unrelated. The siblings
# multiemo/all_* and hotels_* hold the hotel client's sentences and are left out.
PUBLIC = {
    "multiemo/products_sentence_en": (450, SENTIMENT),
    "multiemo/medicine_sentence_en": (450, SENTIMENT),
    "multiemo/reviews_sentence_en": (300, SENTIMENT),
    "fact_checker/fever": (450, "{input}\nAnswer:"),
    "presuppositions_as_nli": (200, "{input}"),
    "epistemic_reasoning": (150, "{input}\nRelation:"),
    "entailed_polarity": (150, "{input}\nAnswer:"),
    "strategyqa": (200, "Question: {input}\nAnswer:"),
    "movie_recommendation": (150, "Find a movie similar to {input}\nAnswer:"),
    "implicatures": (200, "{input}\nDoes Speaker 2 mean yes or no?"),
    "social_support": (200, "Reply: {input}\nUnsupportive, neutral, or supportive?"),
    "sports_understanding": (150, "Statement: {input}\nPlausible or implausible?"),
    "goal_step_wikihow/goal_inference": (150, "{input}\nAnswer:"),
    "social_iqa": (200, "Question: {input}\nAnswer:"),
    "metaphor_boolean": (150, "{input}\nIs the second a paraphrase of the first?"),
    "disambiguation_qa": (150, "Sentence: {input}\nThe pronoun refers to:"),
    "qa_wikidata": (300, "{input}"),
    "tense": (150, "{input}\nAnswer:"),
    "cryptonite": (200, "Crossword clue: {input}\nAnswer:"),
    "linguistic_mappings/sentence_negation_json": (150, "{input}\nAnswer:"),
    "linguistic_mappings/question_formation_json": (150, "{input}\nAnswer:"),
    "unit_conversion/unit_identification": (150, "{input}\nAnswer:"),
    "gem/common_gen": (200, "{input}\nAnswer:"),
    "natural_instructions/*": (2600, "{input}\nAnswer:"),
}
MAX_CHARS = 300  # of a prompt: keeps the default run on a CPU; about 70 tokens
MAX_ANSWER_CHARS = 60
MIN_WORDS = 4  # of a client's text: one-word sentences ("No.") stand in every corpus and say nothing about a copy


def normalise(text):
    """Lower-case words and numbers alone, one space between: what two copies of a text have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))


def client_texts(record):
    """What must not stand in the public set: the record's input and each of its fields (a question without its answer)."""
    whole = normalise(record["input"])
    fields = [normalise(field.split(": ", 1)[-1]) for field in re.split(r"\n| \(Answer: ", record["input"])]
    return [text for text in [whole, *fields] if len(text.split()) >= MIN_WORDS]


def containment_filter(texts):
    """A function that says whether a text contains (as whole words) one of `texts`, normalised; near-linear in its length."""
    by_start = {}
    for words in {tuple(text.split()) for text in texts if text}:
        by_start.setdefault(words[: min(4, len(words))], []).append(words)

    def contains(text):
        words = tuple(normalise(text).split())
        for i in range(len(words)):
            for length in range(1, 5):
                for candidate in by_start.get(words[i : i + length], ()):
                    if words[i : i + len(candidate)] == candidate:
                        return True
        return False

    return contains


def to_record(example, source, template, choices=None):
    """A BIG-bench example as a record, or None where it has no single best answer or is too long for the default."""
    if choices and example["target"] not in ([choice] for choice in choices):
        return None
    if "target_scores" in example:
        choices = list(example["target_scores"])
    prompt = template.format(input=example["input"].strip())
    if "target_scores" in example:
        scores = example["target_scores"]
        best = [choice for choice, score in scores.items() if score == max(scores.values())]
        answer = best[0] if len(best) == 1 else ""
    else:
        target = example["target"]
        answer = target if isinstance(target, str) else target[0]
    answer = answer.strip()
    if not answer or len(prompt) > MAX_CHARS or len(answer) > MAX_ANSWER_CHARS:
        return None
    record = {"source": source, "input": example["input"].strip(), "prompt": prompt, "answer": " " + answer}
    if choices:
        record["choices"] = [" " + choice.strip() for choice in choices]
    return record


def load_bigbench(clients, sizes, n_public, seed):
    """Read the archive once; return (public records, {client: {"train" | "validation" | "test": records}}).

    The public set depends on `n_public` and the client tasks alone, never on the seed. A client's parts are disjoint
    and fixed by the seed; no two of its records share a field (the same question with two answers), so nothing of the
    test part is seen in training. `sizes`: {"train": n, "validation": n, "test": n}.
    """
    wanted = {task for task, _, _ in CLIENTS.values()} | set(PUBLIC)
    raw = {}
    archive = fetch(**BIGBENCH)
    prefix = "bigbench-1.0.0/bigbench/benchmark_tasks/"

    def is_wanted(member):
        task = member.removeprefix(prefix).removesuffix("/task.json")
        return member.endswith("/task.json") and (task in wanted or task.startswith("natural_instructions/subtask"))

    for member, content in read_members(archive, is_wanted):
        raw[member.removeprefix(prefix).removesuffix("/task.json")] = content["examples"]

    parts, private_texts = {}, []
    for name in CLIENTS:  # every embedded client's texts leave the public set, whichever take part in this run
        task, template, choices = CLIENTS[name]
        private_texts += [text for example in raw[task] for text in client_texts(example)]
        if name in clients:
            parts[name] = split_client(name, [to_record(e, task, template, choices) for e in raw[task]], sizes, seed)
    return public_records(raw, containment_filter(private_texts), n_public), parts


def split_client(name, records, sizes, seed):
    """Shuffle by seed, drop records that share a field with an earlier one, and cut into the parts of `sizes`."""
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(records))
    kept, seen = [], set()
    need = sum(sizes.values())
    for i in order:
        record = records[i]
        if record is None:
            continue
        texts = client_texts(record)
        if texts and seen.isdisjoint(texts):
            seen.update(texts)
            kept.append(record)
            if len(kept) == need:
                break
    if len(kept) < need:
        raise UserError(f"client {name}: {len(kept)} distinct usable records, {need} asked for (--train-size {sizes['train']} + "
                        f"--validation-size {sizes['validation']} + --test-size {sizes['test']}): lower one of them")
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[part] = kept[start : start + size]
        start += size
    return parts


def public_records(raw, contains_private, n_public):
    """D_0: `n_public` records, every source in proportion to its quota in PUBLIC, without any client's text."""
    private = {task for task, _, _ in CLIENTS.values()}
    rng = np.random.default_rng(0)  # the public set is one set for everybody: not a matter of the run's seed
    total = sum(quota for quota, _ in PUBLIC.values())
    records, spare, seen = [], [], set()
    for task, (quota, template) in PUBLIC.items():
        sources = [t for t in sorted(raw) if t.startswith(task[:-1]) and t not in private] if task.endswith("*") else [task]
        for source in sources:
            usable = []
            for example in raw[source]:
                record = to_record(example, source, template)
                if record is not None and normalise(record["prompt"]) not in seen and not contains_private(record["prompt"] + record["answer"]):
                    seen.add(normalise(record["prompt"]))
                    usable.append(record)
            usable = [usable[i] for i in rng.permutation(len(usable))]
            take = round(n_public * quota / total / len(sources))
            records += usable[:take]
            spare += usable[take : 8 * take]
    if len(records) < n_public:  # short sources: the rest from what is left of the others
        records += [spare[i] for i in rng.permutation(len(spare))[: n_public - len(records)]]
    if len(records) < n_public:
        raise UserError(f"--public-size {n_public}: only {len(records)} usable public records here: lower it")
    return [records[i] for i in sorted(rng.permutation(len(records))[:n_public])]


# ---------------------------------------------------------------------------------------------------------------
# The paper's language datasets. A record is as BIG-bench's: `prompt`, `answer`, `source`, `choices` (none in the public
# set), and `input`, the text that relevance is judged by. The prompt does not list the choices.

TRAIN_CAP = 10_000  # private samples a client, where --train-size does not say otherwise
ALPACA = ("tatsu-lab/alpaca", ["alpaca", "alpaca_data.json", "stanford_alpaca"])
SPLIT_FILES = {"train": r"(train|alpaca_data)([-_.].*)?\.(jsonl|json|csv)", "validation": r"(validation|valid|val|dev)([-_.].*)?\.(jsonl|json|csv)"}


def question_record(source, context, question, choices, number):
    """A multiple-choice record; ValueError where `number` is not that of a choice (an unlabelled row)."""
    context, question = context.strip(), question.strip()
    if not 0 <= number < len(choices):
        raise ValueError(f"label {number}")
    choices = [" " + choice.strip() for choice in choices]
    return {"source": source, "input": f"{context}\n{question}".strip(), "prompt": f"Context: {context}\n" * bool(context) + f"Question: {question}\nAnswer:",
            "answer": choices[number], "choices": choices}


def commonsenseqa(row):
    """A row of tau/commonsense_qa: `question`, `choices` {"label", "text"}, `answerKey`; in the authors' file question and choices are nested."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    return question_record("commonsenseqa", "", question, choices["text"], choices["label"].index(row["answerKey"]))


def cosmosqa(row):
    """A row of allenai/cosmos_qa, also as its authors' CSV has it: `context`, `question`, `answer0` ... `answer3`, `label` from 0."""
    return question_record("cosmosqa", row["context"], row["question"], [row[f"answer{i}"] for i in range(4)], int(row["label"]))


def socialiqa(row):
    """A row of allenai/social_i_qa: `context`, `question`, `answerA` ... `answerC`, `label` from "1"."""
    return question_record("socialiqa", row["context"], row["question"], [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1)


def alpaca(row):
    """A row of tatsu-lab/alpaca: `instruction`, `input` (often empty), `output`. None where the output is empty."""
    instruction, given, output = row["instruction"].strip(), row["input"].strip(), row["output"].strip()
    if not output:
        return None
    return {"source": "alpaca", "input": f"{instruction}\n{given}".strip(), "prompt": f"Question: {instruction}\n" + f"Input: {given}\n" * bool(given) + "Answer:",
            "answer": " " + output}


# client name -> (hub id, names of its folder below --data-root, row to record)
TEXT_CLIENTS = {
    "commonsenseqa": ("tau/commonsense_qa", ["commonsenseqa", "commonsense_qa", "csqa"], commonsenseqa),
    "cosmosqa": ("allenai/cosmos_qa", ["cosmosqa", "cosmos_qa", "cosmos"], cosmosqa),
    "socialiqa": ("allenai/social_i_qa", ["socialiqa", "social_i_qa", "social_iqa", "siqa", "socialiqa-train-dev"], socialiqa),
}


def load_text(clients, sizes, seed, sources):
    """{client: {"train" | "validation" | "test": records}} of the paper's language clients.

    The test part is the dataset's validation split (its test split has no labels), the validation part is cut out of train,
    no context in both. `sizes`: {"train": n, "validation": n, "test": n}, a random subset each, fixed by the seed; a train
    of 0 is all that is left, up to TRAIN_CAP, a test of 0 the whole validation split. `sources`: as for load_images.
    Raises UserError where data are missing, damaged or fewer than asked for.
    """
    parts = {}
    for name in clients:
        hub_id, spellings, make = TEXT_CLIENTS[name]
        where, flag = locate(name, hub_id, spellings, sources)
        splits = read_splits(where, flag, hub_id)
        if "validation" not in splits:
            raise UserError(f"{flag}: no validation split there, which the paper tests on: name a copy that has it (hub id: {hub_id})")
        train, test = (to_records(splits[split], make, flag, split, hub_id) for split in ("train", "validation"))
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        order, keys = grouped([digest(record["input"].split("\n")[0]) for record in train], rng)
        if sizes["validation"] + max(sizes["train"], 2) > len(train) or sizes["test"] > len(test):
            raise UserError(f"client {name}: its train split has {len(train)} records for --train-size {sizes['train']} + --validation-size "
                            f"{sizes['validation']}, its validation split {len(test)} for --test-size {sizes['test']}: lower one of them")
        validation, rest = hold_out(order, keys, sizes["validation"])
        if sizes["train"] > len(rest):
            raise UserError(f"client {name}: --train-size {sizes['train']}: {len(rest)} records share no context with the validation part: lower it")
        rest = rng.permutation(rest)[: sizes["train"] or TRAIN_CAP]
        chosen = rng.permutation(len(test))[: sizes["test"] or len(test)]
        parts[name] = {"train": [train[i] for i in np.sort(rest)], "validation": [train[i] for i in np.sort(validation)],
                       "test": [test[i] for i in np.sort(chosen)]}
    return parts


def read_splits(where, flag, hub_id):
    """{split: rows (dicts)} of a Hugging Face dataset (hub id, saved folder, parquet) or of the files that a dataset's authors distribute."""
    if os.path.isfile(where):
        return {"train": read_rows_of(where)}
    if os.path.isabs(where) and not holds_dataset(where):
        found = {}
        for split, pattern in SPLIT_FILES.items():
            files = [f for place in (Path(where), Path(where) / "data", Path(where) / "socialiqa-train-dev") if place.is_dir()
                     for f in sorted(place.iterdir(), key=lambda f: (len(f.name), f.name)) if re.fullmatch(pattern, f.name)]
            if files:
                found[split] = read_rows_of(files[0])
        if "train" not in found:
            raise UserError(f"{flag}: {where} holds no saved Hugging Face dataset, no parquet files and no train file (train*.jsonl, .json or "
                            f".csv): put the dataset there (hub id: {hub_id})")
        return found
    splits = open_dataset(dataset_at(where), flag)
    return {split: splits[name] for split, names in (("train", ["train"]), ("validation", ["validation", "valid", "val", "dev"]))
            for name in names if name in splits}


def read_rows_of(path):
    """The rows of a CSV file with a header, of JSON lines or of one JSON list; a file NAME-labels.lst beside it gives each its `label`."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                text = file.read()
                rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): download it again") from None
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.exists():
        values = labels.read_text().split()
        if len(values) != len(rows):
            raise UserError(f"{labels} has {len(values)} labels for the {len(rows)} records of {path.name}: download both again")
        rows = [{**row, "label": label} for row, label in zip(rows, values)]
    return rows


def to_records(rows, make, flag, split, hub_id):
    """The rows as records; UserError naming the first that is not of the dataset's schema."""
    records = []
    for number, row in enumerate(rows):
        try:
            record = make(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{flag}: row {number} of its {split} split is not one of {hub_id} ({type(error).__name__}: {error}): name a copy of that dataset") from None
        if record:
            records.append(record)
    return records


def public_text(n_public, sources, skip_bad=False):
    """D_0 of language models: `n_public` records (0: all), a uniform subset, of Alpaca or of the user's own JSON lines (`own_record`)."""
    where, flag = locate("public", *ALPACA, sources, file_ok=True)
    if os.path.isfile(where) and not alpaca_file(where):
        records, starts, _ = own_file(where, flag, Path(where).stem, skip_bad, mixed=True)
    else:
        records = starts = to_records(read_splits(where, flag, ALPACA[0])["train"], alpaca, flag, "train", ALPACA[0])
    if n_public > len(records):
        raise UserError(f"--public-size {n_public}: {flag} has {len(records)} records: lower it (0: all)")
    if not n_public:
        return records
    chosen = np.sort(np.random.default_rng(0).permutation(len(records))[:n_public])  # one public set for everybody, as in public_records
    return [records[i] for i in chosen] if records is starts else Records(where, starts[chosen], records.convert)


def alpaca_file(path):
    """Whether a file is in Alpaca's format (one JSON list, or lines with an `instruction`), not in the user's own."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    try:
        row = json.loads(first)
        return isinstance(row, list) or isinstance(row, dict) and "instruction" in row and "prompt" not in row
    except (ValueError, RecursionError):
        return first.lstrip().startswith("[")


# ---------------------------------------------------------------------------------------------------------------
# The user's own data: a JSON-lines file for language models, a folder CLASS/IMAGE for CLIP.

LEAST = 50  # records of an own file: fewer leave five to test on


class BadRecord(Exception):
    """What is wrong with a line of an own file."""


def own_record(raw, source):
    """A line of an own file as a record: {"prompt", "choices", "answer"} or {"prompt", "response"}, other keys are left out.

    `answer` is the text of a choice or, as a whole number, its index from 0. Prompt and answer stay as they are written;
    what stands between is one space, or the white space that the prompt ends with or the response begins with (a space at
    the prompt's end moves to the answer, where tokenizers want it). Raises BadRecord.
    """
    if not isinstance(raw, dict):
        raise BadRecord(f"not a JSON object ({type(raw).__name__})")
    several = raw.get("choices") is not None
    for key in ("prompt", "choices", "answer") if several else ("prompt", "response"):
        if raw.get(key) is None:
            raise BadRecord(f"no key {key!r}" + ("" if several or key == "prompt" else " (nor 'choices' and 'answer')"))
    prompt, texts = raw["prompt"], raw["choices"] if several else [raw["response"]]
    if not isinstance(prompt, str):
        raise BadRecord(f"'prompt' is not a string ({type(prompt).__name__})")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("'choices' is not a list of strings" if several else f"'response' is not a string ({type(texts[0]).__name__})")
    if not prompt.strip() or not all(text.strip() for text in texts):
        raise BadRecord("empty prompt" if not prompt.strip() else "empty choice" if several else "empty response")
    try:
        "".join([prompt, *texts]).encode()
    except UnicodeEncodeError:
        raise BadRecord("half of a surrogate pair, which is no character") from None
    gap = "" if prompt[-1].isspace() and prompt[-1] != " " else " "
    record = {"source": source, "input": prompt.strip(), "prompt": prompt.rstrip(" ")}
    if not several:
        return record | {"answer": texts[0].rstrip() if texts[0][0].isspace() else gap + texts[0].rstrip()}
    texts, answer = [text.strip() for text in texts], raw["answer"]
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise BadRecord("fewer than 2 choices" if len(texts) < 2 else "two equal choices")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(texts):
            raise BadRecord(f"'answer' {answer} is no index into the {len(texts)} choices (the first is 0)")
        answer = texts[answer]
    elif not isinstance(answer, str):
        raise BadRecord(f"'answer' is neither a choice's text nor its index ({type(answer).__name__})")
    elif answer.strip() not in texts:
        raise BadRecord(f"'answer' {answer.strip()[:40]!r} is not among the choices")
    return record | {"answer": gap + answer.strip(), "choices": [gap + text for text in texts]}


def own_file(path, flag, source, skip_bad, mixed=False):
    """(Records, their lines' byte offsets (n,), hashes of their prompts (n,)) of an own JSON-lines file, all of it checked.

    One streaming pass; empty lines do not count. `mixed`: multiple choice and instructions may stand in one file. The
    first bad record raises UserError with file, line number and reason; with `skip_bad` they are left out and counted.
    """
    starts, keys, bad, first, several, position = array("q"), array("Q"), 0, "", None, 0
    with open(path, "rb") as lines, tqdm(total=os.path.getsize(path), desc=f"checking {source}", unit="B", unit_scale=True, disable=None) as bar:
        for number, line in enumerate(lines, 1):
            start, position = position, position + len(line)
            bar.update(len(line))
            if not line.strip():
                continue
            try:
                try:
                    raw = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise BadRecord(f"not JSON ({error})") from None
                record = own_record(raw, source)
                if several not in (None, "choices" in record) and not mixed:
                    raise BadRecord(f"{'has' if 'choices' in record else 'no'} 'choices', unlike the records before it: a client is one or the other")
            except BadRecord as error:
                if not skip_bad:
                    raise UserError(f"{path}, line {number}: {error}: repair it, or leave such records out with --skip-bad-records") from None
                bad, first = bad + 1, first or f"line {number}: {error}"
                continue
            several = "choices" in record
            starts.append(start)
            keys.append(digest(record["input"]))
    if bad:
        print(f"select_proxies: {path}: {bad} bad records left out (the first: {first})")
    if len(starts) < LEAST:
        raise UserError(f"{flag}: {len(starts)} usable records, at least {LEAST} are needed")
    starts = np.array(starts)
    return Records(path, starts, partial(own_record, source=source)), starts, np.array(keys)


def own_text(name, path, sizes, seed, skip_bad=False):
    """{"train" | "validation" | "test": Records} of an own client: 80/10/10 of the file or, where not 0, of `sizes`; no prompt is in two parts."""
    flag = f"--client {name}={path}"
    if not os.path.isfile(path):
        raise UserError(f"{flag}: no such file; name one of JSON lines, with `prompt`, `choices`, `answer` or `prompt`, `response` in each")
    records, starts, keys = own_file(path, flag, name, skip_bad)
    order, keys = grouped(keys, np.random.default_rng([seed, zlib.crc32(name.encode())]))
    return {part: Records(path, starts[rows], records.convert) for part, rows in own_parts(order, keys, sizes, flag).items()}


def own_images(name, path, sizes, seed, skip_bad=False):
    """{"train" | "validation" | "test": records} of an own client's folder CLASS/IMAGE, split as own_text, of every class alike."""
    flag = f"--client {name}={path}"
    if not os.path.isdir(path):
        raise UserError(f"{flag}: no such folder; name one that holds a folder of images for each class")
    names, labels, image_of = read_image_folder(path, flag, ["."], "name the folder that holds a folder of images for each class")
    names = [class_name(n) for n in names]
    check_names(names, flag)
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"{flag}: {len(names)} classes, {len(set(names))} different names: two or more are needed, each with a name of its own")
    records = [{"image": image_of(i), "answer": names[label], "source": name, "choices": names} for i, label in enumerate(labels)]
    if skip_bad:
        bad = list(bad_images(records, name))
        if bad:
            print(f"select_proxies: {path}: {len(bad)} bad images left out (the first: {bad[0][1]})")
        kept = np.setdiff1d(np.arange(len(records)), [i for i, _ in bad])
        records, labels = [records[i] for i in kept], labels[kept]
    else:
        check_images(records, name)
    if len(records) < LEAST:
        raise UserError(f"{flag}: {len(records)} usable images, at least {LEAST} are needed")
    # a class's items at equal distances on [0, 1], in random order: any stretch of it has the same share of every class
    rng, place = np.random.default_rng([seed, zlib.crc32(name.encode())]), np.zeros(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    parts = own_parts(np.argsort(place, kind="stable"), np.arange(len(labels)), sizes, flag)
    return {part: [records[i] for i in rows] for part, rows in parts.items()}


def own_parts(order, keys, sizes, flag):
    """{part: sorted rows} of an own client: in `order`, the test part, then validation, the rest is for training."""
    tenth, left, parts = max(1, round(len(order) / 10)), order, {"train": None}
    for part in ("validation", "test"):
        parts[part], left = hold_out(left, keys, sizes[part] or tenth)
    parts["train"] = left[: sizes["train"] or len(left)]
    wanted = {part: sizes[part] or (tenth if part != "train" else 2) for part in parts}
    if any(len(rows) < wanted[part] for part, rows in parts.items()):
        raise UserError(f"{flag}: {len(order)} records with {len(np.unique(keys[order]))} different prompts or images are too few for --train-size "
                        f"{sizes['train']}, --validation-size {sizes['validation']} and --test-size {sizes['test']} (0: 80/10/10): lower one of them")
    return {part: np.sort(rows) for part, rows in parts.items()}


def digest(text):
    """A 64-bit number that stands for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def grouped(keys, rng):
    """(rows in a random order in which those of equal keys stand together (n,), a number for each row's key (n,))."""
    number = np.unique(np.asarray(keys, np.uint64), return_inverse=True)[1]
    number = rng.permutation(len(number))[number]
    return np.argsort(number, kind="stable"), number


def hold_out(order, keys, size):
    """(the first `size` rows of `order`, those of the others that share no key with them)."""
    out, left = order[:size], order[size:]
    return out, left[~np.isin(keys[left], keys[out])]


# ---------------------------------------------------------------------------------------------------------------
# Images: the paper's three clients and ImageNet. A record is a dict with `image`, `answer` (a class name), `source`
# and, for client records, `choices` (the client's class names in label order). `image` is the path of a file or a row
# of a Hugging Face dataset: {"dataset", "split", "row", "column"} and, where it has several, "config".

# client name -> (hub id, CoOp's split file, its image folder, names of the folder that holds both, CoOp's first; in any
# case and spelling of `_` and `-`). Each hub id has its classes in the ClassLabel `label` (timm's pets a `label_cat_dog`
# besides). Flowers has its original split there (1020 / 1020 / 6149 images), CoOp's is 4093 / 1633 / 2463.
IMAGE_CLIENTS = {
    "pets": ("timm/oxford-iiit-pet", "split_zhou_OxfordPets.json", "images", ["oxford_pets", "pets", "oxford-iiit-pet", "oxford-iiit-pets"]),
    "flowers": ("dpdl-benchmark/oxford_flowers102", "split_zhou_OxfordFlowers.json", "jpg",
                ["oxford_flowers", "flowers", "flowers102", "oxford_flowers102", "102flowers"]),
    "eurosat": ("timm/eurosat-rgb", "split_zhou_EuroSAT.json", "2750", ["eurosat", "eurosat_rgb"]),
}
IMAGENET = ("ILSVRC/imagenet-1k", ["imagenet", "imagenet-1k", "ILSVRC2012", "ILSVRC"])  # gated: its hub page asks to accept the terms
IMAGENET_TRAIN = ["train", "images/train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "."]  # below its folder
CLASS_NAME_FILES = ["classnames.txt", "LOC_synset_mapping.txt", "synset_words.txt"]
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

# EuroSAT's own class names, without spaces -> what CoOp's split file calls them.
EUROSAT_NAMES = {
    "annualcrop": "annual crop land", "herbaceousvegetation": "herbaceous vegetation land", "highway": "highway or road",
    "industrial": "industrial buildings", "pasture": "pasture land", "permanentcrop": "permanent crop land",
    "residential": "residential buildings", "sealake": "sea or lake",
}


class BadImage(Exception):
    """An image that is missing or does not decode; the message names its file or row."""


def class_name(text):
    """A class name as prompts have it: lower-case, `_` and `-` as spaces."""
    return " ".join(re.sub("[_-]", " ", text.lower()).split())


def load_images(clients, sizes, n_public, seed, sources):
    """Return (public records, {client: {"train" | "validation" | "test": records}}), as load_bigbench.

    `sizes`: {"train": n, "validation": n, "test": n}; fewer than there are is a subset as balanced over the classes as
    can be, fixed by the seed; 0 means all. `n_public`: a uniform subset of D_0, the same for every seed; 0: all.
    None: it is not read. `sources`: {"root": folder of the datasets' folders, NAME or "public": a folder or hub id (ID or
    ID:CONFIG)}, each may be None or absent; a dataset with neither comes from its default hub id. Raises UserError where data are
    missing, incomplete or fewer than asked for.
    """
    parts = {}
    for name in clients:
        choices, found = client_images(name, seed, sources)
        parts[name] = {}
        for part, size in sizes.items():
            images, labels = found[part]
            if size > len(images) or not images and part != "validation":
                raise UserError(f"client {name}: its {part} part has {len(images)} images, --{part}-size {size} asked for: "
                                + ("lower it (0: all there are)" if images else "name a dataset that has some"))
            rng = np.random.default_rng([seed, zlib.crc32(f"{name} {part}".encode())])
            parts[name][part] = [{"image": images[i], "answer": choices[labels[i]], "source": name, "choices": choices}
                                 for i in balanced(labels, size or len(labels), rng)]
    return None if n_public is None else public_images(n_public, sources), parts


def balanced(labels, n, rng):
    """Sorted indices of `n` random items, as many of each label as possible; a smaller `n` gives a subset of a larger one's."""
    order, seen, turn = rng.permutation(len(labels)), Counter(), []
    for i in order:  # the first of every class, then the second of every class, ...
        turn.append(seen[labels[i]])
        seen[labels[i]] += 1
    return np.sort(order[np.argsort(turn, kind="stable")[:n]]).tolist()


def locate(name, hub_id, spellings, sources, file_ok=False):
    """(where, flag): an existing folder's (or file's) absolute path or a hub id, and the flag and value it comes from, for error lines."""
    option = "--public " if name == "public" else f"--data {name}="
    if given := sources.get(name):
        flag, path = option + given, Path(given).expanduser()
        if path.is_dir() or file_ok and path.is_file():
            return os.path.abspath(path), flag
        if file_ok and path.suffix in (".jsonl", ".json"):
            raise UserError(f"{flag}: no such file; name a JSON-lines file, a dataset's folder or its hub id (such as {hub_id})")
        if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", given):
            raise UserError(f"{flag}: no such folder; name the dataset's folder or its hub id (such as {hub_id})")
        return given, flag
    if not sources.get("root"):
        return hub_id, f"{option}{hub_id} (the default)"
    root = Path(sources["root"]).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds {spellings[0]}")
    entries = [e for e in sorted(os.scandir(root), key=lambda e: e.name) if e.is_dir() or file_ok and e.name.endswith(".json")]
    plain = {re.sub(r"[\W_]", "", entry.name.lower()): entry.path for entry in entries}
    for spelling in spellings:
        if path := plain.get(re.sub(r"[\W_]", "", spelling.lower())):
            return os.path.abspath(path), f"--data-root {root}"
    raise UserError(f"--data-root {root}: no folder {spellings[0]} there (nor {', '.join(spellings[1:])}): put the dataset there, "
                    f"or pass {option}PATH_OR_ID (hub id: {hub_id})")


def client_images(name, seed, sources):
    """(class names, {part: (images, labels)}) of a client, out of CoOp's files or a Hugging Face dataset."""
    hub_id, split_file, image_folder, spellings = IMAGE_CLIENTS[name]
    where, flag = locate(name, hub_id, spellings, sources)
    local = os.path.isabs(where)  # the parent below: where the folder of the images itself was named
    folder = next((f for f in (Path(where), Path(where).parent) if local and (f / split_file).exists()), None)
    if not local or folder != Path(where) and holds_dataset(where):
        names, parts = read_dataset(name, where, flag, seed)
    elif folder:
        names, parts = read_split(folder, split_file, image_folder)
    else:
        raise UserError(f"{flag}: {where} holds neither {split_file} (CoOp's DATASETS.md links it; the images go into {image_folder}/ "
                        f"beside it) nor a Hugging Face dataset (hub id: {hub_id})")
    names = [class_name(n) for n in names]
    if name == "eurosat":
        names = [EUROSAT_NAMES.get(n.replace(" ", ""), n) for n in names]
    check_names(names, flag)
    if len(set(names)) < len(names):
        raise UserError(f"{flag}: two of its classes are called {Counter(names).most_common(1)[0][0]!r}: every class needs a name of its own")
    return names, parts


def check_names(names, flag):
    """UserError where classes are numbered: CLIP's text encoder needs names."""
    for name in names:
        if re.fullmatch(r"n?[ _]?\d+", name):
            raise UserError(f"{flag}: a class is called {name!r} there, and CLIP needs names: take a copy of the dataset whose labels are named")


def read_split(folder, split_file, image_folder):
    """(class names, {part: (paths, labels)}) from a split file of CoOp's: lists of [path below the image folder, label, class name]."""
    path = folder / split_file
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        listed = {part: [(str(file), int(label), str(name)) for file, label, name in split[key]]
                  for part, key in (("train", "train"), ("validation", "val"), ("test", "test"))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): download it again (CoOp's DATASETS.md links it)") from None
    items = [item for part in listed.values() for item in part]
    names = dict(sorted({label: name for _, label, name in items}.items()))
    index = {label: i for i, label in enumerate(names)}
    if any(names[label] != name for _, label, name in items) or len({file for file, _, _ in items}) < len(items):
        raise UserError(f"{path} is damaged (a label with two names, or an image listed twice): download it again (CoOp's DATASETS.md links it)")
    places = [base / sub for base in (folder, folder.parent) for sub in (image_folder, ".", "images", "jpg", "2750", "EuroSAT")]
    place = os.path.abspath(next((p for p in places if items and (p / items[0][0]).exists()), places[0]))
    parts = {part: ([os.path.join(place, file) for file, _, _ in found], [index[label] for _, label, _ in found]) for part, found in listed.items()}
    for image in (image for images, _ in parts.values() for image in images):
        if not os.path.exists(image):
            raise UserError(f"{image} is missing, {path} lists it: unpack the dataset's images into {place}")
    return list(names.values()), parts


def holds_dataset(path):
    """Whether a folder was written by datasets.save_to_disk or holds parquet files as a hub repository does."""
    patterns = ("dataset_dict.json", "state.json", "*.parquet", "data/*.parquet", "train/*.parquet")
    return any(next(Path(path).glob(pattern), None) for pattern in patterns)


def open_dataset(where, flag):
    """{split: datasets.Dataset} of {"dataset": hub id or folder, "config": ...}; UserError where it does not load."""
    import datasets

    name, local = where["dataset"], os.path.isabs(where["dataset"])
    try:
        if local and any(os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            splits = datasets.load_from_disk(name)
        else:
            try:
                splits = datasets.load_dataset(name, where.get("config"))
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                splits = datasets.load_dataset(name, where.get("config"), revision="refs/convert/parquet")  # the hub's own conversion
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = f"does not load ({type(error).__name__}: {error})"
        if local:
            raise UserError(f"{flag}: {name} {why}: make this copy of the dataset again") from None
        raise UserError(f"{flag}: there is no such folder here, and as a hub id (ID, or ID:CONFIG where it has several) it {why}: log in where the "
                        "hub asks for it, or name a local copy (--data NAME=FOLDER, --public FOLDER, or --data-root FOLDER for all)") from None
    splits = splits if isinstance(splits, dict) else {"train": splits}
    if "train" not in splits:
        raise UserError(f"{flag}: a split called train is needed, there is {', '.join(splits)}: name another copy of the dataset")
    return splits


def dataset_at(where):
    """The first fields of a record's `image` for a hub id (ID:CONFIG in two) or a folder."""
    name, _, config = (where, "", "") if os.path.isabs(where) else where.partition(":")
    return {"dataset": name, "config": config} if config else {"dataset": name}


def read_rows(dataset, split, flag):
    """(image column, class names, labels of all rows (n,) int64) of a split, without reading an image.

    Of several image columns `image` counts, of several label columns `label`, else the one with the most classes.
    """
    import datasets

    features = dataset.features
    images = sorted((c for c in features if isinstance(features[c], datasets.Image)), key=lambda c: c != "image")
    labels = sorted((c for c in features if isinstance(features[c], datasets.ClassLabel)), key=lambda c: (c != "label", -features[c].num_classes))
    if not images or not labels:
        raise UserError(f"{flag}: its split {split} has no {'ClassLabel' if images else 'Image'} column, only {', '.join(features)}: "
                        "name a dataset for image classification")
    values = dataset.select_columns(labels[:1]).with_format("arrow")[:][labels[0]].to_numpy()
    if len(values) and not values.min() >= 0:  # -1, or NaN for an empty cell
        raise UserError(f"{flag}: its split {split} has images without a label: name a copy that has them")
    return images[0], features[labels[0]].names, values.astype(np.int64)


def read_dataset(name, where, flag, seed):
    """(class names, {part: (images, labels)}) of a Hugging Face dataset; a missing part is cut out of train.

    20% of it for test, then 10% of the rest for validation, of each class alike, fixed by the seed.
    """
    splits = open_dataset(dataset_at(where), flag)
    parts, names = {}, None
    for part, spellings in (("train", ("train",)), ("validation", ("validation", "val", "valid", "dev")), ("test", ("test",))):
        if split := next((s for s in spellings if s in splits), None):
            column, found, labels = read_rows(splits[split], split, flag)
            if names not in (None, found):
                raise UserError(f"{flag}: its splits train and {split} have different classes: name a copy where they agree")
            names = found
            parts[part] = {**dataset_at(where), "split": split, "column": column}, np.arange(len(labels)), labels
    for part, share in (("test", 0.2), ("validation", 0.1)):
        if part not in parts:
            image, rows, labels = parts["train"]
            out = stratified(labels, share, np.random.default_rng([seed, zlib.crc32(f"{name} cut {part}".encode())]))
            parts[part], parts["train"] = (image, rows[out], labels[out]), (image, rows[~out], labels[~out])
    return names, {part: ([{**image, "row": row} for row in rows.tolist()], labels.tolist()) for part, (image, rows, labels) in parts.items()}


def stratified(labels, share, rng):
    """Mask over `labels` of about `share` of each class: at least one of its items and never all."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        mask[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return mask


def public_images(n_public, sources):
    """D_0: `n_public` records of ImageNet's training set (0: all), a uniform subset in the dataset's order.

    Read from an ImageFolder tree or a Hugging Face dataset. Of comma-separated synonyms the first is the class name;
    classes that share it ("crane") are one class to everybody.
    """
    where, flag = locate("public", *IMAGENET, sources)
    if os.path.isabs(where) and not holds_dataset(where):
        names, labels, image_of = read_image_folder(where, flag)
    else:
        at = dataset_at(where)
        column, names, labels = read_rows(open_dataset(at, flag)["train"], "train", flag)
        image_of = lambda row: {**at, "split": "train", "row": row, "column": column}
    names = [class_name(name.split(",")[0]) for name in names]
    check_names(names, flag)
    if n_public > len(labels):
        raise UserError(f"--public-size {n_public}: {flag} has {len(labels)} images: lower it (0: all)")
    rng = np.random.default_rng(0)  # one public set for everybody, as in public_records
    chosen = np.sort(rng.permutation(len(labels))[:n_public]) if n_public else np.arange(len(labels))
    return [{"image": image_of(i), "answer": names[labels[i]], "source": Path(where).name} for i in chosen.tolist()]


def read_image_folder(where, flag, below=IMAGENET_TRAIN, advice="unpack ILSVRC2012_img_train.tar and the archives in it there"):
    """(class names, labels, function from an index to its path) of a tree CLASS/IMAGE, listed without a stat per file.

    The classes' folders lie in `where` itself or in one of the folders `below` it, the first that has any.
    """
    for train in (Path(where) / folder for folder in below):
        folders = sorted(e.name for e in os.scandir(train) if e.is_dir() and e.name not in ("val", "validation", "test")) if train.is_dir() else []
        if folders:
            break
    train = os.path.abspath(train)
    labels, files, kept = [], [], []
    for folder in folders:
        found = sorted(n for n in os.listdir(os.path.join(train, folder)) if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("."))
        if found:
            labels += [len(kept)] * len(found)
            files += found
            kept.append(folder)
    if not files:
        places = "in CLASS/" if below == ["."] else "in train/CLASS/ (such as train/n01440764/n01440764_18.JPEG) nor in CLASS/, and no parquet files"
        raise UserError(f"{flag}: {where} holds no images {places}: {advice}")
    named = {}
    for place in (Path(train), *Path(train).parents[:4]):  # Kaggle's file lies four levels above its train folder
        for file in (place / name for name in CLASS_NAME_FILES):
            if not named and file.is_file():
                lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
                named = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in kept}
    names = [named.get(folder, folder) for folder in kept]
    if unnamed := [name for name in names if re.fullmatch(r"n\d{8}", name)]:
        raise UserError(f"{flag}: no name for the class {unnamed[0]} of {train}: put CoOp's classnames.txt ('n01440764 tench' a line) "
                        f"or Kaggle's LOC_synset_mapping.txt into {where}")
    return names, np.array(labels), lambda i: os.path.join(train, kept[labels[i]], files[i])


def open_image(image, seen={}):
    """The RGB PIL image of a record's `image`, pixels as stored (no turning by EXIF); `seen` keeps opened datasets per process.

    Raises BadImage where the image is missing or does not decode to its end, UserError where its dataset does not load.
    """
    from PIL import Image

    name = image
    if not isinstance(image, str):
        import datasets

        name = f"row {image['row']} of {image['dataset']}, split {image['split']}"
        key = tuple(image.get(field) for field in ("dataset", "config", "split", "column"))
        if key not in seen:
            dataset = open_dataset(image, name).get(image["split"])
            if dataset is None or image["column"] not in dataset.features:
                raise UserError(f"{name}: no such split or no column {image['column']} there any more: take the dataset that the run was made with")
            seen[key] = dataset.select_columns([image["column"]]).cast_column(image["column"], datasets.Image(decode=False))
    try:
        file = image
        if not isinstance(image, str):
            cell = seen[key][image["row"]][image["column"]]
            file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        with Image.open(file) as opened:
            if opened.mode == "P" and "transparency" in opened.info:  # Pillow warns of the direct way
                opened = opened.convert("RGBA")
            return opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged data
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EISDIR):
            raise
        raise BadImage(f"{name}: {type(error).__name__}: {error}") from None


def bad_images(records, client):
    """Yield (index, what is wrong with it) of a client's images that do not decode; decodes them all."""
    for index, record in enumerate(tqdm(records, desc=f"checking {client}", unit="image", disable=None)):
        try:
            open_image(record["image"])
        except BadImage as error:
            yield index, error


def check_images(records, client):
    """UserError naming the first of a client's images that does not decode."""
    for _, error in bad_images(records, client):
        raise UserError(f"client {client}: bad image {error}: replace it, or take a whole copy of the dataset")
