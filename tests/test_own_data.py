"""Data of a user: files and folders as clients and as the public set, lazy records, a client that joins."""

import json
import pickle
import random
import shutil
import subprocess
import sys

import drive
import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import flags_of, refused, stage, synthetic_archive

from metamoe import backbones, party
from metamoe.backbones import text
from metamoe.data import user
from metamoe.errors import UserError
from metamoe.records import Records, read_records, write_records
from metamoe.rundir import read_json, settings_of

SHARES = {"train": 0, "validation": 0, "test": 0}
FEW = ["--candidates", "24", "--proxies", "6"]


def question(i, word="red"):
    prompt = f"Is thing {i} {word}?\nAnswer:"
    return {"prompt": prompt, "choices": ["yes", "no", f"{word} indeed"], "answer": "no"}


def instruction(i, word="red"):
    return {"prompt": f"Describe the {word} thing number {i}.", "response": f"It is {word}, and {i} tall."}


def write_lines(path, rows):
    with open(path, "w") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


def load(path, sizes=SHARES, seed=0, **more):
    parts = user.own_text("acme", str(path), sizes, seed, **more)
    return {part: list(records) for part, records in parts.items()}


def counts(parts):
    return [len(parts[part]) for part in ("train", "validation", "test")]


def state(run_dir):
    """What a run directory holds, less clocks and the flags of the last command."""
    return drive.snapshot(run_dir, "timing.json", "settings.json")


def done_of(run_dir, name):
    return settings_of(run_dir / "clients" / name / "private")


def own_run(backbone, client, path):
    """(agreement, local) of a run whose client and public set are both in `path`."""
    run = {"backbone": backbone, "seed": 0, "clients": [client], "candidates": 20, "proxies": 4}
    run |= dict.fromkeys(("public_size", "train_size", "validation_size", "test_size"), 0)
    run |= {"seed_model": {"weights": "0" * 64, "tokenizer": "0" * 64}, "rank": 4, "alpha": 8}
    own = {client: {"path": str(path)} | SHARES}
    return run, {"clients": [client], "seed_model": "", "sources": {"public": str(path)}, "own": own}


class NoModel:
    """Of a seed model what write_data asks for."""

    ffn_names, width = [], 0


def read_and_write(run_dir, run, local):
    run_dir.mkdir()
    public, parts = party.read_data(run_dir, run, local)
    party.write_data(run_dir, party.seal(run, NoModel, public), local, NoModel, public, parts)


def passes(name, run_dir, *flags):
    """What a stage that must succeed prints."""
    result = stage(name, run_dir, *flags)
    assert result.code == 0, result.err
    return result.out


def test_lazy_records_are_used_as_a_list_is(tmp_path):
    rows = [{"n": i, "text": "žluťoučký\u2028kůň " * (i % 3)} for i in range(20)]
    write_records(tmp_path / "r.jsonl", rows)
    records = read_records(tmp_path / "r.jsonl")
    more, longer = records + [{"n": 20}] + [{"n": 21}], [*rows, {"n": 20}, {"n": 21}]
    for lazy, plain in ((records, rows), (more, longer)):
        assert len(lazy) == len(plain) and list(lazy) == plain and bool(lazy)
        assert [lazy[index] for index in (*range(len(plain)), -1, np.int64(3))] == [
            *plain,
            plain[-1],
            plain[3],
        ]
        parts = slice(2, 9), slice(None, None, -3), slice(-4, None), slice(15, 99), slice(18, 21), slice(0)
        assert [lazy[part] for part in parts] == [plain[part] for part in parts]
        for index in (len(plain), -len(plain) - 1):
            with pytest.raises(IndexError):
                lazy[index]
    again = pickle.dumps(more)
    assert list(pickle.loads(again)) == longer and len(again) < 1000
    assert list(zip(records, records, strict=True)) == [(row, row) for row in rows]  # two readers at once
    some = Records(records.path, np.array(records.starts)[[3, 5]], lambda record: record["n"])
    assert list(some) == [3, 5] and some[1] == 5

    write_records(tmp_path / "none.jsonl", [])
    assert list(read_records(tmp_path / "none.jsonl")) == [] and not read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="select_proxies.py first"):
        read_records(tmp_path / "missing.jsonl")


