"""Letters as answers, the loss over whole texts, and the ways of scoring, on a tiny LLaMA."""

import json
import random
import re

import drive
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import CLIENTS, COMMON, score_alone, teach, unified

import moe
from metamoe import backbones
from metamoe.backbones import base, text, training
from metamoe.backbones.text import lettered
from metamoe.errors import UserError
from metamoe.records import write_records
from metamoe.rundir import read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(seed_model):
    """A backbone with these `answers` and `loss`."""
    return lambda answers="letters", loss="text": backbones.load_backbone(
        "smollm2-135m", seed_model, "cpu", "float32", answers=answers, loss=loss
    )


@pytest.fixture(scope="module")
def records():
    rng = random.Random(2)
    return [tiny.record(topic, rng, False) for topic in list(tiny.TOPICS) * 4]


def instructions(records):
    return [
        {"prompt": record["prompt"], "answer": record["answer"] + " indeed", "source": "x"}
        for record in records
    ]


# --- letters


def test_lettered_lists_the_choices_before_the_last_line():
    record = {
        "prompt": "Context: a\nQuestion: b?\nAnswer:",
        "choices": [" yes", " no"],
        "answer": " no",
        "source": "s",
    }
    form = lettered(record)
    assert form == {
        "prompt": "Context: a\nQuestion: b?\nChoices:\nA. yes\nB. no\nAnswer:",
        "choices": [" A", " B"],
        "answer": " B",
        "source": "s",
    }
    assert lettered(record | {"prompt": "Say:"})["prompt"] == "Choices:\nA. yes\nB. no\nSay:"
    assert (
        lettered(record | {"prompt": "Say it\nor not"})["prompt"]
        == "Say it\nor not\nChoices:\nA. yes\nB. no\nAnswer:"
    )
    assert lettered({"prompt": "Say:", "answer": " yes"}) == {"prompt": "Say:", "answer": " yes"}
    with pytest.raises(UserError, match="27 choices.*--answers text"):
        lettered(record | {"choices": [f" {i}" for i in range(27)], "answer": " 3"})


def tokenizer(kind):
    """ " A" is one token, a space and a letter, or (of the SentencePiece kind) two marked spaces and a letter."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from metamoe.backbones.base import import_transformers

    texts = [f"Question: {a} or {b}?\nAnswer: {a}" for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for b in "XYZ"]
    if kind == "metaspace":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            decoders.Metaspace(prepend_scheme="always"),
        )
        made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"]))
    else:
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator(
            texts, vocab_size=256 + 2 + (80 if kind == "one token" else 0), special_tokens=["<unk>", "</s>"]
        )
        made = made._tokenizer
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["one token", "two tokens", "metaspace"])
def test_a_letters_id_is_the_one_that_training_teaches(make, kind):
    backbone = make()
    backbone.tokenizer = tokenizer(kind)
    shared, ids = backbone.letter_ids()
    assert (len(shared) == 0) == (kind == "one token") and len(set(ids)) == 26
    for letter, token in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", ids, strict=False):
        assert backbone.tokenizer.convert_ids_to_tokens(token)[-1] == letter
        assert backbone.encode({"prompt": "Question\nAnswer:"}, f" {letter}")[1][: len(shared) + 1] == [
            *shared,
            token,
        ]


@pytest.mark.slow
def test_the_real_seeds_letters_are_single_tokens():
    from transformers import AutoTokenizer

    folder = backbones.default_seed("smollm2-135m")
    backbone = text.TextBackbone.__new__(text.TextBackbone)
    backbone.tokenizer, backbone.source = AutoTokenizer.from_pretrained(folder), folder
    shared, ids = backbone.letter_ids()
    assert shared == [] and backbone.tokenizer.convert_ids_to_tokens(ids[:3]) == ["ĠA", "ĠB", "ĠC"]
    whole = backbone.tokenizer("Question: x?\nChoices:\nA. y\nB. z\nAnswer: B")["input_ids"]
    assert (
        whole[-1] == ids[1]
        and whole[:-1] == backbone.tokenizer("Question: x?\nChoices:\nA. y\nB. z\nAnswer:")["input_ids"]
    )


def test_a_tokenizer_without_letters_is_refused(make):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    backbone = make()
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    backbone.tokenizer = base.import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>"
    )
    with pytest.raises(UserError, match="--scoring likelihood"):
        backbone.letter_ids()


# --- scoring


def last_logits(backbone, model, ids, prompt):
    """Logits after ids, alone in its batch; the router's context is the prompt's mean, or the prefix's."""
    if hasattr(model, "routing"):
        tokens = torch.arange(len(ids))[None]
        model.routing.context_mask, model.routing.token_mask = (
            tokens >= 0 if model.routing.mode == "prefix" else tokens < prompt,
            None,
        )
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


