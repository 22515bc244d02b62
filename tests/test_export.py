"""The unified model as users get it: the exported folder, experts that leave, clients that join, adapters in PEFT."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import drive
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import CLIENTS, refused, stage

import moe
from metamoe import backbones, uploads
from metamoe.rundir import read_json, write_json
from metamoe.serving import export, generation
from metamoe.serving import seed_model as seed_model_module
from metamoe.serving.seed_model import fix_torchvision

fix_torchvision()
import transformers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(2, 42).view(2, 20)
PADDED = torch.tensor([[0, 0, 0, 5, 9, 30], [7, 8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
FINAL = ["--method", "metamoe", "--lr", "0.003", "--batch-size", "4"]


def run_stages(run_dir, commands):
    for name, *flags in commands:
        result = stage(name, run_dir, *flags)
        assert result.code == 0, result.err


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed_model):
    """A run with MetaMoE's uploads, RUN/moe/metamoe and its export, both by one call of unify_moe.py."""
    folder = tmp_path_factory.mktemp("made")
    tiny.make_run(folder / "run", seed_model)
    few = "--epochs 4 --lr 0.02 --rank 4 --alpha 8 --batch-size 4 --warmup-steps 2".split()
    commands = [
        ("select_proxies", "--selection", "dpp"),
        ("train_expert", "--data", "aligned", *few),
        ("unify_moe", *FINAL, "--export", folder / "export"),
    ]
    run_stages(folder / "run", commands)
    return folder


@pytest.fixture
def run(tmp_path, made):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def unify_moe(run_dir, *args):
    result = stage("unify_moe", run_dir, *FINAL, *args)
    assert result.code == 0, result.err
    return result.out


def says(run_dir, message, *args, name="unify_moe"):
    """The stage refuses these arguments, and its one line has the message."""
    line = refused(name, run_dir, *args)
    assert message in line, line


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# --- the exported folder

LOADED = """
import json, os, sys
import torch, transformers
from safetensors.torch import save_file

job, options = json.load(open("job.json")), dict(trust_remote_code=True)
assert not any(os.path.exists(os.path.join(path or ".", "unify_moe.py")) for path in sys.path)
ids, mask, whole = (torch.tensor(job[key]) for key in ("ids", "mask", "whole"))
load, out = transformers.AutoModelForCausalLM.from_pretrained, {}
for name, folder in job["folders"].items():
    model = load(folder, **options)
    with torch.no_grad():
        out[name + ".logits"] = model(whole).logits
        out[name + ".padded"] = model(ids, attention_mask=mask).logits
        for use_cache in (True, False):
            new = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache)
            out[f"{name}.tokens.{use_cache}"] = model.generate(ids, attention_mask=mask, **new)
        model.save_pretrained(name + "-again")
        again = load(name + "-again", **options)
        out[name + ".again"] = again(whole).logits
        assert sorted(again.state_dict()) == sorted(model.state_dict())
        half = load(folder, dtype=torch.bfloat16, **options)
        out[name + ".half"] = half(whole).logits.float()
        routers = {p.dtype for n, p in half.named_parameters() if ".router." in n}
        assert routers == {torch.float32} and half.lm_head.weight.dtype == torch.bfloat16, routers
    if name == "llama":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        assert len(tokenizer("play some music")["input_ids"]) > 2
        try:
            load(folder, trust_remote_code=False)
            raise SystemExit("loaded without its code, as a seed model without experts")
        except ValueError as error:
            assert "trust_remote_code" in str(error)
save_file({key: value.contiguous() for key, value in out.items()}, "out.safetensors")
"""


