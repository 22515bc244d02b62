"""Uploads from strangers: each forgery is refused in one line that names the client and the file."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import CLIENTS, SIZES, forge, refused

import moe
from metamoe.errors import UserError
from metamoe.rundir import read_json, write_json
from metamoe.uploads import CONFIG, FACTORS, FFN, PROXIES, ROUTER, read_upload, receive

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANT = "aligned-dpp"


@pytest.fixture
def sent(tmp_path, finished):
    """(a run directory that has intent's upload no more, a copy of that upload, run.json)."""
    run_dir = tmp_path / "run"
    keep = shutil.ignore_patterns("private", "experts", "selection", "scores", "features.npy")
    shutil.copytree(finished[0], run_dir, ignore=keep)
    folder = run_dir / "clients" / "intent" / "upload" / VARIANT
    shutil.move(folder, tmp_path / "sent")
    return run_dir, tmp_path / "sent", read_json(run_dir / "run.json")


def refusal(sent, name="intent"):
    """What is said of an upload that must be refused; nothing is written."""
    run_dir, folder, run = sent
    with pytest.raises(UserError) as error:
        receive(run_dir, run, [f"{name}={folder}"], VARIANT)
    assert not list((run_dir / "clients" / name).glob(f"upload/{VARIANT}")) or name != "intent"
    message = str(error.value)
    assert f"client {name}: " in message and "\n" not in message
    return message


def test_an_upload_is_taken_and_read_as_it_was_packed(sent, finished):
    run_dir, folder, run = sent
    receive(run_dir, run, [f"intent={folder}"], VARIANT)
    here = run_dir / "clients" / "intent" / "upload" / VARIANT
    assert tiny.snapshot(here) == tiny.snapshot(folder)
    upload = read_upload(run_dir, run, "intent", VARIANT)
    assert torch.equal(upload.vectors, load_file(folder / ROUTER)["vectors"])
    assert upload.proxies == read_json(folder / PROXIES)
    factors = load_file(folder / FACTORS)
    for ffn, own in upload.expert.items():
        assert torch.equal(own["up_proj.lora_A"], factors[f"base_model.model.{ffn}.up_proj.lora_A.weight"])
    receive(run_dir, run, [f"intent={folder}"], VARIANT)  # again, the same


def edit_json(file, change):
    def forgery(folder):
        value = change(read_json(folder / file))
        (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))

    return forgery


def edit_tensors(file, change):
    def forgery(folder):
        tensors = change(load_file(folder / file))
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / file)

    return forgery


def first(change, matching=""):
    """Change the first tensor whose name has `matching`."""

    def forgery(tensors):
        key = next(key for key in sorted(tensors) if matching in key)
        return tensors | {key: change(tensors[key].clone())}

    return forgery