@pytest.mark.parametrize("kind", ["seed", "fixed", "prefix"])
def test_letters_scores_are_the_logits_after_the_lettered_prompt(make, records, kind):
    backbone = make(loss="text" if kind == "prefix" else "answer")
    model = backbone.model if kind == "seed" else unified(backbone, context=kind)
    shared, ids = backbone.letter_ids()
    assert shared  # the tiny vocabulary has a space and a letter
    for record, values in zip(records, backbone.scores(model, records, scoring="letters"), strict=True):
        prompt = backbone.tokenizer(lettered(record)["prompt"])["input_ids"]
        want = last_logits(backbone, model, prompt + shared, len(prompt))[ids[: len(record["choices"])]]
        assert values == pytest.approx(want.numpy(), abs=1e-4)


@pytest.mark.parametrize("kind", ["seed", "prefix"])
def test_generate_takes_the_first_letter_that_stands_alone(make, records, kind):
    """On a model that has learned to answer with letters, against one token after the other, each text alone."""
    backbone = make()
    model = backbone.add_lora(8, 32, 0)
    teach(backbone, model, records, steps=60, lr=0.02)
    model = backbone.model = model.merge_and_unload()
    if kind == "prefix":
        lengths = [len(backbone.encode(lettered(record))[0]) for record in records]
        records = [
            record for record, length in zip(records, lengths, strict=True) if lengths.count(length) > 1
        ]
        model = unified(backbone, context="prefix")
        for parameter in moe.expert_parameters(model):
            parameter.data *= 0.2
    got, texts = backbone.scores(model, records, scoring="generate"), []
    for record, values in zip(records, got, strict=True):
        ids = list(backbone.encode(lettered(record))[0])
        start = len(ids)
        while len(ids) < start + 16 and (len(ids) == start or ids[-1] != backbone.tokenizer.eos_token_id):
            ids.append(int(last_logits(backbone, model, ids, start).argmax()))
        texts.append(backbone.tokenizer.decode(ids[start:], skip_special_tokens=True))
        found = re.search(r"\b[A-Z]\b", texts[-1])
        letters = [choice.strip() for choice in lettered(record)["choices"]]
        want = (
            [float(letter == found.group()) for letter in letters]
            if found and found.group() in letters
            else []
        )
        assert values.tolist() == want, texts[-1]
    if kind == "seed":
        letters = backbone.scores(model, records, scoring="letters")
        assert (
            sum(len(a) > 0 and a.argmax() == b.argmax() for a, b in zip(got, letters, strict=True))
            >= len(records) - 2
        )
        assert len(set(texts)) > 1


@pytest.mark.parametrize(
    "text, want",
    [
        (" B", [0, 1]),
        ("A. yes", [1, 0]),
        (" Answer is (B) not A", [0, 1]),
        (" BA b", []),
        (" C", []),
        ("", []),
        (" I think B", []),
    ],
)
def test_what_counts_as_a_letter(make, text, want, monkeypatch):
    backbone = make()
    monkeypatch.setattr(
        backbone.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[1]])], 1)
    )
    monkeypatch.setattr(backbone.tokenizer, "batch_decode", lambda *args, **_: [text])
    assert [values.tolist() for values in backbone._generate(backbone.model, [([5, 6], [[], []])])] == [want]


