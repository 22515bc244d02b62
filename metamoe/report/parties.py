"""Evaluation across parties: each client scores the model that it was sent on its own test part, alone, and
sends a small report; the server makes a table of the reports."""

from pathlib import Path

from safetensors import SafetensorError

import moe
from metamoe.agreement import agreement_hash
from metamoe.errors import UserError
from metamoe.report.results import client_result
from metamoe.report.tables import grid
from metamoe.rundir import check_name, is_name, sha256, write_json
from metamoe.serving.members import parts_of
from metamoe.untrusted import UploadError, check_tensors, parse_json, read_file_at
from metamoe.uploads import FACTORS, FFN, read_expert

REPORT_BYTES = 2**16
MODELS = ("moe.safetensors", FACTORS, FFN)  # an MoE, or one expert such as the soup
KEYS = {"client", "agreement", "model", "sha256", "split", "scoring", "n", "measure", "value", "zeroshot"}


def check_model(folder, ffn_names):
    """The file of weights in a folder that holds a unified model; UserError where it is none."""
    folder = Path(folder)
    flag, name = f"--model {folder}", folder.name
    if (folder / "modeling_metamoe.py").exists():
        raise UserError(f"{flag}: is an export for transformers: name the server's folder moe/METHOD")
    weights = next((folder / file for file in MODELS if (folder / file).is_file()), None)
    if weights is None:
        raise UserError(f"{flag}: holds no unified model: name the server's folder moe/METHOD")
    if not is_name(name) or name == "zeroshot" or name.startswith("expert-"):
        raise UserError(f"{flag}: a model cannot be called {name}: rename the folder")
    try:
        if weights.name == MODELS[0]:
            config = parse_json((folder / "moe_config.json").read_bytes(), "moe_config.json")
            for client in parts_of(config["names"]):
                check_name("expert", client)
            tensors = moe.read(folder)[1]
        else:
            expert = read_expert(folder, ffn_names)
            tensors = {
                f"{ffn}.{key}": t for ffn, own in expert.items() for key, t in own.items() if key != "scaling"
            }
        check_tensors(tensors, {key: tensor.shape for key, tensor in tensors.items()}, weights.name)
    except (
        UploadError,
        UserError,
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(f"{flag}: is damaged ({str(error).splitlines()[0][:160]})") from None
    return weights


def write_reports(evaluation, run, folder, weights, scores):
    """RUN/reports/CLIENT-MODEL-SPLIT.json of each client here: the model's number, and the seed model's.

    scores: {"zeroshot": the seed model's, name of the folder: the model's}.
    """
    name = Path(folder).name
    for client, records in evaluation.records.items():
        cells = [client_result(scores[row]["scores"][client], records) for row in (name, "zeroshot")]
        measure = "accuracy" if "accuracy" in cells[0] else "perplexity"
        report = {
            "client": client,
            "agreement": agreement_hash(run),
            "model": name,
            "sha256": sha256(weights),
        }
        report |= {"split": evaluation.split, "scoring": evaluation.scoring or "class prompts"}
        report |= {"n": len(records), "measure": measure}
        report |= {"value": cells[0][measure], "zeroshot": cells[1][measure]}
        path = evaluation.run_dir / "reports" / f"{client}-{name}-{evaluation.split}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, report)
        found = f"{measure} {report['value']:.2f} (seed model {report['zeroshot']:.2f})"
        print(f"evaluate: {client}: {name}: {found}; {path} is its report to send")


def read_reports(paths, run):
    """The reports of clients, checked; UserError names the file and what is wrong with it."""
    reports, seen = [], {}
    for path in paths:
        try:
            report = parse_json(read_file_at(path, REPORT_BYTES), "it")
            check_report(report, run)
        except UploadError as error:
            raise UserError(f"--reports {path}: {error}") from None
        key = report["client"], report["model"], report["split"]
        if key in seen:
            raise UserError(f"--reports {path}: {seen[key]} is of the same client, model and split")
        seen[key] = path
        reports.append(report)
    return reports


def check_report(report, run):
    if not isinstance(report, dict) or report.keys() != KEYS:
        raise UploadError("is no report of evaluate.py --model")
    if report["client"] not in run["clients"]:
        names = ", ".join(run["clients"])
        raise UploadError(f"client {str(report['client'])[:80]}: the agreement has {names}")
    if report["agreement"] != agreement_hash(run):
        raise UploadError(f"client {report['client']}: was made under another agreement (run.json)")
    texts = [report[key] for key in ("model", "sha256", "split", "scoring", "measure")]
    if not all(isinstance(text, str) and len(text) < 100 for text in texts) or not is_name(report["model"]):
        raise UploadError(f"client {report['client']}: its model, split and scoring are no names")
    if report["measure"] not in ("accuracy", "perplexity") or report["split"] not in ("test", "validation"):
        raise UploadError(f"client {report['client']}: knows no measure {report['measure']}")
    if type(report["n"]) is not int or report["n"] < 1:
        raise UploadError(f"client {report['client']}: n {report['n']} is no count")
    for key in ("value", "zeroshot"):
        most = 100 if report["measure"] == "accuracy" else float("inf")
        if type(report[key]) not in (int, float) or not 0 <= report[key] <= most:
            raise UploadError(
                f"client {report['client']}: {key} {str(report[key])[:80]} is no {report['measure']}"
            )


def reports_table(reports, run):
    """Markdown: a table for each split and scoring; a line for each model, a column for each client."""
    blocks = []
    for split, scoring in sorted({(report["split"], report["scoring"]) for report in reports}):
        here = [report for report in reports if (report["split"], report["scoring"]) == (split, scoring)]
        clients = [name for name in run["clients"] if any(report["client"] == name for report in here)]
        measures = {report["client"]: report["measure"] for report in here}
        heads = [f"{name} ({measures[name]})" for name in clients]
        models = dict.fromkeys((report["model"], report["sha256"]) for report in here)
        lines = [("seed model", cells_of(here, clients, "zeroshot"))]
        for model, digest in models:
            own = [report for report in here if report["sha256"] == digest]
            lines.append((f"{model} ({digest[:8]})", cells_of(own, clients, "value")))
        blocks.append(f"{split}, {scoring}, as the clients report it\n\n{grid(heads, lines)}")
    return "\n\n".join(blocks) + "\n"


def cells_of(reports, clients, key):
    found = {report["client"]: f"{report[key]:.2f}" for report in reports}
    return [found.get(name, "") for name in clients]