def put(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


COUNT, M = SIZES["public_size"], SIZES["proxies"]
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"
PROXY_LISTS = {
    "all of D_0": lambda own: list(range(COUNT)),
    "one fewer": lambda own: own[1:],
    "a repeat": lambda own: [own[1], *own[1:]],
    "none": lambda own: [],
    "an index below 0": lambda own: [-1, *own[1:]],
    "an index out of range": lambda own: [*own[1:], COUNT],
    "a float": lambda own: [float(own[0]), *own[1:]],
    "booleans": lambda own: [True, False, *own[2:]],
    "strings": lambda own: [str(i) for i in own],
    "null": lambda own: [None, *own[1:]],
    "nested": lambda own: [own],
    "an object": lambda own: dict.fromkeys(map(str, own)),
    "NaN": lambda own: "[NaN, 1, 2, 3, 4, 5]",
    "a huge integer": lambda own: [10**40, *own[1:]],
    "digits for ever": lambda own: "[" + "9" * 150 + ", 1, 2, 3, 4, 5]",
    "deep": lambda own: "[" * 100 + "]" * 100,
    "too large": lambda own: "[" + " " * 10**6 + "]",
    "cut off": lambda own: "[1, 2",
    "empty file": lambda own: "",
}
CONFIGS = {
    "alpha NaN": {"lora_alpha": math.nan},
    "alpha infinite": {"lora_alpha": math.inf},
    "alpha 1e300": {"lora_alpha": 1e300},
    "alpha 0": {"lora_alpha": 0},
    "alpha a string": {"lora_alpha": "16"},
    "alpha true": {"lora_alpha": True},
    "rank 0": {"r": 0},
    "rank -4": {"r": -4},
    "rank 1e9": {"r": 10**9},
    "rank a float": {"r": 4.0},
    "rank null": {"r": None},
    "another rank": {"r": 5},
    "a rank_pattern that hangs": {"rank_pattern": {"(x+x+)+y": 4}},
    "an alpha_pattern that hangs": {"alpha_pattern": {"(.*)*(.*)*(.*)*z": 4}},
    "repetitions": {"alpha_pattern": {".*.*.*.*.*.*.*.*x": 4}},
    "no expression": {"alpha_pattern": {"[": 4}},
    "a pattern of NaN": {"alpha_pattern": {"up_proj": math.nan}},
    "a pattern that is a list": {"rank_pattern": ["up_proj"]},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "IA3": {"peft_type": "IA3"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "an unknown field": {"a_method_of_2031": {"on": True}},
}
TENSORS = {
    "NaN": (FACTORS, first(put(math.nan))),
    "infinity": (FACTORS, first(put(math.inf), "lora_B")),
    "1e30": (FACTORS, first(put(1e30))),
    "integers": (FACTORS, first(lambda t: t.to(torch.int32))),
    "float64": (FACTORS, first(lambda t: t.double())),
    "another shape": (FACTORS, first(lambda t: t[:, 1:])),
    "a rank above the agreed": (FACTORS, lambda own: {k: rank_17(k, t) for k, t in own.items()}),
    "rank 20,000": (FACTORS, lambda own: {k: widen(k, t, 20_000) for k, t in own.items()}),
    "one dimension": (FACTORS, first(lambda t: t.flatten())),
    "attention": (FACTORS, lambda own: own | {ATTENTION: torch.ones(4, 32)}),
    "lm_head": (FACTORS, lambda own: own | {HEAD: torch.ones(4, 32)}),
    "A alone": (FACTORS, lambda own: {k: t for k, t in own.items() if "lora_B" not in k}),
    "B alone": (FACTORS, lambda own: {k: t for k, t in own.items() if "lora_A" not in k}),
    "vectors NaN": (ROUTER, first(put(math.nan))),
    "vectors infinite": (ROUTER, first(put(-math.inf))),
    "vectors 1e30": (ROUTER, first(put(1e30))),
    "vectors of integers": (ROUTER, first(lambda t: t.long())),
    "a layer fewer": (ROUTER, first(lambda t: t[1:])),
    "narrower": (ROUTER, first(lambda t: t[:, 1:])),
    "no vectors": (ROUTER, lambda own: {"vector": own["vectors"]}),
    "two tensors": (ROUTER, lambda own: own | {"bias": torch.ones(2)}),
}


def widen(key, tensor, rank):
    """A factor of another rank."""
    if "lora_A" in key:
        return torch.zeros(rank, tensor.shape[1])
    return torch.zeros(tensor.shape[0], rank)


def rank_17(key, tensor):
    return widen(key, tensor, 17)


FORGERIES = {f"proxies: {k}": (PROXIES, edit_json(PROXIES, v)) for k, v in PROXY_LISTS.items()}
FORGERIES |= {
    f"configuration: {k}": ("adapter", edit_json(CONFIG, lambda own, new=v: own | new))
    for k, v in CONFIGS.items()
}
FORGERIES |= {f"tensors: {k}": (f, edit_tensors(f, change)) for k, (f, change) in TENSORS.items()}
for name in (ROUTER, FACTORS):
    FORGERIES |= {
        f"{name}: no safetensors": (
            name,
            lambda folder, name=name: (folder / name).write_bytes(b"PK\3\4" * 9),
        ),
        f"{name}: a header for ever": (
            name,
            lambda folder, name=name: (folder / name).write_bytes(b"\xff" * 7 + b"\x7f" + b"{" * 99),
        ),
        f"{name}: empty": (name, lambda folder, name=name: (folder / name).write_bytes(b"")),
        f"{name}: truncated": (
            name,
            lambda folder, name=name: (folder / name).write_bytes((folder / name).read_bytes()[:-5]),
        ),
    }


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_file_with_a_fitting_manifest_is_refused(sent, kind):
    file, forgery = FORGERIES[kind]
    run_dir, folder, run = sent
    forgery(folder)
    forge(folder, run)
    assert file.split("/")[0] in refusal(sent)


@pytest.fixture
def whole(sent, seed_model):
    """As sent, with the seed model's whole FFNs in place of an adapter."""
    run_dir, folder, run = sent
    tensors = load_file(seed_model / "model.safetensors")
    save_file({key: t for key, t in tensors.items() if ".mlp." in key}, folder / FFN)
    shutil.rmtree(folder / "adapter")
    forge(folder, run, full_ffn=True)
    return sent


def test_whole_ffns_are_taken_and_read(whole):
    run_dir, folder, run = whole
    receive(run_dir, run, [f"intent={folder}"], f"{VARIANT}-full")
    expert = read_upload(run_dir, run, "intent", f"{VARIANT}-full").expert
    for key, tensor in load_file(folder / FFN).items():
        ffn, linear = key.rsplit(".mlp.", 1)
        assert torch.equal(expert[f"{ffn}.mlp"][linear], tensor)


UP = "model.layers.0.mlp.up_proj.weight"
WHOLE = {
    "NaN": first(put(math.nan)),
    "1e30": first(put(1e30)),
    "integers": first(lambda t: t.long()),
    "another shape": first(lambda t: t.T),
    "one fewer": lambda own: {key: t for key, t in own.items() if key != UP},
    "attention": lambda own: own | {"model.layers.0.self_attn.q_proj.weight": own[UP].clone()},
    "a layer that there is not": lambda own: own | {UP.replace("0", "9"): own[UP].clone()},
    "lm_head": lambda own: own | {"lm_head.weight": own[UP].clone()},
    "a bias": lambda own: own | {UP.replace("weight", "bias"): torch.ones(64)},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_forged_whole_ffns_are_refused(whole, kind):
    run_dir, folder, run = whole
    edit_tensors(FFN, WHOLE[kind])(folder)
    forge(folder, run)
    with pytest.raises(UserError, match=f"client intent: .*{FFN}"):
        receive(run_dir, run, [f"intent={folder}"], f"{VARIANT}-full")


def replace_by_link(folder, name):
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def replace_by_pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


FOLDERS = {
    "adapter is a link": ("adapter", lambda f: replace_by_link(f, "adapter")),
    "a file is a link": (ROUTER, lambda f: replace_by_link(f, ROUTER)),
    "a file below is a link": (FACTORS, lambda f: replace_by_link(f, FACTORS)),
    "a pipe": (PROXIES, lambda f: replace_by_pipe(f, PROXIES)),
    "a pipe below": (CONFIG, lambda f: replace_by_pipe(f, CONFIG)),
    "a device": (PROXIES, lambda f: ((f / PROXIES).unlink(), (f / PROXIES).symlink_to("/dev/zero"))),
    "a folder as a file": (ROUTER, lambda f: ((f / ROUTER).unlink(), (f / ROUTER).mkdir())),
    "an extra file": ("gift", lambda f: (f / "gift.bin").write_bytes(b"x")),
    "an extra file below": ("gift", lambda f: (f / "adapter" / "gift.bin").write_bytes(b"x")),
    "a pickle": ("adapter_model.bin", lambda f: (f / "adapter" / "adapter_model.bin").write_bytes(b"x")),
    "an extra folder": ("more", lambda f: (f / "more").mkdir()),
    "a hidden file": (".x", lambda f: (f / ".x").write_bytes(b"x")),
    "both kinds": (FFN, lambda f: shutil.copy(f / ROUTER, f / FFN)),
    "no proxies": (PROXIES, lambda f: (f / PROXIES).unlink()),
    "no manifest": ("manifest.json", lambda f: (f / "manifest.json").unlink()),
    "no adapter": ("adapter", lambda f: shutil.rmtree(f / "adapter")),
    "changed afterwards": (PROXIES, lambda f: write_json(f / PROXIES, list(range(M)))),
    "a flipped bit": (FACTORS, lambda f: flip(f / FACTORS)),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_upload_is_refused(sent, kind):
    file, change = FOLDERS[kind]
    change(sent[1])
    assert file.split("/")[-1] in refusal(sent)


@pytest.mark.parametrize("where", ["nowhere", "a file", "a link"])
def test_what_is_no_folder_is_refused(sent, tmp_path, where):
    run_dir, folder, run = sent
    if where == "a file":
        (tmp_path / "new").write_text("x")
    if where == "a link":
        (tmp_path / "new").symlink_to(folder)
    assert "new" in refusal((run_dir, tmp_path / "new", run))


MANIFESTS = {
    "another format": {"format": 1},
    "a format of another type": {"format": 2.5},
    "another client": {"client": "hotels"},
    "a client that is a list": {"client": ["intent"]},
    "another D_0": {"public": "0" * 64},
    "another seed model": {"seed_model": {"weights": "0" * 64, "tokenizer": "0" * 64}},
    "a seed model that is a string": {"seed_model": "smollm2"},
    "another agreement": {"agreement": "0" * 64},
    "another variant": {"data": "private"},
    "data that name no kind": {"data": "../../x"},
    "a selection that is a path": {"selection": "../../../x"},
    "full_ffn a string": {"full_ffn": "no"},
    "an extra key": {"note": "hello"},
    "no files": {"files": {}},
    "files in a list": {"files": []},
    "a file more": {"files": {"gift": {"size": 1, "sha256": "0"}}},
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_something_else_is_refused(sent, kind):
    path = sent[1] / "manifest.json"
    write_json(path, read_json(path) | MANIFESTS[kind])
    refusal(sent)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", "", "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', "\0"]
)
def test_a_manifest_that_is_no_manifest_is_refused(sent, text):
    (sent[1] / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(sent)


def test_an_upload_under_another_clients_name_is_refused(sent):
    run_dir, folder, run = sent
    shutil.rmtree(run_dir / "clients" / "hotels" / "upload" / VARIANT)
    assert "another client's" in refusal(sent, "hotels")
    assert "the agreement has no client mallory" in refusal(sent, "mallory")
    with pytest.raises(UserError, match="NAME=DIR"):
        receive(run_dir, run, [f"intent={folder}", f"intent={folder}"], VARIANT)


def test_a_second_upload_of_a_client_is_refused(sent, finished):
    run_dir, folder, run = sent
    receive(run_dir, run, [f"intent={folder}"], VARIANT)
    before = tiny.snapshot(run_dir)
    edit_tensors(ROUTER, first(lambda t: t * 1.01))(folder)
    forge(folder, run)
    with pytest.raises(UserError, match="client intent: .*sent another one before"):
        receive(run_dir, run, [f"intent={folder}"], VARIANT)
    assert tiny.snapshot(run_dir) == before


def test_nothing_is_taken_where_one_of_two_is_refused(sent, tmp_path):
    run_dir, folder, run = sent
    hotels = run_dir / "clients" / "hotels" / "upload" / VARIANT
    shutil.move(hotels, tmp_path / "hotels")
    (tmp_path / "hotels" / PROXIES).unlink()
    with pytest.raises(UserError, match="client hotels"):
        receive(run_dir, run, [f"intent={folder}", f"hotels={tmp_path / 'hotels'}"], VARIANT)
    assert not (run_dir / "clients" / "intent" / "upload" / VARIANT).exists()


@pytest.mark.parametrize("method", ["metamoe", "soup", "btm"])
def test_every_consumer_reads_through_the_same_checks(run, method):
    variant = VARIANT if method == "metamoe" else "private-similarity"
    folder = run / "clients" / "question" / "upload" / variant
    edit_tensors(FACTORS, first(put(math.nan)))(folder)
    forge(folder, read_json(run / "run.json"))
    message = refused("unify_moe", run, "--method", method, "--force")
    assert "client question" in message and FACTORS in message
    if method == "btm":
        message = refused("evaluate", run)
        assert "client question" in message and FACTORS in message


def test_routing_vectors_out_of_proportion_are_refused(run):
    folder = run / "clients" / "hotels" / "upload" / VARIANT
    whole = load_file(folder / ROUTER)["vectors"]
    flags = ["--method", "metamoe", "--name", "new", "--train", "none"]
    for factor in (10, 0.1):
        vectors = whole.clone()
        vectors[1] *= factor
        save_file({"vectors": vectors}, folder / ROUTER)
        forge(folder, read_json(run / "run.json"))
        message = refused("unify_moe", run, *flags)
        assert "client hotels" in message and "layer 1" in message and "--length-bound" in message
    result = tiny.stage("unify_moe", run, *flags, "--length-bound", "100")
    assert result.code == 0, result.err
    told = read_json(run / "moe" / "new" / "routing.json")
    assert set(told["lengths"]) == set(told["tokens"]) == set(CLIENTS)
    for shares in told["tokens"].values():
        assert sum(shares.values()) == pytest.approx(1)


def test_one_that_draws_the_others_tokens_is_named(run):
    """Its vectors point as all inputs do and are the longest that is allowed."""
    run_json = read_json(run / "run.json")
    for name in CLIENTS:
        folder = run / "clients" / name / "upload" / VARIANT
        vectors = load_file(run / "clients" / "intent" / "upload" / VARIANT / ROUTER)["vectors"]
        save_file({"vectors": vectors * (1.5 if name == "hotels" else 0.7)}, folder / ROUTER)
        if name != "intent":
            forge(folder, run_json)
    forge(run / "clients" / "intent" / "upload" / VARIANT, run_json)
    flags = ["--method", "metamoe", "--name", "new", "--train", "none", "--length-bound", "4"]
    result = tiny.stage("unify_moe", run, *flags)
    assert result.code == 0, result.err
    assert "WARNING: hotels draws most of the tokens of intent's proxies" in result.out


def test_an_upload_changes_its_own_expert_alone(run):
    """Another rank, dtype, alpha and other weights of one client leave the others' tensors as they were."""
    flags = ["--method", "metamoe", "--train", "none"]
    assert tiny.stage("unify_moe", run, *flags, "--name", "before").code == 0
    folder = run / "clients" / "hotels" / "upload" / VARIANT
    edit_tensors(FACTORS, lambda own: {k: wild(k, t) for k, t in own.items()})(folder)
    edit_json(CONFIG, lambda own: own | {"r": 7, "lora_alpha": -3})(folder)
    forge(folder, read_json(run / "run.json"))
    result = tiny.stage("unify_moe", run, *flags, "--name", "after")
    assert result.code == 0, result.err
    (before, old), (after, new) = (moe.read(run / "moe" / name) for name in ("before", "after"))
    assert before["names"] == after["names"]
    for key, tensor in old.items():
        if key.endswith(".router.lam"):
            assert torch.equal(tensor, new[key])
            continue
        for expert, name in enumerate(before["names"]):
            was, now = tensor[expert], new[key][expert]
            if ".experts." in key:  # zeros fill up to the largest rank
                now, rest = now[: was.shape[0], : was.shape[1]], now
                assert name == "hotels" or rest.count_nonzero() == now.count_nonzero()
            assert torch.equal(was, now) == (name != "hotels" or ".router." in key), key


def wild(key, tensor):
    noise = torch.randn(7, tensor.shape[1]) if "lora_A" in key else torch.randn(tensor.shape[0], 7)
    return (100 * noise).to(torch.bfloat16)


SWAP = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from metamoe import untrusted, uploads
from metamoe.rundir import read_json
run_dir, sent = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
read = uploads.read_folder
def and_then_swap(*args):
    content = read(*args)
    (sent / "router.safetensors").write_bytes(b"swapped after it was read")
    return content
uploads.read_folder = and_then_swap
uploads.receive(run_dir, read_json(run_dir / "run.json"), [f"intent={sent}"], "aligned-dpp")
"""


def test_what_is_swapped_after_the_check_is_not_what_is_used(sent):
    run_dir, folder, run = sent
    was = (folder / ROUTER).read_bytes()
    command = [sys.executable, "-c", SWAP, tiny.REPO, run_dir, folder]
    subprocess.run(command, check=True, env=tiny.environment(), capture_output=True)
    assert (folder / ROUTER).read_bytes() != was
    assert (run_dir / "clients" / "intent" / "upload" / VARIANT / ROUTER).read_bytes() == was
    read_upload(run_dir, run, "intent", VARIANT)
