"""The stages through their own command lines, on a tiny model and synthetic data, from proxies to the table."""

import contextlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import drive
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import CLIENTS, COMMON, SIZES

import select_proxies
from dpp import relevance_weighted_dpp
from metamoe import rundir
from metamoe.data import bigbench
from metamoe.rundir import atomic, read_json, write_json
from metamoe.uploads import write_manifest

METHODS = ["soup", "btm", "btx", "flexolmo", "metamoe", "unrestricted"]
CLOCKS = ("timing.json", "timings.json", "timings.md")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, seed_model):
    """A run directory with its data and nothing else."""
    run_dir = tmp_path_factory.mktemp("pristine") / "run"
    tiny.make_run(run_dir, seed_model)
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pristine):
    """A run of the whole pipeline: its folder and the driver's report."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(pristine, run_dir)
    report = tiny.drive(commands=tiny.commands(run_dir))
    assert report["code"] == 0, report["stderr"]
    return run_dir, report


@pytest.fixture
def run(tmp_path, finished):
    """A copy of the finished run, for a test to change."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def fresh(tmp_path, pristine):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


def stage(name, run_dir, *args):
    return drive.call(name, "--run-dir", run_dir, *COMMON, *args)


def refused(name, run_dir, *args, watch=None):
    """Run a stage that must refuse: exit code 2, exactly one line on stderr, nothing written. Returns that line."""
    watch = watch or run_dir
    before = drive.snapshot(watch), sorted(Path(watch).rglob("*"))
    result = stage(name, run_dir, *args)
    assert result.code == 2, f"code {result.code}: {result.err or result.out}"
    assert result.err.count("\n") == 1 and result.err.startswith("error: "), result.err
    assert (drive.snapshot(watch), sorted(Path(watch).rglob("*"))) == before
    return result.err


def forge(upload):
    """Close a changed upload with a manifest that fits it, as a client with such an upload would."""
    about = {key: value for key, value in read_json(upload / "manifest.json").items() if key != "files"}
    (upload / "manifest.json").unlink()
    write_manifest(upload, about)


# --- the whole pipeline


def test_every_expected_file_is_written(finished):
    run_dir, _ = finished
    for name in CLIENTS:
        client = run_dir / "clients" / name
        assert np.load(client / "selection" / "relevance.npy").shape == (SIZES["public_size"],)
        for rule in ("similarity", "dpp", "random"):
            chosen = read_json(client / "selection" / rule / "selection.json")["proxies"]
            assert len(chosen) == len(set(chosen)) == SIZES["proxies"] and all(
                0 <= i < SIZES["public_size"] for i in chosen
            )
        for variant in ("private-similarity", "aligned-dpp", "proxies-random"):
            upload = client / "upload" / variant
            assert sorted(drive.snapshot(upload)) == [
                "adapter/adapter_config.json",
                "adapter/adapter_model.safetensors",
                "manifest.json",
                "proxies.json",
                "router.safetensors",
            ]
            assert load_file(upload / "router.safetensors")["vectors"].shape == (2, 32)
        assert sorted(p.name for p in (client / "experts").iterdir()) == [
            "aligned-dpp",
            "private",
            "proxies-random",
        ]
    expected = {
        method: ["done.json", "losses.json", "moe.safetensors", "moe_config.json", "timing.json"]
        for method in (*METHODS, "from-proxies")
    }
    expected["soup"] = [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "done.json",
        "timing.json",
    ]
    expected["btm"] = ["done.json", "timing.json"]
    assert {folder.name: sorted(drive.snapshot(folder)) for folder in (run_dir / "moe").iterdir()} == expected
    assert {p.name for p in run_dir.iterdir()} == {
        "run.json",
        "public",
        "clients",
        "moe",
        "scores",
        "results.json",
        "results.md",
        "timings.json",
        "timings.md",
    }


def test_nothing_is_pickled_and_nothing_half_written_is_left(finished):
    names = [p.name for p in finished[0].rglob("*")]
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) or ".part" in n]
    for path in finished[0].rglob("*.npy"):
        np.load(path, allow_pickle=False)


def test_results_json_adds_up(finished):
    run_dir, _ = finished
    results = read_json(run_dir / "results.json")
    assert results["n"] == dict.fromkeys(CLIENTS, SIZES["test_size"])
    for row in results["rows"]:
        for name in CLIENTS:
            cell = row["clients"][name]
            assert (
                cell["n"] == SIZES["test_size"]
                and isinstance(cell["correct"], int)
                and 0 <= cell["correct"] <= cell["n"]
            )
            assert cell["accuracy"] == pytest.approx(100 * cell["correct"] / cell["n"])
            assert cell["wilson"][0] <= cell["accuracy"] <= cell["wilson"][1]
        assert row["average"] == pytest.approx(
            np.mean([row["clients"][name]["accuracy"] for name in CLIENTS])
        )
    ours = {row["model"]: row["average"] for row in results["rows"]}
    for row in results["rows"]:
        if row["model"] != "metamoe":
            assert row["metamoe_minus"]["difference"] == pytest.approx(ours["metamoe"] - row["average"])
        for shares in row.get("routing", {}).values():
            assert np.shape(shares) == (2, 3) and np.sum(shares, 1) == pytest.approx([1, 1])
    assert {row["model"] for row in results["rows"] if "routing" in row} == {
        "btx",
        "flexolmo",
        "metamoe",
        "unrestricted",
        "from-proxies",
    }
    for name in CLIENTS:
        upload = run_dir / "clients" / name / "upload" / "aligned-dpp"
        assert results["uploaded_bytes"][f"{name}/aligned-dpp"] == sum(
            p.stat().st_size for p in upload.rglob("*") if p.is_file()
        )


