"""The user's own data: a file of JSON lines for language models, a folder CLASS/IMAGE for CLIP."""

import hashlib
import json
import os
import re
import string
from array import array
from functools import partial

import numpy as np

from metamoe.data.decoding import bad_images, check_images
from metamoe.data.forms import EXAMPLE, common_form, is_table, read_rows
from metamoe.data.image_folder import read_image_folder
from metamoe.data.images import class_names
from metamoe.data.splits import digest, grouped, hold_out, rng_of
from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.records import Records

LEAST = 50  # records of an own file: fewer leave five to test on


class BadRecord(Exception):
    """What is wrong with a line of an own file."""


def own_record(raw, source):
    """A line of an own file, {"prompt", "choices", "answer"} or {"prompt", "response"}, as a record.

    Other common forms are read too (forms.common_form). `answer` is the text of a choice, its letter or, as a
    whole number, its index from 0. Prompt and answer stay as they are written. Between them stands one space,
    or the white space that the prompt ends with or the response begins with. A space at the prompt's end
    moves to the answer, where tokenizers want it. Raises BadRecord.
    """
    raw = common_form(raw)
    prompt, texts, several = own_texts(raw)
    gap = "" if prompt[-1].isspace() and prompt[-1] != " " else " "
    record = {"source": source, "input": prompt.strip(), "prompt": prompt.rstrip(" ")}
    if several:
        texts = [text.strip() for text in texts]
        number = chosen(raw["answer"], texts)
        if len(set(texts)) < len(texts):  # the text does not say which
            record["number"] = number
        return record | {"answer": gap + texts[number], "choices": [gap + text for text in texts]}
    response = texts[0].rstrip()
    if "messages" in raw:  # for the tokenizer's chat template, which the prompt's plain text stands in for
        record["messages"] = raw["messages"]
    return record | {"answer": response if response[0].isspace() else gap + response}


def check(fine, reason):
    if not fine:
        raise BadRecord(reason)


def own_texts(raw):
    """(prompt, choices or [response], whether it has choices) of a line, checked. Raises BadRecord."""
    check(isinstance(raw, dict), f"not a JSON object ({type(raw).__name__})")
    several = raw.get("choices") is not None
    for key in ("prompt", "choices", "answer") if several else ("prompt", "response"):
        found = f"it has {', '.join(map(repr, raw))}; such as {EXAMPLE}"
        check(raw.get(key) is not None, f"no key {key!r}: {found}")
    for key in ("prompt",) if several else ("prompt", "response"):
        check(isinstance(raw[key], str), f"{key!r} is not a string ({type(raw[key]).__name__})")
    prompt, texts = raw["prompt"], raw["choices"] if several else [raw["response"]]
    check(isinstance(texts, list), "'choices' is not a list of strings")
    check(all(isinstance(text, str) for text in texts), "'choices' is not a list of strings")
    check(prompt.strip(), "empty prompt")
    check(all(text.strip() for text in texts), "empty choice" if several else "empty response")
    try:
        "".join([prompt, *texts]).encode()
    except UnicodeEncodeError:
        raise BadRecord("half of a surrogate pair, which is no character") from None
    return prompt, texts, several


def chosen(answer, texts):
    """The index of the choice that `answer` names, by its text, its letter or its index. Raises BadRecord."""
    check(len(texts) > 1, "fewer than 2 choices")
    if isinstance(answer, int) and not isinstance(answer, bool):
        why = f"is no index into the {len(texts)} choices (the first is 0)"
        check(0 <= answer < len(texts), f"'answer' {answer} {why}")
        return answer
    kind = type(answer).__name__
    check(isinstance(answer, str), f"'answer' is neither a choice's text nor its index ({kind})")
    answer = answer.strip()
    if answer in texts:
        check(texts.count(answer) == 1, f"two choices are {answer[:40]!r}: give the index of the right one")
        return texts.index(answer)
    letter = re.fullmatch(r"\(?([A-Za-z])[).]?", answer)
    number = string.ascii_uppercase.index(letter[1].upper()) if letter else len(texts)
    check(number < len(texts), f"'answer' {answer[:40]!r} is not among the choices")
    return number


def parse(item, source, several):
    """A line (bytes) or a row (dict) as a record. `several`: whether it must have choices; None: it may."""
    try:
        raw = json.loads(item) if isinstance(item, bytes) else item
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON ({error})") from None
    record = own_record(raw, source)
    which = "no 'choices'" if several else "has 'choices'"
    alike = several in (None, "choices" in record)
    check(alike, f"{which}, unlike the records before it: a client is one or the other")
    return record


def items_of(path, source):
    """Yield (its name in errors, its offset or None, the line or row) of each record of an own file."""
    if is_table(path):
        for number, row in enumerate(read_rows(path), 1):
            yield f"record {number}", None, row
        return
    bar = progress(total=os.path.getsize(path), desc=f"checking {source}", unit="B", unit_scale=True)
    with open(path, "rb") as lines, bar:
        for number, line in enumerate(lines, 1):
            bar.update(len(line))
            if line.strip():
                yield f"line {number}", lines.tell() - len(line), line


