"""generate() of a unified model: the same tokens with and without a key-value cache, alone and in any batch."""

import copy
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

import moe
from metamoe import backbones
from metamoe.serving import generation
from metamoe.serving.seed_model import fix_torchvision

fix_torchvision()
import transformers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
K, VOCAB, TIE = 3, 60, 1e-4
CONTEXTS = pytest.mark.parametrize("context", ("prefix", "fixed"))
NAMES = [f"model.layers.{i}.mlp" for i in range(3)]


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **tokens)).eval()


def random_experts(model, names, scale, rank):
    """K experts that differ, each {ffn name: LoRA}."""
    experts = []
    for _ in range(K):
        expert = {}
        for name in names:
            expert[name] = {"scaling": 2.0}
            for linear in ("gate_proj", "up_proj", "down_proj"):
                rows, columns = model.get_submodule(f"{name}.{linear}").weight.shape
                expert[name][f"{linear}.lora_A"] = torch.randn(rank, columns) * scale
                expert[name][f"{linear}.lora_B"] = torch.randn(rows, rank) * scale
        experts.append(expert)
    return experts


def unified(context="prefix", lam=0.7, source=""):
    """The tiny LLaMA, from `source`, with three random experts whose routing vectors split the tokens."""
    model = llama()
    model.name_or_path = str(source)
    experts = random_experts(model, NAMES, 0.5, 2)
    return moe.unify(model, NAMES, experts, 0.5 * torch.randn(K, 3, 16), context=context, lam=lam)


def prompts(n, longest):
    generator = random.Random(3)
    return [[generator.randrange(2, VOCAB) for _ in range(generator.randint(3, longest))] for _ in range(n)]


def left_padded(rows, pad=0):
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def greedy(model, rows, new, batch=None, **options):
    """The new tokens of each row, generated greedily in left-padded batches."""
    out, size = [], batch or len(rows)
    options |= dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    for start in range(0, len(rows), size):
        ids, mask = left_padded(rows[start : start + size], model.generation_config.pad_token_id)
        out += model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    return out


@torch.no_grad()
def margins(model, row, new):
    """How sure each new token is: the least difference of the two best logits at its step, and of the two best
    experts' pi in any layer at any token up to there, since one route that turns over changes all that comes after.

    Of one plain forward over the whole sequence, which also checks that the tokens are its argmax.
    """
    pis = []
    hooks = [
        layer.router.register_forward_hook(lambda m, x, pi: pis.append(pi)) for layer in moe.layers(model)
    ]
    ids, state = torch.tensor([row + new[:-1]]), model.routing
    state.context_mask = torch.arange(ids.shape[1])[None] < (
        len(row) if state.mode == "fixed" else ids.shape[1]
    )
    out = model(ids, use_cache=False).logits[0, len(row) - 1 :].float()
    state.context_mask = None
    for hook in hooks:
        hook.remove()
    if model.generation_config.eos_token_id is not None:
        out[:, model.generation_config.eos_token_id] = -float("inf")  # min_new_tokens
    best, routes = out.topk(2).values, torch.cat(pis).topk(2).values  # (new, 2), (L, T, 2)
    routes = (routes[..., 0] - routes[..., 1]).amin(0).cummin(0).values[len(row) - 1 :]
    found = torch.minimum(best[:, 0] - best[:, 1], routes).tolist()
    assert_same(out.argmax(-1).tolist(), new, found)
    return found


def assert_same(got, want, sure):
    """Equal, or equal up to a step that a rounding error may turn over; returns how many tokens are equal."""
    for step, (g, w, margin) in enumerate(zip(got, want, sure, strict=True)):
        if g != w:
            assert margin < TIE, f"step {step}: {g}, not {w}, margin {margin}"
            return step
    return len(want)


def compare(model, rows, new, settings):
    """Generate one row after the other and in each of the settings; returns the share of tokens that are equal."""
    wants = greedy(model, rows, new, 1)
    sure = [margins(model, row, want) for row, want in zip(rows, wants, strict=True)]
    equal = 0
    for options in settings:
        for case in zip(greedy(model, rows, new, **options), wants, sure, strict=True):
            equal += assert_same(*case)
    return equal / (len(settings) * len(rows) * new)


@pytest.mark.parametrize("context", moe.CONTEXTS)
def test_greedy_is_the_same_with_and_without_cache_and_in_any_batch(context):
    model, rows = unified(context), prompts(5, 9)
    settings = [
        dict(batch=batch, use_cache=use_cache) for use_cache, batch in ((True, 2), (False, 5), (False, 2))
    ]
    assert compare(model, rows, 8, settings) > 0.75
    # the test would say nothing if one expert took every token, or the context moved none
    model.routing.record = True
    got = greedy(model, rows, 8)
    assert (moe.counts(model) > 0).sum() >= 7
    model.routing.mode = "none" if context != "none" else "prefix"
    assert greedy(model, rows, 8) != got


