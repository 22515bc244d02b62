"""PEFT adapters as experts: what an FFN LoRA of moe.py can express is read exactly, all else is refused."""

import math
import re
from pathlib import Path

from safetensors.torch import load_file

from metamoe.errors import UserError
from metamoe.rundir import read_json

# Starts that also change the seed model's own weights: the adapter alone is then not the client's update.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What an FFN LoRA cannot express: field of adapter_config.json -> what to say of it
REFUSED = {
    "use_dora": "DoRA scales each row by its norm",
    "use_qalora": "QALoRA groups the inputs",
    "lora_bias": "it trains a bias beside B",
    "modules_to_save": "it has trained whole modules",
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts parameters, not linears",
    "trainable_token_indices": "it trains embeddings",
    "alora_invocation_tokens": "it is active behind some tokens alone",
}


def read_adapter(folder):
    """{FFN name: {"gate_proj.lora_A": (r, d_in), "gate_proj.lora_B": (d_out, r), ..., "scaling": float}}.

    Each linear has PEFT's own scale: alpha / r, with rsLoRA alpha / sqrt(r), and rank_pattern's and
    alpha_pattern's values where these name it. Where it is not the FFN's first linear's, it is put into B.
    Raises UserError, naming the folder and the field, for what is no plain LoRA.
    """
    config = read_json(folder / "adapter_config.json")
    check_config(folder, config)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"{folder} has no adapter_model.safetensors: save it with safe_serialization=True")
    expert = {}
    for key, tensor in load_file(file).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.(\w+)\.(lora_[AB])\.weight", key)
        if not found:
            raise UserError(f"{file}: {key} is no factor of a linear: an expert is LoRA on the FFNs alone")
        ffn, linear, factor = found.groups()
        scale = scaling(config, f"{ffn}.{linear}")
        own = expert.setdefault(ffn, {"scaling": scale})
        if factor == "lora_B" and scale != own["scaling"]:
            tensor = tensor * (scale / own["scaling"])
        own[f"{linear}.{factor}"] = tensor
    return expert


def check_config(folder, config):
    where = f"{Path(folder) / 'adapter_config.json'}"
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{where}: peft_type {config['peft_type']}: an expert is a LoRA adapter")
    for field, why in REFUSED.items():
        if config.get(field):
            raise UserError(f"{where}: {field} {config[field]}: {why}; train a plain LoRA on the FFNs")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias {config['bias']!r}: it trains biases; train with bias 'none'")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        advice = "convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        raise UserError(
            f"{where}: init_lora_weights {start!r} also changes the seed model's weights: {advice}"
        )


def scaling(config, module):
    """PEFT's scale of B A for a module: alpha / r, or alpha / sqrt(r) with use_rslora."""
    rank = config.get("rank_pattern") or {}
    alpha = config.get("alpha_pattern") or {}
    r = rank.get(pattern_of(rank, module), config["r"])
    a = alpha.get(pattern_of(alpha, module), config["lora_alpha"])
    return a / (math.sqrt(r) if config.get("use_rslora") else r)


def pattern_of(patterns, module):
    """The first key that names the module, as PEFT matches it; None without one."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def complete(expert, ffn_names, upload):
    """The expert with an entry for every FFN, empty where it leaves one out; UserError for other modules."""
    others = sorted(expert.keys() - set(ffn_names))
    if others:
        raise UserError(f"upload {upload}: has weights of {others[0]}: an expert is the FFN sublayers alone")
    if any("scaling" in own for own in expert.values()):
        return {name: expert.get(name, {"scaling": 1.0}) for name in ffn_names}
    missing = [name for name in ffn_names if name not in expert]
    if missing:
        raise UserError(f"upload {upload}: has no weights of {missing[0]}: an expert has every FFN")
    return expert
