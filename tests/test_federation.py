"""Three parties that share nothing but the agreement and uploads, through their own command lines."""

import json
import random
import re
import shutil
import stat
import subprocess
import sys

import drive
import pytest
import tiny
from tiny import COMMON, REPO, stage

from metamoe.rundir import read_json, write_json

PAGE = REPO / "docs" / "federation.md"
SHOPS = {"shop-a": "intent", "shop-b": "hotels"}
SETTINGS = "--public-size 40 --candidates 20 --proxies 5 --rank 4 --alpha 8".split()
FEW = "--epochs 2 --lr 0.02 --batch-size 4".split()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own_rows(topic, count=60):
    rng = random.Random(topic)
    return [tiny.record(topic, rng, True) for _ in range(count)]


def passes(name, run_dir, *flags):
    result = stage(name, run_dir, *flags)
    assert result.code == 0, result.err
    return result.out


class Parties:
    """Three folders: the server's and two shops', each with its own copies of D_0 and of the seed model."""

    def __init__(self, folder, seed_model):
        self.folder = folder
        for name in ("server", *SHOPS):
            write_lines(folder / name / "public.jsonl", tiny.public_records(random.Random(2), 60))
            shutil.copytree(seed_model, folder / name / "model")
        for name, topic in SHOPS.items():
            write_lines(folder / name / "data.jsonl", own_rows(topic))

    def run(self, name):
        return self.folder / name / "run"

    def own(self, name):
        """The flags with a party's own copies."""
        here = self.folder / name
        return ["--seed-model", here / "model", "--public", here / "public.jsonl"]

    def agree(self, *names):
        flags = ["--make-agreement", *(names or SHOPS), *self.own("server"), *SETTINGS]
        return passes("select_proxies", self.run("server"), *flags)

    def take_part(self, name, *flags):
        """The command line of a shop's selection."""
        agreement = self.folder / name / "agreement.json"
        if not agreement.exists():
            shutil.copy(self.run("server") / "run.json", agreement)
        data = self.folder / name / "data.jsonl"
        return ["--agreement", agreement, "--client", f"{name}={data}", *self.own(name), *flags]

    def work(self, name):
        """A shop's two commands; returns the folder that it sends, moved to the server."""
        passes("select_proxies", self.run(name), *self.take_part(name))
        passes("train_expert", self.run(name), *FEW)
        sent = self.folder / "server" / "inbox" / name
        shutil.copytree(self.run(name) / "clients" / name / "upload" / "aligned-dpp", sent)
        return sent


@pytest.fixture(scope="module")
def done(tmp_path_factory, seed_model):
    """The parties after both shops have sent their uploads."""
    parties = Parties(tmp_path_factory.mktemp("parties"), seed_model)
    parties.agree()
    for name in SHOPS:
        parties.work(name)
    return parties


@pytest.fixture
def parties(tmp_path, done):
    shutil.copytree(done.folder, tmp_path / "parties")
    copy = object.__new__(Parties)
    copy.folder = tmp_path / "parties"
    for path in [*copy.folder.rglob("local.json"), *copy.folder.rglob("source.json")]:
        path.write_text(path.read_text().replace(str(done.folder), str(copy.folder)))
    return copy


def inbox(parties, *names):
    flags = []
    for name in names:
        flags += ["--upload", f"{name}={parties.folder / 'server' / 'inbox' / name}"]
    return flags


def test_the_agreement_holds_no_path_and_is_the_same_for_all(done):
    agreements = [(done.run(name) / "run.json").read_bytes() for name in ("server", *SHOPS)]
    assert len(set(agreements)) == 1
    text = agreements[0].decode()
    assert str(done.folder) not in text and tiny.SECRET not in text and "/" not in text
    run = json.loads(text)
    assert run["clients"] == list(SHOPS) and run["public"]["records"] == 40
    assert (run["rank"], run["alpha"], run["proxies"]) == (4, 8, 5)
    assert set(run["seed_model"]) == {"weights", "tokenizer"}


