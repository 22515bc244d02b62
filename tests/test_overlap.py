"""A client's private texts in the public set are counted for the client alone."""

import re

import pytest
import tiny

from metamoe.data.overlap import overlap
from metamoe.records import read_records, write_records
from metamoe.rundir import finish, read_json, settings_of, write_json


def text(prompt, answer=" yes"):
    return {"prompt": prompt, "answer": answer}


def test_a_private_text_counts_as_often_as_it_is_there():
    private = [text("Play  Music\nnow"), text("play music now", " no"), text("else"), text("play music")]
    public = [text("PLAY music NOW "), text("play music now"), text("other")]
    assert overlap(private, public) == 2
    assert overlap(private, public, whole_text=True) == 1
    assert overlap(private, public[2:]) == overlap([], public) == overlap(private, []) == 0


def test_images_are_left_out():
    images = [{"image": "a.png", "answer": "cat"}]
    assert overlap(images, images) == 0


@pytest.mark.parametrize("loss", ["answer", "text"])
def test_the_client_is_warned_and_nothing_is_written(loss, fresh):
    """Two of intent's texts stand in D_0, one with another answer; none of the others'."""
    private = read_records(fresh / "clients" / "intent" / "private" / "train.jsonl")
    public = list(read_records(fresh / "public" / "records.jsonl"))
    public[3] = private[0] | {"prompt": private[0]["prompt"].upper().replace(" ", "  ")}
    public[7] = private[1] | {"answer": " something else"}
    write_records(fresh / "public" / "records.jsonl", public)
    finish(fresh / "public", settings_of(fresh / "public"))
    write_json(fresh / "run.json", read_json(fresh / "run.json") | {"loss": loss})
    before = set(fresh.rglob("*"))
    result = tiny.stage("select_proxies", fresh)
    assert result.code == 0, result.err
    count, size = 2 if loss == "answer" else 1, 32
    warnings = [line for line in result.out.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and re.search(rf"intent: {count} of its {size} private texts", warnings[0])
    assert tiny.SECRET not in warnings[0]
    written = [path for path in fresh.rglob("*.json*") if path not in before]
    assert written and not [path for path in written if "overlap" in path.read_text()]
    assert not [path for path in written if "word for word" in path.read_text()]
