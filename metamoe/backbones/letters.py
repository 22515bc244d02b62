"""Multiple choice as letters: the prompt lists the choices, the answer is a letter."""

import string

from metamoe.errors import UserError

LETTERS = [f" {letter}" for letter in string.ascii_uppercase]


def lettered(record):
    """A multiple-choice record as letters; a record without choices as it is. UserError beyond 26 choices.

    The choices are listed before the prompt's last line, "Answer:"; answer and choices become " A", " B", ...
    """
    if "choices" not in record:
        return record
    choices = record["choices"]
    if len(choices) > 26:
        remedy = "make the run with --answers text and score with --scoring likelihood"
        where = f"(its prompt: {record['prompt'][:60]!r})"
        raise UserError(f"a record has {len(choices)} choices, letters reach 26: {remedy} {where}")
    letters = LETTERS[: len(choices)]
    head, _, last = record["prompt"].rpartition("\n")
    if not last.endswith(":"):
        head, last = record["prompt"], "Answer:"
    lines = [f"{letter.strip()}. {choice.strip()}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = "\n".join([*filter(None, [head]), "Choices:", *lines, last])
    number = record.get("number", choices.index(record["answer"]))
    return record | {"prompt": prompt, "choices": letters, "answer": letters[number]}
