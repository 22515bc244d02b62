"""Language models of other families than LLaMA's: what the project computes of each is what the model
computes, or the model is refused in one line before any work. Tiny random models of transformers."""

import random

import numpy as np
import pytest
import tiny
import torch

import moe
from metamoe import backbones
from metamoe.backbones.base import import_transformers
from metamoe.errors import UserError

transformers = import_transformers()
pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
SIZES |= dict(pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.3)
HYBRID = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {  # the windows are shorter than the texts
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "SmolLM3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Gemma": {"head_dim": 8},
    "Gemma2": HYBRID | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    "Gemma3Text": HYBRID,
}
QUICK = "Llama", "Gemma2"
WHOLE_RUNS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def config_of(name, **options):
    family = name.split(",")[0]
    return getattr(transformers, f"{family}Config")(**SIZES | options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, seed_model):
    """{family: folder of a random model of it}, all with the tiny tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(seed_model)
    found = {}
    for name, options in FAMILIES.items():
        folder = found[name] = tmp_path_factory.mktemp("families") / name.replace(", ", "-")
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config_of(name, **options)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


def load(folder):
    return backbones.load_backbone("smollm2-135m", str(folder), "cpu", "float32")


def plain(folder):
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def records_of(count):
    return [tiny.record("intent", random.Random(i), True) for i in range(count)]


def likelihoods(model, tokenizer, record):
    """Log-likelihood of each choice by the model's own forward, a sequence at a time."""
    found = []
    for choice in record["choices"]:
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        log_probs = logits.double().log_softmax(-1)
        found.append(sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)))
    return np.array(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_losses_are_those_of_the_models_own_forward(folders, name):
    backbone, own = load(folders[name]), plain(folders[name])
    records = records_of(4)
    for record, scores in zip(records, backbone.scores(backbone.model, records), strict=True):
        assert np.allclose(scores, likelihoods(own, backbone.tokenizer, record), atol=1e-3)
    encoded = [backbone.example(records[0])]
    prompt, answer = encoded[0]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        want = own(input_ids=ids, labels=labels, use_cache=False).loss
        torch.testing.assert_close(backbone.loss(backbone.model, encoded), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_unified_model_is_unified_saved_loaded_and_scored(folders, name, tmp_path):
    """Three equal experts are the adapter that PEFT computes; different ones score as choices alone."""
    backbone = load(folders[name])
    adapted = load(folders[name])
    one = tiny.unified(load(folders[name]))
    expert = first_expert(one, backbone)
    with torch.no_grad():
        ids = torch.arange(3, 15).view(2, 6)
        peft = adapted.with_expert(expert)
        want = peft(input_ids=ids, use_cache=False).logits
        vectors = torch.randn(3, len(backbone.ffn_names), 32)
        model = moe.unify(backbone.model, backbone.ffn_names, [expert] * 3, vectors)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, atol=2e-4, rtol=1e-3)
        moe.save(one, tmp_path / "moe")
        again = moe.load(tmp_path / "moe", plain(folders[name]))
        a, b = (m(input_ids=ids, use_cache=False).logits for m in (one, again))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for record in records_of(2):
        pairs = [backbone.encode(record, choice) for choice in record["choices"]]
        alone = [tiny.score_alone(backbone, one, *pair) for pair in pairs]
        assert np.allclose(backbone.scores(one, [record])[0], alone, atol=1e-3)


@pytest.mark.parametrize("context", ("prefix", "fixed"))
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_that_of_whole_forwards(folders, name, context):
    """With every kind of cache, also where the window has left the prompt behind."""
    model, other = (tiny.unified(load(folders[name]), context, seed, top_k=2) for seed in (0, 1))
    model.generation_config.eos_token_id = other.generation_config.eos_token_id = None
    rows = [[*range(9, 29)], [40, 7, 31, 40, 7, 31, 40]]
    want = [tiny.written(model, row) for row in rows]
    for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        assert [tiny.generated(model, row, **options) for row in rows] == want
    assert tiny.generated(model, rows[0], assistant_model=other) == want[0]
    beams = [tiny.generated(model, rows[0], num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert beams[0] == beams[1]
    ids = torch.tensor([rows[0], [0] * 13 + rows[1]])
    options = dict(attention_mask=(ids > 0).long(), max_new_tokens=10, do_sample=False, pad_token_id=0)
    for cache in (None, "static"):
        assert model.generate(ids, cache_implementation=cache, **options)[:, 20:].tolist() == want
    embeddings = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeddings, **options).tolist() == want


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_from_data_to_an_export(folders, name, tmp_path, export_code):
    run, export = tmp_path / "run", tmp_path / "export"
    few = dict(train_size=4, validation_size=2, test_size=3, public_size=12, candidates=6, proxies=3)
    tiny.make_run(run, folders[name], clients=tiny.CLIENTS[:2], **few)
    training = "--epochs 1 --lr 0.02 --rank 4 --alpha 8 --batch-size 4 --warmup-steps 0"
    for command in (
        "select_proxies --selection dpp",
        f"train_expert --data aligned --selection dpp {training}",
        f"unify_moe --method metamoe --lr 0.003 --batch-size 4 --export {export}",
        "evaluate --models zeroshot metamoe",
    ):
        stage, *flags = command.split()
        result = tiny.stage(stage, run, *flags)
        assert result.code == 0, result.err
    model, ids = moe.load(run / "moe" / "metamoe", plain(folders[name])), torch.arange(3, 63).view(2, 30)
    model.routing.mode, options = "prefix", {"attn_implementation": "eager", "trust_remote_code": True}
    exported = transformers.AutoModelForCausalLM.from_pretrained(export, **options).eval()
    want, got, seed = (tiny.logits(each, ids) for each in (model, exported, plain(folders[name])))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - seed).abs().max() > 1e-3
    assert tiny.generated(exported, ids[0].tolist()) == tiny.written(model, ids[0].tolist())


def first_expert(model, backbone):
    """The first expert of a unified model, as moe.unify takes it."""
    expert = {}
    for name, layer in zip(backbone.ffn_names, moe.layers(model), strict=True):
        own = expert[name] = {"scaling": layer.scaling[0]}
        for linear in backbone.ffn_linears:
            own[f"{linear}.lora_A"] = layer.experts[f"{linear}_A"][0].detach().clone()
            own[f"{linear}.lora_B"] = layer.experts[f"{linear}_B"][0].detach().clone()
    return expert


def refusal(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "family, said",
    (
        ("Phi3", "gate_proj"),  # its projections are fused
        ("BitNet", "model.layers.0.mlp"),  # normalises between its linears
        ("OlmoHybrid", "attention mask"),  # recurrent layers read one choice after the other
        ("HrmText", "each FFN once"),  # repeats its layers
    ),
)
def test_a_family_that_computes_more_is_refused(tmp_path, seed_model, family, said):
    tokenizer = transformers.AutoTokenizer.from_pretrained(seed_model)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family))
    assert said in refusal(tmp_path / family, model, tokenizer)


def test_logits_that_are_computed_in_an_unknown_way_are_refused(folders, monkeypatch):
    """A family of tomorrow: its forward does something to the logits that no setting tells."""
    own = transformers.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        found.logits = found.logits * 1.5
        return found

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(UserError, match="computes its logits"):
        load(folders["Llama"])
