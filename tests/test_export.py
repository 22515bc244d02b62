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
from tiny import CLIENTS, COMMON

import moe
from metamoe import backbones, uploads
from metamoe.backbones import training
from metamoe.rundir import read_json, write_json
from metamoe.serving import export, generation
from metamoe.serving import seed_model as seed_model_module
from metamoe.serving.seed_model import fix_torchvision

fix_torchvision()
import transformers  # noqa: E402

IDS = torch.arange(2, 42).view(2, 20)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed_model):
    """A run with MetaMoE's uploads, RUN/moe/metamoe and its export, both by one call of unify_moe.py."""
    folder = tmp_path_factory.mktemp("made")
    tiny.make_run(folder / "run", seed_model)
    few = [
        "--epochs",
        "4",
        "--lr",
        "0.02",
        "--rank",
        "4",
        "--alpha",
        "8",
        "--batch-size",
        "4",
        "--warmup-steps",
        "2",
    ]
    for name, *flags in (
        ("select_proxies", "--selection", "dpp"),
        ("train_expert", "--data", "aligned", *few),
        (
            "unify_moe",
            "--method",
            "metamoe",
            "--lr",
            "0.003",
            "--batch-size",
            "4",
            "--export",
            folder / "export",
        ),
    ):
        result = stage(name, folder / "run", *flags)
        assert result.code == 0, result.err
    return folder


@pytest.fixture
def run(tmp_path, made):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def stage(name, run_dir, *args):
    return drive.call(name, "--run-dir", run_dir, *COMMON, *args)


def metamoe(run_dir, *args):
    return stage("unify_moe", run_dir, "--method", "metamoe", "--lr", "0.003", "--batch-size", "4", *args)


def refused(run_dir, *args, name="unify_moe"):
    before = drive.snapshot(run_dir)
    result = stage(name, run_dir, *args)
    assert result.code == 2 and result.err.count("\n") == 1, result.err or result.out
    assert drive.snapshot(run_dir) == before
    return result.err


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


# --- the exported folder

LOADED = """
import json, os, sys
import torch, transformers
from safetensors.torch import save_file

job = json.load(open(sys.argv[1]))
assert not any(os.path.exists(os.path.join(path or ".", "unify_moe.py")) for path in sys.path)
out = {}
for name, folder in job["folders"].items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids, mask = torch.tensor(job["ids"]), torch.tensor(job["mask"])
    with torch.no_grad():
        out[name + ".logits"] = model(torch.tensor(job["whole"])).logits
        out[name + ".padded"] = model(ids, attention_mask=mask).logits
        for use_cache in (True, False):
            out[f"{name}.tokens.{use_cache}"] = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache)
        model.save_pretrained(name + "-again")
        again = transformers.AutoModelForCausalLM.from_pretrained(name + "-again", trust_remote_code=True)
        out[name + ".again"] = again(torch.tensor(job["whole"])).logits
        assert sorted(again.state_dict()) == sorted(model.state_dict())
        half = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        out[name + ".half"] = half(torch.tensor(job["whole"])).logits.float()
        routers = {p.dtype for n, p in half.named_parameters() if ".router." in n}
        assert routers == {torch.float32} and half.lm_head.weight.dtype == torch.bfloat16, routers
    if name == "llama":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert len(tokenizer("play some music")["input_ids"]) > 2
        try:
            transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
            raise SystemExit("loaded without its code, as a seed without experts")
        except ValueError as error:
            assert "trust_remote_code" in str(error)
save_file({key: value.contiguous() for key, value in out.items()}, "out.safetensors")
"""


def other_seed(folder, kind):
    """A tiny model of another family, with its tokenizer."""
    sizes = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    if kind == "mistral":  # a window shorter than the texts
        model = transformers.MistralForCausalLM(
            transformers.MistralConfig(**sizes, sliding_window=6, tie_word_embeddings=False)
        )
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=True))
    model.save_pretrained(folder)