def test_scores_agree_with_the_table(finished):
    """Accuracy counted anew from RUN/scores and the private test parts."""
    run_dir, _ = finished
    rows = {row["model"]: row for row in read_json(run_dir / "results.json")["rows"]}
    for model in ("zeroshot", "soup", "metamoe", "expert-intent"):
        for name in CLIENTS:
            scores = read_json(run_dir / "scores" / f"{model}.test.json")["scores"][name]
            records = [
                json.loads(line)
                for line in (run_dir / "clients" / name / "private" / "test.jsonl").read_text().splitlines()
            ]
            correct = sum(
                r["choices"][max(range(len(s)), key=s.__getitem__)] == r["answer"]
                for s, r in zip(scores, records, strict=True)
            )
            assert rows[model]["clients"][name]["correct"] == correct


def test_the_table_has_the_papers_rows_in_its_order(finished):
    lines = (finished[0] / "results.md").read_text().splitlines()
    start = lines.index("| | intent | hotels | question | Average |") + 2
    titles = [line.split("|")[1].strip() for line in lines[start : lines.index("", start)]]
    assert titles == [
        "UnrestrictedMoE",
        "ZeroShot",
        "Expert I (intent)",
        "Expert II (hotels)",
        "Expert III (question)",
        "BTM",
        "ModelSoup",
        "BTX",
        "FlexOlmo",
        "MetaMoE",
        "from-proxies",
    ]
    rows = read_json(finished[0] / "results.json")["rows"]
    for line, row in zip(lines[start:], rows):
        cells = [float(cell) for cell in line.split("|")[2:-1]]
        assert cells == [
            pytest.approx(v, abs=0.006)
            for v in [*(row["clients"][name]["accuracy"] for name in CLIENTS), row["average"]]
        ]


def test_training_on_separable_data_helps(finished):
    """Experts (each on its own data) and MetaMoE (on all) are far above the random seed model: the stages do learn."""
    rows = {row["model"]: row for row in read_json(finished[0] / "results.json")["rows"]}
    for name in CLIENTS:
        losses = read_json(finished[0] / "clients" / name / "experts" / "private" / "losses.json")
        assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    own = np.mean([rows[f"expert-{name}"]["clients"][name]["accuracy"] for name in CLIENTS])
    assert min(own, rows["metamoe"]["average"]) > rows["zeroshot"]["average"] + 20


def test_clocks_are_read_into_the_timings_alone(finished):
    run_dir, _ = finished
    timings = read_json(run_dir / "timings.json")
    selection, relevance = timings.pop("selection_seconds"), timings.pop("relevance_seconds")
    assert (
        timings.pop("embedding_seconds") > 0
        and relevance.keys() == set(CLIENTS)
        and min(relevance.values()) > 0
    )
    assert selection.keys() == set(CLIENTS) and all(
        t.keys() == {"dpp", "random", "similarity"} and min(t.values()) > 0 for t in selection.values()
    )
    assert set(timings) == {row["model"] for row in read_json(run_dir / "results.json")["rows"]}
    assert (
        all(t["samples_per_second"] > 0 for t in timings.values()) and timings["metamoe"]["unify_seconds"] > 0
    )
    for name in ("results.json", "results.md"):
        assert not re.search(r"second|time", (run_dir / name).read_text())
    table = (run_dir / "timings.md").read_text()
    assert (
        f"| MetaMoE | {timings['metamoe']['unify_seconds']:.2f} | {timings['metamoe']['samples_per_second']:.1f} |"
        in table
    )
    assert "| ZeroShot |  |" in table and f"| DPP | {selection[CLIENTS[0]]['dpp']:.3f} |" in table


def test_unrestricted_says_that_it_breaks_privacy(finished):
    assert finished[1]["stdout"].count("TRAINED ON ALL CLIENTS' PRIVATE DATA") == 1


def test_the_fixtures_layout_is_that_of_write_data(tmp_path, seed_model, pristine, monkeypatch):
    """The run directory of these tests is what select_proxies.py makes of an archive (here a synthetic one)."""
    synthetic_archive(monkeypatch)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    result = stage("select_proxies", tmp_path / "run", "--seed-model", seed_model, *sizes)
    assert result.code == 0, result.err
    made = {
        p
        for p in drive.snapshot(tmp_path / "run")
        if "selection" not in p and not p.endswith(("features.npy", "unreadable.json", "timing.json"))
    }
    assert made == set(drive.snapshot(pristine))
    ours, theirs = read_json(pristine / "run.json"), read_json(tmp_path / "run" / "run.json")
    assert ours == theirs
    for path in made:
        if path.endswith("done.json"):
            assert read_json(pristine / path).keys() == read_json(tmp_path / "run" / path).keys()


def synthetic_archive(monkeypatch, per_task=60):
    """Let bigbench.load_bigbench read a small archive made here."""
    names = [bigbench.CLIENTS[name][0] for name in bigbench.CLIENTS] + [
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
                    choices for client, _, choices in bigbench.CLIENTS.values() if client == task and choices
                ):
                    examples = [
                        {"input": example["input"], "target": [choices[i % 2]]}
                        for i, example in enumerate(examples)
                    ]
                yield member, {"examples": examples}

    monkeypatch.setattr(bigbench, "fetch", lambda **kwargs: None)
    monkeypatch.setattr(bigbench, "read_members", members)


# --- same seed, same bytes


