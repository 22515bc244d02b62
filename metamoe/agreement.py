"""The agreement of a federation, RUN/run.json: what all parties compute with, and fingerprints of what each
must have itself, the seed model and D_0. It holds no path and nothing private.

What is one party's alone lies in RUN/local.json, which its owner alone can read: whose data are here, and
where its seed model and its data come from.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from metamoe.atomic import tidy
from metamoe.check_run import check_local
from metamoe.errors import UserError
from metamoe.progress import progress
from metamoe.rundir import check_client, read_json

FORMAT = 3  # of an upload
PROBE = "An answer, 3 of 12:\n  Ärger, čaj, 東京, 🙂 </s> (x + 1) * y"
_SEEN = set()  # seed models that this process has compared


def agreement_hash(run):
    """SHA-256 of what is agreed; not of the clients, as more may join, nor of how much data each brings."""
    own = ("clients", "train_size", "validation_size", "test_size")
    text = json.dumps({key: run[key] for key in run if key not in own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_local(run_dir):
    """{"clients": whose data are here, "seed_model": its place or "", "sources": places of the data}."""
    path, local = Path(run_dir) / "local.json", {"clients": [], "seed_model": "", "sources": {}}
    if path.exists():
        local = read_json(path)
        check_local(local, path)
    return local


def shown(run, local):
    """What a stage prints of the agreement: places instead of fingerprints."""
    return run | {"seed_model": local["seed_model"], "public": local["sources"].get("public", "")}


def check_here(run_dir, run, names, local):
    """The names; UserError without any, or for one that is no client of the run or has its data elsewhere."""
    if not names:
        who = "each client selects, trains and scores in a run directory of its own"
        raise UserError(f"--run-dir {run_dir}: no client's data are here: {who}")
    for name in names:
        check_client(run, name)
        if name not in local["clients"]:
            raise UserError(f"--client {name}: its data are not here: its own party does this for it")
        tidy(Path(run_dir) / "clients" / name)
    return names


def public_fingerprint(records):
    """{"records": |D_0|, "sha256": of its records in order}: what decides which sample an index means.

    Of an image file it takes the name below the folder that all images lie in, and the size.
    """
    digest, root, count = hashlib.sha256(), image_root(records), 0
    for record in progress(records, desc="fingerprint of D_0", show=len(records) > 100_000):
        record = {key: value for key, value in record.items() if key != "source"}
        image = record.get("image")
        if isinstance(image, str):
            record["image"] = [os.path.relpath(image, root), os.path.getsize(image)]
        elif image is not None:  # a row of a dataset, wherever it lies
            record["image"] = {key: value for key, value in image.items() if key != "dataset"}
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
        count += 1
    return {"records": count, "sha256": digest.hexdigest()}


def image_root(records):
    """The deepest folder that all image files of the records lie in; "" without any."""
    first, last = "", ""
    for record in records if len(records) and "image" in records[0] else ():
        image = record["image"]
        if isinstance(image, str):
            first, last = min(first or image, image), max(last, image)
    return os.path.commonpath([os.path.dirname(first), os.path.dirname(last)]) if first else ""


def seed_fingerprint(backbone):
    """{"weights": hash, "tokenizer": hash} of a seed model, the same in every format, dtype and device.

    The weights are compared as bfloat16, which every other dtype is rounded to.
    """
    digest = hashlib.sha256()
    if getattr(backbone, "preprocessing", None):  # of a CLIP, where it is not open_clip's default
        digest.update(json.dumps(backbone.preprocessing, sort_keys=True).encode())
    tensors = backbone.model.state_dict()
    if hasattr(backbone, "projection"):  # of a CLIP, kept beside its tower
        tensors["visual.proj"] = backbone.projection
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return {"weights": digest.hexdigest(), "tokenizer": tokenizer_fingerprint(backbone.tokenizer)}


def tokenizer_fingerprint(tokenizer):
    """Hash of vocabulary, merges, special tokens, template, and of how a text of several scripts is cut."""
    if hasattr(tokenizer, "get_vocab"):
        parts = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
        parts += [tokenizer.chat_template or "", tokenizer(PROBE)["input_ids"]]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        merges = json.loads(backend.to_str())["model"].get("merges", []) if backend else []
        parts.append([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    else:  # open_clip's
        parts = [tokenizer([PROBE.replace("\n", " ")]).tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_seed_model(run, backbone):
    """UserError where the party's seed model is not the agreement's."""
    agreed = run.get("seed_model")
    if not agreed or (backbone.source, str(agreed)) in _SEEN:
        return
    found = seed_fingerprint(backbone)
    for part, digest in agreed.items():
        if found[part] != digest:
            of_clip = part == "weights" and hasattr(backbone, "preprocessing")
            what = "weights or preprocess_cfg" if of_clip else part
            why = f"has other {what} than the agreement's (run.json)"
            raise UserError(f"seed model {backbone.source}: {why}: take the same one (--seed-model)")
    _SEEN.add((backbone.source, str(agreed)))


def check_public(run, fingerprint):
    """UserError where the party's D_0 is not the agreement's."""
    agreed = run.get("public")
    if agreed and agreed != fingerprint:
        mine, theirs = fingerprint["records"], agreed["records"]
        what = f"{mine} records, the agreement (run.json) has {theirs}"
        if mine == theirs:
            what = "its records or their order are not the agreement's (run.json)"
        raise UserError(f"--public: {what}: all parties need the same public set")


def ffn_shapes(backbone):
    """{"width": d, "ffns": [[FFN, {its parameter: shape}], ...]}: what an upload's tensors must fit."""
    ffns = []
    for name in backbone.ffn_names:
        state = backbone.model.get_submodule(name).state_dict()
        ffns.append([name, {key: list(tensor.shape) for key, tensor in state.items()}])
    return {"width": backbone.width, "ffns": ffns}