def load_elsewhere(place, folders, ids, mask):
    """What LOADED writes, run in a folder of its own without this project."""
    place.mkdir()
    (place / "job.json").write_text(
        json.dumps(
            {
                "folders": {k: str(f) for k, f in folders.items()},
                "ids": ids,
                "mask": mask,
                "whole": IDS.tolist(),
            }
        )
    )
    (place / "load.py").write_text(LOADED)
    environment = {
        k: v
        for k, v in tiny.environment(HF_MODULES_CACHE=str(place / "modules")).items()
        if k != "PYTHONPATH"
    }
    done = subprocess.run(
        [sys.executable, "load.py", "job.json"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return load_file(place / "out.safetensors")


def test_an_export_runs_without_this_repository(made, seed_model, tmp_path):
    folders, want = {"llama": made / "export"}, {"llama": moe.load(made / "run" / "moe" / "metamoe")}
    for kind in ("mistral", "qwen2"):
        shutil.copytree(
            seed_model,
            tmp_path / kind,
            ignore=lambda *_: ["model.safetensors", "config.json", "generation_config.json"],
        )
        other_seed(tmp_path / kind, kind)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        names = [f"model.layers.{i}.mlp" for i in range(2)]
        experts = [
            {
                name: {
                    "scaling": 1.0,
                    "up_proj.lora_A": torch.randn(3, 32),
                    "up_proj.lora_B": torch.randn(48, 3),
                    "down_proj.lora_A": torch.randn(2, 48),
                    "down_proj.lora_B": torch.randn(32, 2),
                }
                for name in names
            }
            for _ in range(2)
        ]
        source = tmp_path / "moe" / kind
        moe.save(
            moe.unify(
                model,
                names,
                experts,
                torch.randn(2, 2, 32),
                lam=0.6,
                top_k=2,
                offset=True,
                context="none" if kind == "qwen2" else "fixed",
            ),
            source,
        )
        export.export(
            {"backbone": "smollm2-135m", "seed_model": str(tmp_path / kind)},
            source,
            tmp_path / f"export-{kind}",
            False,
        )
        folders[kind], want[kind] = (
            tmp_path / f"export-{kind}",
            moe.load(source, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)),
        )
    ids, mask = [[0, 0, 0, 5, 9, 30], [7, 8, 9, 10, 11, 12]], [[0, 0, 0, 1, 1, 1], [1] * 6]
    out = load_elsewhere(tmp_path / "elsewhere", folders, ids, mask)
    for name, model in want.items():
        assert model.routing.mode == ("none" if name == "qwen2" else "fixed")
        model.routing.mode = "none" if name == "qwen2" else "prefix"
        mine = logits(model)
        for key in ("logits", "again"):
            torch.testing.assert_close(out[f"{name}.{key}"], mine, atol=1e-5, rtol=1e-5)
        assert mine.std() > 0.3 and (out[f"{name}.half"] - mine).abs().mean() < 0.2 * mine.std()
        padded = logits(model, torch.tensor(ids), attention_mask=torch.tensor(mask))
        torch.testing.assert_close(
            out[f"{name}.padded"][torch.tensor(mask) == 1],
            padded[torch.tensor(mask) == 1],
            atol=1e-5,
            rtol=1e-5,
        )
        tokens = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
        )
        assert torch.equal(out[f"{name}.tokens.True"], tokens) and torch.equal(
            out[f"{name}.tokens.False"], tokens
        )
        model.routing.mode = "fixed"
        assert (logits(model) - mine).abs().max() > 1e-3  # the other context would have been noticed


def test_what_is_in_an_export(made, seed_model):
    export, run_dir = made / "export", made / "run"
    files = {p.name for p in export.iterdir()}
    assert files >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "modeling_metamoe.py",
        "moe.py",
        "generation.py",
        "seed_model.py",
        "done.json",
    }
    seed, own = load_file(seed_model / "model.safetensors"), load_file(export / "model.safetensors")
    assert all(torch.equal(own[name], t) for name, t in seed.items())  # the seed's, under the seed's names
    added = load_file(run_dir / "moe" / "metamoe" / "moe.safetensors")
    assert own.keys() == seed.keys() | added.keys() and all(
        torch.equal(own[name], t) for name, t in added.items()
    )
    for source in (moe, generation, seed_model_module):
        assert (export / Path(source.__file__).name).read_bytes() == Path(source.__file__).read_bytes()
    secrets = [tiny.SECRET, str(run_dir), str(seed_model), str(Path.home()), str(tiny.REPO)]
    for path in export.iterdir():
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path


