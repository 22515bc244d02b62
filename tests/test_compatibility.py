"""A unified model in the hands of other tools computes what its parts compute, or says that it cannot."""

import copy
import io
import pickle
import threading

import pytest
import torch
from tiny import generated, llama, logits, next_logits, written

import moe
from metamoe.serving.seed_model import fix_torchvision

fix_torchvision()
import peft  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
K, NAMES, LINEARS = 3, [f"model.layers.{i}.mlp" for i in range(2)], ("gate_proj", "up_proj", "down_proj")
IDS = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(1))


def unified(context="prefix", lam=0.7, top_k=1, seed=0):
    model = llama(layers=2, eos_token_id=None)
    torch.manual_seed(seed)
    experts = [{name: {"scaling": 2.0} for name in NAMES} for _ in range(K)]
    for expert in experts:
        for name in NAMES:
            for linear in LINEARS:
                rows, columns = model.get_submodule(f"{name}.{linear}").weight.shape
                expert[name][f"{linear}.lora_A"] = torch.randn(2, columns) / 2
                expert[name][f"{linear}.lora_B"] = torch.randn(rows, 2) / 2
    vectors = torch.randn(K, len(NAMES), 16) / 2
    return moe.unify(model, NAMES, experts, vectors, context=context, lam=lam, top_k=top_k)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the seed model's linears are called


@pytest.mark.parametrize("top_k", (1, 2))
@pytest.mark.parametrize("few", (0, 10**6))
def test_adapters_and_hooks_on_the_linears_of_a_unified_model_act(few, top_k, monkeypatch):
    monkeypatch.setitem(moe.FEW_TOKENS, "cpu", few)
    model, changed = unified(top_k=top_k), unified(top_k=top_k)
    seen = []
    model.get_submodule(NAMES[0]).up_proj.register_forward_hook(lambda *_: seen.append(1))
    adapter = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(LINEARS), init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter).eval()
    for name in NAMES:
        for linear in LINEARS:
            layer = model.get_submodule(f"{name}.{linear}")
            changed.get_submodule(f"{name}.{linear}").weight.data += layer.get_delta_weight("default")
    close(logits(adapted, IDS), logits(changed, IDS))
    assert seen and (logits(changed, IDS) - logits(unified(top_k=top_k), IDS)).abs().max() > 0.1
    adapted.train()
    adapted(IDS, labels=IDS).loss.backward()
    trained = [p.grad for name, p in adapted.named_parameters() if "lora_A.default" in name]
    assert len(trained) == len(NAMES) * len(LINEARS) and all(grad.abs().max() > 0 for grad in trained)


def test_lambda_is_bounded_in_the_forward_itself():
    model, bounded = unified(lam=1.0), unified(lam=1.0)
    with torch.no_grad():
        for lam in moe.lambda_parameters(model):
            lam.fill_(1.028)  # an optimiser without moe.clamp_
    assert torch.equal(logits(model, IDS), logits(bounded, IDS))


# ---------------------------------------------------------------- several documents in a row


@pytest.mark.parametrize("context", ("prefix", "fixed"))
def test_documents_in_a_row_are_computed_as_if_alone(context):
    model, lengths = unified(context), (4, 6, 1)
    places = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    got = logits(model, IDS, position_ids=places, use_cache=False).split(lengths, dim=1)
    for alone, packed in zip(IDS.split(lengths, dim=1), got, strict=True):
        close(packed, logits(model, alone))


def test_with_a_mask_positions_begin_no_document():
    model, mask = unified(), torch.ones_like(IDS)
    mask[0, :4], mask[1, -3:] = 0, 0
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate makes them
    own = [logits(model, IDS[i : i + 1, keep], use_cache=False)[0] for i, keep in enumerate(mask.bool())]
    got = logits(model, IDS, attention_mask=mask, position_ids=places)
    close(got[mask == 1], torch.cat(own))


# ---------------------------------------------------------------- what belongs to a call stays in it

PROMPTS = [[5, 9, 14, 5, 9, 14, 5, 9], [7, 3, 2], [40, 2, 8, 11, 30], [21, 22]]
ALL_CONTEXTS = pytest.mark.parametrize("context", moe.CONTEXTS)


