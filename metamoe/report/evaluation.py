"""Scoring the models of a run. The scores are kept in RUN/scores/, so each model is scored once."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import moe
from metamoe.atomic import locked
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.report.models import scored_variant
from metamoe.report.results import client_result
from metamoe.report.statistics import is_choice
from metamoe.rivals.btm import ensemble
from metamoe.rivals.comigs import PERSONAL
from metamoe.rundir import check_name, hashes, inside, read_json, versions, write_json
from metamoe.serving.members import MERGED
from metamoe.uploads import read_expert, read_upload


def scoring_suffix(run, scoring):
    """What distinguishes the files of a scoring that is not the backbone's own."""
    return "" if scoring == PRESETS[run["backbone"]].get("scoring") else f".{scoring}"


def kept_scores(path, identity):
    """The scores in the file `path` where they are there and of this identity, else None."""
    if not path.exists():
        return None
    kept = read_json(path)
    before = kept.get("identity") if isinstance(kept, dict) else None
    if not isinstance(before, dict) or not {"scores", "samples_per_second"} <= kept.keys():
        raise UserError(f"{path} is damaged: remove it and run evaluate.py again")
    left = before.get("records")
    if isinstance(left, dict):  # of clients that have left the run since
        before["records"] = {name: digest for name, digest in left.items() if name in identity["records"]}
    for key in identity | before:
        if before.get(key) != identity.get(key):
            print(f"evaluate: {path}: of another {key}: the model is scored again", flush=True)
            return None
    return kept


def load_moe(folder, seed_model):
    """moe.load; UserError where the folder's model does not go with the seed model."""
    try:
        return moe.load(folder, seed_model)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{folder} cannot be loaded into the seed model ({reason})") from None


