"""What run.json must hold: it comes from another party, or from a hand that edited it."""

import re

from metamoe.errors import UserError
from metamoe.presets import PRESETS

# Names of columns, rows, experts and data of the project itself.
RESERVED = ("average", "public", "root", "seed", "zeroshot")
SIZES = ("train_size", "validation_size", "test_size", "public_size", "candidates", "proxies")
CHOICES = {"answers": ("text", "letters"), "loss": ("answer", "text"), "chat_template": ("off",)}


def is_name(text):
    """Whether `text` can name a client, a model or a rule: each is a folder."""
    return bool(re.fullmatch(r"\w[\w.-]*", text))


def check_client_name(name, what):
    """UserError where a client cannot have this name. what: where it stands."""
    if not isinstance(name, str) or not is_name(name):
        raise UserError(f"{what}: client {name!r}: a name has letters, digits, '-', '_' and '.'")
    if name.casefold() in RESERVED:
        raise UserError(f"{what}: client {name}: take another name, the project uses {', '.join(RESERVED)}")


def check_run(run, path):
    """UserError where the content of run.json cannot be a run's. path: the file, for the message."""
    if not isinstance(run, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    if isinstance(run.get("seed_model"), str):
        earlier = "its seed_model is a path, as earlier versions of this project wrote it"
        raise UserError(f"{path}: {earlier}: use another --run-dir")
    for key in ("backbone", "clients", "seed", "rank", "alpha", "seed_model", "public", *SIZES):
        if key not in run:
            raise UserError(f"{path} is damaged: {key} is missing")
    if not isinstance(run["backbone"], str) or run["backbone"] not in PRESETS:
        raise UserError(f"{path}: backbone {run['backbone']!r}: unknown, choose from {', '.join(PRESETS)}")
    check_fingerprints(run, path)
    for key in ("seed", "rank", "alpha", *SIZES):
        if not is_count(run[key]):
            raise UserError(f"{path} is damaged: {key} {run[key]!r} is no number of 0 to 4294967295")
    for key, choices in CHOICES.items():
        if run.get(key, choices[0]) not in (*choices, None):
            raise UserError(f"{path} is damaged: {key} {run[key]!r} is none of {', '.join(choices)}")
    if not isinstance(run.get("architecture", ""), str):
        raise UserError(f"{path} is damaged: architecture {run['architecture']!r} is no name")
    if not is_count(run.get("max_length", 8)) or run.get("max_length", 8) < 8:
        raise UserError(f"{path} is damaged: max_length {run['max_length']!r} is no number of at least 8")
    check_clients(run["clients"], path)


def check_local(local, path):
    """UserError where the content of local.json cannot be a party's."""
    if not isinstance(local, dict) or local.keys() != {"clients", "seed_model", "sources"}:
        raise UserError(f"{path} is damaged: it needs clients, seed_model and sources")
    if local["clients"] != []:
        check_clients(local["clients"], path)
    sources = local["sources"]
    texts = [local["seed_model"], *(sources.values() if isinstance(sources, dict) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is damaged: seed_model and sources are no texts")


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def check_clients(clients, path):
    """UserError where `clients` is no list of names, each once; some file systems know no capitals."""
    if not isinstance(clients, list) or not clients:
        raise UserError(f"{path} is damaged: clients is no list of names")
    for name in clients:
        check_client_name(name, path)
    if len({name.casefold() for name in clients}) < len(clients):
        raise UserError(f"{path}: clients {' '.join(clients)}: each client once, in any capitals")


def check_fingerprints(run, path):
    """Those of the seed model and of D_0."""
    model, public = run["seed_model"], run["public"]
    if not isinstance(model, dict) or model.keys() != {"weights", "tokenizer"}:
        raise UserError(f"{path} is damaged: seed_model is no fingerprint of weights and tokenizer")
    if not isinstance(public, dict) or not is_count(public.get("records")) or len(public) != 2:
        raise UserError(f"{path} is damaged: public is no fingerprint of D_0")
    for digest in (*model.values(), public.get("sha256")):
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"{path} is damaged: a fingerprint of seed_model or public is no SHA-256")