@ALL_CONTEXTS
def test_threads_that_generate_at_once_answer_as_one_after_the_other(context):
    model, answers = unified(context), {}
    want = {i: [written(model, row)] * 3 for i, row in enumerate(PROMPTS)}
    start = threading.Barrier(len(PROMPTS))

    def work(i):
        start.wait()
        answers[i] = [generated(model, PROMPTS[i], use_cache=use_cache) for use_cache in (True, False, True)]

    threads = [threading.Thread(target=work, args=(i,)) for i in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == want and len({tuple(tokens[0]) for tokens in want.values()}) > 1


@ALL_CONTEXTS
def test_a_forward_inside_generate_is_a_forward_alone(context):
    """A processor of logits calls the model, with a cache of its own: classifier-free guidance by hand."""
    model, row, other, seen = unified(context), PROMPTS[0], torch.tensor([PROMPTS[2]]), []

    def nested(ids, scores):
        seen.append(logits(model, other, use_cache=len(seen) % 2 == 0))
        assert generated(model, PROMPTS[3], 2) == first
        return scores

    want, alone, first = written(model, row), logits(model, other), written(model, PROMPTS[3], 2)
    for use_cache in (True, False):
        assert generated(model, row, logits_processor=[nested], use_cache=use_cache) == want
    assert len(seen) == 20
    for found in seen:
        close(found, alone)


@ALL_CONTEXTS
@pytest.mark.parametrize("negative", (None, PROMPTS[2]))
def test_classifier_free_guidance_keeps_two_contexts(context, negative):
    model, row, scale = unified(context), PROMPTS[0], 2.5
    second = row[-1:] if negative is None else negative
    out, start = list(row), list(second)
    for _ in range(8):
        with_prompt = next_logits(model, out, len(row)).log_softmax(-1)
        without = next_logits(model, start, len(second)).log_softmax(-1)
        token = int((scale * (with_prompt - without) + without).argmax())
        out.append(token)
        start.append(token)
    options = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    assert generated(model, row, 8, guidance_scale=scale, **options) == out[len(row) :]
    assert out[len(row) :] != written(model, row, 8)
    if context == "fixed":
        with pytest.raises(ValueError, match="guidance_scale.*use_cache"):
            generated(model, row, guidance_scale=scale, use_cache=False)
    else:
        assert generated(model, row, 8, guidance_scale=scale, use_cache=False, **options) == out[len(row) :]


@ALL_CONTEXTS
def test_drafts_do_not_change_the_answer(context):
    model, row = unified(context), PROMPTS[0]
    want = written(model, row, 40)
    for tokens in (3, 40):  # more than a cache keeps otherwise
        assert generated(model, row, 40, prompt_lookup_num_tokens=tokens) == want
    for assistant in (model, unified(context, seed=1), llama(layers=1)):
        assistant.generation_config.num_assistant_tokens = 20
        assert generated(model, row, 40, assistant_model=assistant) == want
    with pytest.raises(ValueError, match="assistant_early_exit.*assistant_model"):
        generated(model, row, assistant_early_exit=1)
    assert model.config.num_hidden_layers == 2 and generated(model, row, 40) == want


def test_a_mask_may_be_given_to_one_forward():
    model, mask = unified("fixed"), torch.arange(11).expand(2, -1) < 6
    whole = logits(model, IDS)
    model.routing.context_mask = mask
    want = logits(model, IDS)
    model.routing.context_mask = None
    close(logits(model, IDS, context_mask=mask), want)
    assert torch.equal(logits(model, IDS), whole) and (want - whole).abs().max() > 0.01


def test_a_forward_that_fails_leaves_nothing_behind():
    model = unified("prefix")
    want = logits(model, IDS)
    with pytest.raises(IndexError):
        model(torch.full_like(IDS, 10**6), attention_mask=torch.tensor([[0] * 5 + [1] * 6] * 2))
    layer, x = moe.layers(model)[0], torch.randn(3, 4, 16)
    close(layer(x), moe.layers(unified("prefix"))[0](x))
    assert torch.equal(logits(model, IDS), want)


# ---------------------------------------------------------------- copies and saves


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@ALL_CONTEXTS
@pytest.mark.parametrize("copied", (pickled, saved, copy.deepcopy))
def test_a_copied_model_generates_and_stays_opted_out(copied, context):
    model = unified(context)
    model(IDS, labels=IDS).loss.backward()  # what a forward leaves for the backward is not copied
    moe.disable_expert(model, "expert2")
    want, answer = logits(model, IDS), generated(model, PROMPTS[0])
    other = copied(model)
    moe.enable_expert(model, "expert2")
    assert torch.equal(logits(other, IDS), want) and not torch.equal(logits(model, IDS), want)
    assert generated(other, PROMPTS[0]) == generated(other, PROMPTS[0], use_cache=False) == answer
    assert other.moe_config["disabled"] == ["expert2"] and other.routing is other.model.routing
    generated(model, PROMPTS[0])
    assert other.generate.args[0] is other  # not the weights of the first
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert set(generated(other, PROMPTS[0])) == {0}


@pytest.mark.parametrize("context", ("prefix", "fixed"))
@pytest.mark.parametrize("copied", (pickled, saved, copy.deepcopy))
def test_a_copied_cache_is_reordered_with_its_sums(copied, context):
    model, order = unified(context), torch.tensor([1, 0, 1])
    with torch.no_grad():
        filled, same = (model(ids[:, :8]).past_key_values for ids in (IDS, IDS[order]))
    want = logits(model, IDS[order, 8:], past_key_values=same)
    other = copied(filled)
    other.reorder_cache(order)
    close(logits(model, IDS[order, 8:], past_key_values=other), want)
    assert filled.routing_past.length == 8


def test_save_pretrained_of_a_model_that_is_no_export_is_refused(tmp_path):
    model = unified()
    with pytest.raises(RuntimeError, match="moe.save.*--export"):
        model.save_pretrained(tmp_path / "D")
    with pytest.raises(RuntimeError, match="moe.save.*--export"):
        pickled(model).save_pretrained(tmp_path / "D")
    assert not (tmp_path / "D").exists()


@pytest.mark.slow
@pytest.mark.parametrize("context", ("prefix", "fixed"))
def test_a_compiled_model_computes_the_same(context):
    model, mask = unified(context), torch.ones_like(IDS)
    mask[0, :4] = 0
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for change in (mask, mask.flip(1)):
        want = logits(model, IDS, attention_mask=change, use_cache=False)
        close(logits(compiled, IDS, attention_mask=change, use_cache=False), want)
