"""generate() of a unified model: the same tokens with and without a key-value cache, alone and in any batch."""

import copy
import json
import os
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

K, VOCAB, TIE = 3, 60, 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")


def seed(layers=3, d=16, h=24):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=d,
        intermediate_size=h,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def unified(context="prefix", lam=0.7, source="", **options):
    """The tiny LLaMA, from `source`, with three random experts whose routing vectors split the tokens."""
    model = seed()
    model.name_or_path = str(source)
    names = [f"model.layers.{i}.mlp" for i in range(3)]
    experts = []
    for _ in range(K):
        expert = {"scaling": 2.0}
        for linear in ("gate_proj", "up_proj", "down_proj"):
            shape = getattr(model.model.layers[0].mlp, linear).weight.shape
            expert |= {
                f"{linear}.lora_A": torch.randn(2, shape[1]) * 0.5,
                f"{linear}.lora_B": torch.randn(shape[0], 2) * 0.5,
            }
        experts.append(
            {
                name: {key: t if key == "scaling" else t * (1 + 0.1 * i) for key, t in expert.items()}
                for i, name in enumerate(names)
            }
        )
    return moe.unify(
        model,
        names,
        experts,
        0.5 * torch.randn(K, 3, 16),
        names=["a", "b", "c"],
        context=context,
        lam=lam,
        **options,
    )


def prompts(n, longest, seed=3):
    generator = random.Random(seed)
    return [[generator.randrange(2, VOCAB) for _ in range(generator.randint(3, longest))] for _ in range(n)]


def left_padded(rows, pad=0):
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def greedy(model, rows, new, batch=None, **options):
    """The new tokens of each row, generated greedily in left-padded batches."""
    out, size = [], batch or len(rows)
    pad = model.generation_config.pad_token_id
    for start in range(0, len(rows), size):
        ids, mask = left_padded(rows[start : start + size], pad)
        out += model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
        )[:, ids.shape[1] :].tolist()
    return out


@torch.no_grad()
def reference(model, row, new):
    """(new tokens, their margins) of one row, argmax after argmax over the whole sequence and the masks set by hand.

    A token's margin: the least difference of the two best logits at its step, and of the two best experts' pi of any layer and
    any token up to there, since one route that turns over changes all that comes after.
    """
    tokens, margins, pis = list(row), [], []
    hooks = [
        layer.router.register_forward_hook(lambda router, inputs, pi: pis.append(pi))
        for layer in moe.layers(model)
    ]
    state, eos = model.routing, model.generation_config.eos_token_id
    for _ in range(new):
        pis.clear()
        ids = torch.tensor([tokens])
        state.context_mask = torch.arange(len(tokens))[None] < (
            len(row) if state.mode == "fixed" else len(tokens)
        )
        logits = model(ids, use_cache=False).logits[0, -1].float()
        if eos is not None:
            logits[eos] = -float("inf")  # min_new_tokens
        best = logits.topk(2).values
        routes = torch.cat(pis).topk(2).values  # (L, T, 2)
        margins.append(min((best[0] - best[1]).item(), (routes[..., 0] - routes[..., 1]).min().item()))
        tokens.append(logits.argmax().item())
    for hook in hooks:
        hook.remove()
    state.context_mask = None
    return tokens[len(row) :], margins


def assert_same(got, want, margins):
    """Equal, or equal up to a step that a rounding error may turn over; returns how many tokens are equal."""
    for step, (g, w, margin) in enumerate(zip(got, want, margins, strict=False)):
        if g != w:
            assert margin < TIE, f"step {step}: {g}, not {w}, margin {margin}"
            return step
    assert len(got) == len(want)
    return len(want)


@pytest.mark.parametrize("context", ("prefix", "fixed", "none"))
def test_greedy_is_the_same_with_and_without_cache_and_in_any_batch(context):
    model = unified(context)
    rows = prompts(5, 9)
    wants = [reference(model, row, 8) for row in rows]
    compared = 0
    for use_cache, batch in ((True, 1), (True, 2), (False, 5), (False, 2)):
        for got, want in zip(greedy(model, rows, 8, batch, use_cache=use_cache), wants, strict=False):
            compared += assert_same(got, *want)
    assert compared > 120  # of 160
    model.routing.record = (
        True  # the test would say nothing if one expert took every token, or the context moved none
    )
    got = greedy(model, rows, 8)
    assert (moe.counts(model) > 0).sum() >= 7
    model.routing.mode = "none" if context != "none" else "prefix"
    assert greedy(model, rows, 8) != got


