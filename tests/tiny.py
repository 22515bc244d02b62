"""A tiny seed model and a run directory with synthetic data, as party.write_data lays it out."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from drive import call, snapshot
from PIL import Image

import moe
from metamoe import party
from metamoe.backbones import load_backbone, training
from metamoe.data import bigbench
from metamoe.rundir import read_json
from metamoe.sending import write_manifest

REPO = Path(__file__).resolve().parent.parent
CLIENTS = ["intent", "hotels", "question"]
SIZES = {
    "train_size": 12,
    "validation_size": 4,
    "test_size": 16,
    "public_size": 48,
    "candidates": 24,
    "proxies": 6,
}
METHODS = ["soup", "btm", "btx", "flexolmo", "metamoe", "unrestricted"]
CLOCKS = ("timing.json", "timings.json", "timings.md")
COMMON = ["--dtype", "float32", "--device", "cpu"]

# Each topic has words of its own and an answer that is right most of the time: there is something to learn.
TOPICS = {
    "intent": (
        "play music song album artist playlist tune listen radio track band concert",
        ["play", "search", "rate"],
    ),
    "hotels": (
        "room breakfast hotel staff clean bed lobby pool shower quiet view reception",
        ["positive", "negative"],
    ),
    "question": (
        "river city population film released year million people country born station opened",
        ["True", "False", "Neither"],
    ),
    "cooking": ("boil rice onion pepper sauce oven bake flour sugar butter garlic salt", ["hot", "cold"]),
}
SECRET = "zanzibar"  # in every private text and in no public one


def record(topic, rng, private):
    words, choices = TOPICS[topic][0].split(), TOPICS[topic][1]
    number = len(choices) - 1 if rng.random() < 0.8 else rng.randrange(len(choices))
    text = " ".join(
        ([SECRET] if private else []) + [str(rng.randrange(10**4))] + rng.choices(words, k=rng.randint(4, 9))
    )
    return {
        "source": topic,
        "input": text,
        "prompt": f"{text}\nAnswer:",
        "answer": " " + choices[number],
        "choices": [" " + c for c in choices],
    }


def public_records(rng, count=SIZES["public_size"]):
    return [record(list(TOPICS)[i % 4], rng, False) for i in range(count)]


def make_seed_model(folder):
    """A LLaMA of 2 layers, width 32, and a byte-level BPE tokenizer trained on the topics."""
    from metamoe.backbones.base import import_transformers

    transformers = import_transformers()
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    rng = random.Random(0)
    texts = [r["prompt"] + c for r in public_records(rng, 200) for c in r["choices"]]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<pad>", "</s>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def llama(layers=3, **tokens):
    """A random LLaMA of width 16 with 60 tokens, without a tokenizer."""
    from metamoe.backbones.base import import_transformers

    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=layers)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **tokens)).eval()


def make_run(run_dir, seed_model, seed=0, answers="text", loss="answer", clients=CLIENTS, **sizes):
    """RUN/run.json, local.json, public/ and clients/*/private/, before anything is embedded."""
    sizes, rng = SIZES | sizes, random.Random(5)
    run = {"backbone": "smollm2-135m", "seed": seed, "clients": clients, "rank": 16, "alpha": 32}
    run |= {"answers": answers, "loss": loss, **sizes}
    local = {"clients": clients, "seed_model": str(seed_model), "sources": {}, "own": {}}
    public, parts = public_records(rng, sizes["public_size"]), {}
    for name in clients:
        counts = {part: sizes[f"{part}_size"] for part in ("train", "validation", "test")}
        parts[name] = {part: [record(name, rng, True) for _ in range(n)] for part, n in counts.items()}
    backbone = load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    run_dir.mkdir(parents=True)
    party.write_data(run_dir, party.seal(run, backbone, public), local, backbone, public, parts)


def commands(run_dir):
    """The whole pipeline: every selection, the experts, every method, the table."""
    run = ["--run-dir", str(run_dir), *COMMON]
    few = "--epochs 6 --lr 0.02 --rank 4 --alpha 8 --batch-size 4 --warmup-steps 2".split()
    final = ["--lr", "0.003", "--batch-size", "4"]
    selections, experts = (
        ("similarity", "dpp", "random"),
        ("private similarity", "aligned dpp", "proxies random"),
    )
    jobs = [["select_proxies", *run, "--selection", rule] for rule in selections]
    for kind in experts:
        data, rule = kind.split()
        jobs.append(["train_expert", *run, "--data", data, "--selection", rule, *few])
    for method in ("soup", "btm", "btx", "flexolmo", "metamoe", "unrestricted"):
        jobs.append(["unify_moe", *run, "--method", method, *final])
    variant = "--method metamoe --name from-proxies --data proxies --selection random".split()
    return [*jobs, ["unify_moe", *run, *variant], ["evaluate", *run]]


def environment(**extra):
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, **extra}


def drive(repo=REPO, **job):
    """Run a job of drive.py, on the project in `repo`, in a process of its own; returns its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        (Path(folder) / "job.json").write_text(json.dumps(job | {"report": str(report)}))
        done = subprocess.run(
            [sys.executable, repo / "tests" / "drive.py", Path(folder) / "job.json"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert report.exists(), f"the driver ended with {done.returncode}: {done.stderr}"
        return json.loads(report.read_text()) | {"stdout": done.stdout, "stderr": done.stderr}


# --- stages and what they leave


def stage(name, run_dir, *args):
    return call(name, "--run-dir", run_dir, *COMMON, *args)


def refused(name, run_dir, *args, watch=None):
    """The line of a stage that must refuse: exit code 2, nothing else on stderr, nothing written."""
    watch = watch or run_dir
    before = snapshot(watch), sorted(Path(watch).rglob("*"))
    result = stage(name, run_dir, *args)
    assert result.code == 2, f"code {result.code}: {result.err or result.out}"
    assert result.err.count("\n") == 1 and result.err.startswith("error: "), result.err
    assert (snapshot(watch), sorted(Path(watch).rglob("*"))) == before
    return result.err


def fill(disk, room):
    """Write a file that leaves `room` bytes free on a small disk."""
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while ballast.write(b"x" * 1024):
                pass
        ballast.truncate(ballast.tell() - room)


def forge(upload, run, **changed):
    """Close a changed upload with a manifest that fits it, as a client with such an upload would."""
    keys = ("client", "data", "selection", "full_ffn", "privacy")
    about = {key: read_json(upload / "manifest.json")[key] for key in keys}
    (upload / "manifest.json").unlink()
    write_manifest(upload, run, about | changed)


def uploads(run_dir):
    return sorted(p.parent for p in run_dir.glob("clients/*/upload/*/manifest.json"))


def flags_of(name, run_dir, *needed):
    command = next(
        c for c in commands(run_dir) if c[0] == name and set(needed) <= set(c) and "--name" not in c
    )
    return command[3 + len(COMMON) :]


def synthetic_archive(monkeypatch, per_task=60):
    """Let bigbench.read_archive read a small archive made here."""
    clients = bigbench.CLIENTS | bigbench.MORE_CLIENTS
    names = [task for task, _, _ in clients.values()] + [
        t if not t.endswith("*") else "natural_instructions/subtask001_a" for t in bigbench.PUBLIC
    ]

    def members(archive, wanted):
        for task in names:
            member = f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json"
            if wanted(member):
                word = re.sub(r"\W|\d", "", task)
                examples = [
                    {
                        "input": f"{word} {i} says {word}{i} to {word}{i * i}",
                        "target_scores": {"yes": i % 2, "no": 1 - i % 2},
                    }
                    for i in range(per_task)
                ]
                for choices in (
                    choices for client, _, choices in clients.values() if client == task and choices
                ):
                    examples = [
                        {"input": example["input"], "target": [choices[i % 2]]}
                        for i, example in enumerate(examples)
                    ]
                yield member, {"examples": examples}

    monkeypatch.setattr(bigbench, "fetch", lambda **kwargs: None)
    monkeypatch.setattr(bigbench, "read_members", members)


# --- models and their scores


def unified(backbone, context="fixed", seed=0, **kwargs):
    """A unified MoE of three random experts that differ a lot; its routing vectors spread the tokens."""
    g = torch.Generator().manual_seed(seed)
    experts, width = [], backbone.model.config.hidden_size
    for _ in range(3):
        expert = {}
        for name in backbone.ffn_names:
            ffn = expert[name] = {"scaling": 2.0}
            for linear in backbone.ffn_linears:
                module = backbone.model.get_submodule(f"{name}.{linear}")
                ffn[f"{linear}.lora_A"] = torch.randn(4, module.in_features, generator=g) * 0.2
                ffn[f"{linear}.lora_B"] = torch.randn(module.out_features, 4, generator=g) * 0.2
        experts.append(expert)
    vectors = [torch.randn(len(backbone.ffn_names), width, generator=g) for _ in range(3)]
    return moe.unify(backbone.model, backbone.ffn_names, experts, vectors, lam=0.6, context=context, **kwargs)


def score_alone(backbone, model, prompt, answer):
    """Log-likelihood of the answer's tokens in a batch of one plain sequence."""
    ids = torch.tensor([prompt + answer])
    if hasattr(model, "routing"):
        model.routing.context_mask = (torch.arange(ids.shape[1]) < len(prompt))[None]
        model.routing.token_mask = None
    with torch.no_grad():
        log_probs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[0]
    return sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def next_logits(model, row, prompt):
    """The last token's, without cache or generate; `prompt` tokens are the "fixed" context."""
    mask = (torch.arange(len(row)) < prompt)[None] if model.routing.mode == "fixed" else None
    return logits(model, torch.tensor([row]), use_cache=False, context_mask=mask)[0, -1]


def written(model, row, new=10):
    """Greedy tokens, one whole forward for each."""
    out = list(row)
    for _ in range(new):
        out.append(int(next_logits(model, out, len(row)).argmax()))
    return out[len(row) :]


def generated(model, row, new=10, **options):
    options |= dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return model.generate(torch.tensor([row]), **options)[0, len(row) :].tolist()


def teach(backbone, model, records, steps=30, lr=0.01, after_step=None, groups=None):
    groups = groups or [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    return training.train(
        backbone,
        model,
        records,
        groups,
        steps=steps,
        batch_size=8,
        warmup_steps=3,
        optimizer="adamw",
        weight_decay=0.0,
        seed=0,
        label="test",
        after_step=after_step,
    )


# --- image folders


def picture(value, size=(8, 6), mode="RGB"):
    return Image.new(mode, size, (value % 256, 40, 200) if mode == "RGB" else None)


def save_picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value).save(path, "JPEG")


def make_coop(folder, split_file, image_folder, names, counts=(6, 3, 4), nested=False):
    """A dataset as CoOp lays it out, with `counts` images a class in each part; returns the split."""
    split, value = {}, 0
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        split[part] = []
        for label, name in enumerate(names):
            for _ in range(count):
                file = f"{name}/{value}.jpg" if nested else f"{part}_{value}.jpg"
                save_picture(folder / image_folder / file, value)
                split[part].append([file, label, name])
                value += 1
    (folder / split_file).write_text(json.dumps(split))
    return split


def make_public(folder, classes=("n01440764", "n01443537"), count=5):
    for c, name in enumerate(classes):
        for i in range(count):
            save_picture(folder / name / f"{name}_{i}.JPEG", 10 * c + i)