def load_elsewhere(place, folders):
    """What LOADED writes, run in a folder of its own without this project."""
    place.mkdir()
    job = {"ids": PADDED.tolist(), "mask": MASK.tolist(), "whole": IDS.tolist()}
    job["folders"] = {name: str(folder) for name, folder in folders.items()}
    (place / "job.json").write_text(json.dumps(job))
    (place / "load.py").write_text(LOADED)
    environment = tiny.environment(HF_MODULES_CACHE=str(place / "modules"))
    environment.pop("PYTHONPATH", None)
    options = dict(cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    done = subprocess.run([sys.executable, "load.py"], **options)
    assert done.returncode == 0, done.stderr
    return load_file(place / "out.safetensors")


def save_other_seed_model(folder, kind, seed_model):
    """A tiny model of another family, with the tokenizer of seed_model."""
    shutil.copytree(seed_model, folder)
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    torch.manual_seed(1)
    if kind == "mistral":  # a window shorter than the texts
        config = transformers.MistralConfig(**sizes, **heads, sliding_window=6, tie_word_embeddings=False)
        transformers.MistralForCausalLM(config).save_pretrained(folder)
    else:
        config = transformers.Qwen2Config(**sizes, **heads, tie_word_embeddings=True)
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def random_expert(names):
    """LoRA experts of the FFNs `names`, of different ranks and without one of the linears."""
    shapes = {"up_proj.lora_A": (3, 32), "up_proj.lora_B": (48, 3)}
    shapes |= {"down_proj.lora_A": (2, 48), "down_proj.lora_B": (32, 2)}
    return {name: {"scaling": 1.0} | {key: torch.randn(s) for key, s in shapes.items()} for name in names}


def export_other(folder, kind, seed_model):
    """Export an MoE of another family's seed model; returns the MoE, loaded, and the export's folder."""
    save_other_seed_model(folder / kind, kind, seed_model)
    fresh = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / kind)
    names = [f"model.layers.{i}.mlp" for i in range(2)]
    experts = [random_expert(names) for _ in range(2)]
    options = dict(lam=0.6, top_k=2, offset=True, context="none" if kind == "qwen2" else "fixed")
    source, target = folder / "moe" / kind, folder / f"export-{kind}"
    moe.save(moe.unify(fresh(), names, experts, torch.randn(2, 2, 32), **options), source)
    export.export({"backbone": "smollm2-135m", "seed_model": str(folder / kind)}, source, target, False)
    return moe.load(source, fresh()), target


def test_an_export_runs_without_this_repository(made, seed_model, tmp_path):
    folders, models = {"llama": made / "export"}, {"llama": moe.load(made / "run" / "moe" / "metamoe")}
    for kind in ("mistral", "qwen2"):
        models[kind], folders[kind] = export_other(tmp_path, kind, seed_model)
    out = load_elsewhere(tmp_path / "elsewhere", folders)
    for name, model in models.items():
        assert model.routing.mode == ("none" if name == "qwen2" else "fixed")
        model.routing.mode = "none" if name == "qwen2" else "prefix"
        mine = logits(model)
        for key in ("logits", "again"):
            close(out[f"{name}.{key}"], mine)
        assert mine.std() > 0.3 and (out[f"{name}.half"] - mine).abs().mean() < 0.2 * mine.std()
        close(out[f"{name}.padded"][MASK == 1], logits(model, PADDED, attention_mask=MASK)[MASK == 1])
        new = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        tokens = model.generate(PADDED, attention_mask=MASK, **new)
        for use_cache in (True, False):
            assert torch.equal(out[f"{name}.tokens.{use_cache}"], tokens)
        model.routing.mode = "fixed"
        assert (logits(model) - mine).abs().max() > 1e-3  # the other context would have been noticed


def test_what_is_in_an_export(made, seed_model):
    export, run_dir = made / "export", made / "run"
    files = "config.json model.safetensors tokenizer.json tokenizer_config.json done.json modeling_metamoe.py"
    assert {p.name for p in export.iterdir()} >= {*files.split(), "moe.py", "generation.py", "seed_model.py"}
    seed, own = load_file(seed_model / "model.safetensors"), load_file(export / "model.safetensors")
    added = load_file(run_dir / "moe" / "metamoe" / "moe.safetensors")
    assert own.keys() == seed.keys() | added.keys()  # the seed model's under their own names
    assert all(torch.equal(own[name], t) for name, t in (seed | added).items())
    for source in (moe, generation, seed_model_module):
        assert (export / Path(source.__file__).name).read_bytes() == Path(source.__file__).read_bytes()
    secrets = [tiny.SECRET, str(run_dir), str(seed_model), str(Path.home()), str(tiny.REPO)]
    for path in export.iterdir():
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path


def test_export_of_a_model_that_is_there(run, tmp_path):
    before = drive.snapshot(run / "moe")
    out = unify_moe(run, "--export", tmp_path / "a")
    assert "is there already, skipped" in out and "as a Hugging Face folder" in out
    assert unify_moe(run, "--export", tmp_path / "a").count("is there already, skipped") == 2
    unify_moe(run, "--without", "hotels", "--export", tmp_path / "b")
    assert read_json(tmp_path / "b" / "config.json")["moe"]["names"] == ["intent", "question"]
    left = drive.snapshot(run / "moe")
    assert {path: left[path] for path in before} == before
    without = ["--method", "metamoe", "--without", "hotels"]
    says(run, "model 'metamoe' there", *without, "--export", tmp_path / "a")
    full = tmp_path / "c"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    code = tiny.REPO / "metamoe" / "serving"  # not an export, for all its name and files
    for folder in (full, code, full / "thesis.tex"):
        says(run, "holds no export", "--method", "metamoe", "--export", folder)
    says(run, "an MoE of a language model alone", "--method", "soup", "--export", tmp_path / "d")
    assert [p.name for p in full.iterdir()] == ["thesis.tex"] and not (tmp_path / "d").exists()


