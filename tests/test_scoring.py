"""Letters as answers, the loss over whole texts, and the ways of scoring, on a tiny LLaMA."""

import random
import re
import shutil

import drive
import numpy as np
import pytest
import tiny
import tokenizers
import torch
import torch.nn.functional as F
from tiny import CLIENTS, score_alone, teach, unified
from tokenizers import models, pre_tokenizers, trainers

import moe
from metamoe import backbones
from metamoe.backbones import base, text, training
from metamoe.backbones.letters import lettered
from metamoe.errors import UserError
from metamoe.records import read_records, write_records
from metamoe.rundir import finish, read_json, settings_of, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
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
    return [{"prompt": r["prompt"], "answer": r["answer"] + " indeed", "source": "x"} for r in records]


# --- letters


def test_lettered_lists_the_choices_before_the_last_line():
    record = {"prompt": "Context: a\nAnswer:", "choices": [" yes", " no"], "answer": " no", "source": "s"}
    listed = "Choices:\nA. yes\nB. no\n"
    prompts = {
        "Context: a\nAnswer:": f"Context: a\n{listed}Answer:",
        "Say:": f"{listed}Say:",
        "Say it\nor not": f"Say it\nor not\n{listed}Answer:",
    }
    for prompt, form in prompts.items():
        wanted = {"prompt": form, "choices": [" A", " B"], "answer": " B", "source": "s"}
        assert lettered(record | {"prompt": prompt}) == wanted
    assert lettered({"prompt": "Say:", "answer": " yes"}) == {"prompt": "Say:", "answer": " yes"}
    with pytest.raises(UserError, match="27 choices.*--answers text"):
        lettered(record | {"choices": [f" {i}" for i in range(27)], "answer": " 3"})


def wrapped(tokenizer):
    fast = base.import_transformers().PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# " A" is one token, a space and a letter, or (of the SentencePiece kind) marked spaces and a letter.
