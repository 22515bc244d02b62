"""What a client uploads: proxy indices, expert, routing vectors, and a manifest with every file's hash."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from metamoe.backbones.base import unwrap
from metamoe.errors import UserError
from metamoe.rundir import atomic, read_json, sha256, write_json


def upload_variant(data, selection, full_ffn=False):
    """The folder name of an upload below clients/NAME/upload/: client and server must agree on it."""
    return f"{data}-{selection}" + "-full" * full_ffn


def write_manifest(upload, about):
    """Close an upload folder: `manifest.json` with the hash of every file in it."""
    files = sorted(p for p in upload.rglob("*") if p.is_file())
    write_json(
        upload / "manifest.json", {**about, "files": {str(p.relative_to(upload)): sha256(p) for p in files}}
    )


def read_manifest(upload):
    """The manifest of an upload whose files are all there and unchanged; else UserError naming the file."""
    upload = Path(upload)
    if not (upload / "manifest.json").exists():
        raise UserError(f"upload {upload} is missing: run train_expert.py for that client and variant")
    manifest = read_json(upload / "manifest.json")
    present = {str(p.relative_to(upload)) for p in upload.rglob("*") if p.is_file()} - {"manifest.json"}
    for name in sorted(present ^ manifest["files"].keys()):
        problem = "not in the manifest" if name in present else "missing"
        raise UserError(f"upload {upload}: {name} is {problem}: have the client upload it again")
    for name, digest in manifest["files"].items():
        if sha256(upload / name) != digest:
            raise UserError(
                f"upload {upload}: {name} was changed after the upload (its hash differs): "
                "have the client upload it again"
            )
    return manifest


def read_expert(upload):
    """An uploaded expert for moe.unify: {FFN name: {"gate_proj.lora_A": tensor, ..., "scaling": float}}."""
    expert = {}
    if (Path(upload) / "adapter").exists():
        config = json.loads((Path(upload) / "adapter" / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        for key, tensor in load_file(Path(upload) / "adapter" / "adapter_model.safetensors").items():
            ffn, linear, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 2)
            expert.setdefault(ffn, {"scaling": scaling})[f"{linear}.{factor}"] = tensor
    else:
        for key, tensor in load_file(Path(upload) / "ffn.safetensors").items():
            ffn, linear, kind = key.rsplit(".", 2)
            expert.setdefault(ffn, {})[f"{linear}.{kind}"] = tensor
    return expert


def save_expert(model, backbone, folder, full_ffn):
    if full_ffn:
        state = {
            f"{ffn}.{key}": value.contiguous()
            for ffn in backbone.ffn_names
            for key, value in unwrap(model).get_submodule(ffn).state_dict().items()
        }
        save_file(state, folder / "ffn.safetensors")
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path = Path(backbone.source).name  # not the client's paths
        # a set, which would be written in another order each time
        config.target_modules = sorted(config.target_modules)
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's model-card template


def pack(expert, proxies, upload, about):
    """Write the upload: the files of the expert's folder, the proxies' indices, the manifest."""
    own_notes = shutil.ignore_patterns("done.json", "losses.json")
    with atomic(upload) as part:
        shutil.copytree(expert, part, ignore=own_notes, copy_function=shutil.copyfile)
        write_json(part / "proxies.json", sorted(proxies))  # not in the order of their scores
        write_manifest(part, about)