def test_what_is_private_is_for_its_owner_alone(done):
    private = done.run("shop-a") / "clients" / "shop-a" / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    for path in [*private.iterdir(), done.run("shop-a") / "local.json"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert read_json(private / "source.json")["path"] == str(done.folder / "shop-a" / "data.jsonl")
    assert not (done.run("server") / "clients").exists()
    assert sorted(p.name for p in (done.run("shop-a") / "clients").iterdir()) == ["shop-a"]


def test_the_server_unifies_and_the_clients_report(parties):
    server = parties.run("server")
    out = passes("unify_moe", server, "--method", "metamoe", "--lr", "0.001", *inbox(parties, *SHOPS))
    assert "shop-a: upload taken" in out and "2 experts" in out
    assert "is there already" in passes("unify_moe", server, "--method", "metamoe", "--lr", "0.001")
    reports = []
    for name in SHOPS:
        shutil.copytree(server / "moe" / "metamoe", parties.folder / name / "metamoe")
        out = passes("evaluate", parties.run(name), "--model", parties.folder / name / "metamoe")
        reports += (parties.run(name) / "reports").iterdir()
        report = read_json(reports[-1])
        assert report["client"] == name and f"{report['value']:.2f}" in out
        assert (
            tiny.SECRET not in reports[-1].read_text() and str(parties.folder) not in reports[-1].read_text()
        )
    out = passes("evaluate", server, "--reports", *reports)
    for path in reports:
        assert f"{read_json(path)['value']:.2f}" in out
    assert (server / "reports.md").read_text() in out


def test_reports_are_of_what_evaluate_measures(parties, seed_model):
    """The same accuracy as in a simulation of all parties in one directory."""
    server, one = parties.run("server"), parties.folder / "all"
    flags = [f for name in SHOPS for f in ("--client", f"{name}={parties.folder / name / 'data.jsonl'}")]
    passes("select_proxies", one, *flags, *parties.own("server"), *SETTINGS)
    passes("train_expert", one, *FEW)
    passes("unify_moe", one, "--method", "metamoe", "--lr", "0.001")
    passes("unify_moe", server, "--method", "metamoe", "--lr", "0.001", *inbox(parties, *SHOPS))
    for file in ("moe.safetensors", "moe_config.json"):
        assert (one / "moe" / "metamoe" / file).read_bytes() == (
            server / "moe" / "metamoe" / file
        ).read_bytes()
    passes("evaluate", one, "--models", "zeroshot", "metamoe")
    row = {row["model"]: row for row in read_json(one / "results.json")["rows"]}["metamoe"]
    for name in SHOPS:
        passes("evaluate", parties.run(name), "--model", server / "moe" / "metamoe")
        (report,) = (parties.run(name) / "reports").iterdir()
        assert read_json(report)["value"] == row["clients"][name]["accuracy"]


REFUSED = {
    "one upload alone": (["--method", "metamoe"], ["shop-a"], "client shop-b: upload"),
    "none": (["--method", "metamoe"], [], "client shop-a: upload"),
    "another variant": (["--method", "btx"], ["shop-a", "shop-b"], "not private-similarity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_server_says_whose_upload_is_missing(parties, case):
    flags, given, say = REFUSED[case]
    message = tiny.stage("unify_moe", parties.run("server"), *flags, *inbox(parties, *given)).err
    assert message.startswith("error: ") and message.count("\n") == 1 and say in message
    assert not (parties.run("server") / "moe").exists()


def another_order(parties, name):
    path = parties.folder / name / "public.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")


def fewer(parties, name):
    path = parties.folder / name / "public.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:30]) + "\n")


def other_weights(parties, name):
    from safetensors.torch import load_file, save_file

    path = parties.folder / name / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})


def other_tokenizer(parties, name):
    path = parties.folder / name / "model" / "tokenizer.json"
    text = json.loads(path.read_text())
    text["model"]["merges"] = text["model"]["merges"][:-40]
    path.write_text(json.dumps(text))


