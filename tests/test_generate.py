"""generate() of a unified model: the same tokens with a key-value cache and without, alone and in a batch."""

import copy
import importlib
import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

import moe
from metamoe import backbones
from metamoe.backbones.base import import_transformers
from metamoe.serving import generation

transformers = import_transformers()
pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 60
CONTEXTS = pytest.mark.parametrize("context", ("prefix", "fixed"))
NAMES = [f"model.layers.{i}.mlp" for i in range(3)]


def llama():
    return tiny.llama(pad_token_id=0, bos_token_id=1, eos_token_id=None)


def unified(context="prefix", model=None, names=NAMES):
    """`model`, or the tiny LLaMA, with three random experts whose routing vectors split the tokens."""
    model, linears = model or llama().double(), ("gate_proj", "up_proj", "down_proj")
    backbone = SimpleNamespace(model=model, ffn_names=names, ffn_linears=linears)
    return tiny.unified(backbone, context)


def prompts(n, longest):
    generator = random.Random(3)
    return [[generator.randrange(2, VOCAB) for _ in range(generator.randint(3, longest))] for _ in range(n)]


def left_padded(rows, pad=0):
    width, lengths = max(map(len, rows)), torch.tensor([[len(row)] for row in rows])
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, (torch.arange(width) >= width - lengths).long()


def greedy(model, rows, new, batch=None, **options):
    """The new tokens of each row, generated greedily in left-padded batches."""
    out, size = [], batch or len(rows)
    options |= dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    for start in range(0, len(rows), size):
        ids, mask = left_padded(rows[start : start + size], model.generation_config.pad_token_id)
        out += model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    return out


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits.double()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def filled(model, ids):
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("context", moe.CONTEXTS)
def test_greedy_is_the_same_with_and_without_cache_and_in_any_batch(context):
    model, rows = unified(context), prompts(5, 9)
    want = greedy(model, rows, 8, batch=1)
    for batch, use_cache in ((2, True), (5, False), (2, False)):
        assert greedy(model, rows, 8, batch, use_cache=use_cache) == want
    # the test would say nothing if one expert took every token, or the context moved none
    model.routing.record = True
    assert greedy(model, rows, 8) == want and (moe.counts(model) > 0).sum() >= 7
    model.routing.mode = "none" if context != "none" else "prefix"
    assert greedy(model, rows, 8) != want


def test_the_context_of_a_prompt_does_not_move_while_it_is_answered():
    """What was generated does not matter: with lambda = 1, pi is of the context alone."""
    model, pis = unified(), []
    for lam in moe.lambda_parameters(model):
        lam.data.fill_(1)
    moe.layers(model)[0].router.register_forward_hook(lambda router, inputs, pi: pis.append(pi[:, -1]))
    for mode, use_cache in (("fixed", True), ("fixed", False), ("prefix", True)):
        pis.clear()
        model.routing.mode = mode
        greedy(model, prompts(3, 7), 5, use_cache=use_cache)
        moved = (torch.stack(pis) - pis[0]).abs().max()
        assert moved < 1e-5 if mode == "fixed" else moved > 1e-3


@CONTEXTS
@pytest.mark.parametrize("do_sample, num_beams, number", ((True, 1, 1), (True, 1, 3), (False, 3, 2)))
def test_sampling_and_beams_do_not_depend_on_the_cache(context, do_sample, num_beams, number):
    model, (ids, mask), out = unified(context), left_padded(prompts(4, 8)), []
    options = dict(do_sample=do_sample, num_beams=num_beams, num_return_sequences=number, max_new_tokens=8)
    for use_cache in (True, False):
        torch.manual_seed(7)
        out.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*out) and len(out[0].unique(dim=0)) == len(out[0])


@CONTEXTS
def test_speculative_decoding_static_caches_and_embeddings_as_input(context):
    """Speculative decoding takes tokens back."""
    model, rows = unified(context), prompts(3, 8)
    ids, mask = left_padded(rows)
    want = greedy(model, rows, 8)
    assert greedy(model, rows, 8, cache_implementation="static") == want
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options).tolist() == want
    row = [5, 9, 14, 5, 9, 14, 5, 9]
    assert greedy(model, [row], 12, prompt_lookup_num_tokens=3) == greedy(model, [row], 12, use_cache=False)


@CONTEXTS
def test_forward_takes_padding_from_the_attention_mask(context):
    model, rows = unified(context), prompts(4, 9)
    ids, mask = left_padded(rows)
    got = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    close(got[mask == 1], torch.cat([logits(model, torch.tensor([row]))[0] for row in rows]))
    got = logits(model, ids.flip(1), attention_mask=mask.flip(1))  # on the right
    close(got[mask.flip(1) == 1], torch.cat([logits(model, torch.tensor([row[::-1]]))[0] for row in rows]))
    with pytest.raises(ValueError, match="attention mask .* set routing.context_mask"):
        model(ids[:, :9], attention_mask=torch.zeros(4, 1, 9, 9))
    if context == "prefix":  # padding on the right needs no mask
        row = torch.tensor(rows[:1])
        close(logits(model, torch.cat((row, torch.zeros(1, 3).long()), 1))[:, :-3], logits(model, row))