@pytest.mark.slow
def test_the_real_seed_model_from_uploads_to_an_export(tmp_path):
    """The default's own seed model on a few dozen texts: all that its users get."""
    run, seed_model = tmp_path / "run", backbones.default_seed("smollm2-135m")
    tiny.make_run(run, seed_model)
    few = "--epochs 3 --lr 0.001 --batch-size 6 --warmup-steps 1".split()
    score = ["evaluate", "--models", "zeroshot", "metamoe"]
    commands = [
        ("select_proxies", "--selection", "dpp"),
        ("train_expert", "--data", "aligned", *few),
        ("unify_moe", "--method", "metamoe", "--batch-size", "6", "--export", tmp_path / "export"),
        (*score, "--scoring", "letters"),
        (*score, "--scoring", "generate"),
        (*score, "--opt-out"),
    ]
    run_stages(run, commands)
    for scoring in ("", ".letters", ".generate"):
        rows = read_json(run / f"results{scoring}.json")["rows"]
        found = {row["model"]: row["average"] for row in rows}
        assert all(0 <= average <= 100 for average in found.values())
        assert scoring or found["metamoe"] > found["zeroshot"] + 5
    assert set(read_json(run / "results.json")["opt_out"]["metamoe"]) == {"", *CLIENTS}
    model, tokenizer = (
        moe.load(run / "moe" / "metamoe"),
        transformers.AutoTokenizer.from_pretrained(seed_model),
    )
    batch, new = tokenizer("play some quiet jazz\nAnswer:", return_tensors="pt"), dict(max_new_tokens=6)
    before, whole = model.generate(**batch, do_sample=False, **new), logits(model, batch["input_ids"])
    moe.disable_expert(model, "intent")
    assert (logits(model, batch["input_ids"]) - whole).abs().max() > 1e-3
    moe.enable_expert(model, "intent")
    assert torch.equal(model.generate(**batch, do_sample=False, **new), before)
    out = load_elsewhere(tmp_path / "elsewhere", {"llama": tmp_path / "export"})
    model.routing.mode = "prefix"
    close(out["llama.logits"], logits(model))


# --- opting out and in


def same_but(new, old, rows):
    """The tensors `new` are those rows of `old`, lambda the same."""
    assert new.keys() == old.keys()
    for key, t in new.items():
        assert torch.equal(t, old[key] if key.endswith(".lam") else old[key][rows])


def test_left_out_on_disk_is_disabled_in_memory(run):
    home = run / "moe" / "metamoe"
    whole, moved = logits(moe.load(home)), 0
    for name in CLIENTS:
        unify_moe(run, "--without", name)
        folder, rest = run / "moe" / f"metamoe-without-{name}", [c for c in CLIENTS if c != name]
        config, tensors = moe.read(folder)
        assert config["names"] == rest and read_json(folder / "done.json")["without"] == [name]
        same_but(tensors, moe.read(home)[1], [CLIENTS.index(other) for other in rest])
        model = moe.load(home)
        moe.disable_expert(model, name)
        close(logits(moe.load(folder)), logits(model))
        moved += not torch.equal(logits(model), whole)
        moe.enable_expert(model, name)
        assert torch.equal(logits(model), whole)
    assert moved >= 2  # one may have no token of these
    assert "is there already, skipped" in unify_moe(run, "--without", "hotels")
    # one after the other, down to one
    unify_moe(run, "--name", "metamoe-without-hotels", "--without", "intent")
    last = run / "moe" / "metamoe-without-hotels-without-intent"
    assert moe.read(last)[0]["names"] == ["question"]
    assert read_json(last / "done.json")["without"] == ["hotels", "intent"]
    for message, method, *flags in (
        ("'question' is the last expert", "metamoe", "--name", last.name, "--without", "question"),
        ("no expert is called 'bars'; there are intent, hotels, question", "metamoe", "--without", "bars"),
        ("there is no MoE flexolmo", "flexolmo", "--without", "intent"),
        ("metamoe was made with metamoe", "btx", "--name", "metamoe", "--without", "intent"),
        ("one after the other", "metamoe", "--without", "intent", "--extend", "metamoe"),
    ):
        says(run, message, "--method", method, *flags)


