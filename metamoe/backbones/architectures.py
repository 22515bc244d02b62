"""open_clip's architectures: which of them can be a seed model, and whether a checkpoint is of the one it is
run as. A checkpoint says so by its shapes, by open_clip_config.json beside it, or by open_clip's own list.
"""

import difflib
from dataclasses import asdict
from math import isqrt
from pathlib import Path

import torch
from safetensors import safe_open

from metamoe.errors import UserError
from metamoe.rundir import read_json
from metamoe.serving.seed_model import fix_torchvision

CONFIG = "open_clip_config.json"  # what open_clip writes beside a checkpoint: model_cfg and preprocess_cfg


def import_open_clip():
    fix_torchvision()
    import open_clip

    return open_clip


def check_architecture(name):
    """UserError where open_clip does not know it, or its image tower is no ViT of open_clip's own."""
    open_clip = import_open_clip()
    if name not in open_clip.list_models():
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 3, cutoff=0))
        raise UserError(f"--architecture {name}: open_clip knows none of this name, close are {close}")
    what = other_kind(open_clip.get_model_config(name))
    if what:
        raise UserError(f"--architecture {name}: is {what}: take a ViT of open_clip's own, such as ViT-B-32")


def other_kind(config):
    """What the model of a model_cfg is, if it has no ViT whose FFNs are c_fc, gelu and c_proj; else None."""
    if "multimodal_cfg" in config:
        return "a CoCa, which pools its image tokens by attention"
    if "timm_model_name" in config["vision_cfg"]:
        return "a CLIP with an image tower of timm's"
    if not isinstance(config["vision_cfg"].get("layers", 0), int):
        return "a CLIP with a ResNet, which has no FFN"
    return None


def check_checkpoint(architecture, source):
    """What of the checkpoint's preprocess_cfg is not open_clip's default: mean, std, interpolation.

    source: a file, or one of open_clip's pretrained tags. UserError where it is of another architecture, or
    needs images resized in a way that is not known here.
    """
    open_clip = import_open_clip()
    check_architecture(architecture)
    tag = open_clip.get_pretrained_cfg(architecture, source)
    if tag:
        found = flat(open_clip.get_model_config(architecture)) | {"quick_gelu": tag.get("quick_gelu", False)}
        check_same(architecture, source, found, "open_clip's list")
        return own_preprocessing(source, tag)
    if not Path(source).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        what = f"is no file, and none of open_clip's weights for {architecture} ({tags})"
        raise UserError(f"--seed-model {source}: {what}")
    check_same(architecture, source, read_shapes(source), "its tensors' shapes")
    path = Path(source).with_name(CONFIG)
    if not path.exists():
        return {}
    config = read_json(path)
    try:
        check_same(architecture, source, flat(config["model_cfg"]), path)
        return own_preprocessing(source, config.get("preprocess_cfg", {}))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no configuration of open_clip's ({what}): repair or remove it") from None


def own_preprocessing(source, config):
    """What of a preprocess_cfg is not open_clip's default; UserError for a resize that is not known here."""
    transform = import_open_clip().transform
    default = asdict(transform.PreprocessCfg())
    found = transform.merge_preprocess_dict(default, config)
    mode, interpolation = found["resize_mode"], found["interpolation"]
    if mode != "shortest" or interpolation not in ("bicubic", "bilinear"):
        what = f"its images are resized by {mode}, {interpolation} (preprocess_cfg)"
        raise UserError(f"--seed-model {source}: {what}: known here are shortest with bicubic or bilinear")
    for key in ("mean", "std"):
        found[key] = tuple(torch.as_tensor(found[key], dtype=torch.float64).expand(3).tolist())
    return {key: found[key] for key in ("mean", "std", "interpolation") if found[key] != default[key]}


def check_same(architecture, source, found, where):
    """UserError where the architecture has not what was `found` of a checkpoint, a part of `flat`."""
    open_clip = import_open_clip()
    ours, names = flat(open_clip.get_model_config(architecture)), []
    differing = [key for key in found if found[key] != ours[key]]
    if not differing:
        return
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not other_kind(config) and found.items() <= flat(config).items():
            names.append(name)
    key = differing[0]
    what = f"has {key} {found[key]} ({where}), {architecture} has {ours[key]}"
    take = "open_clip has no architecture for it"
    if names:
        close = difflib.get_close_matches(architecture, names, 3, cutoff=0)
        take = f"take --architecture {' or '.join(close)}"
    raise UserError(f"--seed-model {source}: {what}: {take}")


def flat(config):
    """{"quick_gelu": ..., "vision_cfg.width": ..., ...} of a model_cfg, with open_clip's defaults."""
    open_clip = import_open_clip()
    found = {"quick_gelu": config.get("quick_gelu", False), "embed_dim": config["embed_dim"]}
    parts = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    for part, fields in parts.items():
        found |= {f"{part}.{key}": value for key, value in asdict(fields(**config[part])).items()}
    del found["vision_cfg.patch_dropout"]  # of pretraining alone
    return found


def read_shapes(source):
    """What a checkpoint's shapes say, a part of `flat`; UserError where it is no CLIP with a ViT."""
    try:
        shapes = tensor_shapes(source)
    except Exception as error:  # pickle, safetensors and torch raise nearly anything on such a file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--seed-model {source}: does not read as a checkpoint ({reason})") from None
    try:
        width, _, _, patch = shapes["visual.conv1.weight"]
        tokens, _ = shapes["visual.positional_embedding"]
        _, embed_dim = shapes["visual.proj"]
    except (KeyError, ValueError):
        what = "its tensors are not named or shaped as those of open_clip's CLIPs with a ViT"
        raise UserError(f"--seed-model {source}: {what}") from None
    layers = sum(name.startswith("visual.") and name.endswith(".mlp.c_fc.weight") for name in shapes)
    # open_clip would stretch the positions of another image size
    vision = {"width": width, "layers": layers, "patch_size": patch, "image_size": patch * isqrt(tokens - 1)}
    found = {"embed_dim": embed_dim} | {f"vision_cfg.{key}": value for key, value in vision.items()}
    if "positional_embedding" in shapes:
        found["text_cfg.context_length"], found["text_cfg.width"] = shapes["positional_embedding"]
    return found


def tensor_shapes(source):
    """{name: shape} of a checkpoint, without its tensors."""
    if source.endswith(".safetensors"):
        with safe_open(source, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    state = import_open_clip().factory.load_state_dict(source, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