@pytest.mark.slow
def test_a_second_run_in_another_folder_gives_the_same_bytes(tmp_path, pristine, finished):
    """Also with another PYTHONHASHSEED, which every process draws: no set's order reaches a file."""
    other = tmp_path / "elsewhere" / "another run"
    shutil.copytree(pristine, other)
    assert tiny.drive(commands=tiny.commands(other))["code"] == 0
    ours, theirs = drive.snapshot(finished[0], *CLOCKS), drive.snapshot(other, *CLOCKS)
    assert ours.keys() == theirs.keys()
    differ = [
        path for path in ours if ours[path] != theirs[path] and not path.startswith("scores/")
    ]  # these hold samples/s
    assert not differ
    for path in (p for p in ours if p.startswith("scores/")):
        a, b = read_json(finished[0] / path), read_json(other / path)
        assert a | {"samples_per_second": 0} == b | {"samples_per_second": 0}


@pytest.mark.slow
def test_another_seed_gives_another_model(tmp_path, seed_model, finished):
    tiny.make_run(tmp_path / "run", seed_model, seed=1)
    for command in tiny.commands(tmp_path / "run")[:5]:
        assert drive.call(*command).code == 0
    upload = Path("clients/intent/upload/aligned-dpp/adapter/adapter_model.safetensors")
    assert (tmp_path / "run" / upload).read_bytes() != (finished[0] / upload).read_bytes()


# --- privacy


def unify_commands(run_dir, methods=("metamoe", "flexolmo", "btx", "soup", "btm")):
    return [
        c
        for c in tiny.commands(run_dir)
        if c[0] == "unify_moe" and c[c.index("--method") + 1] in methods and "--name" not in c
    ]


@pytest.mark.slow
def test_the_server_opens_nothing_of_a_client_but_its_upload(run):
    shutil.rmtree(run / "moe")
    report = tiny.drive(commands=unify_commands(run), audit=str(run))
    assert report["code"] == 0, report["stderr"]
    opened = {path for _, path in report["opened"]}
    assert {
        "run.json",
        "public/records.jsonl",
        "clients/hotels/upload/aligned-dpp/manifest.json",
    } <= opened  # the hook does see
    allowed = re.compile(r"run\.json$|public(/|$)|clients/\w+/upload(/|$)|moe(/|$)")
    assert not [path for path in opened if not allowed.match(path)]


@pytest.mark.slow
def test_the_server_needs_nothing_of_a_client_but_its_upload(run, finished):
    """safetensors opens its files outside of Python, where no audit hook sees it: so take the rest away."""
    shutil.rmtree(run / "moe")
    for name in CLIENTS:
        for path in (run / "clients" / name).iterdir():
            if path.name != "upload":
                shutil.rmtree(path)
    report = tiny.drive(commands=unify_commands(run))
    assert report["code"] == 0, report["stderr"]
    for method in ("metamoe", "flexolmo", "btx", "soup", "btm"):
        assert drive.snapshot(run / "moe" / method, *CLOCKS) == drive.snapshot(
            finished[0] / "moe" / method, *CLOCKS
        )


@pytest.mark.slow
def test_unrestricted_does_read_private_data(run):
    """The counterpart of the two above: were it read there, they would fail."""
    shutil.rmtree(run / "moe")
    report = tiny.drive(commands=unify_commands(run, ["unrestricted"]), audit=str(run))
    assert "clients/hotels/private/train.jsonl" in {path for _, path in report["opened"]}


def uploads(run_dir):
    return sorted(p.parent for p in run_dir.glob("clients/*/upload/*/manifest.json"))


def test_the_manifest_hashes_the_uploaded_files_alone(finished):
    assert len(uploads(finished[0])) == 9
    for upload in uploads(finished[0]):
        manifest = read_json(upload / "manifest.json")
        assert manifest["files"] == drive.snapshot(upload, "manifest.json")
        assert set(manifest) == {"client", "data", "selection", "files"}
        assert (
            manifest["client"] == upload.parent.parent.name
            and f"{manifest['data']}-{manifest['selection']}" == upload.name
        )


def test_proxies_are_sorted_indices_without_scores(finished):
    for upload in uploads(finished[0]):
        proxies = read_json(upload / "proxies.json")
        assert (
            all(type(i) is int for i in proxies)
            and proxies == sorted(set(proxies))
            and len(proxies) == SIZES["proxies"]
        )
        client, rule = upload.parent.parent, upload.name.split("-")[1]
        assert set(proxies) == set(read_json(client / "selection" / rule / "selection.json")["proxies"])


def test_without_the_pre_filter_the_dpp_chooses_from_all(fresh, tmp_path, seed_model):
    """The rule dpp-all of a run with candidates, and the rule dpp of a run without (--pool 0)."""
    assert (
        stage("select_proxies", fresh).code
        == stage("select_proxies", fresh, "--selection", "dpp-all").code
        == 0
    )
    tiny.make_run(tmp_path / "whole", seed_model, candidates=0)
    assert stage("select_proxies", tmp_path / "whole", "--pool", "0").code == 0
    features, differs = np.load(fresh / "public" / "features.npy"), False
    for name in CLIENTS:
        relevance = np.load(fresh / "clients" / name / "selection" / "relevance.npy")
        want = relevance_weighted_dpp(features, relevance, SIZES["proxies"]).tolist()
        found = {
            folder.name: read_json(folder / "selection.json")["proxies"]
            for folder in (fresh / "clients" / name / "selection").glob("dpp*")
        }
        assert (
            found["dpp-all"]
            == want
            == read_json(tmp_path / "whole" / "clients" / name / "selection" / "dpp" / "selection.json")[
                "proxies"
            ]
        )
        few = read_json(fresh / "run.json") | {"candidates": SIZES["proxies"]}
        differs |= set(
            select_proxies.choose("dpp", features, relevance, few, name, range(len(features))).tolist()
        ) != set(want)
        # an unreadable sample has no features and no relevance
        features[7], relevance[7] = np.nan, 0
        usable = [i for i in range(len(features)) if i != 7]
        chosen = select_proxies.choose(
            "dpp-all", features, relevance, read_json(fresh / "run.json"), name, usable
        ).tolist()
        assert chosen == [
            usable[i] for i in relevance_weighted_dpp(features[usable], relevance[usable], SIZES["proxies"])
        ]
        features = np.load(fresh / "public" / "features.npy")
    assert differs  # a pre-filter would have shown
    for command in (
        ["train_expert", "--selection", "dpp-all", "--epochs", "1"],
        ["unify_moe", "--method", "metamoe", "--selection", "dpp-all", "--name", "metamoe-dpp-all"],
        ["evaluate", "--models", "metamoe-dpp-all"],
    ):
        result = stage(command[0], fresh, *command[1:])
        assert result.code == 0, result.err
    assert "| the whole public set |" in (fresh / "results.md").read_text()