VOCABULARIES = {
    "one token": (BYTES, BYTES.alphabet(), 340),
    "two tokens": (BYTES, BYTES.alphabet(), 258),
    "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="always", split=False), [], 200),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_letters_id_is_the_one_that_training_teaches(make, kind):
    splitter, alphabet, size = VOCABULARIES[kind]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = splitter
    special = ["<unk>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    texts = [f"Question: {a} or {b}?\nAnswer: {a}" for a in ALPHABET for b in "XYZ"]
    trained.train_from_iterator(texts, trainer)
    backbone = make()
    backbone.tokenizer = wrapped(trained)
    shared, ids = backbone.letter_ids()
    assert (len(shared) == 0) == (kind == "one token") and len(set(ids)) == 26
    for letter, token in zip(ALPHABET, ids, strict=True):
        assert backbone.tokenizer.convert_ids_to_tokens(token)[-1] == letter
        answer = backbone.encode({"prompt": "Question\nAnswer:"}, f" {letter}")[1]
        assert answer[: len(shared) + 1] == [*shared, token]


@pytest.mark.slow
def test_the_real_seed_models_letters_are_single_tokens(make):
    backbone = make()
    fast = base.import_transformers().AutoTokenizer
    tokenizer = backbone.tokenizer = fast.from_pretrained(backbones.default_seed("smollm2-135m"))
    backbone.rows = len(tokenizer)
    shared, ids = backbone.letter_ids()
    assert shared == [] and tokenizer.convert_ids_to_tokens(ids[:3]) == ["ĠA", "ĠB", "ĠC"]
    prompt = "Question: x?\nChoices:\nA. y\nB. z\nAnswer:"
    assert tokenizer(f"{prompt} B")["input_ids"] == [*tokenizer(prompt)["input_ids"], ids[1]]


def test_a_tokenizer_without_letters_is_refused(make):
    backbone = make()
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    backbone.tokenizer = wrapped(words)
    with pytest.raises(UserError, match="--scoring likelihood"):
        backbone.letter_ids()


# --- scoring


def last_logits(model, ids, prompt):
    """Logits after ids, alone in its batch; the router's context is the prompt's mean, or the prefix's."""
    if hasattr(model, "routing"):
        end = len(ids) if model.routing.mode == "prefix" else prompt
        model.routing.context_mask = torch.arange(len(ids))[None] < end
        model.routing.token_mask = None
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def log_probs(model, prompt, answer):
    """Log-probability of each token of the answer, each prefix alone in its batch."""
    prefixes = [prompt + answer[:i] for i in range(len(answer))]
    rows = [last_logits(model, ids, len(prompt)).log_softmax(-1) for ids in prefixes]
    return [row[token].item() for row, token in zip(rows, answer, strict=True)]


@pytest.mark.parametrize("kind", ["seed model", "fixed", "prefix"])
def test_scores_are_those_of_each_text_alone(make, records, kind):
    """Of letters, of choices, and of answers without choices; "prefix" as after training on whole texts."""
    backbone = make(loss="text" if kind == "prefix" else "answer")
    model = backbone.model if kind == "seed model" else unified(backbone, context=kind)
    shared, ids = backbone.letter_ids()
    assert shared  # the tiny vocabulary has a space and a letter
    for record, values in zip(records, backbone.scores(model, records, scoring="letters"), strict=True):
        prompt = backbone.tokenizer(lettered(record)["prompt"])["input_ids"]
        want = last_logits(model, prompt + shared, len(prompt))[ids[: len(record["choices"])]]
        assert values == pytest.approx(want.numpy(), abs=1e-4)
    for record, values in zip(records[:4], backbone.scores(model, records[:4]), strict=True):
        # score_alone's context are the prompt's tokens: also on the prefix, a choice does not route itself
        pairs = [backbone.encode(record, choice) for choice in record["choices"]]
        assert values == pytest.approx([score_alone(backbone, model, *pair) for pair in pairs], abs=1e-4)
    answers = instructions(records[:6])
    for record, values in zip(answers, backbone.scores(model, answers), strict=True):
        want = log_probs(model, *backbone.encode(record, record["answer"]))
        assert values == pytest.approx(want, abs=1e-4) and len(values) > 1


def generated(backbone, model, record):
    """The greedy continuation of the lettered prompt, one token after the other."""
    ids = list(backbone.encode(lettered(record))[0])
    start = len(ids)
    while len(ids) < start + 16 and backbone.tokenizer.eos_token_id not in ids[start:]:
        ids.append(int(last_logits(model, ids, start).argmax()))
    return backbone.tokenizer.decode(ids[start:], skip_special_tokens=True)


def generate_scores(backbone, model, records):
    """The scores by generation, checked against one text after the other; also the texts."""
    got = backbone.scores(model, records, scoring="generate")
    texts = [generated(backbone, model, record) for record in records]
    for said, record, values in zip(texts, records, got, strict=True):
        first = re.findall(r"\b[A-Z]\b", said)[:1]
        want = [float([letter] == first) for letter in ALPHABET[: len(record["choices"])]]
        assert values.tolist() == (want if any(want) else []), said
    return got, texts


def test_generate_takes_the_first_letter_that_stands_alone(make, records):
    """On a model that has learned to answer with letters, and as experts of a MoE near it."""
    backbone = make()
    model = backbone.add_lora(8, 32, 0)
    teach(backbone, model, records, steps=60, lr=0.02)
    model = backbone.model = model.merge_and_unload()
    got, texts = generate_scores(backbone, model, records)
    letters = backbone.scores(model, records, scoring="letters")
    agree = [len(a) > 0 and a.argmax() == b.argmax() for a, b in zip(got, letters, strict=True)]
    assert sum(agree) >= len(records) - 2 and len(set(texts)) > 1

    model = unified(backbone, context="prefix")
    for parameter in moe.expert_parameters(model):
        parameter.data *= 0.2
    generate_scores(backbone, model, records[:8])


def test_what_counts_as_a_letter(make, monkeypatch):
    texts = {" B": [0, 1], "A. yes": [1, 0], " Answer is (B) not A": [0, 1]}
    texts |= dict.fromkeys([" BA b", " C", "", " I think B"], [])
    backbone = make()
    monkeypatch.setattr(backbone.model, "generate", lambda input_ids, **_: input_ids)
    monkeypatch.setattr(backbone.tokenizer, "batch_decode", lambda *args, **_: list(texts))
    records = [{"prompt": "Say:", "choices": [" yes", " no"], "answer": " no"}] * len(texts)
    scores = backbone.scores(backbone.model, records, scoring="generate")
    assert [values.tolist() for values in scores] == list(texts.values())


# --- loss


@pytest.mark.parametrize("kind", ["seed model", "prefix"])
def test_loss_over_the_whole_text(make, records, kind):
    backbone = make()
    model = backbone.model if kind == "seed model" else unified(backbone, context=kind)
    examples = [backbone.example(record) for record in records[:3]]
    terms = []
    for prompt, answer in examples:
        assert answer[-1] == backbone.tokenizer.eos_token_id
        assert backbone.tokenizer.decode(answer[:-1]) in (" A", " B", " C")
        terms += log_probs(model, prompt[:1], prompt[1:] + answer)
    assert len(terms) == sum(map(backbone.count, examples))
    assert backbone.loss(model, examples).item() == pytest.approx(-np.mean(terms), abs=1e-4)


def saved_sizes(sizes):
    """While it is entered, the size of what autograd keeps for the backward goes into the list `sizes`."""

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def test_the_loss_in_chunks_is_the_loss():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    states, targets = torch.randn(23, 8), torch.randint(50, (23,))
    results, most = [], []
    for limit in (2**29, 50 * 4 * 5):  # at once; five rows at a time
        leaf, saved = states.clone().requires_grad_(), []
        with saved_sizes(saved):
            loss = text.head_loss(head, leaf, targets, lambda logits: logits, limit)
        most.append(max(saved))
        results.append((loss, *torch.autograd.grad(loss, (leaf, head.weight))))
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, atol=1e-6)
    assert torch.equal(results[0][0], F.cross_entropy(head(states), targets))
    assert most[0] == 23 * 50 > 250 >= most[1]  # no chunk's logits wait for the backward


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_checkpointing_changes_no_loss(make, records, kind):
    settings = dict(steps=6, batch_size=8, warmup_steps=0, optimizer="adamw", weight_decay=0.0, seed=0)
    losses, sizes = [], ([], [])
    for checkpointing, saved in zip((False, True), sizes, strict=True):
        backbone = make()
        model = backbone.add_lora(4, 8, 0) if kind == "lora" else unified(backbone, context=kind)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.01}]
        settings |= {"label": "test", "checkpointing": checkpointing}
        with saved_sizes(saved):
            losses.append(training.train(backbone, model, records, groups, **settings))
    assert losses[0] == losses[1] and losses[0][0] - losses[0][-1] > 0.05
    assert sum(sizes[1]) < 0.6 * sum(sizes[0])