def test_windows_give_the_features_of_one_pass(seed_model, monkeypatch):
    """Texts are grouped by length within a window: other batches, the same features, and a kill goes on in
    any window."""
    backbone = backbones.load_backbone("smollm2-135m", seed_model, "cpu", "float32")
    records = tiny.public_records(random.Random(0), 70)
    whole, vectors = backbone.features(records), backbone.routing_vectors(backbone.model, records)
    monkeypatch.setattr(text, "WINDOW", 32)
    assert np.allclose(backbone.features(records), whole, atol=1e-5)
    assert np.allclose(backbone.routing_vectors(backbone.model, records), vectors, atol=1e-5)
    batches = [indices for indices, _ in backbone.embed(records)]
    assert sorted(sum(map(list, batches), [])) == list(range(70)) and len(batches) >= 3
    for skip in range(len(batches) + 1):
        assert [indices for indices, _ in backbone.embed(records, skip=skip)] == batches[skip:]


RECORDS = [  # (a line, and its prompt, answer and choices as they are used)
    ({"prompt": "Q: why?\nA:", "response": "so"}, "Q: why?\nA:", " so"),
    # the same text: tokenizers take a space with the word after it
    ({"prompt": "Q: why?\nA: ", "response": "so \n"}, "Q: why?\nA:", " so"),
    ({"prompt": "def f(x):\n", "response": "    return x"}, "def f(x):\n", "    return x"),
    ({"prompt": "Translate.\n", "response": "ja"}, "Translate.\n", "ja"),
    ({"prompt": "A poem:", "response": "\n\nRoses"}, "A poem:", "\n\nRoses"),
    ({"prompt": "  indented", "response": "yes", "choices": None, "id": 7}, "  indented", " yes"),
    ({"prompt": "Q", "choices": ["a", " b "], "answer": "b"}, "Q", " b", " a", " b"),
    ({"prompt": "Q", "choices": ["a", "b"], "answer": 0}, "Q", " a", " a", " b"),
    ({"prompt": "Q", "choices": ["1", "0"], "answer": "1"}, "Q", " 1", " 1", " 0"),  # a text, not an index
    ({"prompt": "Q\n", "choices": ["a", "b"], "answer": 1}, "Q\n", "b", "a", "b"),
]


def test_a_record_is_used_as_it_is_written():
    for raw, prompt, answer, *choices in RECORDS:
        expected = {"source": "s", "input": raw["prompt"].strip(), "prompt": prompt, "answer": answer}
        if choices:
            expected["choices"] = choices
        assert user.own_record(raw, "s") == expected


BAD = {
    "{'prompt': 1}": "not JSON",
    '["a"]': "not a JSON object (list)",
    '{"choices": ["a", "b"], "answer": "a"}': "no key 'prompt'",
    '{"prompt": "Q"}': "no key 'response'",
    '{"prompt": "Q", "choices": ["a", "b"]}': "no key 'answer'",
    '{"prompt": " ", "response": "a"}': "empty prompt",
    '{"prompt": "Q", "response": "\\n"}': "empty response",
    '{"prompt": "Q", "choices": ["a", ""], "answer": "a"}': "empty choice",
    '{"prompt": 3, "response": "a"}': "'prompt' is not a string (int)",
    '{"prompt": "Q", "response": ["a"]}': "'response' is not a string (list)",
    '{"prompt": "Q", "choices": "ab", "answer": "a"}': "'choices' is not a list of strings",
    '{"prompt": "Q", "choices": [1, 2], "answer": 1}': "'choices' is not a list of strings",
    '{"prompt": "Q", "choices": ["a"], "answer": "a"}': "fewer than 2 choices",
    '{"prompt": "Q", "choices": ["a", "a "], "answer": "a"}': "two choices are 'a'",
    '{"prompt": "Q", "choices": ["a", "b"], "answer": "c"}': "'answer' 'c' is not among the choices",
    '{"prompt": "Q", "choices": ["a", "b"], "answer": 2}': "'answer' 2 is no index into the 2 choices",
    '{"prompt": "Q", "choices": ["a", "b"], "answer": true}': "neither a choice's text nor its index (bool)",
    '{"prompt": "Q \\ud800", "response": "a"}': "half of a surrogate pair",
    '{"prompt": "Q", "response": "a"}': "no 'choices', unlike the records before it",
}