def test_export_of_a_model_that_is_there(run, tmp_path):
    before = drive.snapshot(run / "moe")
    result = metamoe(run, "--export", tmp_path / "a")
    assert (
        result.code == 0
        and "is there already, skipped" in result.out
        and "as a Hugging Face folder" in result.out
    )
    assert metamoe(run, "--export", tmp_path / "a").out.count("is there already, skipped") == 2
    assert metamoe(run, "--without", "hotels", "--export", tmp_path / "b").code == 0
    assert read_json(tmp_path / "b" / "config.json")["moe"]["names"] == ["intent", "question"]
    left = drive.snapshot(run / "moe")
    assert {path: left[path] for path in before} == before
    assert "model 'metamoe' there" in refused(
        run, "--method", "metamoe", "--without", "hotels", "--export", tmp_path / "a"
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("")
    code = tiny.REPO / "metamoe" / "serving"  # not an export, for all its name and files
    say = {
        ("metamoe", tmp_path / "c"): "holds no export",
        ("metamoe", code): "holds no export",
        ("metamoe", tmp_path / "c" / "thesis.tex"): "holds no export",
        ("soup", tmp_path / "d"): "an MoE of a language model alone",
    }
    for (method, folder), message in say.items():
        assert message in refused(run, "--method", method, "--export", folder)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.tex"] and not (tmp_path / "d").exists()


@pytest.mark.slow
def test_the_real_seed_from_uploads_to_an_export(tmp_path):
    """The default's own seed on a few dozen texts: all that its users get."""
    run, seed = tmp_path / "run", backbones.default_seed("smollm2-135m")
    tiny.make_run(run, seed)
    for name, *flags in (
        ("select_proxies", "--selection", "dpp"),
        (
            "train_expert",
            "--data",
            "aligned",
            "--epochs",
            "3",
            "--lr",
            "0.001",
            "--batch-size",
            "6",
            "--warmup-steps",
            "1",
        ),
        ("unify_moe", "--method", "metamoe", "--batch-size", "6", "--export", tmp_path / "export"),
        *(
            ("evaluate", "--models", "zeroshot", "metamoe", "--scoring", scoring)
            for scoring in ("letters", "generate")
        ),
        ("evaluate", "--models", "zeroshot", "metamoe", "--opt-out"),
    ):
        result = stage(name, run, *flags)
        assert result.code == 0, result.err
    found = {
        scoring: {row["model"]: row["average"] for row in read_json(run / f"results{scoring}.json")["rows"]}
        for scoring in ("", ".letters", ".generate")
    }
    assert found[""]["metamoe"] > found[""]["zeroshot"] + 5 and all(
        0 <= average <= 100 for rows in found.values() for average in rows.values()
    )
    table = read_json(run / "results.json")["opt_out"]["metamoe"]
    assert set(table) == {"", *CLIENTS}
    model, tokenizer = moe.load(run / "moe" / "metamoe"), transformers.AutoTokenizer.from_pretrained(seed)
    batch = tokenizer("play some quiet jazz\nAnswer:", return_tensors="pt")
    expected, whole = (
        model.generate(**batch, max_new_tokens=6, do_sample=False),
        logits(model, batch["input_ids"]),
    )
    moe.disable_expert(model, "intent")
    assert (logits(model, batch["input_ids"]) - whole).abs().max() > 1e-3
    moe.enable_expert(model, "intent")
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)
    out = load_elsewhere(
        tmp_path / "elsewhere",
        {"llama": tmp_path / "export"},
        [[0, 0, 0, 5, 9, 30], [7, 8, 9, 10, 11, 12]],
        [[0, 0, 0, 1, 1, 1], [1] * 6],
    )
    model.routing.mode = "prefix"
    torch.testing.assert_close(out["llama.logits"], logits(model), atol=1e-5, rtol=1e-5)


# --- opting out and in


