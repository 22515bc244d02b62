"""The unified model as users get it: the exported folder, experts that leave, clients that join, adapters."""

import json
import random
import re
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
from metamoe import backbones, sending, uploads
from metamoe.rundir import finish, read_json, write_json
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
METAMOE = ["--method", "metamoe"]


def done(run_dir, name, *flags):
    result = stage(name, run_dir, *flags)
    assert result.code == 0, result.err
    return result.out


def unify_moe(run_dir, *flags):
    return done(run_dir, "unify_moe", *FINAL, *flags)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("exported")
    unify_moe(shutil.copytree(finished[0], folder / "run"), "--export", folder / "export")
    return folder


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# --- the exported folder

LOADED = """
import importlib, json, os, pickle
import sys
import torch, transformers
from safetensors.torch import save_file

job, options, out = json.load(open("job.json")), dict(trust_remote_code=True), {}
assert not any(os.path.exists(os.path.join(path or ".", "unify_moe.py")) for path in sys.path)
ids, mask, whole = (torch.tensor(job[key]) for key in ("ids", "mask", "whole"))
load = transformers.AutoModelForCausalLM.from_pretrained
new = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
for name, folder in job["folders"].items():
    model = load(folder, **options)
    with torch.no_grad():
        out[name + ".logits"] = model(whole).logits
        out[name + ".padded"] = model(ids, attention_mask=mask).logits
        out[name + ".tokens"] = model.generate(ids, attention_mask=mask, **new)
        slow = model.generate(ids, attention_mask=mask, use_cache=False, **new)
        assert torch.equal(slow, out[name + ".tokens"])
        model.save_pretrained(name + "-again")
        again = load(name + "-again", **options)
        out[name + ".again"] = again(whole).logits
        assert sorted(again.state_dict()) == sorted(model.state_dict())
        code = importlib.import_module(type(model).__module__.rpartition(".")[0] + ".moe")
        code.disable_expert(model, model.moe_config["names"][0])  # and whatever is made of it stays so
        out[name + ".without"] = model(whole).logits
        tokens = model.generate(ids, attention_mask=mask, **new)
        model.save_pretrained(name + "-without")
        for other in (load(name + "-without", **options), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(whole).logits, out[name + ".without"])
            assert torch.equal(other.generate(ids, attention_mask=mask, **new), tokens)
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
    job = {"ids": PADDED.tolist(), "mask": MASK.tolist(), "whole": IDS.tolist(), "folders": folders}
    (place / "job.json").write_text(json.dumps(job, default=str))
    environment = tiny.environment(HF_MODULES_CACHE=str(place / "modules"))
    environment.pop("PYTHONPATH", None)
    (place / "load.py").write_text(LOADED)
    ended = subprocess.run([sys.executable, "load.py"], cwd=place, env=environment, stderr=subprocess.PIPE)
    assert ended.returncode == 0, ended.stderr.decode()
    return load_file(place / "out.safetensors")


def export_other(folder, kind, seed_model):
    """Export an MoE of a seed model of another family; returns the MoE, loaded, and the export's folder."""
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    own = {"mistral": {"sliding_window": 6}, "qwen2": {"tie_word_embeddings": True}}  # 6: below the texts'
    config = transformers.AutoConfig.for_model(kind, **{"tie_word_embeddings": False} | sizes | own[kind])
    path = shutil.copytree(seed_model, folder / kind)
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    # experts of different ranks and without one of the linears
    shapes = {"up_proj.lora_A": (3, 32), "up_proj.lora_B": (48, 3)}
    shapes |= {"down_proj.lora_A": (2, 48), "down_proj.lora_B": (32, 2)}
    names, experts = [f"model.layers.{i}.mlp" for i in range(2)], [{}, {}]
    for expert in experts:
        for name in names:
            expert[name] = {"scaling": 1.0} | {key: torch.randn(shape) for key, shape in shapes.items()}
    options = dict(lam=0.6, top_k=2, offset=True, context="none" if kind == "qwen2" else "fixed")
    plain = transformers.AutoModelForCausalLM.from_pretrained
    source, target = folder / "moe" / kind, folder / f"export-{kind}"
    moe.save(moe.unify(plain(path), names, experts, torch.randn(2, 2, 32), **options), source)
    finish(source, {})
    export.export({"backbone": "smollm2-135m"}, {"seed_model": str(path)}, source, target, False)
    return moe.load(source, plain(path)), target


