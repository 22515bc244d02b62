"""What a client uploads: proxy indices, expert, routing vectors, and a manifest with every file's hash."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from metamoe.adapters import complete, read_adapter
from metamoe.backbones.base import unwrap
from metamoe.errors import UserError
from metamoe.rundir import atomic, read_json, sha256, write_json


def upload_variant(data, selection, full_ffn=False):
    """The folder name of an upload below clients/NAME/upload/: client and server must agree on it."""
    return f"{data}-{selection}" + ("-full" if full_ffn else "")


def files_of(folder):
    """{path inside `folder`: file} of all files in it, sorted."""
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def write_manifest(upload, about):
    """Close an upload folder: `manifest.json` with the hash of every file in it."""
    hashes = {name: sha256(path) for name, path in files_of(upload).items()}
    write_json(upload / "manifest.json", {**about, "files": hashes})


def read_manifest(upload):
    """The manifest of an upload whose files are all there and unchanged; else UserError naming the file."""
    upload = Path(upload)
    if not (upload / "manifest.json").exists():
        raise UserError(f"upload {upload} is missing: run train_expert.py for that client and variant")
    manifest = read_json(upload / "manifest.json")
    present, remedy = files_of(upload).keys() - {"manifest.json"}, "have the client upload it again"
    for name in sorted(present ^ manifest["files"].keys()):
        problem = "not in the manifest" if name in present else "missing"
        raise UserError(f"upload {upload}: {name} is {problem}: {remedy}")
    for name, digest in manifest["files"].items():
        if sha256(upload / name) != digest:
            changed = f"{name} was changed after the upload (its hash differs)"
            raise UserError(f"upload {upload}: {changed}: {remedy}")
    return manifest


def read_expert(upload, ffn_names=None):
    """An uploaded expert for moe.unify: {FFN name: {"gate_proj.lora_A": tensor, ..., "scaling": float}}.

    ffn_names: the seed model's; the expert then has an entry for each, and UserError names any other module.
    """
    upload, expert = Path(upload), {}
    if (upload / "adapter").exists():
        expert = read_adapter(upload / "adapter")
    else:
        for key, tensor in load_file(upload / "ffn.safetensors").items():
            ffn, linear, kind = key.rsplit(".", 2)
            expert.setdefault(ffn, {})[f"{linear}.{kind}"] = tensor
    return expert if ffn_names is None else complete(expert, ffn_names, upload)


def save_expert(model, backbone, folder, full_ffn):
    if full_ffn:
        state = {}
        for ffn in backbone.ffn_names:
            for key, value in unwrap(model).get_submodule(ffn).state_dict().items():
                state[f"{ffn}.{key}"] = value.contiguous()
        save_file(state, folder / "ffn.safetensors")
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path = Path(backbone.source).name  # not the client's paths
        config.target_modules = sorted(config.target_modules)  # a set has another order each time
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's model-card template


def pack(expert, proxies, upload, about):
    """Write the upload: the files of the expert's folder, the proxies' indices, the manifest."""
    own_notes = shutil.ignore_patterns("done.json", "losses.json")
    with atomic(upload) as part:
        shutil.copytree(expert, part, ignore=own_notes, copy_function=shutil.copyfile)
        write_json(part / "proxies.json", sorted(proxies))  # not in the order of their scores
        write_manifest(part, about)