def test_no_private_text_and_no_path_is_in_an_upload_or_a_model(finished, seed_model):
    run_dir, _ = finished
    secrets = [tiny.SECRET, str(run_dir), str(seed_model), str(Path.home()), str(tiny.REPO)]
    for name in CLIENTS:
        for part in ("train", "validation", "test"):
            lines = (run_dir / "clients" / name / "private" / f"{part}.jsonl").read_text().splitlines()
            secrets += [json.loads(line)["input"] for line in lines]
    assert tiny.SECRET in secrets[-1]
    for path in [
        p for folder in [*uploads(run_dir), run_dir / "moe"] for p in folder.rglob("*") if p.is_file()
    ]:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_what_is_uploaded_is_the_ffn_alone(finished):
    for upload in uploads(finished[0]):
        tensors = load_file(upload / "adapter" / "adapter_model.safetensors")
        assert len(tensors) == 2 * 3 * 2 and all(
            re.search(r"\.mlp\.(gate|up|down)_proj\.lora_[AB]\.weight$", key) for key in tensors
        )


# --- experts are PEFT adapters


def logits_with(seed_model, folder=None, deltas=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(seed_model, dtype=torch.float32).eval()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    for name, delta in (deltas or {}).items():
        model.get_parameter(name).data += delta
    with torch.no_grad():
        return model(torch.arange(2, 42).view(2, 20)).logits


def products(folder):
    """{weight: s B A} of a PEFT adapter, by its two files alone."""
    config, tensors = (
        read_json(folder / "adapter_config.json"),
        load_file(folder / "adapter_model.safetensors"),
    )
    scaling = config["lora_alpha"] / config["r"]
    bases = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        f"{b.removeprefix('base_model.model.')}.weight": scaling
        * tensors[f"{b}.lora_B.weight"]
        @ tensors[f"{b}.lora_A.weight"]
        for b in bases
    }


def test_peft_loads_an_upload_as_the_expert(finished, seed_model):
    upload = finished[0] / "clients" / "intent" / "upload" / "aligned-dpp"
    dense = products(upload / "adapter")
    assert len(dense) == 6 and all(delta.abs().max() > 1e-3 for delta in dense.values())
    got, want = logits_with(seed_model, upload / "adapter"), logits_with(seed_model, deltas=dense)
    assert (got - want).abs().max() < 1e-3 < 0.1 < (got - logits_with(seed_model)).abs().max()
    assert read_json(upload / "adapter" / "adapter_config.json")["peft_type"] == "LORA"


def test_the_soup_is_the_average_of_the_products(finished, seed_model):
    run_dir, _ = finished
    experts = [
        products(run_dir / "clients" / name / "upload" / "private-similarity" / "adapter") for name in CLIENTS
    ]
    soup = products(run_dir / "moe" / "soup" / "adapter")
    assert soup.keys() == experts[0].keys()
    for key, delta in soup.items():
        assert (
            torch.allclose(delta, sum(expert[key] for expert in experts) / 3, atol=1e-6)
            and delta.abs().max() > 1e-3
        )
    got = logits_with(seed_model, run_dir / "moe" / "soup" / "adapter")
    assert torch.allclose(got, logits_with(seed_model, deltas=soup), atol=1e-3)