@dataclass
class Evaluation:
    """One split of a run's data, and one way to score it.

    scoring: of multiple choice by language models (evaluate.py --scoring); None for an image model.
    dtype: "float32" or "bfloat16".
    records: {client: its records of the split}.
    load_backbone: makes a new backbone for each model that has no scores: all change the seed model in place.
    """

    run_dir: Path
    run: dict
    split: str
    scoring: str | None
    dtype: str
    records: dict
    load_backbone: Callable

    def score_all(self, folders):
        """{row: its scores} of the models in `folders`."""
        return {row: self.score(row, folder) for row, folder in folders.items()}

    def score(self, row, folder, without=""):
        """The scores of one model, from RUN/scores/ where they are there.

        folder: the model's, None for the seed model. without: an expert to leave out.
        Returns {"scores": {client: [[...], ...]}, "routing": {client: (L, K) counts}, "samples_per_second"}.
        """
        if row == "btm":
            return self.score_btm()
        name = f"{row}.without.{without}" if without else row
        name += f".{self.split}{scoring_suffix(self.run, self.scoring)}.json"
        path = inside(self.run_dir, "scores") / name
        with locked(path):
            identity = self.identity(folder)
            found = kept_scores(path, identity)
            if found is None:
                found = {"identity": identity} | self.score_anew(row, folder, without)
                if self.identity(folder) != identity:
                    raise UserError(
                        f"{folder or path} was changed while it was scored: run evaluate.py again"
                    )
                write_json(path, found)
        return found

    def score_anew(self, row, folder, without):
        """As score, computed."""
        if folder is not None and (folder / PERSONAL).exists():
            return self.score_personal(row, folder / PERSONAL)
        backbone, model = self.load_model(row, folder)
        if without:
            moe.disable_expert(model, without)
        return self.measure(row, backbone, model)

    def score_personal(self, row, folder):
        """As score, computed, of a model for each client: it scores that client's records alone."""
        scores, seconds = {}, 0.0
        for name, records in self.records.items():
            own = replace(self, records={name: records})
            found = own.measure(row, *own.load_model(row, folder / name))
            scores |= found["scores"]
            seconds += len(records) / found["samples_per_second"]
        count = sum(map(len, self.records.values()))
        return {"scores": scores, "samples_per_second": count / seconds}

    def load_model(self, row, folder):
        """(backbone, the model of a row); UserError where it does not go with the seed model."""
        backbone = self.load_backbone()
        if folder is None:
            return backbone, backbone.model
        if (folder / "moe_config.json").exists():
            return backbone, load_moe(folder, backbone.model)
        return backbone, backbone.with_expert(self.read_expert(row, folder, backbone))

    def read_expert(self, row, folder, backbone):
        """The expert of a client's upload, or of a model like the soup."""
        if row.startswith("expert-"):
            return read_upload(self.run_dir, self.run, row.removeprefix("expert-"), folder.name).expert
        return read_expert(folder, backbone.ffn_names)

    def identity(self, folder):
        """What scores depend on: kept ones are of use only where this is the same."""
        files = [f"clients/{name}/private/{self.split}.jsonl" for name in self.run["clients"]]
        identity = {"dtype": self.dtype, "model": "seed", "records": versions(self.run_dir, *files)}
        if self.scoring not in (None, "likelihood"):
            identity["scoring"] = self.scoring
        if folder is not None:
            identity["model"] = hashes(folder)
        return identity

    def measure(self, row, backbone, model):
        """Scores of every client's records; of a MoE also its routing."""
        # generation sends a prompt's tokens through the model again with every generated token
        routed = hasattr(model, "routing") and self.scoring != "generate"
        found, seconds = {"scores": {}, "routing": {}}, 0.0
        for name, records in self.records.items():
            if routed:
                model.routing.record = True
                moe.reset_counts(model)
            start = time.perf_counter()
            scores = backbone.scores(model, records, label=f"{row} on {name}", scoring=self.scoring)
            found["scores"][name] = [values.tolist() for values in scores]
            seconds += time.perf_counter() - start
            if routed:
                found["routing"][name] = moe.counts(model).tolist()
        found["samples_per_second"] = sum(map(len, self.records.values())) / seconds
        if routed:
            found["experts"] = model.moe_config["names"]
            found["lambda"] = [lam.item() for lam in moe.lambda_parameters(model)]
        return found

    def score_btm(self):
        """BTM's scores, out of those of the private-only experts."""
        clients = self.run["clients"]
        # it combines probabilities, and a generated letter has none
        combined = replace(self, scoring="letters") if self.scoring == "generate" else self
        uploads, variant = self.run_dir / "clients", scored_variant(self.run_dir, self.run)
        experts = [combined.score(f"expert-{name}", uploads / name / "upload" / variant) for name in clients]
        instruction = [name for name in clients if not is_choice(self.records[name])]
        seconds = sum(1 / expert["samples_per_second"] for expert in experts)
        return {"scores": ensemble(experts, instruction), "samples_per_second": 1 / seconds}

    def check_opt_out(self, rows):
        """{MoE: its experts that can be left out}; UserError for a model without such."""
        found = {}
        for row in rows:
            config = self.run_dir / "moe" / check_name("--opt-out", row) / "moe_config.json"
            if not config.exists():
                raise UserError(f"--opt-out {row}: there is no such MoE in {self.run_dir / 'moe'}")
            names = read_json(config)["names"]
            if len(names) == 1:
                raise UserError(f"--opt-out {row}: it has one expert alone, which cannot be left out")
            merged = [name for name in names if MERGED in name]
            if merged:
                raise UserError(f"--opt-out {row}: {merged[0]} is one expert: none of its clients can leave")
            found[row] = [name for name in names if name in self.run["clients"]]
        return found

    def score_opt_out(self, left_out):
        """{MoE: {expert left out: {client: accuracy or perplexity}}}; "": none is left out."""
        tables = {}
        for row, names in left_out.items():
            tables[row] = {name: {} for name in ["", *names]}
            for name, values in tables[row].items():
                scores = self.score(row, self.run_dir / "moe" / row, name)["scores"]
                for client, records in self.records.items():
                    cell = client_result(scores[client], records)
                    values[client] = cell.get("accuracy", cell.get("perplexity"))
        return tables