@pytest.mark.parametrize("kind", ["seed", "fixed", "prefix"])
def test_instruction_data_is_scored_by_its_answers_tokens(make, records, kind):
    backbone = make(loss="text" if kind == "prefix" else "answer")
    model = backbone.model if kind == "seed" else unified(backbone, context=kind)
    for record, values in zip(
        instructions(records), backbone.scores(model, instructions(records)), strict=True
    ):
        prompt, answer = backbone.encode(record, record["answer"])
        want = [
            last_logits(backbone, model, prompt + answer[:i], len(prompt)).log_softmax(-1)[token].item()
            for i, token in enumerate(answer)
        ]
        assert values == pytest.approx(want, abs=1e-4) and len(values) > 1


def test_likelihood_of_choices_keeps_the_prompts_mean_with_a_router_on_the_prefix(make, records):
    backbone = make("text", "text")
    model = unified(backbone, context="prefix")
    got = backbone.scores(model, records[:4])
    for record, values in zip(records, got, strict=False):
        # score_alone's context are the prompt's tokens: after them the running mean stays
        prompt = backbone.encode(record)[0]
        want = [
            score_alone(backbone, model, prompt, backbone.encode(record, choice)[1])
            for choice in record["choices"]
        ]
        assert values == pytest.approx(want, abs=1e-4)


# --- loss


@pytest.mark.parametrize("kind", ["seed", "prefix"])
def test_loss_over_the_whole_text(make, records, kind):
    backbone = make()
    model = backbone.model if kind == "seed" else unified(backbone, context="prefix")
    examples = [backbone.example(record) for record in records[:5]]
    terms = []
    for prompt, answer in examples:
        ids = prompt + answer
        assert answer[-1] == backbone.tokenizer.eos_token_id and backbone.tokenizer.decode(answer[:-1]) in (
            " A",
            " B",
            " C",
        )
        terms += [
            last_logits(backbone, model, ids[:i], len(prompt)).log_softmax(-1)[ids[i]].item()
            for i in range(1, len(ids))
        ]
    assert len(terms) == sum(map(backbone.count, examples))
    assert backbone.loss(model, examples).item() == pytest.approx(-np.mean(terms), abs=1e-4)


def test_the_loss_in_chunks_is_the_loss():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    states, targets = torch.randn(23, 8), torch.randint(50, (23,))
    results, made = [], []
    for limit in (2**29, 50 * 4 * 5):  # at once; five rows at a time
        head.zero_grad()
        leaf = states.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.numel()) or t, lambda t: t):
            loss = text.head_loss(head, leaf, targets, limit)
        made.append(None)
        loss.backward()
        results.append((loss.detach(), leaf.grad, head.weight.grad.clone()))
    for whole, chunked in zip(*results, strict=False):
        assert torch.allclose(whole, chunked, atol=1e-6)
    assert torch.equal(results[0][0], F.cross_entropy(head(states), targets))
    once, chunks = made[: made.index(None)], made[made.index(None) :]
    # no chunk's logits wait for the backward
    assert max(once) == 23 * 50 > 250 >= max(n for n in chunks if n)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_checkpointing_changes_no_loss(make, records, kind):
    losses = []
    for checkpointing in (False, True):
        backbone = make()
        if kind == "lora":
            model = backbone.add_lora(4, 8, 0)
            parameters = [p for p in model.parameters() if p.requires_grad]
        else:
            model = unified(backbone, context="prefix")
            parameters = [*moe.router_parameters(model), *moe.expert_parameters(model)]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            losses.append(
                training.train(
                    backbone,
                    model,
                    records,
                    [{"params": parameters, "lr": 0.01}],
                    steps=6,
                    batch_size=8,
                    warmup_steps=0,
                    optimizer="adamw",
                    weight_decay=0.0,
                    seed=0,
                    label="test",
                    checkpointing=checkpointing,
                )
            )
        losses.append(sum(saved))
    assert losses[0] == losses[2] and losses[0][0] - losses[0][-1] > 0.05
    assert losses[3] < 0.6 * losses[1]


