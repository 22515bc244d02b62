"""The boundary between client and server: what an upload holds, and what the server opens."""

import json
import re
import shutil
from pathlib import Path

import drive
import pytest
import tiny
from tiny import CLIENTS, CLOCKS, SIZES, refused, uploads

from metamoe.rundir import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


METHODS = ("metamoe", "flexolmo", "btx", "soup", "btm")


def unify(run_dir, *methods):
    """Make the models anew, in a process of its own; returns every path below `run_dir` that it opened."""
    shutil.rmtree(run_dir / "moe")
    commands = [
        command
        for command in tiny.commands(run_dir)
        if command[0] == "unify_moe" and set(methods) & set(command) and "--name" not in command
    ]
    assert len(commands) == len(methods)
    report = tiny.drive(commands=commands, audit=str(run_dir))
    assert report["code"] == 0, report["stderr"]
    return {path for _, path in report["opened"]}


@pytest.mark.slow
def test_the_server_opens_and_needs_nothing_of_a_client_but_its_upload(run, finished):
    """safetensors opens its files outside of Python, where no audit hook sees it: so all else is spoilt."""
    for path in filter(Path.is_file, run.glob("clients/*/*/**/*")):
        if path.relative_to(run).parts[2] != "upload":
            path.write_bytes(b"spoilt")
    opened = unify(run, *METHODS)
    hook_sees = {"run.json", "public/records.jsonl", "clients/hotels/upload/aligned-dpp"}
    assert hook_sees <= opened
    allowed = re.compile(r"(run|local)\.json$|public(/|$)|clients/\w+/upload(/|$)|(moe|settings)(/|$)")
    assert not [path for path in opened if not allowed.match(path)]
    for folder in (Path("moe", method) for method in METHODS):
        assert drive.snapshot(run / folder, *CLOCKS) == drive.snapshot(finished[0] / folder, *CLOCKS)


@pytest.mark.slow
def test_unrestricted_does_read_private_data(run):
    """The counterpart: were it read by the others, the test above would fail."""
    assert "clients/hotels/private/train.jsonl" in unify(run, "unrestricted")


def test_the_manifest_hashes_the_uploaded_files_alone(finished):
    assert len(uploads(finished[0])) == 9
    for upload in uploads(finished[0]):
        manifest = read_json(upload / "manifest.json")
        hashes = {file: found["sha256"] for file, found in manifest["files"].items()}
        assert hashes == drive.snapshot(upload, "manifest.json")
        about = {
            "format",
            "client",
            "data",
            "selection",
            "full_ffn",
            "privacy",
            "agreement",
            "public",
            "seed_model",
        }
        assert set(manifest) == about | {"files"}
        assert manifest["client"] == upload.parent.parent.name
        assert f"{manifest['data']}-{manifest['selection']}" == upload.name


def test_proxies_are_sorted_indices_without_scores(finished):
    for upload in uploads(finished[0]):
        proxies = read_json(upload / "proxies.json")
        assert all(type(i) is int for i in proxies)
        assert proxies == sorted(set(proxies)) and len(proxies) == SIZES["proxies"]
        client, rule = upload.parent.parent, upload.name.split("-")[1]
        assert set(proxies) == set(read_json(client / "selection" / rule / "selection.json")["proxies"])


def test_no_private_text_and_no_path_is_in_an_upload_or_a_model(finished, seed_model):
    run_dir, _ = finished
    secrets = [tiny.SECRET, str(run_dir), str(seed_model), str(Path.home()), str(tiny.REPO)]
    for name in CLIENTS:
        for part in ("train", "validation", "test"):
            lines = (run_dir / "clients" / name / "private" / f"{part}.jsonl").read_text().splitlines()
            secrets += [json.loads(line)["input"] for line in lines]
    assert tiny.SECRET in secrets[-1]
    for folder in [*uploads(run_dir), run_dir / "moe"]:
        for path in filter(Path.is_file, folder.rglob("*")):
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], path


def refusal(run):
    return refused("unify_moe", run, "--method", "metamoe", "--name", "new")


ADAPTER = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@pytest.mark.parametrize("file", [*ADAPTER, "router.safetensors", "proxies.json"])
def test_an_edited_upload_is_named(run, file):
    path = run / "clients" / "hotels" / "upload" / "private-similarity" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for name, flags in (("unify_moe", ["--method", "btx", "--name", "new"]), ("evaluate", [])):
        message = refused(name, run, *flags)
        assert file in message and "hotels" in message


def test_files_more_or_fewer_in_an_upload_are_named(run):
    upload = run / "clients" / "question" / "upload" / "aligned-dpp"
    (upload / "gift.txt").write_text("x")
    assert "gift.txt" in refusal(run)
    (upload / "gift.txt").unlink()
    (upload / "router.safetensors").unlink()
    assert "router.safetensors' is missing" in refusal(run)