def test_the_context_of_a_prompt_does_not_move_while_it_is_answered():
    """With prompt context the generated tokens are routed by the prompt's mean: what was generated does not matter."""
    model = unified("fixed", lam=1.0)
    seen = []
    for layer in moe.layers(model):
        layer.router.register_forward_hook(lambda router, inputs, pi: seen.append(pi[:, -1]))
    for use_cache in (True, False):
        seen.clear()
        greedy(model, prompts(3, 7), 5, use_cache=use_cache)
        # step, layer, row, expert; lambda = 1: pi is of the context alone
        steps = torch.stack(seen).view(5, 3, 3, K)
        torch.testing.assert_close(steps[1:, 0], steps[:1, 0].expand(4, -1, -1))
    seen.clear()
    model.routing.mode = "prefix"
    greedy(model, prompts(3, 7), 5)
    assert (torch.stack(seen).view(5, 3, 3, K)[1:, 0] - seen[0]).abs().max() > 1e-3


@pytest.mark.parametrize("context", ("prefix", "fixed"))
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
    model = unified(context)
    ids, mask = left_padded(prompts(4, 8))
    out = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        out.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*out) and len(out[0].unique(dim=0)) == len(out[0])


def test_speculative_decoding_takes_tokens_back():
    row = [5, 9, 14, 5, 9, 14, 5, 9]
    for context in ("prefix", "fixed"):
        model = unified(context)
        ids = torch.tensor([row])
        got = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            prompt_lookup_num_tokens=3,
        )
        assert got[0, len(row) :].tolist() == reference(model, row, 12)[0]


def test_a_static_cache_and_embeddings_as_input():
    rows = prompts(3, 8)
    ids, mask = left_padded(rows)
    for context in ("prefix", "fixed"):
        model = unified(context)
        want = greedy(model, rows, 8)
        assert greedy(model, rows, 8, cache_implementation="static") == want
        got = model.generate(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
        )
        assert got.tolist() == want


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", ("prefix", "fixed"))
def test_forward_takes_padding_from_the_attention_mask(context):
    model = unified(context)
    rows = prompts(4, 9)
    alone = [logits(model, torch.tensor([row]))[0] for row in rows]
    ids, mask = left_padded(rows)
    for row, want, got in zip(
        rows,
        alone,
        logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)),
        strict=False,
    ):
        close(got[-len(row) :], want)
    ids, mask = ids.flip(1), mask.flip(1)  # on the right
    for row, want, got in zip(
        rows,
        (logits(model, torch.tensor([row[::-1]]))[0] for row in rows),
        logits(model, ids, attention_mask=mask),
        strict=False,
    ):
        close(got[: len(row)], want)
    tree = torch.zeros(4, 1, 9, 9)
    with pytest.raises(
        ValueError, match=r"not \(B, T\), and does not say which tokens are real: set routing.context_mask"
    ):
        model(ids[:, :9], attention_mask=tree)


def test_with_prefix_context_padding_on_the_right_needs_no_mask():
    model = unified("prefix")
    row = prompts(1, 9)[0]
    close(logits(model, torch.tensor([row + [0, 0, 0]]))[:, : len(row)], logits(model, torch.tensor([row])))