def test_training_reads_its_records_one_at_a_time(make, records):
    class OnDisk:
        def __len__(self):
            return len(records)

        def __getitem__(self, index):
            return dict(records[index])

    backbone = make()
    ours, theirs = (
        [loss.item() for loss in backbone.losses(backbone.model, data, (), 8, 3, 0)]
        for data in (records, OnDisk())
    )
    assert ours == theirs and len(ours) == 3


# --- the table


@pytest.fixture(scope="module")
def run(tmp_path_factory, seed_model):
    """A run with letters and whole texts, one of whose clients has instruction data, evaluated three times."""
    run_dir = tmp_path_factory.mktemp("letters") / "run"
    tiny.make_run(run_dir, seed_model, answers="letters", loss="text")
    for path in (run_dir / "clients" / "hotels" / "private").glob("*.jsonl"):
        write_records(path, instructions([json.loads(line) for line in path.read_text().splitlines()]))
    common = ["--run-dir", run_dir, *COMMON]
    few = ["--epochs", "4", "--lr", "0.02", "--batch-size", "4", "--warmup-steps", "2"]
    commands = [
        ["select_proxies", "--selection", "similarity"],
        ["train_expert", "--data", "private", "--selection", "similarity", *few],
        ["unify_moe", "--method", "btm"],
    ]
    commands += [
        ["unify_moe", "--method", "metamoe", "--data", "private", "--selection", "similarity"],
        ["evaluate"],
    ]
    commands += [["evaluate", "--scoring", scoring] for scoring in ("letters", "generate")]
    for stage, *flags in commands:
        result = drive.call(stage, *common, *flags)
        assert result.code == 0, result.err
    return run_dir


def test_the_run_trains_on_letters_with_the_prefix_as_context(run):
    config = read_json(run / "moe" / "metamoe" / "moe_config.json")
    assert (
        config["context"] == "prefix" and read_json(run / "moe" / "metamoe" / "done.json")["context"] == "on"
    )


def test_each_scoring_has_a_table_of_its_own(run):
    titles = {
        "": "",
        ".letters": ", scored by the letters' logits",
        ".generate": ", scored by the generated letter",
    }
    for suffix, title in titles.items():
        text, results = (run / f"results{suffix}.md").read_text(), read_json(run / f"results{suffix}.json")
        assert text.startswith(f"# smollm2-135m, seed 0, test split{title}\n")
        assert "| | intent | hotels (perplexity) | question | Average |" in text
        assert ("--scoring letters" in text) == (suffix == ".generate")
        for row in results["rows"]:
            assert "accuracy" not in row["clients"]["hotels"]
            assert row["average"] == pytest.approx(
                np.mean([row["clients"][name]["accuracy"] for name in ("intent", "question")])
            )
            assert ("metamoe_minus" in row) == (row["model"] != "metamoe")
    rows = {
        suffix: {row["model"]: row for row in read_json(run / f"results{suffix}.json")["rows"]}
        for suffix in titles
    }
    btm = {suffix: rows[suffix]["btm"]["clients"] for suffix in titles}
    assert btm[".generate"] == btm[".letters"] != btm[""]
    assert (
        rows[""]["expert-intent"]["clients"]["hotels"]
        == rows[".generate"]["expert-intent"]["clients"]["hotels"]
    )
    own = np.mean(
        [rows[".letters"][f"expert-{name}"]["clients"][name]["accuracy"] for name in ("intent", "question")]
    )
    assert own > rows[".letters"]["zeroshot"]["average"] + 15
    assert (
        rows[""]["expert-hotels"]["clients"]["hotels"]["perplexity"]
        < 0.5 * rows[""]["zeroshot"]["clients"]["hotels"]["perplexity"]
    )