def test_the_opt_out_table(run):
    unify_moe(run, "--without", "hotels")
    run_stages(run, [("evaluate", "--models", "metamoe", "metamoe-without-hotels", "--opt-out")])
    found = read_json(run / "results.json")
    table, rows = found["opt_out"]["metamoe"], {row["model"]: row["clients"] for row in found["rows"]}
    assert list(table) == ["", "hotels", "intent", "question"]
    for without, row in (("", "metamoe"), ("hotels", "metamoe-without-hotels")):
        assert table[without] == {name: rows[row][name]["accuracy"] for name in CLIENTS}
    names = [f"metamoe{without}.test.json" for without in ("", ".without.hotels", ".without.intent")]
    whole, hotels, intent = (read_json(run / "scores" / name)["scores"] for name in names)
    assert intent != hotels != whole
    text = (run / "results.md").read_text()
    assert "MetaMoE with one client's expert left out, without training" in text and "| no expert |" in text
    cells = " | ".join(f"{table['hotels'][name]:.2f}" for name in CLIENTS)
    assert f"| hotels | {cells} |" in text
    says(run, "no such MoE", "--models", "metamoe", "--opt-out", "voting", name="evaluate")


# --- a client that joins later


def test_a_client_joins_an_moe_of_two(run):
    everyone = read_json(run / "run.json")
    write_json(run / "run.json", everyone | {"clients": ["intent", "question"]})
    unify_moe(run, "--name", "two")
    write_json(run / "run.json", everyone)
    for path in run.glob("clients/*/*"):  # from the uploads alone
        if path.name != "upload":
            shutil.rmtree(path)
    soup = ["--method", "soup", "--data", "aligned", "--selection", "dpp"]
    for message, *flags in (
        ("no such MoE", *FINAL, "--extend", "three", "--name", "new"),
        ("a --name of its own", *FINAL, "--extend", "two"),
        ("has an expert of every client", *FINAL, "--extend", "metamoe", "--name", "new"),
        ("two was made with metamoe", *soup, "--extend", "two", "--name", "new"),
        ("two was made with 1", *FINAL, "--extend", "two", "--name", "new", "--top-k", "2"),
    ):
        says(run, message, *flags)
    unify_moe(run, "--extend", "two", "--name", "start", "--train", "none")
    (old_config, old), (config, start) = moe.read(run / "moe" / "two"), moe.read(run / "moe" / "start")
    assert old_config["names"] == ["intent", "question"] and config["names"] == [
        "intent",
        "question",
        "hotels",
    ]
    same_but(old, start, slice(2))
    upload = run / "clients" / "hotels" / "upload" / "aligned-dpp"
    vectors = load_file(upload / "router.safetensors")["vectors"]
    for i, (name, layer) in enumerate(uploads.read_expert(upload).items()):
        assert torch.equal(start[f"{name}.router.vectors"][2], vectors[i])
        assert torch.equal(start[f"{name}.experts.up_proj.A"][2], layer["up_proj.lora_A"])
    model = moe.load(run / "moe" / "start")
    moe.disable_expert(model, "hotels")  # what was there is as it was
    close(logits(model), logits(moe.load(run / "moe" / "two")))
    # and the final training, on the union of all proxies
    unify_moe(run, "--extend", "two", "--name", "joined")
    joined = moe.read(run / "moe" / "joined")[1]
    assert all((joined[key] - start[key]).abs().max() > 0 for key in start)
    steps = -(-len(CLIENTS) * tiny.SIZES["proxies"] // 4)
    assert len(read_json(run / "moe" / "joined" / "losses.json")) == steps
    assert read_json(run / "moe" / "joined" / "done.json")["steps"] == steps
    assert "is there already, skipped" in unify_moe(run, "--extend", "two", "--name", "joined")


# --- experts are PEFT adapters


def test_peft_opens_each_upload_as_the_expert_that_was_trained(made, seed_model):
    from peft import PeftModel

    def backbone():
        return backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained(seed_model)

    records = [tiny.record("hotels", random.Random(i), True) for i in range(6)]
    trained = backbone()
    model = trained.add_lora(4, 8, 0)
    tiny.teach(trained, model, records, steps=6, lr=0.02)
    uploads.save_expert(model, trained, made / "hand", False)
    folders = [made / "run" / "clients" / name / "upload" / "aligned-dpp" for name in CLIENTS]
    seen = [logits(fresh())]
    for folder in (made / "hand", *folders):
        got, other = logits(PeftModel.from_pretrained(fresh(), folder / "adapter")), backbone()
        close(got, logits(backbone().with_adapter(folder)))
        expert = uploads.read_expert(folder)
        alone = moe.unify(other.model, other.ffn_names, [expert], torch.zeros(1, 2, 32))
        close(got, logits(alone), 1e-4)
        if folder.name == "hand":
            close(got, logits(model))
        assert all((got - others).abs().max() > 0.1 for others in seen)  # each is another model
        seen.append(got)