@pytest.mark.parametrize("context, cuts", (("prefix", (0, 2, 5, 6, 9, 12)), ("fixed", (0, 9, 11, 12))))
def test_a_sequence_in_pieces_is_the_sequence_in_one(context, cuts):
    model = unified(context)
    ids, mask = left_padded(prompts(3, 9) + [[7] * 9])  # 9 tokens of prompt, 3 of answer
    ids, real = (
        torch.cat((ids, torch.randint(2, VOCAB, (4, 3))), 1),
        torch.cat((mask, torch.ones(4, 3, dtype=torch.long)), 1),
    )
    place = (real.cumsum(1) - 1).clamp(min=0)
    if context == "fixed":
        model.routing.context_mask = real.bool() & (torch.arange(12) < 9)
    want = logits(model, ids, attention_mask=real, position_ids=place)
    model.routing.context_mask = None
    cache = transformers.DynamicCache(config=model.config)
    pieces = [slice(*ends) for ends in zip(cuts, cuts[1:], strict=False)]
    got = torch.cat(
        [
            logits(
                model,
                ids[:, p],
                attention_mask=real[:, : p.stop],
                position_ids=place[:, p],
                past_key_values=cache,
            )
            for p in pieces
        ],
        1,
    )
    close(got[real.bool()], want[real.bool()])


def test_a_new_prompt_never_sees_the_sums_of_the_old_one():
    first, second = torch.tensor([[5, 8, 11, 40, 2]]), torch.tensor([[33, 21, 9]])
    for context in ("prefix", "fixed"):
        model, fresh = unified(context), unified(context)
        want = fresh.generate(second, max_new_tokens=6, do_sample=False)
        model.generate(first, max_new_tokens=9, do_sample=False)
        assert torch.equal(model.generate(second, max_new_tokens=6, do_sample=False), want)
        # a cache that is emptied and used again
        cache = transformers.DynamicCache(config=model.config)
        logits(model, first, past_key_values=cache)
        cache.reset()
        close(logits(model, second, past_key_values=cache), logits(fresh, second))
        # masks that a scoring left behind
        model.routing.context_mask = model.routing.token_mask = torch.tensor([[True, False, False]])
        assert torch.equal(model.generate(second, max_new_tokens=6, do_sample=False), want)


def test_sums_follow_the_cache_through_copies_cropping_and_reordering():
    ids, extra = torch.randint(2, VOCAB, (3, 6)), torch.randint(2, VOCAB, (3, 4))
    model = unified("prefix")
    want = logits(model, torch.cat((ids, extra), 1))[:, 6:]
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    logits(model, 61 - extra, past_key_values=other)  # the copy goes its own way
    close(logits(model, extra, past_key_values=cache), want)
    other.crop(-4)
    close(logits(model, extra, past_key_values=other), want)
    other.crop(-4)
    order = torch.tensor([2, 0, 0])
    twice = copy.deepcopy(other)
    other.reorder_cache(order)
    close(logits(model, extra[order], past_key_values=other), want[order])
    few = copy.deepcopy(twice)
    twice.batch_repeat_interleave(2)
    close(logits(model, extra.repeat_interleave(2, 0), past_key_values=twice), want.repeat_interleave(2, 0))
    few.batch_select_indices(torch.tensor([1]))
    close(logits(model, extra[1:2], past_key_values=few), want[1:2])
    assert all(s.shape[1] <= generation.CROP for s, _ in cache.routing_past.sums.values())


def test_a_cache_that_the_router_does_not_know_is_refused():
    ids = torch.randint(2, VOCAB, (1, 40))
    model = unified("prefix")

    def filled(model):
        cache = transformers.DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        return cache

    with pytest.raises(ValueError, match="holds 40 tokens that the router has not seen"):
        logits(model, ids[:, :1], past_key_values=filled(seed()))
    cache = filled(model)
    cache.crop(-generation.CROP)
    with pytest.raises(
        ValueError, match="32 tokens were taken back from the key-value cache, the router can go back by 31"
    ):
        logits(model, ids[:, :1], past_key_values=cache)
    cache = filled(model)
    logits(seed(), ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="2 of which the router has not seen"):
        logits(model, ids[:, :1], past_key_values=cache)
    cache = filled(model)
    model.routing.mode = "fixed"
    with pytest.raises(ValueError, match="was filled in mode 'prefix', the mode is 'fixed' now"):
        logits(model, ids[:, :1], past_key_values=cache)
    cache = filled(model)
    cache.crop(-1)
    with pytest.raises(ValueError, match="cropped to 39 of the 40 tokens whose mean is the context"):
        logits(model, ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="prefill_chunk_size: the context is the mean of the whole prompt"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=8)
    model.routing.mode = "prefix"
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=8), want)