def test_perplexity_and_btms_mixture(run):
    scores = {
        row: read_json(run / "scores" / f"{row}.test.json")["scores"]["hotels"]
        for row in [f"expert-{name}" for name in CLIENTS]
    }
    rows = {row["model"]: row["clients"]["hotels"] for row in read_json(run / "results.json")["rows"]}
    for row, tokens in scores.items():
        assert (
            rows[row]["perplexity"] == pytest.approx(np.exp(-np.mean(sum(tokens, []))))
            and rows[row]["n"] == 16
        )
    mixture = [
        -np.log(np.mean(np.exp(token)))
        for answer in zip(*scores.values(), strict=False)
        for token in zip(*answer, strict=False)
    ]
    assert rows["btm"]["perplexity"] == pytest.approx(np.exp(np.mean(mixture))) and rows["btm"][
        "tokens"
    ] == len(mixture)


def test_opting_out_with_instruction_data(run):
    result = drive.call("evaluate", "--run-dir", run, *COMMON, "--models", "metamoe", "--opt-out")
    assert result.code == 0, result.err
    found = read_json(run / "results.json")
    clients, table = found["rows"][0]["clients"], found["opt_out"]["metamoe"]
    assert table[""] == {
        name: clients[name]["perplexity" if name == "hotels" else "accuracy"] for name in CLIENTS
    }
    assert (
        table["hotels"]["hotels"] != table[""]["hotels"]
        and "| left out | intent | hotels (perplexity) | question | Average |" in result.out
    )
    assert (
        f"| none | {table['']['intent']:.2f} | {table['']['hotels']:.2f} | {table['']['question']:.2f} | {(table['']['intent'] + table['']['question']) / 2:.2f} |"
        in result.out
    )
    drive.call("evaluate", "--run-dir", run, *COMMON)


def test_the_table_over_runs_is_of_one_scoring(run, capsys):
    for scoring in ("letters", None):
        result = drive.call("evaluate", "--run-dir", run, run, *(["--scoring", scoring] if scoring else []))
        assert result.code == 0, result.err
        assert "| | intent | hotels (perplexity) | question | Average | MetaMoE minus this |" in result.out
        for row in read_json(run / f"results{'.letters' if scoring else ''}.json")["rows"]:
            cells = [
                row["clients"]["intent"]["accuracy"],
                row["clients"]["hotels"]["perplexity"],
                row["clients"]["question"]["accuracy"],
                row["average"],
            ]
            assert f"| {row['title']} | " + " | ".join(f"{cell:.2f} ± 0.00" for cell in cells) in result.out
    assert (
        "holds no results.validation.generate.json"
        in drive.call("evaluate", "--run-dir", run, run, "--scoring", "generate", "--split", "validation").err
    )


def test_what_is_scored_is_not_scored_again(run):
    before = drive.snapshot(run, "timings.json", "timings.md")
    result = drive.call("evaluate", "--run-dir", run, *COMMON, "--scoring", "generate")
    assert result.code == 0 and drive.snapshot(run, "timings.json", "timings.md") == before


def refused(stage, run_dir, *flags):
    before = drive.snapshot(run_dir)
    result = drive.call(stage, "--run-dir", run_dir, *COMMON, *flags)
    assert result.code == 2 and result.err.count("\n") == 1 and drive.snapshot(run_dir) == before
    return result.err


def test_answers_and_loss_belong_to_the_run(run, tmp_path):
    assert "answers 'letters', now 'text'" in refused("select_proxies", run, "--answers", "text")
    assert "loss 'text', now 'answer'" in refused("select_proxies", run, "--loss", "answer")
    old = {key: value for key, value in read_json(run / "run.json").items() if key not in ("answers", "loss")}
    write_json(tmp_path / "run.json", old)  # made before there were such settings
    assert "answers 'text', now 'letters'" in refused("select_proxies", tmp_path, "--answers", "letters")
    write_json(tmp_path / "run.json", old | {"backbone": "glyph-clip", "seed_model": ""})
    assert "for language models" in refused("select_proxies", tmp_path, "--loss", "text")
    assert "for language models" in refused("evaluate", tmp_path, "--scoring", "letters")
