"""The unified model as a folder that transformers loads without this project."""

import shutil
from pathlib import Path

import moe
from metamoe.agreement import check_seed_model
from metamoe.atomic import locked
from metamoe.backbones import load_backbone
from metamoe.backbones.base import import_transformers
from metamoe.errors import UserError
from metamoe.methods import METHODS
from metamoe.presets import PRESETS
from metamoe.rundir import check_whole, finished, folder_bytes, making, read_json, sha256, write_json
from metamoe.serving import generation, past, seed_model


def check_export(args, run):
    """The folder to export to is free, or holds an earlier export; the model is one that can be exported."""
    if PRESETS[run["backbone"]]["kind"] != "text" or METHODS[args.method].merge != "moe":
        raise UserError(
            f"--export {args.export}: an MoE of a language model alone; {run['backbone']}, {args.method} "
            "is none"
        )
    folder = Path(args.export)
    earlier = all((folder / file).exists() for file in ("config.json", "modeling_metamoe.py"))
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not earlier:
        raise UserError(f"--export {args.export}: is there already and holds no export: name another folder")


def export(run, local, source, folder, force):
    """Write the model RUN/moe/NAME as a Hugging Face folder: weights, configuration, tokenizer, code."""
    check_whole(source, "make it again")
    settings = {
        "model": source.name,
        "moe": sha256(source / "moe.safetensors"),
        "config": sha256(source / "moe_config.json"),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if finished(folder, settings, force):
            print(f"unify_moe: {folder}: is there already, skipped")
            return
        backbone = load_backbone(run["backbone"], local["seed_model"], "cpu", "bfloat16")
        check_seed_model(run, backbone)
        backbone.model = None  # the weights are wanted as they are stored
        auto = import_transformers().AutoModelForCausalLM
        model = moe.load(source, auto.from_pretrained(backbone.source, dtype="auto", **seed_model.SAFE))
        shapes = [{key: list(t.shape) for key, t in moe.added(layer).items()} for layer in moe.layers(model)]
        if any(layer != shapes[0] for layer in shapes):
            raise UserError(f"--export {folder}: the experts' shapes differ from layer to layer")
        with making(folder, settings) as part:
            write_model(model, shapes[0], part)
            backbone.tokenizer.save_pretrained(part)
    print(f"unify_moe: {folder}: {source.name} as a Hugging Face folder, {folder_bytes(folder) / 1e6:.0f} MB")


def write_model(model, shapes, folder):
    """Write weights, configuration and code. shapes: of `moe.added` of each layer."""
    names = type(model.config).__name__, type(model).__name__
    type(model).save_pretrained(model, folder)
    # tools pad on the right without a mask, and do not say where a prompt ends: the prefix needs neither
    context = "none" if model.moe_config["context"] == "none" else "prefix"
    config = read_json(folder / "config.json")
    config |= {"model_type": "metamoe", "architectures": ["MetaMoEForCausalLM"]}
    config["moe"] = model.moe_config | {"context": context, "shapes": shapes}
    config["auto_map"] = {
        "AutoConfig": "modeling_metamoe.MetaMoEConfig",
        "AutoModelForCausalLM": "modeling_metamoe.MetaMoEForCausalLM",
    }
    write_json(folder / "config.json", config)
    code = (Path(__file__).parent / "modeling_metamoe.py").read_text()
    for own, name in zip(("LlamaConfig", "LlamaForCausalLM"), names, strict=True):
        code = code.replace(own, name)
    (folder / "modeling_metamoe.py").write_text(code)
    for module in (moe, generation, past, seed_model):
        shutil.copyfile(module.__file__, folder / Path(module.__file__).name)