def test_the_context_of_a_prompt_does_not_move_while_it_is_answered():
    """With prompt context the generated tokens are routed by the prompt's mean: what was generated does not matter."""
    model, seen = unified("fixed", lam=1.0), []
    for layer in moe.layers(model):
        layer.router.register_forward_hook(lambda router, inputs, pi: seen.append(pi[:, -1]))

    def pi_of_first_layer(mode, **options):  # (step, row, expert); lambda = 1: pi is of the context alone
        seen.clear()
        model.routing.mode = mode
        greedy(model, prompts(3, 7), 5, **options)
        return torch.stack(seen).view(5, 3, 3, K)[:, 0]

    for use_cache in (True, False):
        pi = pi_of_first_layer("fixed", use_cache=use_cache)
        torch.testing.assert_close(pi[1:], pi[:1].expand(4, -1, -1))
    pi = pi_of_first_layer("prefix")
    assert (pi[1:] - pi[:1]).abs().max() > 1e-3


@CONTEXTS
@pytest.mark.parametrize(
    "options",
    (
        dict(do_sample=True, top_k=20),
        dict(num_beams=3, num_return_sequences=2, do_sample=False),
        dict(do_sample=True, num_return_sequences=3),
    ),
    ids=("sampled", "beams", "several"),
)
def test_sampling_and_beams_do_not_depend_on_the_cache(context, options):
    model, out = unified(context), []
    ids, mask = left_padded(prompts(4, 8))
    for use_cache in (True, False):
        torch.manual_seed(7)
        out.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*out) and len(out[0].unique(dim=0)) == len(out[0])


@CONTEXTS
def test_speculative_decoding_static_caches_and_embeddings_as_input(context):
    """Speculative decoding takes tokens back."""
    model, rows = unified(context), prompts(3, 8)
    ids, mask = left_padded(rows)
    want = greedy(model, rows, 8)
    assert greedy(model, rows, 8, cache_implementation="static") == want
    embeddings = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert got.tolist() == want
    row = [5, 9, 14, 5, 9, 14, 5, 9]
    assert greedy(model, [row], 12, prompt_lookup_num_tokens=3) == greedy(model, [row], 12, use_cache=False)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def empty_cache(model):
    return transformers.DynamicCache(config=model.config)


def filled(model, ids):
    cache = empty_cache(model)
    logits(model, ids, past_key_values=cache)
    return cache


@CONTEXTS
def test_forward_takes_padding_from_the_attention_mask(context):
    model, rows = unified(context), prompts(4, 9)
    ids, mask = left_padded(rows)
    got = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, own in zip(rows, got, strict=True):
        close(own[-len(row) :], logits(model, torch.tensor([row]))[0])
    ids, mask = ids.flip(1), mask.flip(1)  # on the right
    for row, own in zip(rows, logits(model, ids, attention_mask=mask), strict=True):
        close(own[: len(row)], logits(model, torch.tensor([row[::-1]]))[0])
    with pytest.raises(ValueError, match="attention mask .* set routing.context_mask"):
        model(ids[:, :9], attention_mask=torch.zeros(4, 1, 9, 9))
    row = torch.tensor(rows[:1])
    if context == "prefix":  # padding on the right needs no mask
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
    cache, got = empty_cache(model), []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        options = dict(
            attention_mask=real[:, :stop], position_ids=place[:, start:stop], past_key_values=cache
        )
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
    # masks that a scoring left behind
    model.routing.context_mask = model.routing.token_mask = torch.tensor([[True, False, False]])
    assert torch.equal(model.generate(second, **options), want)


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
    for method, argument, rows in (
        ("reorder_cache", order, order),
        ("batch_repeat_interleave", 2, torch.arange(3).repeat_interleave(2)),
        ("batch_select_indices", one, one),
    ):
        changed = copy.deepcopy(other)
        getattr(changed, method)(argument)
        close(logits(model, extra[rows], past_key_values=changed), want[rows])
    assert all(s.shape[1] <= generation.CROP for s, _ in cache.routing_past.sums.values())


def test_a_cache_that_the_router_does_not_know_is_refused():
    ids, model = torch.randint(2, VOCAB, (1, 40)), unified("prefix")

    def refused(cache, message):
        with pytest.raises(ValueError, match=message):
            logits(model, ids[:, :1], past_key_values=cache)

    refused(filled(llama(), ids), "40 tokens that the router has not seen")
    cache = filled(model, ids)
    cache.crop(-generation.CROP)
    refused(cache, "32 tokens were taken back .* by 31 at most")
    cache = filled(model, ids)
    logits(llama(), ids[:, :2], past_key_values=cache)
    refused(cache, "2 of which the router has not seen")
    cache = filled(model, ids)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    got = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=8)
    assert torch.equal(got, want)
    model.routing.mode = "fixed"
    refused(cache, "filled in mode 'prefix', the mode is 'fixed' now")
    cache = filled(model, ids)
    cache.crop(-1)
    refused(cache, "cropped to 39 of the 40 tokens whose mean is the context")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=8)


