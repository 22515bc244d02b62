"""moe.classify: the decision that evaluate.py scores, of a unified model and of a plain one."""

import random

import numpy as np
import pytest
import tiny
import torch

import moe
from metamoe import backbones

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone(seed_model):
    return backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")


@pytest.fixture(scope="module")
def records():
    rng = random.Random(2)
    return [tiny.record(topic, rng, False) for topic in list(tiny.TOPICS) * 4]


@pytest.mark.parametrize("context", ("seed model", "fixed", "prefix"))
def test_a_decision_is_the_one_that_evaluation_scores(backbone, seed_model, records, context):
    model = backbone.model
    if context != "seed model":
        backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
        model = tiny.unified(backbone, context)
    want = backbone.scores(model, records)
    prompts, choices = ([record[key] for record in records] for key in ("prompt", "choices"))
    earlier = getattr(model, "routing", None) and model.routing.context_mask
    answers, scores = moe.classify(model, backbone.tokenizer, prompts, choices)
    for record, answer, found, expected in zip(records, answers, scores, want, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
        assert answer == record["choices"][expected.argmax()]
    assert earlier is None or model.routing.context_mask is earlier


def test_the_same_choices_serve_every_prompt_and_white_space_is_kept(backbone):
    answers, scores = moe.classify(
        backbone.model, backbone.tokenizer, ["Answer:", "Answer: ", "Answer:\n"], ["yes", "no, never"]
    )
    assert set(answers) <= {"yes", "no, never"}
    assert torch.equal(scores[0], scores[1])  # one space between prompt and choice
    for row, text in ((0, "Answer: no, never"), (2, "Answer:\nno, never")):
        ids = backbone.tokenizer(text, return_tensors="pt")["input_ids"]
        start = len(backbone.tokenizer(["Answer:", "", "Answer:\n"][row])["input_ids"])
        log_p = backbone.model(ids).logits[0].log_softmax(-1)
        total = sum(log_p[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        assert scores[row][1].item() == pytest.approx(total, abs=1e-4)
