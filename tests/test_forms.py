"""The common public forms of questions and instructions, as a client's own data and as a public set."""

import csv
import json

import numpy as np
import pytest

from metamoe.backbones.letters import lettered
from metamoe.data import questions, user
from metamoe.errors import UserError
from metamoe.report.statistics import is_right

CHOICES = {"label": ["A", "B", "C"], "text": ["red", "green", "blue"]}
PAIRS = [{"label": label, "text": text} for label, text in zip(*CHOICES.values(), strict=True)]
COLOUR = "Question: Which colour?\nAnswer:"
FORMS = {
    "own": {"prompt": COLOUR, "choices": CHOICES["text"], "answer": "green"},
    "own, by index": {"prompt": COLOUR, "choices": CHOICES["text"], "answer": 1},
    "own, by letter": {"prompt": COLOUR, "choices": CHOICES["text"], "answer": "B"},
    "own, by letter in brackets": {"prompt": COLOUR, "choices": CHOICES["text"], "answer": "(b)"},
    "own, labelled choices": {"prompt": COLOUR, "choices": PAIRS, "answer": "B"},
    "CommonsenseQA's file": {"question": {"stem": "Which colour?", "choices": PAIRS}, "answerKey": "B"},
    "CommonsenseQA, ARC": {"question": "Which colour?", "choices": CHOICES, "answerKey": "B"},
    "ARC, labels of digits": {
        "question": "Which colour?",
        "choices": CHOICES | {"label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "OpenBookQA": {"question_stem": "Which colour?", "choices": CHOICES, "answerKey": "B"},
    "MMLU": {"question": "Which colour?", "choices": CHOICES["text"], "answer": 1},
    "MMLU's columns": {"question": "Which colour?", "A": "red", "B": "green", "C": "blue", "answer": "B"},
}
CONTEXT = "Context: Light.\nQuestion: Which colour?\nAnswer:"
READ = [
    *((name, raw, COLOUR, CHOICES["text"], 1) for name, raw in FORMS.items()),
    (
        "SocialIQA",
        {"context": "Light.", "question": "Which colour?", "label": "3"}
        | {"answerA": "red", "answerB": "green", "answerC": "blue"},
        CONTEXT,
        CHOICES["text"],
        2,
    ),
    (
        "SocialIQA 1.4",
        {"context": "Light.", "question": "Which colour?", "correct": "C"}
        | {"answerA": "red", "answerB": "green", "answerC": "blue"},
        CONTEXT,
        CHOICES["text"],
        2,
    ),
    (
        "CosmosQA",
        {"context": "Light.", "question": "Which colour?", "label": 2}
        | {"answer0": "red", "answer1": "green", "answer2": "blue", "answer3": "grey"},
        CONTEXT,
        [*CHOICES["text"], "grey"],
        2,
    ),
    (
        "PIQA",
        {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
        "Question: Open it\nAnswer:",
        ["push", "pull"],
        1,
    ),
    ("HellaSwag", {"ctx": "He sits", "endings": ["down", "up"], "label": "0"}, "He sits", ["down", "up"], 0),
]


@pytest.mark.parametrize("name, raw, prompt, choices, number", READ, ids=[form[0] for form in READ])
def test_questions_with_choices(name, raw, prompt, choices, number):
    record = user.own_record(raw, "shop")
    assert record["prompt"] == prompt and record["choices"] == [f" {choice}" for choice in choices]
    assert record["answer"] == record["choices"][number]


@pytest.mark.parametrize(
    "raw, prompt, answer",
    (
        ({"prompt": "Say hello.", "completion": "hello"}, "Say hello.", " hello"),
        ({"prompt": "Say hello.", "output": "hello"}, "Say hello.", " hello"),
        ({"question": "Hello?", "answer": "hello"}, "Question: Hello?\nAnswer:", " hello"),
        (
            {"instruction": "Greet.", "input": "Ann", "output": "Hi Ann"},
            "Question: Greet.\nInput: Ann\nAnswer:",
            " Hi Ann",
        ),
        ({"instruction": "Greet.", "output": "Hi"}, "Question: Greet.\nAnswer:", " Hi"),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, "Question: Greet.\nAnswer:", " Hi"),
    ),
)
def test_instructions(raw, prompt, answer):
    record = user.own_record(raw, "shop")
    assert (record["prompt"], record["answer"]) == (prompt, answer) and "choices" not in record


def test_what_is_of_no_known_form_is_told_its_keys_and_an_example():
    with pytest.raises(user.BadRecord) as error:
        user.own_record({"body": "x", "title": "y"}, "shop")
    assert all(word in str(error.value) for word in ("'body'", "'title'", '"response"', '"choices"'))


@pytest.mark.parametrize("answer", ("D", "yellow", "", 3, True, None, "AB"))
def test_an_answer_that_names_no_choice_is_refused(answer):
    with pytest.raises(user.BadRecord, match="answer"):
        user.own_record({"prompt": "x", "choices": CHOICES["text"], "answer": answer}, "shop")


def test_a_choices_text_counts_before_its_letter():
    record = user.own_record({"prompt": "Vitamin?", "choices": ["B", "A", "C"], "answer": "A"}, "shop")
    assert record["answer"] == record["choices"][1]


def test_of_choices_with_one_text_the_number_stays_to_the_end():
    raw = {"prompt": "Pick.\nAnswer:", "choices": ["none", "one", "two", "none"]}
    record = user.own_record(raw | {"answer": "D"}, "shop")
    assert lettered(record)["answer"] == " D"
    assert is_right([np.array([3.0, 0, 0, 1]), np.array([1.0, 0, 0, 3])], [record] * 2).tolist() == [0, 1]
    with pytest.raises(user.BadRecord, match="two choices"):
        user.own_record(raw | {"answer": "none"}, "shop")
    paper = questions.question_record("", "Pick.", raw["choices"], 3)
    assert lettered(paper)["answer"] == " D"


def rows(count=60):
    return [FORMS["MMLU's columns"] | {"question": f"Which colour, {i}?"} for i in range(count)]


def write_csv(path, found):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


def write_list(path, found):
    path.write_text(json.dumps(found, indent=1))


@pytest.mark.parametrize("name, write", (("shop.csv", write_csv), ("shop.json", write_list)))
def test_a_table_is_read_as_json_lines_are(tmp_path, name, write):
    lines, table = tmp_path / "shop.jsonl", tmp_path / name
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write(table, rows())
    sizes = dict(train=0, validation=0, test=0)
    found = [user.own_text("shop", path, sizes, 0) for path in (lines, table)]
    assert {part: list(records) for part, records in found[0].items()} == {
        part: list(records) for part, records in found[1].items()
    }
    if name == "shop.csv":  # a JSON list as a public set is Alpaca's
        public = [questions.public_text(50, {"public": str(path)}) for path in (lines, table)]
        assert list(public[0]) == list(public[1]) and len(public[0]) == 50


def test_a_bad_record_of_a_table_is_named_or_left_out(tmp_path, capsys):
    path = tmp_path / "shop.csv"
    write_csv(path, [*rows(), rows(1)[0] | {"answer": "Z"}])
    sizes = dict(train=0, validation=0, test=0)
    with pytest.raises(UserError, match="record 61.*'Z'"):
        user.own_text("shop", path, sizes, 0)
    parts = user.own_text("shop", path, sizes, 0, skip_bad=True)
    assert sum(map(len, parts.values())) == 60 and "1 bad records left out" in capsys.readouterr().out
