"""Tokenizers that do not fit their model: what can work does, the rest is refused in one line."""

import json
import random

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from metamoe import backbones
from metamoe.backbones.base import import_transformers
from metamoe.errors import UserError

transformers = import_transformers()
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 400  # of the tiny model's embedding


@pytest.fixture
def load(tmp_path, seed_model):
    """A function: the tiny model with a tokenizer that `change` has changed, as the stages load it."""

    def load(change):
        tokenizer = transformers.AutoTokenizer.from_pretrained(seed_model)
        change(tokenizer)
        transformers.AutoModelForCausalLM.from_pretrained(seed_model).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return backbones.load_backbone("smollm2-135m", str(tmp_path), "cpu", "float32")

    return load


@pytest.fixture(scope="module")
def records():
    return [tiny.record("intent", random.Random(i), True) for i in range(4)]


@pytest.fixture(scope="module")
def scores(seed_model, records):
    """Of the tiny model with its own tokenizer."""
    backbone = backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")
    return backbone.scores(backbone.model, records)


def beyond(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    assert tokenizer.pad_token_id == ROWS


def no_end(tokenizer):
    tokenizer.eos_token = None


def neither(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = None


@pytest.mark.parametrize("change", [beyond, no_end, neither])
def test_a_model_scores_the_same_without_end_or_pad(load, records, scores, change):
    backbone = load(change)
    for got, want in zip(backbone.scores(backbone.model, records), scores, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), atol=1e-5, rtol=1e-5)
    _, answer = backbone.example(records[0])
    assert (answer[-1] == 1) == (change is beyond)  # EOS, where there is one
    assert torch.isfinite(backbone.loss(backbone.model, [backbone.example(r) for r in records]))
    backbone.scores(backbone.model, records, scoring="generate")


def test_a_text_with_a_token_beyond_the_embedding_is_refused(load, records):
    backbone = load(lambda tokenizer: tokenizer.add_tokens(["<zebra>"]))
    assert backbone.scores(backbone.model, records)  # none of them has it
    for changed in ({"prompt": "a <zebra>"}, {"choices": [" <zebra>", " b"]}):
        with pytest.raises(UserError, match=f"'<zebra>' token {ROWS}, .* {ROWS} rows"):
            backbone.scores(backbone.model, [records[0] | changed])


def test_an_end_beyond_the_embedding_is_refused_at_once(load):
    with pytest.raises(UserError, match=f"'<end>' token {ROWS}"):
        load(lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<end>"}))


def test_a_tokenizer_that_ends_prompts_is_refused_at_once(load):
    def change(tokenizer):
        ends = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.backend_tokenizer.post_processor = ends

    with pytest.raises(UserError, match="ends every prompt with EOS"):
        load(change)


def test_the_command_line_refuses_in_one_line(tmp_path, seed_model):
    """Before anything is written, and without a traceback."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(seed_model)
    tokenizer.add_tokens(["zanzibar"])  # in every private text
    model = transformers.AutoModelForCausalLM.from_pretrained(seed_model)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    data = tmp_path / "a.jsonl"
    record = {"prompt": "zanzibar", "choices": ["a", "b"], "answer": "a"}
    data.write_text(json.dumps(record) + "\n")
    tiny.make_run(tmp_path / "run", tmp_path / "model")
    report = tiny.drive(commands=tiny.commands(tmp_path / "run")[:1])
    assert report["code"] == 2 and "token 400" in report["stderr"] and "Traceback" not in report["stderr"]
