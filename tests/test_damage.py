"""Damaged and foreign files of a run, and what was made from them: each is named in a line, or made again."""

import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from tiny import CLIENTS, flags_of, refused, stage

from metamoe.check_run import check_local, check_run
from metamoe.errors import UserError
from metamoe.rundir import finish, read_json, settings_of, sha256, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, EXPERT = "moe/metamoe/moe.safetensors", "clients/hotels/experts/aligned-dpp/router.safetensors"


@pytest.fixture(scope="module")
def kept(tmp_path_factory, finished):
    """A copy of the finished run, whose every file is put back after a test."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    shutil.copytree(finished[0], folder)
    return folder


@pytest.fixture
def damage(kept):
    """damage(path, change): write change(bytes) over a file of the run; every one is put back."""
    before = {}

    def act(path, change):
        before.setdefault(path, (kept / path).read_bytes())
        (kept / path).write_bytes(change((kept / path).read_bytes()))

    yield act
    for path, content in before.items():
        (kept / path).write_bytes(content)


def flipped(content):
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def cut(content):
    return content[: len(content) // 2]


# ---------------------------------------------------------------- results are checked, and made again


@pytest.mark.parametrize("change", [flipped, cut])
def test_a_damaged_model_is_refused_where_it_is_used_and_remade_by_its_stage(run, change):
    path = run / MODEL
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    assert "moe.safetensors was changed" in refused("evaluate", run)
    assert "moe.safetensors" in refused("unify_moe", run, "--method", "metamoe", "--without", "hotels")
    result = stage("unify_moe", run, *flags_of("unify_moe", run, "metamoe"))
    assert result.code == 0 and "moe.safetensors was changed" in result.out, result.err
    assert path.read_bytes() == whole
    again = stage("evaluate", run)
    assert again.code == 0 and "scored again" not in again.out


def test_a_truncated_expert_is_trained_again_to_the_same_bytes(run):
    path = run / EXPERT
    whole = path.read_bytes()
    path.write_bytes(cut(whole))
    result = stage("train_expert", run, *flags_of("train_expert", run, "aligned"), "--client", "hotels")
    assert result.code == 0 and "router.safetensors was changed" in result.out, result.err
    assert path.read_bytes() == whole
    assert "skipped" in stage("unify_moe", run, *flags_of("unify_moe", run, "metamoe")).out


def test_a_missing_file_is_made_again_and_a_foreign_one_refused(run):
    flags = [*flags_of("train_expert", run, "aligned"), "--client", "hotels"]
    (run / EXPERT).unlink()
    assert "router.safetensors is missing" in stage("train_expert", run, *flags).out
    (run / EXPERT).with_name("notes.txt").write_text("would be packed into the upload")
    assert "notes.txt" in refused("train_expert", run, *flags)
    (run / EXPERT).with_name("notes.txt").rename((run / EXPERT).with_name(".notes"))
    assert "skipped" in stage("train_expert", run, *flags).out


def test_features_of_another_dtype_are_refused_and_damaged_ones_made_again(run):
    path = run / "public" / "features.npy"
    whole = path.read_bytes()
    rule = ["--selection", "dpp-all"]
    assert "dtype 'float32' there" in refused(
        "select_proxies", run, *rule, "--dtype", "bfloat16", watch=path.parent
    )
    path.write_bytes(flipped(whole))
    result = stage("select_proxies", run, "--selection", "dpp")
    assert result.code == 0 and result.out.count("made again") == 4  # the features, three selections
    assert path.read_bytes() == whole
    assert stage("select_proxies", run, "--selection", "dpp").out.count("skipped") == 3


def test_changed_records_are_refused_in_every_stage(kept, damage):
    damage("public/records.jsonl", lambda content: content.replace(b"rice", b"salt"))
    where = str(kept / "public" / "records.jsonl")
    assert where in refused("select_proxies", kept, "--selection", "dpp-all")
    train = ["--data", "proxies", "--selection", "dpp"]
    assert where in refused("train_expert", kept, *train)
    unify = ["--method", "metamoe", "--name", "other"]
    assert where in refused("unify_moe", kept, *unify)


def test_changed_tests_are_refused_and_with_a_new_note_scored_again(run):
    path = run / "clients" / "hotels" / "private" / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert str(path) in refused("evaluate", run)
    finish(path.parent, settings_of(path.parent))  # as if select_proxies.py had written it
    result = stage("evaluate", run, "--models", "zeroshot", "metamoe")
    assert result.code == 0 and result.out.count("of another records: the model is scored again") == 2
    assert read_json(run / "results.json")["n"]["hotels"] == tiny.SIZES["test_size"] - 1


def test_scores_of_another_dtype_are_made_again(run):
    result = stage("evaluate", run, "--models", "zeroshot", "--dtype", "bfloat16")
    assert "of another dtype" in result.out
    assert read_json(run / "scores" / "zeroshot.test.json")["identity"]["dtype"] == "bfloat16"


def test_a_selection_from_other_private_data_is_made_again(run):
    folder = run / "clients" / "hotels" / "private"
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:-2]))
    finish(folder, settings_of(folder))
    out = stage("select_proxies", run, "--selection", "dpp").out
    assert out.count("private/train.jsonl was changed since: it is made again") == 2  # relevance, selection
    assert out.count("skipped") == 2


def test_a_run_of_an_earlier_version_is_valid(run):
    """Its done.json have no hashes, its features no note."""
    for done in run.rglob("done.json"):
        write_json(done, settings_of(done.parent))
    for note in [run / "public" / "features.npy.json", *run.rglob("relevance.npy.json")]:
        note.unlink()
    for name, word in (("select_proxies", "dpp"), ("train_expert", "aligned"), ("unify_moe", "metamoe")):
        result = stage(name, run, *flags_of(name, run, word))
        assert result.code == 0 and "skipped" in result.out and "again" not in result.out, result.err
    assert stage("select_proxies", run, "--selection", "dpp-all").code == 0


# ---------------------------------------------------------------- damaged files in one line


@pytest.mark.parametrize(
    "path, content, command",
    [
        ("run.json", b"{", "evaluate"),
        ("run.json", b"[]", "train_expert"),
        ("run.json", b"\xff\xfe", "select_proxies"),
        ("run.json", b"[" * 100_000, "unify_moe --method btm"),
        ("moe/metamoe/done.json", b"{", "unify_moe --method metamoe"),
        ("moe/metamoe/done.json", b"[]", "evaluate"),
        ("moe/btm/done.json", b'{"variant": "../../../outside"}', "evaluate"),
        ("clients/hotels/experts/aligned-dpp/done.json", b'{"files": 3}', "train_expert --client hotels"),
        ("clients/hotels/selection/dpp/selection.json", b"{}", "train_expert --client hotels"),
        ("clients/hotels/selection/dpp/done.json", b"null", "select_proxies"),
        ("public/done.json", b"7", "select_proxies --selection dpp-all"),
        ("scores/zeroshot.test.json", b"{}", "evaluate"),
        ("scores/zeroshot.test.json", b"", "evaluate"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(kept, damage, path, content, command):
    damage(path, lambda _: content)
    name, *flags = command.split()
    assert os.path.dirname(path) in refused(name, kept, *flags)


def without_note(run, folder):
    """As an earlier version left it."""
    write_json(run / folder / "done.json", settings_of(run / folder))


def test_damage_that_no_hash_shows_is_one_line_too(run):
    """Runs of earlier versions have no hashes."""
    for folder in ("moe/metamoe", "public"):
        without_note(run, folder)
    (run / MODEL).write_bytes(cut((run / MODEL).read_bytes()))
    shutil.rmtree(run / "scores")
    assert "safetensors file is damaged" in refused("evaluate", run, "--models", "metamoe", watch=run / "moe")
    records = run / "public" / "records.jsonl"
    records.write_bytes(records.read_bytes().replace(b'{"source"', b'{"source', 1))
    for damaged in (b'{"source', b"7 "):
        records.write_bytes(damaged + records.read_bytes()[len(damaged) :])
        unify = ["--method", "metamoe", "--name", "x", "--samples", "public", "--seed-expert"]
        assert str(records) in refused("unify_moe", run, *unify, watch=run / "moe")
    (run / "public" / "features.npy.json").unlink()
    features = run / "public" / "features.npy"
    for damaged in (features.read_bytes()[:-100], b"no array", b"", np.lib.format.MAGIC_PREFIX):
        features.write_bytes(damaged)
        assert str(features) in refused("select_proxies", run, "--selection", "dpp-all", watch=run / "moe")


# ---------------------------------------------------------------- run.json of a foreign hand

SHA = "0" * 64
RUN = {"backbone": "smollm2-135m", "seed": 0, "clients": ["a", "b"], "rank": 4, "alpha": 8}
RUN |= {"seed_model": {"weights": SHA, "tokenizer": SHA}, "public": {"records": 40, "sha256": SHA}}
RUN |= {"answers": "text", "loss": "answer", **tiny.SIZES}
LOCAL = {"clients": ["a"], "seed_model": "", "sources": {"public": "x"}}


def test_a_run_that_is_right_is_taken():
    check_run(RUN, "run.json")
    check_run({key: value for key, value in RUN.items() if key not in ("answers", "loss")}, "x")
    check_local(LOCAL, "local.json")
    check_local(LOCAL | {"clients": []}, "local.json")


@pytest.mark.parametrize("key", ["backbone", "clients", "seed", "seed_model", "public", "rank", *tiny.SIZES])
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"run.json.*{key}"):
        check_run({name: value for name, value in RUN.items() if name != key}, "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "gpt-9"},
        {"backbone": ["smollm2-135m"]},
        {"seed_model": 3},
        {"seed_model": "/an/earlier/version"},
        {"seed_model": {"weights": SHA}},
        {"seed_model": {"weights": "x", "tokenizer": SHA}},
        {"public": None},
        {"public": {"records": -1, "sha256": SHA}},
        {"public": {"records": 4, "sha256": 4}},
        {"rank": "16"},
        {"max_length": 7},
        {"max_length": "9"},
        {"architecture": ["ViT-B-32"]},
        {"chat_template": "{{ x }}"},
        {"alpha": 1.5},
        {"seed": "0"},
        {"seed": -1},
        {"seed": True},
        {"seed": 2**32},
        {"train_size": 1.5},
        {"proxies": None},
        {"clients": []},
        {"clients": "a"},
        {"clients": {"a": 1}},
        {"clients": ["a", 3]},
        {"clients": ["a", "a"]},
        {"clients": ["shop", "Shop"]},
        {"clients": ["../../outside"]},
        {"clients": ["/tmp/outside"]},
        {"clients": [""]},
        {"clients": ["a\n"]},
        {"clients": [".hidden"]},
        *({"clients": [name]} for name in ("average", "Average", "seed", "zeroshot", "public", "root")),
        {"answers": "words"},
        {"loss": 1},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_its_key(change):
    (key,) = change
    with pytest.raises(UserError, match=f"run.json.*({key.rstrip('s')}|client)"):
        check_run(RUN | change, "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"clients": ["../x"]},
        {"clients": "a"},
        {"seed_model": 3},
        {"sources": []},
        {"sources": {"a": 1}},
        {"x": 1},
    ],
    ids=str,
)
def test_a_wrong_value_of_local_json_is_refused(change):
    with pytest.raises(UserError, match="local.json"):
        check_local(LOCAL | change, "local.json")


@pytest.mark.parametrize("command", ["select_proxies", "train_expert", "unify_moe --method soup", "evaluate"])
def test_a_foreign_client_cannot_lead_outside(kept, damage, command):
    def renamed(content):
        return json.dumps(json.loads(content) | {"clients": [*CLIENTS, "../../outside"]}).encode()

    damage("run.json", renamed)
    name, *flags = command.split()
    assert "../../outside" in refused(name, kept, *flags, watch=kept.parent)


@pytest.mark.parametrize("name", ["average", "seed", "ZeroShot"])
@pytest.mark.parametrize("flag", ["--client", "--join"])
def test_a_name_that_the_project_uses_is_refused_on_the_command_line(kept, flag, name):
    assert f"client {name}" in refused("select_proxies", kept, flag, f"{name}=x.jsonl")


@pytest.mark.parametrize(
    "command, say",
    [
        ("unify_moe --method metamoe --name ../metamoe --without hotels", "--name"),
        ("unify_moe --method metamoe --without ../hotels", "--without"),
        ("unify_moe --method metamoe --name x --extend ../moe/metamoe", "--extend"),
        ("evaluate --opt-out ../moe/metamoe", "--opt-out"),
    ],
)
def test_a_flags_name_cannot_lead_elsewhere(kept, command, say):
    name, *flags = command.split()
    assert say in refused(name, kept, *flags)


# ---------------------------------------------------------------- the machine's limits


@pytest.mark.parametrize("folder", ["x" * 300, b"caf\xe9"], ids=["too long", "not UTF-8"])
@pytest.mark.parametrize("name", ["select_proxies", "evaluate"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, folder, name):
    run_dir = os.path.join(os.fsencode(tmp_path), os.fsencode(folder))
    command = [sys.executable, tiny.REPO / f"{name}.py", "--run-dir", run_dir]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_belongs_and_the_other_way_round(run):
    shutil.rmtree(run / "moe")
    (run / "moe").write_text("a file")
    assert str(run / "moe") in refused("unify_moe", run, "--method", "btm")
    (run / "run.json").unlink()
    (run / "run.json").mkdir()
    assert str(run / "run.json") in refused("evaluate", run)


def test_too_many_open_files_are_one_line(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # one more, which the lock takes
        result = stage("unify_moe", run, "--method", "btm", "--name", "btm")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.code == 2 and "Too many open files" in result.err and result.err.count("\n") == 1


def test_a_hash_is_that_of_the_file_as_it_is(tmp_path):
    """Also of one that was changed to the same size and time."""
    path = tmp_path / "a"
    path.write_text("one")
    before, times = sha256(path), path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256(path) != before