def test_left_out_on_disk_is_disabled_in_memory(run):
    home = run / "moe" / "metamoe"
    whole, moved = logits(moe.load(home)), 0
    for name in CLIENTS:
        assert metamoe(run, "--without", name).code == 0
        rest = [other for other in CLIENTS if other != name]
        config, tensors = moe.read(run / "moe" / f"metamoe-without-{name}")
        assert config["names"] == rest and read_json(run / "moe" / f"metamoe-without-{name}" / "done.json")[
            "without"
        ] == [name]
        old, kept = moe.read(home)[1], [CLIENTS.index(other) for other in rest]
        assert tensors.keys() == old.keys()
        assert all(
            torch.equal(t, old[key] if key.endswith(".lam") else old[key][kept]) for key, t in tensors.items()
        )
        model = moe.load(home)
        moe.disable_expert(model, name)
        torch.testing.assert_close(
            logits(moe.load(run / "moe" / f"metamoe-without-{name}")), logits(model), atol=1e-5, rtol=1e-5
        )
        moved += not torch.equal(logits(model), whole)
        moe.enable_expert(model, name)
        assert torch.equal(logits(model), whole)
    assert moved >= 2  # one may have no token of these
    assert "is there already, skipped" in metamoe(run, "--without", "hotels").out
    # one after the other, down to one
    assert metamoe(run, "--name", "metamoe-without-hotels", "--without", "intent").code == 0
    last = run / "moe" / "metamoe-without-hotels-without-intent"
    assert moe.read(last)[0]["names"] == ["question"] and read_json(last / "done.json")["without"] == [
        "hotels",
        "intent",
    ]
    assert "'question' is the last expert" in refused(
        run, "--method", "metamoe", "--name", last.name, "--without", "question"
    )
    assert "no expert is called 'bars'; there are intent, hotels, question" in refused(
        run, "--method", "metamoe", "--without", "bars"
    )
    assert "there is no MoE flexolmo" in refused(run, "--method", "flexolmo", "--without", "intent")
    assert "metamoe was made with metamoe" in refused(
        run, "--method", "btx", "--name", "metamoe", "--without", "intent"
    )
    assert "one after the other" in refused(
        run, "--method", "metamoe", "--without", "intent", "--extend", "metamoe"
    )


def test_the_opt_out_table(run):
    assert metamoe(run, "--without", "hotels").code == 0
    result = stage("evaluate", run, "--models", "metamoe", "metamoe-without-hotels", "--opt-out")
    assert result.code == 0, result.err
    found = read_json(run / "results.json")
    table, rows = found["opt_out"]["metamoe"], {row["model"]: row["clients"] for row in found["rows"]}
    assert list(table) == ["", "hotels", "intent", "question"]
    for without, row in (("", "metamoe"), ("hotels", "metamoe-without-hotels")):
        assert table[without] == {name: rows[row][name]["accuracy"] for name in CLIENTS}
    scores = {p.name: read_json(p)["scores"] for p in (run / "scores").iterdir()}
    assert (
        scores["metamoe.without.intent.test.json"]
        != scores["metamoe.without.hotels.test.json"]
        != scores["metamoe.test.json"]
    )
    text = (run / "results.md").read_text()
    assert "MetaMoE with one client's expert left out, without training" in text and "| no expert |" in text
    cells = " | ".join(f"{table['hotels'][name]:.2f}" for name in CLIENTS)
    assert f"| hotels | {cells} |" in text
    assert "no such MoE" in refused(run, "--models", "metamoe", "--opt-out", "voting", name="evaluate")


# --- a client that joins later