def test_a_copied_model_generates_by_its_own_weights():
    model = unified("prefix")
    want = greedy(model, prompts(2, 6), 6)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moe.router_parameters(other):
            parameter.mul_(-3)
    assert greedy(model, prompts(2, 6), 6) == want != greedy(other, prompts(2, 6), 6)
    assert other.routing is other.model.routing is not model.routing


@pytest.mark.parametrize("context", ("prefix", "fixed"))
def test_gradients_are_the_same_where_the_backward_computes_the_forward_again(context):
    ids, mask = left_padded(prompts(3, 9))
    gradients = []
    for again in (False, True):
        model = unified(context).train()
        if again:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(ids, attention_mask=mask, labels=ids, use_cache=None if again else False).loss.backward()
        gradients.append(
            [
                p.grad
                for p in (
                    *moe.router_parameters(model),
                    *moe.lambda_parameters(model),
                    *moe.expert_parameters(model),
                )
            ]
        )
    for a, b in zip(*gradients, strict=False):
        torch.testing.assert_close(a, b)
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_a_copied_moe_never_routes_wrongly(tmp_path, monkeypatch):
    """moe.py without generation.py and seed_model.py: forwards without a filled cache alone."""
    shutil.copyfile(moe.__file__, tmp_path / "copied_moe.py")
    whole = unified("prefix")
    moe.save(whole, tmp_path / "m")
    for name in ("metamoe", "metamoe.serving", "metamoe.serving.generation", "metamoe.serving.seed_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(
        sys, "path", [str(tmp_path)] + [p for p in sys.path if not (Path(p or ".") / "metamoe").exists()]
    )
    import copied_moe

    monkeypatch.delitem(sys.modules, "copied_moe")
    model = copied_moe.load(tmp_path / "m", seed())
    ids, mask = left_padded(prompts(3, 9))
    close(logits(model, ids, attention_mask=mask), logits(whole, ids, attention_mask=mask))
    cache = transformers.DynamicCache(config=model.config)
    close(logits(model, ids, past_key_values=cache), logits(whole, ids))
    for refused in (lambda: logits(model, ids[:, :1], past_key_values=cache), lambda: model.generate(ids)):
        with pytest.raises(RuntimeError, match="generation.py"):
            refused()
    with pytest.raises(FileNotFoundError, match=r"moe.load\(folder, model\)"):
        copied_moe.load(tmp_path / "m")


# ---------------------------------------------------------------- load alone


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """RUN/run.json, its seed model and RUN/moe/two."""
    folder = tmp_path_factory.mktemp("run")
    seed().save_pretrained(folder / "models" / "tiny-seed")
    (folder / "RUN").mkdir()
    (folder / "RUN" / "run.json").write_text(json.dumps({"seed_model": str(folder / "models" / "tiny-seed")}))
    moe.save(unified(source=folder / "models" / "tiny-seed"), folder / "RUN" / "moe" / "two")
    return folder


def test_load_finds_the_seed(run_dir, tmp_path, monkeypatch):
    ids, home = torch.arange(2, 12)[None], run_dir / "RUN" / "moe" / "two"
    want = logits(unified(), ids)
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    # not where it was made
    assert str(run_dir).encode() not in b"".join(p.read_bytes() for p in home.iterdir())
    close(logits(moe.load(home), ids), want)
    assert moe.load(home, dtype=torch.float64).lm_head.weight.dtype == torch.float64
    close(logits(moe.load(home, seed()), ids), want)
    # alone, without its run
    shutil.copytree(home, tmp_path / "alone" / "two")
    with pytest.raises(
        FileNotFoundError,
        match=r"the seed model 'tiny-seed' of .*two is not there, looked for .*cache/tiny-seed, .*alone/tiny-seed: give it, moe.load\(folder, model\)",
    ):
        moe.load(tmp_path / "alone" / "two")
    for place in (tmp_path / "cache" / "tiny-seed", tmp_path / "alone" / "tiny-seed"):
        shutil.copytree(run_dir / "models" / "tiny-seed", place)
        close(logits(moe.load(tmp_path / "alone" / "two"), ids), want)
        shutil.rmtree(place)
    close(logits(moe.load(tmp_path / "alone" / "two", seed()), ids), want)