def test_training_reads_its_records_one_at_a_time(make, records, tmp_path):
    write_records(tmp_path / "records.jsonl", records)
    backbone, found = make(), []
    for data in (records, read_records(tmp_path / "records.jsonl")):
        found.append([loss.item() for _, loss in backbone.losses(backbone.model, data, (), 8, 3, 0)])
    assert found[0] == found[1] and len(found[0]) == 3


# --- the table

TITLES = {
    "": "test split",
    ".letters": "test split, scored by the letters' logits",
    ".generate": "test split, scored by the generated letter",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, seed_model):
    """A run with letters and whole texts; one client has instruction data; evaluated in three ways."""
    run_dir = tmp_path_factory.mktemp("letters") / "run"
    tiny.make_run(run_dir, seed_model, answers="letters", loss="text")
    for path in (run_dir / "clients" / "hotels" / "private").glob("*.jsonl"):
        write_records(path, instructions(read_records(path)))
    finish(path.parent, settings_of(path.parent))
    few = ["--epochs", 4, "--lr", 0.02, "--batch-size", 4, "--warmup-steps", 2]
    private = ["--data", "private", "--selection", "similarity"]
    for name, *flags in (
        ["select_proxies", "--selection", "similarity"],
        ["train_expert", *private, *few],
        ["unify_moe", "--method", "btm"],
        ["unify_moe", "--method", "metamoe", *private],
        ["evaluate"],
        ["evaluate", "--scoring", "letters"],
        ["evaluate", "--scoring", "generate"],
    ):
        result = tiny.stage(name, run_dir, *flags)
        assert result.code == 0, result.err
    return run_dir


def rows_of(run, suffix=""):
    return {row["model"]: row for row in read_json(run / f"results{suffix}.json")["rows"]}


@pytest.mark.parametrize("suffix", TITLES)
def test_each_scoring_has_a_table_of_its_own(run, suffix):
    table = (run / f"results{suffix}.md").read_text()
    assert table.startswith(f"# smollm2-135m, random seed 0, {TITLES[suffix]}\n")
    assert "| | intent | hotels (perplexity) | question | Average |" in table
    assert ("--scoring letters" in table) == (suffix == ".generate")
    for model, row in rows_of(run, suffix).items():
        assert "accuracy" not in row["clients"]["hotels"]
        accuracies = [row["clients"][name]["accuracy"] for name in ("intent", "question")]
        assert row["average"] == pytest.approx(np.mean(accuracies))
        assert ("metamoe_minus" in row) == (model != "metamoe")