# --- full FFN, seed expert, top-k, weightings, bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_ffn_experts_are_trained_uploaded_and_unified(fresh, dtype):
    """float32 trains and scores every kind of model; bfloat16 (autocast) goes the same way with fewer of them."""
    common = ["--dtype", dtype]  # the later --dtype wins
    assert stage("select_proxies", fresh, "--selection", "similarity", *common).code == 0
    for data in ("private", "aligned"):
        result = stage(
            "train_expert",
            fresh,
            "--data",
            data,
            "--selection",
            "similarity",
            "--full-ffn",
            "--epochs",
            "1",
            *common,
        )
        assert result.code == 0, result.err
    upload = fresh / "clients" / "hotels" / "upload" / "private-similarity-full"
    assert sorted(drive.snapshot(upload)) == [
        "ffn.safetensors",
        "manifest.json",
        "proxies.json",
        "router.safetensors",
    ]
    assert set(load_file(upload / "ffn.safetensors")) == {
        f"model.layers.{i}.mlp.{linear}_proj.weight" for i in (0, 1) for linear in ("gate", "up", "down")
    }
    variants = [
        ["soup"],
        ["btm"],
        ["metamoe", "--selection", "similarity", "--seed-expert", "--top-k", "2", "--train", "none"],
    ]
    if dtype == "float32":
        variants += [
            [
                "metamoe",
                "--selection",
                "similarity",
                "--weighting",
                w,
                "--name",
                w,
                "--top-k",
                "2",
                "--offset",
            ]
            for w in ("stopgrad", "literal", "renormalized")
        ]
    for method, *flags in variants:
        result = stage("unify_moe", fresh, "--method", method, "--full-ffn", *flags, *common)
        assert result.code == 0, result.err
    result = stage("evaluate", fresh, *common)
    assert result.code == 0, result.err
    rows = read_json(fresh / "results.json")["rows"]
    assert len(rows) == 4 + len(variants) and next(row for row in rows if row["model"] == "metamoe")[
        "experts"
    ] == ["seed", *CLIENTS]
    assert read_json(fresh / "moe" / "metamoe" / "moe_config.json")["kind"] == "full"
    if dtype == "float32":  # the soup of the weights
        paths = [
            fresh / "clients" / name / "upload" / "private-similarity-full" / "ffn.safetensors"
            for name in CLIENTS
        ]
        for key, tensor in load_file(fresh / "moe" / "soup" / "ffn.safetensors").items():
            assert torch.allclose(tensor, sum(load_file(path)[key] for path in paths) / 3, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed-expert", "--top-k", "2", "--weighting", "stopgrad"],
        ["--weighting", "literal", "--lambda-init", "0.3"],
        ["--weighting", "renormalized", "--top-k", "3", "--offset"],
        ["--context", "off", "--init", "random", "--train", "router"],
        ["--samples", "public", "--data", "private", "--selection", "similarity"],
        ["--train", "none"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_switch_makes_a_model_that_evaluate_scores(run, flags):
    result = stage("unify_moe", run, "--method", "metamoe", "--name", "variant", *flags)
    assert result.code == 0, result.err
    result = stage("evaluate", run, "--models", "variant", "metamoe")
    assert result.code == 0, result.err
    assert [row["model"] for row in read_json(run / "results.json")["rows"]] == ["metamoe", "variant"]
    scores = [read_json(run / "scores" / f"{name}.test.json")["scores"] for name in ("metamoe", "variant")]
    assert scores[0] != scores[1]


def test_the_untrained_moe_starts_at_the_uploads(run):
    """--train none: routing vectors and experts are the uploaded ones, lambda the given one."""
    assert (
        stage(
            "unify_moe",
            run,
            "--method",
            "metamoe",
            "--name",
            "start",
            "--train",
            "none",
            "--lambda-init",
            "0.25",
        ).code
        == 0
    )
    tensors = load_file(run / "moe" / "start" / "moe.safetensors")
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp"
        assert tensors[f"{prefix}.router.lam"].item() == 0.25
        for p, name in enumerate(CLIENTS):
            upload = run / "clients" / name / "upload" / "aligned-dpp"
            assert torch.equal(
                tensors[f"{prefix}.router.vectors"][p],
                load_file(upload / "router.safetensors")["vectors"][layer],
            )
            adapter = load_file(upload / "adapter" / "adapter_model.safetensors")
            assert torch.equal(
                tensors[f"{prefix}.experts.up_proj.B"][p],
                adapter[f"base_model.model.{prefix}.up_proj.lora_B.weight"],
            )


@pytest.mark.parametrize(
    "method, moves",
    [("metamoe", {"router", "lam", "experts"}), ("flexolmo", {"router"}), ("btx", {"router", "experts"})],
)
def test_the_final_training_moves_what_the_method_says(run, method, moves):
    """FlexOlmo trains its router alone; without a context lambda gets no gradient."""
    assert stage("unify_moe", run, "--method", method, "--name", "start", "--train", "none").code == 0
    before, after = (load_file(run / "moe" / name / "moe.safetensors") for name in ("start", method))
    moved = {
        key.split(".")[-1] if key.endswith("lam") else key.split(".")[4]
        for key in before
        if not torch.equal(before[key], after[key])
    }
    assert {"router" if m == "vectors" else m for m in moved} == moves


# --- finished stages: skipped, or refused under other settings


def flags_of(name, run_dir, *needed):
    command = next(
        c for c in tiny.commands(run_dir) if c[0] == name and set(needed) <= set(c) and "--name" not in c
    )
    return command[3 + len(COMMON) :]


@pytest.mark.parametrize(
    "name, needed, folder, say",
    [
        (
            "select_proxies",
            ["dpp"],
            "clients/hotels/selection/dpp",
            "dpp selection is there already, skipped",
        ),
        (
            "train_expert",
            ["aligned"],
            "clients/hotels/experts/aligned-dpp",
            "expert is there already, skipped",
        ),
        ("unify_moe", ["metamoe"], "moe/metamoe", "is there already, skipped"),
    ],
)
def test_a_finished_stage_is_skipped(run, name, needed, folder, say):
    before = drive.snapshot(run), {p: p.stat().st_mtime_ns for p in (run / folder).rglob("*")}
    result = stage(name, run, *flags_of(name, run, *needed))
    assert result.code == 0 and say in result.out
    assert (drive.snapshot(run), {p: p.stat().st_mtime_ns for p in (run / folder).rglob("*")}) == before


@pytest.mark.parametrize(
    "name, needed, folder, other, say",
    [
        (
            "select_proxies",
            ["dpp"],
            "clients/hotels/selection/dpp",
            ["--dtype", "bfloat16"],
            "dtype 'float32' there, 'bfloat16' now",
        ),
        (
            "train_expert",
            ["aligned"],
            "clients/hotels/experts/aligned-dpp",
            ["--lr", "0.5"],
            "lr 0.02 there, 0.5 now",
        ),
        ("unify_moe", ["metamoe"], "moe/metamoe", ["--lambda-init", "0.5"], "lambda_init 1.0 there, 0.5 now"),
    ],
)
def test_other_settings_are_refused_and_redone_with_force(run, name, needed, folder, other, say):
    flags = [*flags_of(name, run, *needed), *other]
    message = refused(name, run, *flags)
    assert say in message and "--force" in message
    before = drive.snapshot(run)
    result = stage(name, run, *flags, "--force")
    assert result.code == 0, result.err
    after = drive.snapshot(run)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert f"{folder}/done.json" in changed
    # a selection is redone from the embeddings on
    roots = (
        folder.replace("hotels", r"\w+"),
        r"clients/\w+/upload",
        r"clients/\w+/selection/(relevance.npy|timing.json)",
        "public/(features.npy|timing.json)",
    )
    assert all(re.match("|".join(roots), path) for path in changed), changed
    assert stage(name, run, *flags).out.count("skipped") >= 1


def test_a_new_upload_makes_the_old_model_stale(run):
    """The unified model knows which uploads it was made of."""
    flags = flags_of("train_expert", run, "aligned")
    assert stage("train_expert", run, *flags, "--client", "hotels", "--lr", "0.5", "--force").code == 0
    assert "uploads" in refused("unify_moe", run, *flags_of("unify_moe", run, "metamoe"))


def test_another_seed_for_the_same_run_is_refused(run):
    message = refused("select_proxies", run, "--selection", "dpp", "--seed", "1")
    assert "seed 0" in message and "1" in message and "--run-dir" in message


@pytest.mark.parametrize(
    "flags, say",
    [
        (["--train-size", "13"], "train_size 12"),
        (["--clients", "hotels"], "clients"),
        (["--proxies", "5"], "proxies 6"),
    ],
)
def test_other_run_settings_are_refused(run, flags, say):
    assert say in refused("select_proxies", run, *flags)


def test_evaluate_scores_each_model_once(run):
    before = {p: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    results = (run / "results.json").read_bytes(), (run / "results.md").read_bytes()
    assert stage("evaluate", run).code == 0
    assert {p: p.stat().st_mtime_ns for p in (run / "scores").iterdir()} == before
    assert ((run / "results.json").read_bytes(), (run / "results.md").read_bytes()) == results


def test_a_remade_model_is_scored_anew(run):
    before = {p.name: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    assert stage("unify_moe", run, "--method", "metamoe", "--force", "--lr", "0.5").code == 0
    assert stage("evaluate", run).code == 0
    after = {p.name: p.stat().st_mtime_ns for p in (run / "scores").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"metamoe.test.json"}


def test_validation_results_stand_beside_the_test_results(run):
    before = (run / "results.json").read_bytes()
    assert stage("evaluate", run, "--split", "validation", "--models", "zeroshot", "metamoe", "btm").code == 0
    results = read_json(run / "results.validation.json")
    assert (
        results["n"] == dict.fromkeys(CLIENTS, SIZES["validation_size"])
        and (run / "results.json").read_bytes() == before
    )
    assert [row["title"] for row in results["rows"]] == ["ZeroShot", "BTM", "MetaMoE"]


# --- bad input


@pytest.mark.parametrize(
    "flags, say",
    [
        (["--backbone", "gpt-9"], "gpt-9"),
        (["--clients", "intent", "nobody"], "nobody"),
        (["--clients", "intent", "intent"], "intent"),
        (["--client", "nobody"], "nobody"),
        (["--proxies", "9", "--candidates", "8", "--public-size", "48"], "m must be at most n"),
        (["--candidates", "99", "--public-size", "48"], "n must be at most |D_0|"),
        (["--pool", "0", "--proxies", "49", "--public-size", "48"], "m must be at most |D_0|"),
        (["--pool", "-1"], "--candidates -1"),
        (["--train-size", "1"], "--train-size"),
        (["--train-size", "0"], "--train-size"),
        (["--test-size", "0"], "--test-size"),
        (["--validation-size", "-1"], "--validation-size"),
        (["--public-size", "1", "--candidates", "1", "--proxies", "1"], "--public-size"),
        (["--seed", "-1"], "--seed"),
        (["--seed-model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--device", "abacus"], "abacus"),
        pytest.param(
            ["--device", "cuda"],
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (
            ["--train-size", "40", "--validation-size", "11", "--test-size", "10"],
            "60 distinct usable records, 61 asked for",
        ),
        (["--public-size", "100000"], "usable public records"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_setting_of_a_new_run_leaves_nothing(tmp_path, seed_model, monkeypatch, flags, say):
    """Not even run.json: the run directory is free for the corrected command, which then works."""
    synthetic_archive(monkeypatch)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    assert say in refused(
        "select_proxies", tmp_path / "run", "--seed-model", seed_model, *sizes, *flags, watch=tmp_path
    )


def test_the_corrected_command_works_in_the_same_folder(tmp_path, seed_model, monkeypatch):
    synthetic_archive(monkeypatch)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    refused("select_proxies", tmp_path / "run", *sizes, "--seed-model", "/nowhere", watch=tmp_path)
    refused(
        "select_proxies",
        tmp_path / "run",
        *sizes,
        "--seed-model",
        seed_model,
        "--test-size",
        "100",
        watch=tmp_path,
    )
    assert stage("select_proxies", tmp_path / "run", *sizes, "--seed-model", seed_model).code == 0


def test_a_foreign_folder_is_left_alone(tmp_path, seed_model):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run directory" in refused("select_proxies", tmp_path, "--seed-model", seed_model)


def test_a_file_as_run_dir_is_refused(tmp_path, seed_model):
    (tmp_path / "file").write_text("not a folder")
    assert "name another folder" in refused(
        "select_proxies", tmp_path / "file", "--seed-model", seed_model, watch=tmp_path
    )


@pytest.mark.parametrize(
    "name, flags", [("train_expert", []), ("unify_moe", ["--method", "btm"]), ("evaluate", [])]
)
def test_a_later_stage_needs_a_run(tmp_path, name, flags):
    assert "run select_proxies.py first" in refused(name, tmp_path / "empty", *flags, watch=tmp_path)


@pytest.mark.parametrize(
    "name, flags, say",
    [
        ("select_proxies", ["--client", "nobody"], "nobody"),
        ("train_expert", ["--client", "nobody"], "nobody"),
        ("train_expert", ["--lr", "0"], "--lr"),
        ("train_expert", ["--lr", "nan"], "--lr"),
        ("train_expert", ["--rank", "0"], "--rank"),
        ("train_expert", ["--epochs", "0"], "--epochs"),
        ("train_expert", ["--batch-size", "-4"], "--batch-size"),
        ("train_expert", ["--warmup-steps", "-1"], "--warmup-steps"),
        ("unify_moe", ["--method", "metamoe", "--lambda-init", "1.5"], "--lambda-init"),
        ("unify_moe", ["--method", "metamoe", "--lambda-init", "nan"], "--lambda-init"),
        ("unify_moe", ["--method", "metamoe", "--top-k", "0"], "--top-k"),
        ("unify_moe", ["--method", "metamoe", "--top-k", "4"], "--top-k"),
        ("unify_moe", ["--method", "metamoe", "--lr", "0"], "--lr"),
        ("unify_moe", ["--method", "metamoe", "--lr", "nan"], "--lr"),
        ("unify_moe", ["--method", "metamoe", "--name", "../../outside"], "--name"),
        ("unify_moe", ["--method", "metamoe", "--name", "btm"], "--name"),
        ("unify_moe", ["--method", "metamoe", "--name", "zeroshot"], "--name"),
        ("unify_moe", ["--method", "metamoe", "--name", "expert-hotels"], "--name"),
        ("unify_moe", ["--method", "metamoe", "--selection", "random"], "upload"),
        ("evaluate", ["--models", "nobody"], "nobody"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_setting_of_a_later_stage_changes_nothing(run, name, flags, say):
    assert say in refused(name, run, *flags)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("train_expert", ["--data", "public"]),
        ("unify_moe", ["--method", "voting"]),
        ("unify_moe", []),
        ("select_proxies", ["--selection", "luck"]),
    ],
)
def test_argparse_refuses_what_is_no_choice(run, name, flags):
    before = drive.snapshot(run)
    result = stage(name, run, *flags)
    assert (
        result.code == 2
        and "usage:" in result.err
        and "Traceback" not in result.err
        and drive.snapshot(run) == before
    )


def test_an_expert_needs_its_selection(fresh):
    assert "select_proxies.py --selection dpp" in refused("train_expert", fresh)


def test_a_missing_upload_is_named(run):
    shutil.rmtree(run / "clients" / "hotels" / "upload" / "aligned-dpp")
    message = refused("unify_moe", run, "--method", "metamoe", "--name", "new")
    assert "hotels/upload/aligned-dpp" in message and "train_expert.py" in message


@pytest.mark.parametrize(
    "file",
    [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "router.safetensors",
        "proxies.json",
    ],
)
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
    assert "gift.txt is not in the manifest" in refused(
        "unify_moe", run, "--method", "metamoe", "--name", "new"
    )
    (upload / "gift.txt").unlink()
    (upload / "router.safetensors").unlink()
    assert "router.safetensors is missing" in refused(
        "unify_moe", run, "--method", "metamoe", "--name", "new"
    )


@pytest.mark.parametrize("index", [-1, SIZES["public_size"]])
def test_a_public_index_out_of_range_is_refused(run, index):
    upload = run / "clients" / "intent" / "upload" / "aligned-dpp"
    write_json(upload / "proxies.json", sorted([index, 3]))
    forge(upload)
    assert f"public sample {index}," in refused("unify_moe", run, "--method", "metamoe", "--name", "new")


def test_validation_scoring_needs_validation_samples(tmp_path, seed_model):
    tiny.make_run(tmp_path / "run", seed_model, validation_size=0)
    assert "--validation-size" in refused("evaluate", tmp_path / "run", "--split", "validation")


def test_evaluate_without_the_clients_data_says_so(run):
    (run / "clients" / "hotels" / "private" / "test.jsonl").unlink()
    assert "test.jsonl" in refused("evaluate", run)


def test_leftovers_of_a_killed_stage_are_no_rows(run):
    shutil.copytree(run / "moe" / "metamoe", run / "moe" / ".next.part")
    shutil.copytree(
        run / "clients" / "hotels" / "upload" / "aligned-dpp",
        run / "clients" / "hotels" / "upload" / ".next.part",
    )
    before = (run / "results.json").read_bytes()
    assert stage("evaluate", run).code == 0
    assert (run / "results.json").read_bytes() == before


def test_what_a_kill_left_behind_is_removed_by_the_next_run(run):
    """The temporary folder of the stage itself, and the one that moe.save had beside it."""
    shutil.rmtree(run / "moe" / "metamoe")
    for name in (".metamoe.part", ".metamoe.part.x7f3k", ".metamoe.party"):
        (run / "moe" / name).mkdir()
    (run / "moe" / ".metamoe.part.x7f3k" / "moe.safetensors").write_bytes(b"half")
    assert stage("unify_moe", run, *flags_of("unify_moe", run, "metamoe")).code == 0
    assert [p.name for p in (run / "moe").glob(".*")] == [".metamoe.party"]


def test_a_refusal_reaches_the_shell(tmp_path):
    """Exit code and stderr of a real process, not of `drive.call`."""
    command = [sys.executable, tiny.REPO / "unify_moe.py", "--run-dir", tmp_path / "none", "--method", "btm"]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("error: ")
    )
    assert not any(tmp_path.iterdir())


# --- full disks


WRITERS = [
    ("select_proxies", ["--selection", "dpp"], ["clients/hotels/selection", "public/features.npy"]),
    ("select_proxies", ["--selection", "dpp", "--client", "hotels"], ["clients/hotels/selection"]),
    (
        "train_expert",
        ["--data", "private", "--selection", "similarity", "--client", "hotels"],
        ["clients/hotels/experts/private", "clients/hotels/upload/private-similarity"],
    ),
    ("unify_moe", ["--method", "metamoe"], ["moe/metamoe"]),
    ("unify_moe", ["--method", "soup"], ["moe/soup"]),
    ("evaluate", [], ["scores/metamoe.test.json"]),
    ("evaluate", [], ["results.json"]),
]


@pytest.mark.parametrize(
    "name, flags, remove",
    WRITERS,
    ids=lambda value: str(value[-1]) if isinstance(value, list) and value else "",
)
def test_a_limit_on_file_sizes_ends_in_one_line(run, name, flags, remove):
    """EFBIG where a file may not grow, as on a full disk: one line, exit code 2, no half a file."""
    for path in map(run.joinpath, remove):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = drive.snapshot(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        result = stage(name, run, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    full_disk_checks(result, run, before)


def full_disk_checks(result, run, before):
    assert result.code == 2, f"code {result.code}: {result.err or result.out}"
    assert result.err.count("\n") == 1 and "cannot write" in result.err, result.err
    after = drive.snapshot(run)
    assert {path: after.get(path) for path in before} == before
    assert not [p for p in run.rglob("*") if ".part" in p.name]
    for path in (run / new for new in after.keys() - before.keys()):  # written while there was room: whole
        {".json": read_json, ".npy": np.load, ".safetensors": load_file}[path.suffix](path)
        assert path.parent.name in ("public", "selection", "scores") or any(
            (p / "done.json").exists() or (p / "manifest.json").exists()
            for p in (path.parent, path.parent.parent)
        )


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
        if shutil.which("mount")
        else None
    )
    if mount is None or mount.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    "name, flags, remove",
    WRITERS,
    ids=lambda value: str(value[-1]) if isinstance(value, list) and value else "",
)
@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_ends_in_one_line(run, small_disk, name, flags, remove, room):
    """ENOSPC for real, at once and after a page."""
    for path in map(run.joinpath, remove):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(run, small_disk / "run")
    before = drive.snapshot(small_disk / "run")
    fill(small_disk, room)
    full_disk_checks(stage(name, small_disk / "run", *flags), small_disk / "run", before)


def fill(disk, room):
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while ballast.write(b"x" * 1024):
                pass
        ballast.truncate(ballast.tell() - room)


def test_a_full_disk_under_a_memory_map_ends_in_one_line(seed_model, small_disk):
    """features.npy is sparse at first: with room for its ends alone, its pages would meet the full disk in a SIGBUS."""
    run_dir = small_disk / "run"
    tiny.make_run(run_dir, seed_model, public_size=600)  # 75 kB of features
    before = drive.snapshot(run_dir)
    fill(small_disk, 30_000)
    done = subprocess.run(
        [sys.executable, tiny.REPO / "select_proxies.py", "--run-dir", run_dir, *COMMON],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    full_disk_checks(drive.Result(done.returncode, done.stdout, done.stderr), run_dir, before)


def test_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == 1 and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# --- kills


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_to_the_same_results(tmp_path, pristine, finished):
    """SIGKILL at random times and right before random writes, again and again, then the same command lines to the end."""
    run_dir, report = finished
    shutil.copytree(pristine, tmp_path / "run")
    killed = tiny.drive(
        run_dir=str(tmp_path / "run"),
        pristine=str(pristine),
        commands=tiny.commands(tmp_path / "run"),
        kills=10,
        seconds=report["seconds"],
        writes=500,
        seed=3,
    )
    assert killed["kills"] == 10 and killed["ended"]
    wanted = {p: h for p, h in drive.snapshot(run_dir, *CLOCKS).items() if not p.startswith("scores/")}
    for end in killed["ended"]:
        assert end["code"] == 0, killed["stderr"]
        assert not [path for path in end["files"] if ".part" in path]
        got = {
            p: h
            for p, h in end["files"].items()
            if not p.startswith("scores/") and Path(p).name not in CLOCKS
        }
        assert got == wanted
    assert any(log["left"] for log in killed["logs"])  # the kills did hit half-written things


@pytest.mark.parametrize("victim", range(3))
def test_a_folder_killed_while_removed_is_not_taken_for_finished(tmp_path, victim, monkeypatch):
    """rmtree has no order: whichever file goes first, the folder must stop counting as finished."""
    folder = tmp_path / "folder"
    for name in ("a.txt", "done.json", "z.txt"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    def killed(path, *args, **kwargs):
        sorted(Path(path).iterdir())[min(victim, len(list(Path(path).iterdir())) - 1)].unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(rundir.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rundir.finished(folder, {"other": 1}, force=True)
    assert not rundir.finished(folder, {})