def test_load_without_a_record_and_from_the_hub(run_dir, tmp_path):
    home = tmp_path / "two"
    shutil.copytree(run_dir / "RUN" / "moe" / "two", home)
    config = json.loads((home / "moe_config.json").read_text())
    (home / "moe_config.json").write_text(json.dumps(config | {"seed": "nobody/no-such-model"}))
    with pytest.raises(
        FileNotFoundError,
        match=r"the seed model 'nobody/no-such-model' of .*two cannot be loaded \(.*\): give it, moe.load",
    ):
        moe.load(home)
    del config["seed"], config["disabled"]  # as earlier versions wrote it
    (home / "moe_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="two does not say what its seed model was: give it"):
        moe.load(home)
    close(
        logits(moe.load(home, seed()), torch.arange(2, 12)[None]),
        logits(unified(), torch.arange(2, 12)[None]),
    )


# ---------------------------------------------------------------- the real default


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The default's seed in fp32 with three experts whose routers split its tokens, and its tokenizer."""
    folder = backbones.default_seed("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = [f"model.layers.{i}.mlp" for i in range(30)]
    torch.manual_seed(0)
    texts = [
        "play some quiet jazz",
        "the room was clean and the staff kind",
        "which river runs through Paris",
    ]
    means = []
    for text in texts:  # routing vectors as a client takes them: the mean FFN inputs of its text
        seen = []
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0][0].mean(0))
            )
            for name in names
        ]
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        means.append(torch.stack(seen))
        for hook in hooks:
            hook.remove()
    experts = []
    for _ in texts:
        expert = {}
        for name in names:
            expert[name] = {"scaling": 2.0}
            for linear in ("gate_proj", "up_proj", "down_proj"):
                rows, columns = getattr(model.get_submodule(name), linear).weight.shape
                expert[name] |= {
                    f"{linear}.lora_A": torch.randn(4, columns) * 0.02,
                    f"{linear}.lora_B": torch.randn(rows, 4) * 0.02,
                }
        experts.append(expert)
    return moe.unify(
        model,
        names,
        experts,
        means,
        names=["intent", "hotels", "question"],
        lam=0.9,
        context="prefix",
        offset=True,
    ), tokenizer


@pytest.mark.slow
def test_the_default_generates_the_same_tokens_with_and_without_cache_and_in_any_batch(real):
    model, tokenizer = real
    torch.set_num_threads(min(2, os.cpu_count()))
    lines = Path(__file__).read_text().split('"""')[1:]  # any text will do: prompts of 3 to 60 tokens
    words = " ".join(lines).split()
    generator = random.Random(0)
    rows = []
    for _ in range(20):
        start = generator.randrange(len(words) - 50)
        rows.append(tokenizer(" ".join(words[start : start + generator.randint(3, 25)]))["input_ids"][:60])
    wants = greedy(model, rows, 32, 1, use_cache=True)
    margins = [margins_of(model, row, want) for row, want in zip(rows, wants, strict=False)]
    compared = 0
    for options in (
        dict(batch=20, use_cache=True),
        dict(batch=4, use_cache=True),
        dict(batch=20, use_cache=False),
    ):
        for got, want, margin in zip(greedy(model, rows, 32, **options), wants, margins, strict=False):
            compared += assert_same(got, want, margin)
    assert compared > 0.9 * 3 * 20 * 32, compared


@torch.no_grad()
def margins_of(model, row, new):
    """As `reference`, of tokens that are there already, from one forward; with prefix context no token sees a later one."""
    pis = []
    hooks = [
        layer.router.register_forward_hook(lambda router, inputs, pi: pis.append(pi))
        for layer in moe.layers(model)
    ]
    out = model(torch.tensor([row + new[:-1]]), use_cache=False).logits[0, len(row) - 1 :]
    for hook in hooks:
        hook.remove()
    out[:, model.generation_config.eos_token_id] = -float("inf")
    best, routes = out.topk(2).values, torch.cat(pis).topk(2).values
    assert out.argmax(-1).tolist()[0] == new[0]
    routes = (routes[..., 0] - routes[..., 1]).amin(0).cummin(0).values[len(row) - 1 :]
    return torch.minimum(best[:, 0] - best[:, 1], routes).tolist()