def test_an_export_runs_without_this_repository(exported, seed_model, tmp_path):
    folders, models = (
        {"llama": exported / "export"},
        {"llama": moe.load(exported / "run" / "moe" / "metamoe")},
    )
    for kind in ("mistral", "qwen2"):
        models[kind], folders[kind] = export_other(tmp_path, kind, seed_model)
    out = load_elsewhere(tmp_path / "elsewhere", folders)
    for name, model in models.items():
        assert model.routing.mode == ("none" if name == "qwen2" else "fixed")
        model.routing.mode = "none" if name == "qwen2" else "prefix"
        mine = logits(model)
        close(out[f"{name}.logits"], mine)
        close(out[f"{name}.again"], mine)
        assert mine.std() > 0.3 and (out[f"{name}.half"] - mine).abs().mean() < 0.2 * mine.std()
        close(out[f"{name}.padded"][MASK == 1], logits(model, PADDED, attention_mask=MASK)[MASK == 1])
        new = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert torch.equal(out[f"{name}.tokens"], model.generate(PADDED, attention_mask=MASK, **new))
        moe.disable_expert(model, model.moe_config["names"][0])
        close(out[f"{name}.without"], logits(model))
        moe.enable_expert(model, model.moe_config["names"][0])
        model.routing.mode = "fixed"
        assert (logits(model) - mine).abs().max() > 1e-3  # the other context would have been noticed


def test_what_is_in_an_export(exported, seed_model):
    folder, run_dir = exported / "export", exported / "run"
    files = "config.json model.safetensors tokenizer.json tokenizer_config.json done.json modeling_metamoe.py"
    assert {p.name for p in folder.iterdir()} >= {*files.split(), "moe.py", "generation.py", "seed_model.py"}
    seed, own = load_file(seed_model / "model.safetensors"), load_file(folder / "model.safetensors")
    added = load_file(run_dir / "moe" / "metamoe" / "moe.safetensors")
    added = {re.sub(r"(\.experts\.\w+)\.", r"\1_", name): t for name, t in added.items()}
    assert own.keys() == seed.keys() | added.keys()  # the seed model's under their own names
    assert all(torch.equal(own[name], t) for name, t in (seed | added).items())
    for source in (moe, generation, seed_model_module):
        assert (folder / Path(source.__file__).name).read_bytes() == Path(source.__file__).read_bytes()
    secrets = [tiny.SECRET, str(run_dir), str(seed_model), str(Path.home()), str(tiny.REPO)]
    for path in folder.iterdir():
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path


def test_export_of_a_model_that_is_there(run, tmp_path):
    before = drive.snapshot(run / "moe")
    out = unify_moe(run, "--export", tmp_path / "a")
    assert "is there already, skipped" in out and "as a Hugging Face folder" in out
    assert unify_moe(run, "--export", tmp_path / "a").count("is there already, skipped") == 2
    without = [*METAMOE, "--without", "hotels", "--export"]
    done(run, "unify_moe", *without, tmp_path / "b")
    assert read_json(tmp_path / "b" / "config.json")["moe"]["names"] == ["intent", "question"]
    assert drive.snapshot(run / "moe").items() >= before.items()
    assert "model 'metamoe' there" in refused("unify_moe", run, *without, tmp_path / "a")
    full, code = tmp_path / "c", tiny.REPO / "metamoe" / "serving"  # code: no export, for all its files
    full.mkdir()
    (full / "thesis.tex").write_text("")
    for folder in (full, code, full / "thesis.tex"):
        assert "holds no export" in refused("unify_moe", run, *METAMOE, "--export", folder)
    soup = ["--method", "soup", "--export", tmp_path / "d"]
    assert "an MoE of a language model alone" in refused("unify_moe", run, *soup)
    assert [p.name for p in full.iterdir()] == ["thesis.tex"] and not (tmp_path / "d").exists()


@pytest.mark.slow
def test_the_real_seed_model_from_uploads_to_an_export(tmp_path):
    """The default's own seed model on a few texts: all that its users get."""
    run, seed_model = tmp_path / "run", backbones.default_seed("smollm2-135m")
    sizes = dict(train_size=3, validation_size=1, test_size=3, public_size=12, candidates=6, proxies=3)
    tiny.make_run(run, seed_model, **sizes)
    training = "--epochs 4 --lr 0.003 --batch-size 6 --warmup-steps 1"
    done(run, "select_proxies", "--selection", "dpp")
    done(run, "train_expert", "--data", "aligned", *training.split())
    unify_moe(run, "--export", tmp_path / "export")  # model and export in one call
    for flags in (["--scoring", "letters"], ["--scoring", "generate"], ["--opt-out"]):
        done(run, "evaluate", "--models", "zeroshot", "metamoe", *flags)
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


def same_but(new, old, rows):
    """The tensors `new` are those rows of `old`, lambda the same."""
    assert new.keys() == old.keys()
    for key, t in new.items():
        assert torch.equal(t, old[key] if key.endswith(".lam") else old[key][rows])


