"""A tiny seed model and a run directory with synthetic data, in the layout that federation.write_data writes."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from metamoe.records import write_records
from metamoe.rundir import write_json

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
COMMON = ["--dtype", "float32", "--device", "cpu"]

# Each topic has words of its own and an answer that is right most of the time, so that there is something to learn.
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
    import torch

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


def make_run(run_dir, seed_model, seed=0, answers="text", loss="answer", **sizes):
    """RUN/run.json, RUN/public/ and RUN/clients/*/private/, as select_proxies.py leaves them before it embeds anything."""
    sizes = SIZES | sizes
    write_json(
        run_dir / "run.json",
        {
            "backbone": "smollm2-135m",
            "seed_model": str(seed_model),
            "seed": seed,
            "clients": CLIENTS,
            "sources": {},
            "answers": answers,
            "loss": loss,
            **sizes,
        },
    )
    rng = random.Random(5)
    write_records(run_dir / "public" / "records.jsonl", public_records(rng, sizes["public_size"]))
    write_json(run_dir / "public" / "done.json", {"records": sizes["public_size"]})
    parts = {part: sizes[f"{part}_size"] for part in ("train", "validation", "test")}
    for name in CLIENTS:
        folder = run_dir / "clients" / name / "private"
        for part, count in parts.items():
            write_records(folder / f"{part}.jsonl", [record(name, rng, True) for _ in range(count)])
        write_json(folder / "done.json", {"seed": seed, **parts})


def commands(run_dir):
    """The whole pipeline: every selection, the experts, every method, the table."""
    run = ["--run-dir", str(run_dir), *COMMON]
    few = [
        "--epochs",
        "6",
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
    return [
        *(["select_proxies", *run, "--selection", rule] for rule in ("similarity", "dpp", "random")),
        *(
            ["train_expert", *run, "--data", data, "--selection", rule, *few]
            for data, rule in (("private", "similarity"), ("aligned", "dpp"), ("proxies", "random"))
        ),
        *(
            ["unify_moe", *run, "--method", method, "--lr", "0.003", "--batch-size", "4"]
            for method in ("soup", "btm", "btx", "flexolmo", "metamoe", "unrestricted")
        ),
        [
            "unify_moe",
            *run,
            "--method",
            "metamoe",
            "--name",
            "from-proxies",
            "--data",
            "proxies",
            "--selection",
            "random",
        ],
        ["evaluate", *run],
    ]


def environment(**extra):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def drive(**job):
    """Run a job of drive.py in a process of its own; returns its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        (Path(folder) / "job.json").write_text(json.dumps(job | {"report": str(report)}))
        done = subprocess.run(
            [sys.executable, REPO / "tests" / "drive.py", Path(folder) / "job.json"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert report.exists(), f"the driver ended with {done.returncode}: {done.stderr}"
        return json.loads(report.read_text()) | {"stdout": done.stdout, "stderr": done.stderr}
