"""An exported model in the tools that people use: as the unified model that it was made from, or refused."""

import copy
import sys
from itertools import product

import pytest
import tiny
import torch
from tiny import generated, logits, written

import moe
from metamoe.backbones import load_backbone
from metamoe.backbones.base import import_transformers
from metamoe.rundir import finish
from metamoe.serving import export
from metamoe.serving.members import remove_expert

transformers = import_transformers()
import accelerate  # noqa: E402
import peft  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "export_code")
IDS = torch.randint(2, 400, (2, 11), generator=torch.Generator().manual_seed(1))
ROW = IDS[0].tolist()


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def home(tmp_path_factory, seed_model):
    """The folder of a unified model of three random experts, `moe`, and of its export, `export`."""
    folder = tmp_path_factory.mktemp("runtimes")
    backbone = load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    moe.save(tiny.unified(backbone, "prefix", top_k=2), folder / "moe")
    finish(folder / "moe", {})
    where = {"seed_model": str(seed_model)}
    export.export({"backbone": "smollm2-135m"}, where, folder / "moe", folder / "export", False)
    return folder


def plain(seed_model, **options):
    options |= {"attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(seed_model, **options).eval()


@pytest.fixture
def unified(home, seed_model):
    return moe.load(home / "moe", plain(seed_model))


def load(folder, **options):
    options |= {"attn_implementation": "eager", "trust_remote_code": True}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def exported(home):
    return load(home / "export")


# --- copies, dtypes, places


def test_an_export_saved_in_shards_is_the_export(exported, unified, tmp_path):
    exported.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for model in (load(tmp_path), copy.deepcopy(exported)):
        close(logits(model, IDS), logits(unified, IDS))


@pytest.mark.parametrize("dtype, off", ((torch.float16, 0.02), (torch.bfloat16, 0.1)))
def test_in_half_precision_the_routers_stay_in_float32(home, seed_model, unified, dtype, off):
    model, want = load(home / "export", dtype=dtype), logits(unified, IDS)
    assert torch.equal(
        logits(model, IDS), logits(moe.load(home / "moe", plain(seed_model, dtype=dtype)), IDS)
    )
    assert (logits(model, IDS).float() - want).abs().mean() < off * want.std()
    assert {p.dtype for name, p in model.named_parameters() if "router" in name} == {torch.float32}
    assert model.lm_head.weight.dtype == dtype and generated(model, ROW) == written(model, ROW)


def offload_cpu(model, folder):
    return accelerate.cpu_offload(model, torch.device("cpu"))


def offload_disk(model, folder):
    return accelerate.disk_offload(model, folder, torch.device("cpu"))


@pytest.mark.parametrize("offload", (offload_cpu, offload_disk))
def test_an_offloaded_export_is_the_export(exported, unified, offload, tmp_path):
    sys.modules[type(exported).__module__.rpartition(".")[0] + ".moe"].disable_expert(exported, "expert2")
    moe.disable_expert(unified, "expert2")
    model = offload(exported, tmp_path)
    assert model.model.layers[1].mlp.router.vectors.is_meta
    close(logits(model, IDS), logits(unified, IDS))
    assert generated(model, ROW) == written(unified, ROW)


def test_an_export_partly_on_disk_is_the_export(home, unified, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head"), "cpu")
    places |= {"model.layers.1": "disk", "model.norm": "disk"}
    model = load(home / "export", device_map=places, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.router.vectors.is_meta
    close(logits(model, IDS), logits(unified, IDS))


@pytest.mark.parametrize("offload", (offload_cpu, offload_disk))
def test_an_offloaded_seed_model_is_refused(home, seed_model, offload, tmp_path):
    with pytest.raises(ValueError, match="model.layers.0.mlp.*offloaded"):
        moe.load(home / "moe", offload(plain(seed_model), tmp_path))


# --- training by others

LINEARS = {"attention": ["q_proj", "v_proj"], "FFNs": ["gate_proj", "up_proj", "down_proj"]}


@pytest.mark.parametrize("linears", LINEARS.values(), ids=LINEARS)
def test_a_lora_of_peft_on_an_export_learns_acts_and_merges(home, exported, unified, linears, tmp_path):
    torch.manual_seed(3)
    options = {"task_type": "CAUSAL_LM", "target_modules": linears, "init_lora_weights": False}
    model = peft.get_peft_model(exported, peft.LoraConfig(r=2, lora_alpha=4, **options)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * len(linears) and all(grad.abs().max() > 0 for grad in trained.values())
    want = logits(model.eval(), IDS)
    assert (want - logits(unified, IDS)).abs().max() > 0.1
    out = [
        model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*out)
    model.save_pretrained(tmp_path / "adapter")
    close(logits(peft.PeftModel.from_pretrained(load(home / "export"), tmp_path / "adapter"), IDS), want)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for each in (merged, load(tmp_path / "merged")):
        close(logits(each, IDS), want)


@pytest.mark.parametrize("again", (False, True), ids=("", "gradient checkpointing"))
def test_a_step_of_the_trainer_is_a_step_by_hand(exported, unified, again, tmp_path):
    options = dict(
        max_steps=1, per_device_train_batch_size=2, optim="sgd", learning_rate=0.1, max_grad_norm=0
    )
    options |= dict(use_cpu=True, report_to=[], disable_tqdm=True, gradient_checkpointing=again)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in IDS]
    arguments = transformers.TrainingArguments(str(tmp_path), lr_scheduler_type="constant", **options)
    trainer = transformers.Trainer(exported, arguments, train_dataset=rows)
    trainer.train()
    unified.requires_grad_(True).train()(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in unified.parameters():
            parameter -= 0.1 * parameter.grad
    trainer.save_model(tmp_path / "trained")
    trained = load(tmp_path / "trained")
    for (name, got), want in zip(trained.named_parameters(), unified.parameters(), strict=True):
        assert want.grad.abs().max() > 0, name
        close(got, want)
    close(logits(trained, IDS), logits(unified.eval(), IDS), 1e-3)


# --- eight bits, where the package is there


def test_eight_bits_of_bitsandbytes_are_those_under_an_adapter_of_peft(home, seed_model):
    pytest.importorskip("bitsandbytes")
    bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
    config, tensors = remove_expert(*remove_expert(*moe.read(home / "moe"), "expert2"), "expert3")
    one = moe.assemble(plain(seed_model, quantization_config=bits), config, tensors)
    expert = {name: {"scaling": config["scaling"][0][0]} for name in config["ffn_names"]}
    for name, linear, factor in product(expert, LINEARS["FFNs"], "AB"):
        expert[name][f"{linear}.lora_{factor}"] = tensors[f"{name}.experts.{linear}.{factor}"][0]
    backbone = load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    backbone.model = plain(seed_model, quantization_config=bits)
    close(logits(one, IDS), logits(backbone.with_expert(expert), IDS), 1e-2)
    exported = load(home / "export", quantization_config=bits)
    whole = moe.load(home / "moe", plain(seed_model, quantization_config=bits))
    close(logits(exported, IDS), logits(whole, IDS), 1e-2)


def test_eight_bits_of_torchao_are_the_weights_that_they_stand_for(exported, home, seed_model):
    quantization = pytest.importorskip("torchao.quantization")
    seed = plain(seed_model)
    for model in (exported, seed):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    reference = plain(seed_model)
    for linear, own in zip(reference.modules(), seed.modules(), strict=True):
        if isinstance(linear, torch.nn.Linear) and type(own.weight) is not torch.nn.Parameter:
            linear.weight = torch.nn.Parameter(own.weight.dequantize())
    want = logits(moe.load(home / "moe", reference), IDS)
    for model in (exported, moe.load(home / "moe", seed)):
        close(logits(model, IDS), want, 1e-3)


# --- what cannot be right


def test_continuous_batching_is_refused(exported, unified):
    for model in (exported, unified):
        with pytest.raises(ValueError, match="continuous batching.*generate"):
            model.generate_batch([ROW])
        with pytest.raises(ValueError, match="continuous batching.*generate"):
            model.generate(IDS, cache_implementation="paged")


def test_a_cache_with_a_part_of_the_prompt_goes_with_the_prefix_alone(unified):
    def answer():
        cache = unified(IDS[:1, :6]).past_key_values
        return generated(unified, ROW, past_key_values=cache)

    assert answer() == written(unified, ROW)
    unified.routing.mode = "fixed"
    with pytest.raises(ValueError, match="past_key_values.*'prefix'"):
        answer()