def test_left_out_on_disk_is_disabled_in_memory(run):
    home = run / "moe" / "metamoe"
    model, moved = moe.load(home), 0
    whole = logits(model)
    for name in CLIENTS:
        unify_moe(run, "--without", name)
        folder, rest = run / "moe" / f"metamoe-without-{name}", [c for c in CLIENTS if c != name]
        config, tensors = moe.read(folder)
        assert config["names"] == rest and read_json(folder / "done.json")["without"] == [name]
        same_but(tensors, moe.read(home)[1], [CLIENTS.index(other) for other in rest])
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
        ("there is no MoE bars", "metamoe", "--name", "bars", "--without", "intent"),
        ("metamoe was made with metamoe", "btx", "--name", "metamoe", "--without", "intent"),
        ("one after the other", "metamoe", "--without", "intent", "--extend", "metamoe"),
    ):
        assert message in refused("unify_moe", run, "--method", method, *flags)


def test_the_opt_out_table(run):
    unify_moe(run, "--without", "hotels")
    done(run, "evaluate", "--models", "metamoe", "metamoe-without-hotels", "--opt-out")
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
    assert "no such MoE" in refused("evaluate", run, "--models", "metamoe", "--opt-out", "voting")


def test_a_client_joins_an_moe_of_two(run):
    everyone, home = read_json(run / "run.json"), run / "moe"
    write_json(run / "run.json", everyone | {"clients": ["intent", "question"]})
    unify_moe(run, "--name", "two")
    write_json(run / "run.json", everyone)
    for path in run.glob("clients/*/*"):  # from the uploads alone
        if path.name != "upload":
            shutil.rmtree(path)
    soup, new = ["--method", "soup", "--data", "aligned", "--selection", "dpp"], ["--name", "new"]
    for message, *flags in (
        ("no such MoE", *FINAL, "--extend", "three", *new),
        ("a --name of its own", *FINAL, "--extend", "two"),
        ("has an expert of every client", *FINAL, "--extend", "metamoe", *new),
        ("two was made with metamoe", *soup, "--extend", "two", *new),
        ("two was made with 1", *FINAL, "--extend", "two", *new, "--top-k", "2"),
    ):
        assert message in refused("unify_moe", run, *flags)
    unify_moe(run, "--extend", "two", "--name", "start", "--train", "none")
    (old_config, old), (config, start) = moe.read(home / "two"), moe.read(home / "start")
    assert old_config["names"] == ["intent", "question"]
    assert config["names"] == ["intent", "question", "hotels"]
    same_but(old, start, slice(2))
    upload = run / "clients" / "hotels" / "upload" / "aligned-dpp"
    vectors = load_file(upload / "router.safetensors")["vectors"]
    for i, (name, layer) in enumerate(uploads.read_expert(upload).items()):
        assert torch.equal(start[f"{name}.router.vectors"][2], vectors[i])
        assert torch.equal(start[f"{name}.experts.up_proj.A"][2], layer["up_proj.lora_A"])
    model = moe.load(home / "start")
    moe.disable_expert(model, "hotels")  # what was there is as it was
    close(logits(model), logits(moe.load(home / "two")))
    # and the final training, on the union of all proxies
    unify_moe(run, "--extend", "two", "--name", "joined")
    joined = home / "joined"
    assert all((t - start[key]).abs().max() > 0 for key, t in moe.read(joined)[1].items())
    steps = -(-len(CLIENTS) * tiny.SIZES["proxies"] // 4)
    assert len(read_json(joined / "losses.json")) == read_json(joined / "done.json")["steps"] == steps
    assert "is there already, skipped" in unify_moe(run, "--extend", "two", "--name", "joined")


def test_peft_opens_each_upload_as_the_expert_that_was_trained(finished, seed_model, tmp_path):
    from peft import PeftModel

    def backbone():
        return backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")

    records = [tiny.record("hotels", random.Random(i), True) for i in range(6)]
    trained = backbone()
    model = trained.add_lora(4, 8, 0)
    tiny.teach(trained, model, records, steps=6, lr=0.02)
    sending.save_expert(model, trained, tmp_path / "hand", False)
    folders = [finished[0] / "clients" / name / "upload" / "aligned-dpp" for name in CLIENTS]
    seen = [logits(backbone().model)]
    for folder in (tmp_path / "hand", *folders):
        plain = transformers.AutoModelForCausalLM.from_pretrained(seed_model)
        got, other = logits(PeftModel.from_pretrained(plain, folder / "adapter")), backbone()
        expert = uploads.read_expert(folder)
        close(got, logits(backbone().with_expert(expert)))
        alone = moe.unify(other.model, other.ffn_names, [expert], torch.zeros(1, 2, 32))
        close(got, logits(alone), 1e-4)
        if folder.name == "hand":
            close(got, logits(model))
        assert all((got - others).abs().max() > 0.1 for others in seen)  # each is another model
        seen.append(got)