@pytest.mark.parametrize("context, cuts", (("prefix", (0, 2, 5, 6, 9, 12)), ("fixed", (0, 9, 11, 12))))
def test_a_sequence_in_pieces_is_the_sequence_in_one(context, cuts):
    model = unified(context)
    ids, mask = left_padded(prompts(3, 9) + [[7] * 9])  # 9 tokens of prompt, 3 of answer
    ids = torch.cat((ids, torch.randint(2, VOCAB, (4, 3))), 1)
    real = torch.cat((mask, torch.ones(4, 3, dtype=torch.long)), 1)
    place = (real.cumsum(1) - 1).clamp(min=0)
    if context == "fixed":
        model.routing.context_mask = real.bool() & (torch.arange(12) < 9)
    want = logits(model, ids, attention_mask=real, position_ids=place)
    model.routing.context_mask = None
    options, got = dict(past_key_values=transformers.DynamicCache(config=model.config)), []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        options |= dict(attention_mask=real[:, :stop], position_ids=place[:, start:stop])
        got.append(logits(model, ids[:, start:stop], **options))
    close(torch.cat(got, 1)[real.bool()], want[real.bool()])


@CONTEXTS
def test_a_new_prompt_never_sees_the_sums_of_the_old_one(context):
    first, second = torch.tensor([[5, 8, 11, 40, 2]]), torch.tensor([[33, 21, 9]])
    model, fresh, options = unified(context), unified(context), dict(max_new_tokens=6, do_sample=False)
    want = fresh.generate(second, **options)
    model.generate(first, **options)
    assert torch.equal(model.generate(second, **options), want)
    cache = filled(model, first)  # is emptied and used again
    cache.reset()
    close(logits(model, second, past_key_values=cache), logits(fresh, second))
    model.routing.context_mask = model.routing.token_mask = second > 9  # left behind by a scoring
    assert torch.equal(model.generate(second, **options), want)


def test_the_second_turn_of_a_chat_has_the_context_that_the_documentation_says():
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    for context in ("fixed", "prefix"):
        model = unified(context)
        first = model.generate(torch.tensor([prompts(1, 9)[0]]), **options)
        second = torch.cat((first.sequences, torch.tensor([[7, 11, 13, 17]])), 1)
        anew = model.generate(second, output_logits=True, **options)
        close(anew.logits[0].double(), logits(model, second)[:, -1])  # of the whole conversation
        if context == "fixed":
            with pytest.raises(ValueError, match="prefix"):
                model.generate(second, past_key_values=first.past_key_values, **options)
        else:
            goes_on = model.generate(second, past_key_values=first.past_key_values, **options)
            assert torch.equal(goes_on.sequences, anew.sequences)


def test_sums_follow_the_cache_through_copies_cropping_and_reordering():
    ids, extra = torch.randint(2, VOCAB, (3, 6)), torch.randint(2, VOCAB, (3, 4))
    model = unified("prefix")
    want = logits(model, torch.cat((ids, extra), 1))[:, 6:]
    cache = filled(model, ids)
    other = copy.deepcopy(cache)
    logits(model, 61 - extra, past_key_values=other)  # the copy goes its own way
    close(logits(model, extra, past_key_values=cache), want)
    for _ in range(2):
        other.crop(-4)
        close(logits(model, extra, past_key_values=other), want)
    other.crop(-4)
    order, one = torch.tensor([2, 0, 0]), torch.tensor([1])
    changes = dict(reorder_cache=order, batch_repeat_interleave=2, batch_select_indices=one)
    for (method, argument), rows in zip(changes.items(), (order, [0, 0, 1, 1, 2, 2], one), strict=True):
        changed = copy.deepcopy(other)
        getattr(changed, method)(argument)
        close(logits(model, extra[rows], past_key_values=changed), want[rows])
    assert all(s.shape[1] <= generation.CROP for s, _ in cache.routing_past.sums.values())


def test_a_cache_that_the_router_does_not_know_is_refused():
    ids, model = torch.randint(2, VOCAB, (1, 40)), unified("prefix")

    def refused(cache, message, crop=0):
        if crop:
            cache.crop(-crop)
        with pytest.raises(ValueError, match=message):
            logits(model, ids[:, :1], past_key_values=cache)

    refused(filled(llama().double(), ids), "40 tokens that the router has not seen")
    refused(filled(model, ids), "32 tokens were taken back .* by 31", crop=generation.CROP)
    cache = filled(model, ids)
    logits(llama().double(), ids[:, :2], past_key_values=cache)
    refused(cache, "2 of which the router has not seen")
    cache, options = filled(model, ids), dict(max_new_tokens=4, do_sample=False)
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=8, **options), want)
    model.routing.mode = "fixed"
    refused(cache, "mode 'prefix', the mode is 'fixed'")
    refused(filled(model, ids), "cropped to 39 of the 40 tokens", crop=1)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, prefill_chunk_size=8, **options)