def own_file(path, flag, source, skip_bad, mixed=False):
    """(Records, hashes of their prompts (n,)) of an own file, all of it checked.

    JSON lines are read in one streaming pass, empty ones do not count; a CSV file or one JSON list stays in
    memory. `mixed`: multiple choice and instructions may stand in one file. The first bad record raises
    UserError with file, line number and reason; with `skip_bad` they are left out and counted.
    """
    starts, rows, keys = array("q"), [], array("Q")
    bad, first, several = 0, None, None
    for where, start, item in items_of(path, source):
        try:
            record = parse(item, source, several)
        except BadRecord as error:
            if not skip_bad:
                advice = "repair it, or leave such records out with --skip-bad-records"
                raise UserError(f"{path}, {where}: {error}: {advice}") from None
            bad, first = bad + 1, first or f"{where}: {error}"
            continue
        several = None if mixed else "choices" in record
        keys.append(digest(record["input"]))
        if start is None:
            rows.append(record)
        else:
            starts.append(start)
    if bad:
        print(f"select_proxies: {path}: {bad} bad records left out (the first: {first})")
    if len(keys) < LEAST:
        raise UserError(f"{flag}: {len(keys)} usable records, at least {LEAST} are needed")
    records = Records(path, np.array(starts), partial(own_record, source=source), rows)
    return records, np.array(keys)


def own_text(name, path, sizes, seed, skip_bad=False):
    """{part: Records} of an own client: 80/10/10 or, where not 0, `sizes`; no prompt is in two parts."""
    flag = f"--client {name}={path}"
    if not os.path.isfile(path):
        keys = "`prompt`, `choices`, `answer` or `prompt`, `response`"
        raise UserError(f"{flag}: no such file; name one of JSON lines, with {keys} in each")
    records, keys = own_file(path, flag, name, skip_bad)
    order, keys = grouped(keys, rng_of(seed, name))
    parts = own_parts(order, keys, sizes, flag)
    return {part: records.take(rows) for part, rows in parts.items()}


def own_images(name, path, sizes, seed, skip_bad=False):
    """As own_text, of a folder CLASS/IMAGE; every part has about the same share of each class."""
    flag, what = f"--client {name}={path}", "a folder of images for each class"
    if not os.path.isdir(path):
        raise UserError(f"{flag}: no such folder; name one that holds {what}")
    advice = f"name the folder that holds {what}"
    names, labels, image_of, left_out = read_image_folder(path, flag, ["."], advice)
    names = class_names(names, flag)
    counts = [f"{name} {count}" for name, count in zip(names, np.bincount(labels), strict=True)]
    print(f"select_proxies: {name}: {', '.join(counts[:20])}{', ...' if len(counts) > 20 else ''}")
    if left_out:
        reasons = ", ".join(f"{reason}: {what}" for reason, what in sorted(left_out.items()))
        print(f"select_proxies: {name}: NOT READ: {reasons}")
    if len(set(names)) < max(2, len(names)):
        counts = f"{len(names)} classes, {len(set(names))} different names"
        raise UserError(f"{flag}: {counts}: two or more are needed, each with a name of its own")
    answers, shared = [names[label] for label in labels], {"source": name, "choices": names}
    records = [{"image": image_of(i), "answer": answer, **shared} for i, answer in enumerate(answers)]
    if not skip_bad:
        check_images(records, name)
    bad = dict(bad_images(records, name)) if skip_bad else {}
    if bad:
        first = next(iter(bad.values()))
        print(f"select_proxies: {path}: {len(bad)} bad images left out (the first: {first})")
    kept = [i for i in range(len(records)) if i not in bad]
    records, labels = [records[i] for i in kept], labels[kept]
    if len(records) < LEAST:
        raise UserError(f"{flag}: {len(records)} usable images, at least {LEAST} are needed")
    order = spread(labels, rng_of(seed, name))
    parts = own_parts(order, contents([record["image"] for record in records]), sizes, flag)
    left = len(records) - sum(map(len, parts.values()))
    if left and not any(sizes.values()):
        print(f"select_proxies: {name}: {left} images left out of train: copies of validation or test images")
    return {part: [records[i] for i in rows] for part, rows in parts.items()}


def contents(files):
    """A number for each file's content (n,): copies of a photo have the same."""
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return np.unique(digests, return_inverse=True)[1]


def spread(labels, rng):
    """A random order in which any stretch has about the same share of every class (n,)."""
    place = np.zeros(len(labels))  # a class's items at equal distances on [0, 1]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def own_parts(order, keys, sizes, flag):
    """{part: sorted rows} of an own client: from `order` first validation, then test, then training."""
    tenth = max(1, round(len(order) / 10))
    validation, left = hold_out(order, keys, sizes["validation"] or tenth)
    test, left = hold_out(left, keys, sizes["test"] or tenth)
    parts = {"train": left[: sizes["train"] or len(left)], "validation": validation, "test": test}
    least = {"train": 2, "validation": tenth, "test": tenth}
    if any(len(rows) < (sizes[part] or least[part]) for part, rows in parts.items()):
        found = f"{len(order)} records with {len(np.unique(keys[order]))} different prompts or images"
        train, others = sizes["train"], f"{sizes['validation']} and --test-size {sizes['test']}"
        wanted = f"--train-size {train}, --validation-size {others} (0: 80/10/10)"
        raise UserError(f"{flag}: {found} are too few for {wanted}: lower one of them")
    return {part: np.sort(rows) for part, rows in parts.items()}