def test_the_first_bad_record_is_named(tmp_path, capsys):
    for line, say in BAD.items():
        path = write_lines(tmp_path / "acme.jsonl", [question(i) for i in range(60)] + ["", line, "{"])
        with pytest.raises(UserError) as error:
            load(path)
        message = str(error.value)
        assert f"{path}, line 62: " in message and say in message and "--skip-bad-records" in message
        assert sum(counts(load(path, skip_bad=True))) == 60
        said = capsys.readouterr().out
        assert "2 bad records left out (the first: line 62: " in said and say in said


def test_bytes_that_are_no_text_and_files_of_windows(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(question(i)) for i in range(60)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert sum(counts(load(path))) == 60
    path.write_bytes("\n".join(rows).encode() + b'\n{"prompt": "\xff", "response": "a"}\n')
    with pytest.raises(UserError, match="line 61: not JSON .*utf-8"):
        load(path)


def test_too_few_records(tmp_path):
    path = tmp_path / "acme.jsonl"
    for rows, sizes, say in (
        ([question(i) for i in range(49)], {}, "--client acme=.*: 49 usable records, at least 50"),
        ([question(0)] * 80, {}, "80 records with 1 different prompts"),
        ([question(i) for i in range(60)], {"train": 50, "test": 9}, "--train-size 50.*--test-size 9"),
    ):
        write_lines(path, rows)
        with pytest.raises(UserError, match=say):
            load(path, SHARES | sizes)
    for wrong in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(UserError, match=f"--client acme={wrong}: no such file"):
            load(wrong)


def test_a_file_is_split_80_10_10_by_the_seed(tmp_path):
    path = write_lines(tmp_path / "acme.jsonl", [question(i) for i in range(200)])
    parts = load(path)
    assert counts(parts) == [160, 20, 20] and parts == load(path)
    assert len({record["prompt"] for records in parts.values() for record in records}) == 200
    first = parts["test"][0]
    assert first["choices"] == [" yes", " no", " red indeed"] and first["answer"] == " no"
    assert load(path, seed=1)["test"] != parts["test"]
    assert counts(load(path, {"train": 7, "validation": 0, "test": 30})) == [7, 20, 30]


def test_no_prompt_is_in_two_parts(tmp_path):
    rows = [instruction(i // 4) | {"response": f"answer {i}"} for i in range(240)]
    parts = load(write_lines(tmp_path / "acme.jsonl", rows))
    prompts = sum((list({record["prompt"] for record in records}) for records in parts.values()), [])
    assert len(set(prompts)) == len(prompts) and "choices" not in parts["train"][0]
    assert counts(parts)[1:] == [24, 24] and len(parts["train"]) >= 186


@pytest.fixture
def photos(tmp_path):
    """A folder CLASS/IMAGE: 60 cats, 30 dogs, 2 emus, and a file beside them."""
    for label, count in (("Cat", 60), ("small_dog", 30), ("emu", 2)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 6), (i, 2 * i, count)).save(tmp_path / "photos" / label / f"{i}.png")
    (tmp_path / "photos" / "list.txt").touch()
    return tmp_path / "photos"


def test_a_folder_of_images_is_split_with_every_class_alike(photos, capsys):
    def load(path=photos, sizes=SHARES, **more):
        return user.own_images("zoo", str(path), sizes, 0, **more)

    parts = load()
    assert counts(parts) == [74, 9, 9] and parts == load()
    for part in ("validation", "test"):
        answers = [record["answer"] for record in parts[part]]
        assert abs(answers.count("cat") - 6) <= 1 and abs(answers.count("small dog") - 3) <= 1
    assert len({record["image"] for records in parts.values() for record in records}) == 92
    first = parts["train"][0]
    assert first["choices"] == ["cat", "emu", "small dog"] and first["source"] == "zoo"
    assert counts(load(sizes={"train": 20, "validation": 0, "test": 40})) == [20, 9, 40]
    (photos / "Cat" / "7.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="client zoo: bad image .*7.png"):
        load()
    assert sum(counts(load(skip_bad=True))) == 91
    assert "1 bad images left out (the first:" in capsys.readouterr().out
    one = photos.parent / "one"
    shutil.copytree(photos / "Cat", one / "Cat")
    says = {photos / "Cat": "images lie in", one: "1 classes", photos / "none": "no such folder"}
    for wrong, say in says.items():
        with pytest.raises(UserError, match=say):
            load(wrong)


def test_image_clients_and_public_set_of_ones_own(photos, tmp_path):
    """The data of a CLIP run, without the CLIP."""
    run_dir = tmp_path / "run"
    read_and_write(run_dir, *own_run("vit-b-32", "zoo", photos))
    assert done_of(run_dir, "zoo") == {"seed": 0, "train": 74, "validation": 9, "test": 9}
    assert read_json(run_dir / "public" / "classes.json") == ["cat", "emu", "small dog"]
    assert len(read_records(run_dir / "public" / "records.jsonl")) == 92
    assert read_json(run_dir / "run.json")["public"]["records"] == 92


@pytest.fixture
def files(tmp_path):
    """Two private files, of both kinds, and a public one of both."""
    write_lines(tmp_path / "acme.jsonl", [question(i) for i in range(60)])
    write_lines(tmp_path / "brick.jsonl", [instruction(i, "blue") for i in range(80)])
    both = [question(i, "green") if i % 2 else instruction(i, "grey") for i in range(70)]
    write_lines(tmp_path / "public.jsonl", both)
    return tmp_path


def test_own_clients_and_public_set_from_nothing(files, seed_model):
    run_dir, acme = files / "run", f"acme={files}/acme.jsonl"
    flags = ["--client", acme, "--client", f"brick={files}/brick.jsonl", "--public", f"{files}/public.jsonl"]
    flags += ["--seed-model", seed_model, *FEW]
    with open(files / "brick.jsonl", "a") as file:
        file.write('{"prompt": "cut off')
    assert "brick.jsonl, line 81: not JSON" in refused("select_proxies", run_dir, *flags, watch=files)
    said = passes("select_proxies", run_dir, *flags, "--skip-bad-records")
    assert "brick.jsonl: 1 bad records left out" in said
    run = read_json(run_dir / "run.json")
    assert run["clients"] == ["acme", "brick"] and run["public_size"] == 0
    source = read_json(run_dir / "clients" / "brick" / "private" / "source.json")
    assert source == {"path": f"{files}/brick.jsonl"} | SHARES
    assert [done_of(run_dir, name)["train"] for name in run["clients"]] == [48, 64]
    public = read_records(run_dir / "public" / "records.jsonl")
    prompt = "Describe the grey thing number 0."
    first = {"source": "public", "input": prompt, "prompt": prompt, "answer": " It is grey, and 0 tall."}
    assert public[0] == first and len(public) == 70 and public[1]["answer"] == " no"
    before = state(run_dir)
    assert stage("select_proxies", run_dir, *flags).out.count("skipped") == 2
    assert stage("select_proxies", run_dir, "--client", "brick").out.count("skipped") == 1
    assert state(run_dir) == before
    assert "acme" in refused("select_proxies", run_dir, *flags, "--train-size", "20")
    assert "clients" in refused("select_proxies", run_dir, "--client", acme)
    assert "nobody" in refused("select_proxies", run_dir, "--client", "nobody")
    assert "48 private + 6 proxies" in passes("train_expert", run_dir, "--epochs", "1", "--rank", "2")


def test_own_clients_take_the_backbones_public_set(files, seed_model, monkeypatch):
    synthetic_archive(monkeypatch)
    run_dir = files / "run"
    flags = ["--seed-model", seed_model, "--clients", "intent", "--client", f"acme={files}/acme.jsonl"]
    flags += ["--public-size", "48", *FEW, "--test-size", "5"]
    result = stage("select_proxies", run_dir, *flags, "--client", "acme")
    assert "--train-size 400" in result.err  # intent's own preset, more than the small archive has
    passes("select_proxies", run_dir, *flags, "--train-size", "20", "--validation-size", "4")
    for name in ("intent", "acme"):
        assert done_of(run_dir, name) == {"seed": 0, "train": 20, "validation": 4, "test": 5}
    public = run_dir / "public" / "records.jsonl"
    assert len(read_records(public)) == 48
    before = public.read_bytes()
    passes("select_proxies", run_dir, "--join", "hotels")
    assert public.read_bytes() == before


def test_what_is_not_given_shrinks_to_the_public_set(files, seed_model):
    flags = ["--client", f"acme={files}/acme.jsonl", "--public", f"{files}/public.jsonl"]
    flags += ["--seed-model", seed_model]
    said = passes("select_proxies", files / "run", *flags)
    assert said.count("D_0 has 70 samples") == 1 and "candidates 900 -> 70" in said
    run = read_json(files / "run" / "run.json")
    assert (run["candidates"], run["proxies"]) == (70, 70 * 150 // 900)
    assert "acme: 11 of 70 by dpp" in said
    assert "skipped" in passes("select_proxies", files / "run", *flags)
    passes("select_proxies", files / "given", *flags, "--public-size", "40", "--proxies", "20")
    run = read_json(files / "given" / "run.json")
    assert (run["candidates"], run["proxies"]) == (40, 20)


ACME = "--client acme=FILES/acme.jsonl"


BAD_FLAGS = [
    ("--client acme=FILES/nowhere.jsonl", "--client acme="),
    (f"{ACME} --client acme=FILES/brick.jsonl", "each NAME once"),
    ("--client a/b=FILES/acme.jsonl", "--client a/b="),
    ("--client acme=", "--client acme="),
    (f"{ACME} --clients acme", "--clients acme: unknown"),
    (f"{ACME} --test-size -1", "--test-size -1"),
    (f"{ACME} --train-size 60", "too few for --train-size 60"),
    (f"{ACME} --candidates 71", "--candidates 71 is more than the 70 public samples"),
    (f"{ACME} --public FILES/nowhere.jsonl", "--public"),
    (f"{ACME} --dataset acme=FILES", "--client NAME=PATH"),
    (f"{ACME} --public FILES/bad.jsonl", "bad.jsonl, line 3: not JSON"),
    ("--join acme=FILES/acme.jsonl", "holds no run yet"),
]


@pytest.mark.parametrize("flags, say", BAD_FLAGS)
def test_bad_flags_leave_nothing(files, seed_model, flags, say):
    rows = [instruction(i) for i in range(60)]
    write_lines(files / "bad.jsonl", [*rows[:2], "{", *rows])
    if "--public" not in flags:
        flags += " --public FILES/public.jsonl"
    flags = ["--seed-model", seed_model, *FEW, *flags.replace("FILES", str(files)).split()]
    assert say in refused("select_proxies", files / "run", *flags, watch=files)


def test_a_client_joins_and_the_others_work_stays(files, run):
    acme, before = f"acme={files}/acme.jsonl", state(run)
    for flags, say in (
        (["--join", f"hotels={files}/acme.jsonl"], "a client of that name"),
        (["--join", "nobody"], "--join nobody=PATH"),
        (["--join", acme, "--proxies", "5"], "proxies 6"),
        (["--join", acme, "--client", "hotels"], "leave out --client"),
        (["--join", f"acme={files}/none"], "no such file"),
        (["--join", acme, "--train-size", "60"], "too few"),
    ):
        assert say in refused("select_proxies", run, *flags)
    assert "select_proxies: acme: 6 of 48" in passes("select_proxies", run, "--join", acme)
    after = state(run)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert {path for path in changed if not path.startswith("clients/acme/")} == {"run.json", "local.json"}
    assert read_json(run / "run.json")["clients"] == [*tiny.CLIENTS, "acme"]
    for again in (acme, "acme", "hotels"):
        assert "selection is there already, skipped" in stage("select_proxies", run, "--join", again).out
    assert state(run) == after
    assert "other data" in refused("select_proxies", run, "--join", f"acme={files}/brick.jsonl")
    assert stage("select_proxies", run).out.count("skipped") == 4
    said = passes("train_expert", run, *flags_of("train_expert", run, "aligned"))
    assert said.count("expert is there already, skipped") == 3  # the others' experts are theirs still
    assert "acme: aligned-dpp: 48 private + 6 proxies" in said
    flags = flags_of("unify_moe", run, "metamoe")
    assert "uploads" in refused("unify_moe", run, *flags)
    passes("unify_moe", run, *flags, "--force")
    passes("evaluate", run, "--models", "zeroshot", "metamoe")
    assert read_json(run / "results.json")["n"] == dict.fromkeys(tiny.CLIENTS, 16) | {"acme": 6}


def test_a_join_that_was_killed_goes_on(files, run):
    """run.json is written after the client's data: with them the same command ends the work."""
    join = ["--join", f"acme={files}/acme.jsonl"]
    before = {name: (run / name).read_text() for name in ("run.json", "local.json")}
    passes("select_proxies", run, *join, "--test-size", "9")
    whole = state(run)
    for name, content in before.items():
        (run / name).write_text(content)
    assert "other data" in refused("select_proxies", run, "--join", f"acme={files}/brick.jsonl")
    assert "skipped" in passes("select_proxies", run, *join)
    assert state(run) == whole and done_of(run, "acme")["test"] == 9


MEASURE = """
import json, resource, sys
from pathlib import Path
from metamoe import party
from metamoe.records import read_records
(run, local), folder = json.loads(sys.argv[1]), Path(sys.argv[2])
class NoModel:
    ffn_names, width = [], 0
folder.mkdir()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
public, parts = party.read_data(folder, run, local)
party.write_data(folder, party.seal(run, NoModel, public), local, NoModel, public, parts)
for path in sorted(folder.rglob("*.jsonl")):
    records = read_records(path)
    assert sum(1 for record in records) == len(records) == len(records + [])
    assert len(records[:1000]) == 1000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """60,000 records as a client and as the public set: as dicts they would take more than 60 MB."""
    path = write_lines(tmp_path / "big.jsonl", (instruction(i) for i in range(60_000)))
    run = json.dumps(own_run("smollm2-135m", "acme", path))
    command = [sys.executable, "-c", MEASURE, run, tmp_path / "run"]
    where = tiny.environment(PYTHONPATH=str(tiny.REPO))
    done = subprocess.run(command, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 30
    assert done_of(tmp_path / "run", "acme") == {"seed": 0, "train": 48_000, "validation": 6000, "test": 6000}
    assert (tmp_path / "run" / "public" / "records.jsonl").stat().st_size > 7e6
