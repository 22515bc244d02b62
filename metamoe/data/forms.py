"""The common public forms of questions and instructions, read as a user's own records."""

import csv
import json
from pathlib import Path

from metamoe.errors import UserError

EXAMPLE = (
    '{"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": "4"} or {"prompt": "...", "response": "..."}'
)


def common_form(raw):
    """`raw` as {"prompt", "choices", "answer"} or {"prompt", "response"}; as it is where its form is unknown.

    Read are the forms of CommonsenseQA, ARC and OpenBookQA (`question`, `choices` with labels, `answerKey`),
    CosmosQA (`answer0` ...), SocialIQA (`answerA` ...), PIQA (`goal`, `sol1`, `sol2`), HellaSwag (`ctx`,
    `endings`), MMLU (`question`, `choices`, `answer`, or columns `A` to `D`), Alpaca (`instruction`, `input`,
    `output`), chats (`messages`), and prompts or questions with a `completion`, `output` or `answer`.
    """
    if not isinstance(raw, dict):
        return raw
    for read in FORMS:
        try:
            found = read(raw)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue  # not of this form
        if found:
            return found
    return raw


def question(context, text, choices, number):
    """As common_form's result; ValueError where `number` is not that of a choice (an unlabelled row)."""
    context, text = (context or "").strip(), text.strip()
    if not 0 <= number < len(choices):
        raise ValueError(f"label {number}")
    prompt = f"Question: {text}\nAnswer:"
    if context:
        prompt = f"Context: {context}\n{prompt}"
    return {"prompt": prompt, "choices": choices, "answer": number}


def instruction_prompt(instruction, given):
    return f"Question: {instruction}\n" + (f"Input: {given}\n" if given else "") + "Answer:"


def stem_and_choices(asked, choices):
    """(the question, {"label": [...], "text": [...]}) of CommonsenseQA, in its own file or on the hub."""
    if isinstance(asked, dict):  # in its authors' file
        asked, choices = asked["stem"], asked["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    return asked, choices


def cosmosqa(row):
    """(context, question, choices, number) of allenai/cosmos_qa: `answer0` ... `answer3`, `label` from 0."""
    return row["context"], row["question"], [row[f"answer{i}"] for i in range(4)], int(row["label"])


def socialiqa(row):
    """(context, question, choices, number) of allenai/social_i_qa: `answerA` ... `answerC`, `label` from "1".

    In version 1.4 the label is the letter `correct`.
    """
    number = "ABC".index(row["correct"]) if "correct" in row else int(row["label"]) - 1
    return row["context"], row["question"], [row[f"answer{letter}"] for letter in "ABC"], number


def labelled(raw):
    """`choices` {"label": [...], "text": [...]}, or a list of such pairs, and the right label."""
    asked = raw.get("question", raw.get("question_stem", raw.get("prompt")))
    asked, choices = stem_and_choices(asked, raw.get("choices"))
    right = raw["answerKey"] if "answerKey" in raw else raw["answer"]
    number = list(map(str, choices["label"])).index(str(right))
    if "prompt" in raw:
        return {"prompt": raw["prompt"], "choices": choices["text"], "answer": number}
    return question("", asked, choices["text"], number)


def lettered_answers(raw):
    return question(*socialiqa(raw))


def numbered_answers(raw):
    return question(*cosmosqa(raw))


def two_solutions(raw):
    return question("", raw["goal"], [raw["sol1"], raw["sol2"]], int(raw["label"]))


def endings(raw):
    return {"prompt": raw["ctx"], "choices": raw["endings"], "answer": int(raw["label"])}


def plain_question(raw):
    """A `question` with `choices` of texts; the answer may be a text, a letter or a number from 0."""
    if "prompt" in raw:
        return None
    made = question(raw.get("context"), raw["question"], raw["choices"], 0)
    return made | {"answer": raw["answer"]}


def lettered_columns(raw):
    """A question with its choices in columns A, B, ...; the answer is a letter, or a text."""
    texts = [raw[letter] for letter in "ABCDEFGH" if raw.get(letter)]
    asked = raw["prompt"] if "prompt" in raw else question("", raw["question"], texts, 0)["prompt"]
    return {"prompt": asked, "choices": texts, "answer": raw["answer"]} if len(texts) > 1 else None


def chat(raw):
    """`messages` of {"role", "content"}, the last of which is the answer; the prompt is a plain rendering."""
    messages = [{"role": str(m["role"]), "content": m["content"].strip()} for m in raw["messages"]]
    *asked, answer = messages
    if answer["role"] not in ("assistant", "gpt", "model") or not asked:
        raise ValueError("the last message is not the assistant's")
    lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in asked]
    return {"prompt": "".join(lines) + "Assistant:", "response": answer["content"], "messages": asked}


def pair(raw):
    """Something asked and something answered, without choices."""
    answers = [raw[key] for key in ("output", "completion", "answer") if raw.get(key) is not None]
    if not answers or raw.get("choices") is not None or raw.get("response") is not None:
        return None
    response = answers[0]
    if "prompt" in raw:
        return {"prompt": raw["prompt"], "response": response}
    asked = (raw["instruction"] if "instruction" in raw else raw["question"]).strip()
    given = (raw.get("input") or raw.get("context") or "").strip()
    return {"prompt": instruction_prompt(asked, given), "response": response}


FORMS = (labelled, lettered_answers, numbered_answers, two_solutions, endings, plain_question)
FORMS += (lettered_columns, chat, pair)


def read_rows(path):
    """The rows (dicts) of a CSV file, of one JSON list, or of JSON lines."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return list(csv.DictReader(file))
            text = file.read()
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): download it again") from None


def is_table(path):
    """Whether a file is CSV or one JSON list, not JSON lines."""
    if Path(path).suffix.lower() == ".csv":
        return True
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip().startswith("[")