def test_the_tables_rows_agree_where_the_scorings_do(run):
    likelihood, letters, generate = (rows_of(run, suffix) for suffix in TITLES)
    assert generate["btm"]["clients"] == letters["btm"]["clients"] != likelihood["btm"]["clients"]
    hotels = [rows["expert-intent"]["clients"]["hotels"] for rows in (likelihood, generate)]
    assert hotels[0] == hotels[1]
    own = [letters[f"expert-{name}"]["clients"][name]["accuracy"] for name in ("intent", "question")]
    assert np.mean(own) > letters["zeroshot"]["average"] + 15
    before, after = (likelihood[model]["clients"]["hotels"] for model in ("zeroshot", "expert-hotels"))
    assert after["perplexity"] < 0.5 * before["perplexity"]


def test_perplexity_and_btms_mixture(run):
    names = [f"expert-{name}" for name in CLIENTS]
    files = [read_json(run / "scores" / f"{name}.test.json") for name in names]
    scores = [np.concatenate(file["scores"]["hotels"]) for file in files]  # of each token
    found = {model: row["clients"]["hotels"] for model, row in rows_of(run).items()}
    for name, tokens in zip(names, scores, strict=True):
        assert found[name]["perplexity"] == pytest.approx(np.exp(-np.mean(tokens)))
        assert found[name]["n"] == 16
    mixture = -np.log(np.exp(scores).mean(0))
    assert found["btm"]["perplexity"] == pytest.approx(np.exp(np.mean(mixture)))
    assert found["btm"]["tokens"] == len(mixture)


def test_opting_out_with_instruction_data(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    result = tiny.stage("evaluate", copy, "--models", "metamoe", "--opt-out")
    assert result.code == 0, result.err
    found = read_json(copy / "results.json")
    clients, table = found["rows"][0]["clients"], found["opt_out"]["metamoe"]
    kinds = dict(intent="accuracy", hotels="perplexity", question="accuracy")
    assert table[""] == {name: clients[name][kind] for name, kind in kinds.items()}
    assert table["hotels"]["hotels"] != table[""]["hotels"]
    assert "| left out | intent | hotels (perplexity) | question | Average |" in result.out
    whole = [table[""][name] for name in kinds]
    cells = [f"{value:.2f}" for value in (*whole, (whole[0] + whole[2]) / 2)]
    assert f"| none | {' | '.join(cells)} |" in result.out


@pytest.mark.parametrize("suffix, flags", [("", []), (".letters", ["--scoring", "letters"])])
def test_the_table_over_runs_is_of_one_scoring(run, suffix, flags):
    result = drive.call("evaluate", "--run-dir", run, run, *flags)
    assert result.code == 0, result.err
    assert "| | intent | hotels (perplexity) | question | Average | MetaMoE minus this |" in result.out
    for row in rows_of(run, suffix).values():
        intent, hotels, question = (row["clients"][name] for name in CLIENTS)
        values = [intent["accuracy"], hotels["perplexity"], question["accuracy"], row["average"]]
        assert f"| {row['title']} | " + " | ".join(f"{v:.2f} ± 0.00" for v in values) in result.out
    missing = drive.call("evaluate", "--run-dir", run, run, *flags, "--split", "validation")
    assert f"holds no results.validation{suffix}.json" in missing.err


def test_what_is_scored_is_not_scored_again(run):
    before = drive.snapshot(run, *tiny.CLOCKS)
    assert tiny.stage("evaluate", run, "--scoring", "generate").code == 0
    assert drive.snapshot(run, *tiny.CLOCKS) == before


def test_answers_and_loss_belong_to_the_run(run, tmp_path):
    assert read_json(run / "moe" / "metamoe" / "moe_config.json")["context"] == "prefix"
    assert read_json(run / "moe" / "metamoe" / "done.json")["context"] == "on"
    assert "answers 'letters', now 'text'" in tiny.refused("select_proxies", run, "--answers", "text")
    assert "loss 'text', now 'answer'" in tiny.refused("select_proxies", run, "--loss", "answer")
    other = {
        key: value for key, value in read_json(run / "run.json").items() if key not in ("answers", "loss")
    }
    write_json(tmp_path / "run.json", other | {"backbone": "glyph-clip"})
    shutil.copy(run / "local.json", tmp_path)
    assert "for language models" in tiny.refused("select_proxies", tmp_path, "--loss", "text")
    assert "for language models" in tiny.refused("evaluate", tmp_path, "--scoring", "letters")
