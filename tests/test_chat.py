"""Chats as data of one's own: the tokenizer's chat template, or plain text."""

import json

import pytest
from tiny import refused, stage

from metamoe import backbones
from metamoe.data import user
from metamoe.errors import UserError
from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "Red."},
]


@pytest.fixture
def make(seed_model):
    def load(template=TEMPLATE, **options):
        backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32", **options)
        backbone.tokenizer.chat_template = template
        return backbone

    return load


def test_a_chat_is_a_prompt_and_the_assistants_last_message():
    record = user.own_record({"messages": CHAT}, "shop")
    assert record["prompt"] == "System: Be brief.\nUser: Which colour?\nAssistant:"
    assert record["answer"] == " Red." and record["messages"] == CHAT[:-1]
    for broken in (CHAT[:2], CHAT[-1:], [], "x", [{"role": "user"}]):
        with pytest.raises(user.BadRecord):
            user.own_record({"messages": broken}, "shop")


def test_the_tokens_are_those_of_the_chat_template(make):
    backbone, record = make(), user.own_record({"messages": CHAT}, "shop")
    prompt, answer = backbone.example(record)
    options = dict(add_generation_prompt=True, tokenize=False)
    text = backbone.tokenizer.apply_chat_template(CHAT[:-1], **options)
    assert prompt == backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert backbone.tokenizer.decode(answer) == "Red.</s>"


@pytest.mark.parametrize("options", ({"template": None}, {"chat_template": False}))
def test_without_a_template_or_where_it_is_off_the_text_is_plain(make, options):
    backbone, record = make(**options), user.own_record({"messages": CHAT}, "shop")
    prompt, answer = backbone.example(record)
    assert prompt == backbone.tokenizer(record["prompt"])["input_ids"]
    assert backbone.tokenizer.decode(answer) == " Red.</s>"


def test_a_record_that_the_template_refuses_is_named(make):
    backbone = make("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate.*Which colour.*--chat-template off"):
        backbone.example(user.own_record({"messages": CHAT}, "shop"))


def test_a_client_of_chats_from_its_file_to_its_expert(tmp_path, seed_model):
    for name in ("shop", "public"):
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}?"}, CHAT[-1]]} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--client", f"shop={tmp_path}/shop.jsonl", "--public", f"{tmp_path}/public.jsonl"]
    flags += ["--seed-model", seed_model, "--chat-template", "off"]
    assert stage("select_proxies", tmp_path / "run", *flags).code == 0
    assert read_json(tmp_path / "run" / "run.json")["chat_template"] == "off"
    assert stage("train_expert", tmp_path / "run", "--epochs", "1", "--rank", "2").code == 0
    glyph = ["--backbone", "glyph-clip", "--chat-template", "off"]
    assert "--chat-template" in refused("select_proxies", tmp_path / "other", *glyph, watch=tmp_path)


def test_texts_that_do_not_fit_are_counted(seed_model, capsys):
    backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32", max_length=24)
    short = user.own_record({"prompt": "Say a.", "response": "a"}, "shop")
    long = user.own_record({"prompt": "word " * 40, "response": "a"}, "shop")
    backbone.features([short, long, long], "embedding shop")
    whole = len(backbone.tokenizer(long["prompt"])["input_ids"]) + 1
    said = f"embedding shop: 2 of 3 texts cut to 24 tokens, the longest has {whole} (--max-length)\n"
    assert capsys.readouterr().out == said
    next(backbone.losses(backbone.model, [short, long], (), 2, 1, 0))
    assert "training: 1 of 2 texts cut to 24 tokens" in capsys.readouterr().out
    backbone.features([short], "embedding shop")
    assert not capsys.readouterr().out