def test_a_copied_model_generates_by_its_own_weights():
    model = unified("prefix")
    want = greedy(model, prompts(2, 6), 6)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moe.router_parameters(other):
            parameter.mul_(-3)
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
    shutil.copyfile(moe.__file__, tmp_path / "copied_moe.py")
    whole = unified("prefix")
    moe.save(whole, tmp_path / "m")
    for name in ("metamoe", "metamoe.serving", "metamoe.serving.generation", "metamoe.serving.seed_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    elsewhere = [path for path in sys.path if not (Path(path or ".") / "metamoe").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    import copied_moe

    monkeypatch.delitem(sys.modules, "copied_moe")
    model = copied_moe.load(tmp_path / "m", llama())
    ids, mask = left_padded(prompts(3, 9))
    close(logits(model, ids, attention_mask=mask), logits(whole, ids, attention_mask=mask))
    assert model.routing.real is None  # a layer that is called alone afterwards has no mask of another batch
    cache = empty_cache(model)
    close(logits(model, ids, past_key_values=cache), logits(whole, ids))
    for refused in (lambda: logits(model, ids[:, :1], past_key_values=cache), lambda: model.generate(ids)):
        with pytest.raises(RuntimeError, match="generation.py"):
            refused()
    with pytest.raises(ValueError, match="mask"):
        model(ids, attention_mask=torch.zeros(3, 1, *ids.shape[1:] * 2))
    with pytest.raises(FileNotFoundError, match=r"moe.load\(folder, model\)"):
        copied_moe.load(tmp_path / "m")


# ---------------------------------------------------------------- load alone


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """RUN/run.json, its seed model and RUN/moe/two."""
    folder = tmp_path_factory.mktemp("run")
    seed_model = folder / "models" / "tiny-seed"
    llama().save_pretrained(seed_model)
    (folder / "RUN").mkdir()
    (folder / "RUN" / "run.json").write_text(json.dumps({"seed_model": str(seed_model)}))
    moe.save(unified(source=seed_model), folder / "RUN" / "moe" / "two")
    return folder


def test_load_finds_the_seed_model(run_dir, tmp_path, monkeypatch):
    ids, home, alone = torch.arange(2, 12)[None], run_dir / "RUN" / "moe" / "two", tmp_path / "alone" / "two"
    want = logits(unified(), ids)
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    # not where it was made
    assert str(run_dir).encode() not in b"".join(p.read_bytes() for p in home.iterdir())
    close(logits(moe.load(home), ids), want)
    assert moe.load(home, dtype=torch.float64).lm_head.weight.dtype == torch.float64
    shutil.copytree(home, alone)  # without its run
    with pytest.raises(
        FileNotFoundError, match=r"'tiny-seed' .*cache/tiny-seed, .*alone/tiny-seed: .*moe.load\("
    ):
        moe.load(alone)
    for place in (tmp_path / "cache" / "tiny-seed", tmp_path / "alone" / "tiny-seed"):
        shutil.copytree(run_dir / "models" / "tiny-seed", place)
        close(logits(moe.load(alone), ids), want)
        shutil.rmtree(place)
    close(logits(moe.load(alone, llama()), ids), want)


def test_load_without_a_record_and_from_the_hub(run_dir, tmp_path):
    home, ids = tmp_path / "two", torch.arange(2, 12)[None]
    shutil.copytree(run_dir / "RUN" / "moe" / "two", home)
    config = json.loads((home / "moe_config.json").read_text())
    (home / "moe_config.json").write_text(json.dumps(config | {"seed": "nobody/no-such-model"}))
    with pytest.raises(
        FileNotFoundError, match=r"'nobody/no-such-model' of .*two cannot be loaded .* moe.load"
    ):
        moe.load(home)
    del config["seed"], config["disabled"]  # as earlier versions wrote it
    (home / "moe_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="two does not say what its seed model was"):
        moe.load(home)
    close(logits(moe.load(home, llama()), ids), logits(unified(), ids))


# ---------------------------------------------------------------- the real default


@pytest.mark.slow
def test_the_default_generates_the_same_tokens_with_and_without_cache_and_in_any_batch():
    """The default seed model in fp32 with three experts whose routers split its tokens."""
    folder = backbones.default_seed("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = [f"model.layers.{i}.mlp" for i in range(30)]
    torch.manual_seed(0)
    texts = (
        "play some quiet jazz",
        "the room was clean and the staff kind",
        "which river runs through Paris",
    )
    seen = []  # routing vectors as a client takes them: the mean FFN inputs of its text
    note = lambda module, inputs: seen.append(inputs[0][0].mean(0))
    hooks = [model.get_submodule(name).register_forward_pre_hook(note) for name in names]
    for text in texts:
        logits(model, tokenizer(text, return_tensors="pt")["input_ids"])
    for hook in hooks:
        hook.remove()
    experts, vectors = random_experts(model, names, 0.02, 4), torch.stack(seen).view(3, 30, -1)
    model = moe.unify(model, names, experts, vectors, lam=0.9, context="prefix", offset=True)
    words = Path(__file__).read_text().split()  # any text will do
    generator, rows = random.Random(0), []
    for _ in range(8):
        start = generator.randrange(len(words) - 50)
        rows.append(tokenizer(" ".join(words[start : start + generator.randint(3, 25)]))["input_ids"][:60])
    settings = [dict(batch=8), dict(batch=3), dict(batch=8, use_cache=False)]
    assert compare(model, rows, 16, settings) > 0.9