def test_a_client_joins_an_moe_of_two(run, tmp_path):
    everyone = read_json(run / "run.json")
    write_json(run / "run.json", everyone | {"clients": ["intent", "question"]})
    assert metamoe(run, "--name", "two").code == 0
    write_json(run / "run.json", everyone)
    for path in run.glob("clients/*/*"):  # from the uploads alone
        if path.name != "upload":
            shutil.rmtree(path)
    flags = ["--method", "metamoe", "--lr", "0.003", "--batch-size", "4"]
    assert "no such MoE" in refused(run, *flags, "--extend", "three", "--name", "new")
    assert "a --name of its own" in refused(run, *flags, "--extend", "two")
    assert "has an expert of every client" in refused(run, *flags, "--extend", "metamoe", "--name", "new")
    assert "two was made with metamoe" in refused(
        run, "--method", "soup", "--data", "aligned", "--selection", "dpp", "--extend", "two", "--name", "new"
    )
    assert "two was made with 1" in refused(run, *flags, "--extend", "two", "--name", "new", "--top-k", "2")
    assert metamoe(run, "--extend", "two", "--name", "start", "--train", "none").code == 0
    (old_config, old), (config, start) = moe.read(run / "moe" / "two"), moe.read(run / "moe" / "start")
    assert old_config["names"] == ["intent", "question"] and config["names"] == [
        "intent",
        "question",
        "hotels",
    ]
    assert all(
        torch.equal(start[key] if key.endswith(".lam") else start[key][:2], t) for key, t in old.items()
    )
    upload = run / "clients" / "hotels" / "upload" / "aligned-dpp"
    model, vectors, expert = (
        moe.load(run / "moe" / "start"),
        load_file(upload / "router.safetensors")["vectors"],
        uploads.read_expert(upload),
    )
    for i, (name, layer) in enumerate(expert.items()):
        assert torch.equal(start[f"{name}.router.vectors"][2], vectors[i])
        assert torch.equal(start[f"{name}.experts.up_proj.A"][2], layer["up_proj.lora_A"])
    moe.disable_expert(model, "hotels")  # what was there is as it was
    torch.testing.assert_close(logits(model), logits(moe.load(run / "moe" / "two")), atol=1e-5, rtol=1e-5)
    # and the final training, on the union of all proxies
    result = metamoe(run, "--extend", "two", "--name", "joined")
    assert result.code == 0, result.err
    _, joined = moe.read(run / "moe" / "joined")
    assert all((joined[key] - start[key]).abs().max() > 0 for key in start)
    steps = len(read_json(run / "moe" / "joined" / "losses.json"))
    assert (
        steps
        == -(-len(CLIENTS) * tiny.SIZES["proxies"] // 4)
        == read_json(run / "moe" / "joined" / "done.json")["steps"]
    )
    assert "is there already, skipped" in metamoe(run, "--extend", "two", "--name", "joined").out


# --- experts are PEFT adapters


def test_peft_opens_each_upload_as_the_expert_that_was_trained(made, seed_model):
    from peft import PeftModel

    records = [tiny.record("hotels", random.Random(i), True) for i in range(6)]
    trained = backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")
    model = trained.add_lora(4, 8, 0)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.02}]
    training.train(
        trained,
        model,
        records,
        groups,
        steps=6,
        batch_size=3,
        warmup_steps=0,
        optimizer="adamw",
        weight_decay=0.0,
        seed=0,
        label="expert",
    )

    uploads.save_expert(model, trained, made / "hand", False)
    folders = {"as trained": made / "hand"} | {
        name: made / "run" / "clients" / name / "upload" / "aligned-dpp" for name in CLIENTS
    }
    seen = [logits(transformers.AutoModelForCausalLM.from_pretrained(seed_model))]
    for name, folder in folders.items():
        fresh = transformers.AutoModelForCausalLM.from_pretrained(seed_model)
        got = logits(PeftModel.from_pretrained(fresh, folder / "adapter"))
        backbone = backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")
        torch.testing.assert_close(got, logits(backbone.with_adapter(folder)), atol=1e-5, rtol=1e-5)
        backbone = backbones.load_backbone("smollm2-135m", str(seed_model), "cpu", "float32")
        alone = moe.unify(
            backbone.model, backbone.ffn_names, [uploads.read_expert(folder)], torch.zeros(1, 2, 32)
        )
        torch.testing.assert_close(got, logits(alone), atol=1e-4, rtol=1e-4)
        if name == "as trained":
            torch.testing.assert_close(got, logits(model), atol=1e-5, rtol=1e-5)
        assert all((got - other).abs().max() > 0.1 for other in seen)  # each is another model
        seen.append(got)