OTHERS = {
    "another order of D_0": (another_order, "--public", []),
    "fewer records of D_0": (fewer, "--public", []),
    "another seed model of the same shape": (other_weights, "other weights", []),
    "another tokenizer": (other_tokenizer, "other tokenizer", []),
    "another number of proxies": (None, "--proxies 6", ["--proxies", "6"]),
    "another random seed": (None, "--seed 4", ["--seed", "4"]),
    "a client of its own": (None, "shop-c", ["--client", "shop-c=x.jsonl"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_party_that_differs_is_told_before_anything_is_computed(tmp_path, seed_model, case):
    change, say, flags = OTHERS[case]
    parties = Parties(tmp_path, seed_model)
    parties.agree()
    if change:
        change(parties, "shop-a")
    result = stage("select_proxies", parties.run("shop-a"), *parties.take_part("shop-a", *flags))
    assert result.code == 2 and say in result.err and result.err.count("\n") == 1, result.err
    assert not parties.run("shop-a").exists()


def test_a_larger_rank_than_agreed_is_refused_at_the_client(parties):
    message = tiny.refused("train_expert", parties.run("shop-a"), "--rank", "5", "--force")
    assert "--rank 5" in message and "agreement" in message


def test_a_party_cannot_do_anothers_work(parties):
    for name, flags in (("select_proxies", []), ("train_expert", [])):
        message = tiny.refused(name, parties.run("shop-a"), "--client", "shop-b", *flags)
        assert "shop-b" in message and "not here" in message
    for name in ("select_proxies", "train_expert", "evaluate"):
        assert "no client's data are here" in tiny.refused(name, parties.run("server"))


def test_one_joins_later_and_the_others_stay(parties):
    server = parties.run("server")
    passes("unify_moe", server, "--method", "metamoe", "--lr", "0.001", *inbox(parties, *SHOPS))
    before = drive.snapshot(server / "moe" / "metamoe")
    parties.agree(*SHOPS, "shop-c")
    write_lines(parties.folder / "shop-c" / "data.jsonl", own_rows("question"))
    for file in ("public.jsonl", "model"):
        copy = shutil.copytree if file == "model" else shutil.copy
        copy(parties.folder / "server" / file, parties.folder / "shop-c" / file)
    parties.work("shop-c")
    flags = ["--extend", "metamoe", "--name", "three", "--lr", "0.001"]
    out = passes("unify_moe", server, "--method", "metamoe", *flags, *inbox(parties, "shop-c"))
    assert "3 experts" in out and drive.snapshot(server / "moe" / "metamoe") == before
    assert read_json(server / "moe" / "three" / "moe_config.json")["names"] == [*SHOPS, "shop-c"]
    # who was there goes on under the agreement with one name more
    shutil.copy(server / "run.json", parties.folder / "shop-a" / "agreement.json")
    passes("select_proxies", parties.run("shop-a"), *parties.take_part("shop-a"))
    assert read_json(parties.run("shop-a") / "run.json") == read_json(server / "run.json")
    assert "name first those" in tiny.refused(
        "select_proxies", server, "--make-agreement", "shop-b", "shop-a", *parties.own("server")
    )


REPORTS = {
    "another agreement": {"agreement": "0" * 64},
    "an unknown client": {"client": "mallory"},
    "a client that is a list": {"client": ["shop-a"]},
    "accuracy 101": {"value": 101},
    "a value that is a string": {"value": "99"},
    "n 0": {"n": 0},
    "a model that is a path": {"model": "../x"},
    "Markdown": {"model": "x | y"},
    "an extra key": {"extra": 1},
    "another measure": {"measure": "joy"},
}


@pytest.fixture(scope="module")
def report(done, tmp_path_factory):
    """A shop's report, of a model that needs no training."""
    folder = tmp_path_factory.mktemp("report")
    server, shop = folder / "server", folder / "shop-a"
    shutil.copytree(done.run("server"), server)
    shutil.copytree(done.run("shop-a"), shop)
    passes("unify_moe", server, "--method", "metamoe", "--train", "none", *inbox(done, *SHOPS))
    passes("evaluate", shop, "--model", server / "moe" / "metamoe")
    return server, next((shop / "reports").iterdir())


@pytest.mark.parametrize("case", REPORTS)
def test_a_forged_report_is_refused(report, tmp_path, case):
    server, path = report
    write_json(tmp_path / "report.json", read_json(path) | REPORTS[case])
    assert "report.json" in tiny.refused("evaluate", server, "--reports", tmp_path / "report.json")


def test_two_reports_of_one_client_are_refused(report, tmp_path):
    server, path = report
    shutil.copy(path, tmp_path / "again.json")
    assert "again.json" in tiny.refused("evaluate", server, "--reports", path, tmp_path / "again.json")


MODELS = {
    "nothing": lambda folder: shutil.rmtree(folder),
    "no weights": lambda folder: (folder / "moe.safetensors").unlink(),
    "cut off": lambda folder: cut(folder / "moe.safetensors"),
    "a configuration that is none": lambda folder: (folder / "moe_config.json").write_text("[]"),
    "NaN in it": lambda folder: spoil(folder / "moe.safetensors"),
    "of another seed model": lambda folder: change(folder, ffn_names=["model.layers.0.mlp", "layers.7.mlp"]),
    "top_k above the experts": lambda folder: change(folder, top_k=10**9),
    "names that are numbers": lambda folder: change(folder, names=[1, 2]),
    "deep": lambda folder: (folder / "moe_config.json").write_text("[" * 10**5),
}


def change(folder, **settings):
    write_json(folder / "moe_config.json", read_json(folder / "moe_config.json") | settings)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_that_was_sent_is_refused(report, done, tmp_path, case):
    server, _ = report
    shutil.copytree(server / "moe" / "metamoe", tmp_path / "metamoe")
    MODELS[case](tmp_path / "metamoe")
    shop = done.run("shop-a")
    assert "metamoe" in tiny.refused("evaluate", shop, "--model", tmp_path / "metamoe")


ALONE = """
import json, os, runpy, sys
stage, party, folder, argv = json.loads(sys.argv[1])
others = [os.path.join(folder, name) for name in os.listdir(folder) if name not in (party, "mail")]
def watch(event, args):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(args[0]))
        if any(path == other or path.startswith(other + os.sep) for other in others):
            raise PermissionError(f"{party} may not see {path}")
sys.addaudithook(watch)
sys.argv = [stage + ".py", *argv]
sys.path.insert(0, os.getcwd())
runpy.run_path(stage + ".py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path, seed_model):
    """Each command of docs/federation.md, in its party's folder, where nothing of the others' can be seen."""
    parties = Parties(tmp_path, seed_model)
    (tmp_path / "mail").mkdir()
    blocks = re.findall(r"```bash\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert {name for name, _ in blocks} == {"server", *SHOPS}
    tiny_run = {"select_proxies": SETTINGS, "train_expert": FEW, "unify_moe": ["--lr", "0.001"]}
    for name, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            words = [word.replace("MAIL", str(tmp_path / "mail")) for word in line.split()]
            words = [
                re.sub(r"^(shop-\w=)?(data|public|model|run|inbox)\b", rf"\1{tmp_path / name}/\2", w)
                for w in words
            ]
            if words[0] in ("cp", "mkdir"):
                subprocess.run(words, check=True)
                continue
            assert words[0] == "python", line
            script = words[1].removesuffix(".py")
            more = [
                *COMMON,
                *(
                    tiny_run.get(script, [])
                    if "--make-agreement" in words or script != "select_proxies"
                    else []
                ),
            ]
            if script in ("select_proxies",):
                more += ["--seed-model", str(tmp_path / name / "model")]
            job = json.dumps([script, name, str(tmp_path), [*words[2:], *more]])
            command = [sys.executable, "-c", ALONE, job]
            result = subprocess.run(command, cwd=REPO, env=tiny.environment(), capture_output=True, text=True)
            assert result.returncode == 0, f"{name}: {line}: {result.stderr}"
    assert "seed model" in (parties.run("server") / "reports.md").read_text()


SECONDS = {
    "other proxies": ["--selection", "random"],
    "private data alone": ["--data", "private"],
    "retrained": [*FEW, "--lr", "0.01", "--force"],
}


@pytest.mark.parametrize("kind", SECONDS)
def test_a_second_upload_is_refused_by_the_clients_own_tool(parties, kind):
    run = parties.run("shop-a")
    passes("select_proxies", run, "--selection", "random")
    shutil.rmtree(run / "clients" / "shop-a" / "upload")  # it has been moved to the server
    flags = FEW + SECONDS[kind]
    refused = stage("train_expert", run, *flags)
    assert refused.code == 2 and "shop-a" in refused.err and "--again" in refused.err, refused.err
    assert not (run / "clients" / "shop-a" / "upload").exists()
    insisted = stage("train_expert", run, *flags, "--again")
    assert insisted.code == 0 and "do not share" in insisted.out, insisted.err


def test_the_same_upload_can_be_made_again(parties):
    run = parties.run("shop-a")
    uploads = run / "clients" / "shop-a" / "upload"
    before = read_json(uploads / "aligned-dpp" / "manifest.json")
    shutil.rmtree(uploads)
    assert stage("train_expert", run, *FEW).code == 0
    assert read_json(uploads / "aligned-dpp" / "manifest.json") == before
