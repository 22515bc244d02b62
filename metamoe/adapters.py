"""PEFT adapters as experts: what an FFN LoRA of moe.py can express is read exactly, all else is refused."""

import math
import re

from safetensors.torch import load_file

from metamoe.errors import UserError
from metamoe.rundir import read_json
from metamoe.untrusted import LARGEST

# Starts that also change the seed model's own weights: the adapter alone is then not the client's update.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of adapter_config.json that are read here, or that change nothing of what the adapter computes
PLAIN = {"peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"}
PLAIN |= {"inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
PLAIN |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"}
PLAIN |= {"fan_in_fan_out", "init_lora_weights", "megatron_core", "loftq_config", "eva_config"}
PLAIN |= {"corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying"}
# What an FFN LoRA cannot express: any other field that is set, of which these are known
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
    """The expert of a folder that PEFT has written; UserError, naming it, for what is no plain LoRA."""
    file = folder / "adapter_model.safetensors"
    config = read_json(folder / "adapter_config.json")
    check_config(folder, config)
    if not file.exists():
        raise UserError(f"{folder} has no adapter_model.safetensors: save it with safe_serialization=True")
    return expert_of(config, load_file(file), folder)


def expert_of(config, tensors, where):
    """{FFN name: {"gate_proj.lora_A": (r, d_in), "gate_proj.lora_B": (d_out, r), ..., "scaling": float}}.

    config, tensors: adapter_config.json and adapter_model.safetensors; nothing of them is believed. Each
    linear has PEFT's own scale: alpha / r, with rsLoRA alpha / sqrt(r), and rank_pattern's and
    alpha_pattern's values where these name it. Where it is not the FFN's first linear's, it is put into B.
    """
    check_config(where, config)
    expert, ranks = {}, {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.(\w+)\.(lora_[AB])\.weight", key)
        if not found or tensor.dim() != 2:
            raise UserError(f"{where}: {key} is no factor of a linear: an expert is LoRA on the FFNs alone")
        ffn, linear, factor = found.groups()
        rank, scale = rank_and_scale(config, f"{ffn}.{linear}")
        has = tensor.shape[0 if factor == "lora_A" else 1]
        if has != rank:
            raise UserError(f"{where}: {key} has rank {has}, its configuration says {rank}")
        own = expert.setdefault(ffn, {"scaling": scale})
        if factor == "lora_B" and scale != own["scaling"]:
            tensor = tensor * (scale / own["scaling"])
        own[f"{linear}.{factor}"] = tensor
        ranks.setdefault(f"{ffn}.{linear}", set()).add(factor)
    halves = [module for module, factors in ranks.items() if len(factors) == 1]
    if halves:
        raise UserError(f"{where}: {halves[0]} has {ranks[halves[0]].pop()} alone")
    return expert


def check_config(where, config):
    """UserError, naming the field, for a configuration that is no plain LoRA's."""
    if not isinstance(config, dict):
        raise UserError(f"{where}: adapter_config.json is no object")
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{where}: peft_type {config['peft_type']}: an expert is a LoRA adapter")
    for field in sorted(config.keys() - PLAIN):
        if config[field]:
            why = REFUSED.get(field, "this project does not know it")
            value = f"{field} {str(config[field])[:80]}"
            raise UserError(f"{where}: {value}: {why}; train a plain LoRA on the FFNs")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias {config['bias']!r}: it trains biases; train with bias 'none'")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        advice = "convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        why = "also changes the seed model's weights"
        raise UserError(f"{where}: init_lora_weights {start[:80]!r} {why}: {advice}")
    for field, alike in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(alike) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{where}: {alike} is no object")
        check_patterns(where, alike, patterns)
        for name, value in ((field, config.get(field)), *patterns.items()):
            check_number(where, name, value, whole=field == "r")


def check_number(where, name, value, whole):
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < abs(value) <= LARGEST or whole and value < 0:
        what = "a positive integer" if whole else f"a number, not 0, of at most {LARGEST:,.0f}"
        raise UserError(f"{where}: {name[:80]} {str(value)[:80]}: must be {what}")


def check_patterns(where, field, patterns):
    """UserError for an expression that could match for ever: groups, and more than two repetitions."""
    for pattern in patterns:
        simple = re.fullmatch(r"[\w.\\\[\]^$*+-]{1,200}", pattern)
        if not simple or len(re.findall("[*+]", pattern)) > 2:
            raise UserError(f"{where}: {field} {pattern[:80]!r}: name the modules without groups")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}: {field} {pattern[:80]!r}: {error}") from None


def rank_and_scale(config, module):
    """(r, PEFT's scale of B A) of a module: alpha / r, or alpha / sqrt(r) with use_rslora."""
    rank = config.get("rank_pattern") or {}
    alpha = config.get("alpha_pattern") or {}
    r = rank.get(pattern_of(rank, module), config["r"])
    a = alpha.get(pattern_of(alpha, module), config["lora_alpha"])
    return r, a / (math.sqrt(r) if config.get("use_rslora") else r)


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