def test_a_copied_model_generates_by_its_own_weights():
    model = unified("prefix")
    want = greedy(model, prompts(2, 6), 6)
    other = copy.deepcopy(model)
    for parameter in moe.router_parameters(other):
        parameter.data.mul_(-3)
    assert greedy(model, prompts(2, 6), 6) == want != greedy(other, prompts(2, 6), 6)
    assert other.routing is other.model.routing is not model.routing


@CONTEXTS
def test_gradients_are_the_same_where_the_backward_computes_the_forward_again(context):
    ids, mask = left_padded(prompts(3, 9))
    gradients = []
    for again in (False, True):
        model = unified(context).train()
        if again:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(ids, attention_mask=mask, labels=ids, use_cache=None if again else False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_a_copied_moe_never_routes_wrongly(tmp_path, monkeypatch):
    """moe.py without generation.py and seed_model.py: forwards without a filled cache alone."""
    whole, (ids, mask) = unified("prefix"), left_padded(prompts(3, 9))
    moe.save(whole, tmp_path / "m")
    shutil.copyfile(moe.__file__, tmp_path / "copied_moe.py")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("generation", "seed_model"):
        monkeypatch.setitem(sys.modules, f"metamoe.serving.{name}", None)
    copied_moe = importlib.import_module("copied_moe")
    model = copied_moe.load(tmp_path / "m", llama().double())
    cache = transformers.DynamicCache(config=model.config)
    got = logits(model, ids, attention_mask=mask, past_key_values=cache)
    close(got, logits(whole, ids, attention_mask=mask))
    for refused in (lambda: logits(model, ids[:, :1], past_key_values=cache), lambda: model.generate(ids)):
        with pytest.raises(RuntimeError, match="generation.py"):
            refused()
    copied_moe.layers(model)[0](torch.randn(2, 4, 16).double())  # takes no mask of another batch
    with pytest.raises((ValueError, RuntimeError), match="mask"):
        model(ids, attention_mask=torch.zeros(3, 1, *ids.shape[1:] * 2))
    with pytest.raises(FileNotFoundError, match=r"moe.load\(folder, model\)"):
        copied_moe.load(tmp_path / "m")


def test_load_finds_the_seed_model_and_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    source, home, alone = (tmp_path / name for name in ("models/tiny-seed", "RUN/moe/two", "alone/two"))
    model, ids = llama(), torch.arange(2, 12)[None]
    model.save_pretrained(source)
    model.name_or_path = str(source)
    model = unified(model=model)
    want = logits(model, ids)
    moe.save(model, home)
    (tmp_path / "RUN" / "local.json").write_text(json.dumps({"seed_model": str(source)}))
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in home.iterdir())
    close(logits(moe.load(home), ids), want)
    assert moe.load(home, dtype=torch.float64).lm_head.weight.dtype == torch.float64
    shutil.copytree(home, alone)  # without its run
    places = tmp_path / "cache" / "tiny-seed", tmp_path / "alone" / "tiny-seed"
    with pytest.raises(FileNotFoundError, match=rf"'tiny-seed' .*{places[0]}, {places[1]}: .*moe.load\("):
        moe.load(alone)
    for place in places:
        shutil.copytree(source, place)
        close(logits(moe.load(alone), ids), want)
        shutil.rmtree(place)
    config = json.loads((alone / "moe_config.json").read_text()) | {"seed": "nobody/no-such-model"}
    (alone / "moe_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"'nobody/no-such-model' of .*two .*moe.load\("):
        moe.load(alone)
    del config["seed"], config["disabled"]  # as earlier versions wrote it
    (alone / "moe_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"two .*seed model.*moe.load\("):
        moe.load(alone)
    close(logits(moe.load(alone, llama()), ids), want)


@pytest.mark.slow
def test_the_default_generates_the_same_tokens_with_and_without_cache_and_in_any_batch():
    """The default seed model with three experts whose routers split its tokens."""
    folder = backbones.default_seed("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model = unified(model=model, names=[f"model.layers.{i}.mlp" for i in range(30)])
    for parameter in moe.expert_parameters(model):
        parameter.data.mul_(0.1)
    texts = "play some quiet jazz", "the room was clean and the staff kind", "which river runs through Paris?"
    rows = tokenizer([*texts, " ".join(texts)])["input_ids"]
    model.routing.record = True
    want = greedy(model, rows, 8, batch=1)
    assert ((moe.counts(model) > 0).sum(1) > 1).sum() > 20
    for batch, use_cache in ((4, True), (3, True), (4, False)):
        assert greedy(model, rows, 8, batch, use_cache=use_cache) == want
