"""Multiple choice as letters: the prompt lists the choices, the answer is a letter."""

import string

from metamoe.errors import UserError


def lettered(record):
    """A multiple-choice record as letters.

    The choices are listed before the prompt's last line ("Answer:").
    Answer and choices become " A", " B", ...
    A record without choices comes back as it is. Raises UserError beyond 26 choices.
    """
    if "choices" not in record:
        return record
    choices = record["choices"]
    letters = [f" {letter}" for letter in string.ascii_uppercase[: len(choices)]]
    if len(letters) < len(choices):
        raise UserError(
            f"a record has {len(choices)} choices, letters reach 26: make the run with --answers text "
            f"and score with --scoring likelihood (its prompt: {record['prompt'][:60]!r})"
        )
    head, _, last = record["prompt"].rpartition("\n")
    if not last.endswith(":"):
        head = record["prompt"]
        last = "Answer:"
    lines = [head] if head else []
    lines.append("Choices:")
    lines += [f"{letter.strip()}. {choice.strip()}" for letter, choice in zip(letters, choices, strict=True)]
    lines.append(last)
    return record | {
        "prompt": "\n".join(lines),
        "choices": letters,
        "answer": letters[choices.index(record["answer"])],
    }
