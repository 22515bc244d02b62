"""What a unified model starts from: experts and routing vectors, the seed model's (e_0) among them."""

import numpy as np
import torch

from metamoe.records import read_records, usable_public

PUBLIC_SAMPLES = 3000  # of D_0 that the seed model's mean and covariance are taken over, at most


def seed_sample(run_dir, run):
    """Up to PUBLIC_SAMPLES random readable records of D_0, the same for all parties."""
    public = read_records(run_dir / "public" / "records.jsonl")
    chosen = np.random.default_rng([run["seed"], 17]).permutation(usable_public(run_dir, public))
    return [public[i] for i in chosen[:PUBLIC_SAMPLES]]


def seed_expert(ffn, like):
    """e_0 of Eq. 6: the seed model's own FFN as an expert like another; LoRA zeros stay zero."""
    if "scaling" in like:
        return {key: v if key == "scaling" else torch.zeros_like(v) for key, v in like.items()}
    return {key: v.detach().clone() for key, v in ffn.named_parameters()}


def seed_model_expert(backbone, like):
    """e_0 in every layer, as an expert for moe.unify; like: another one."""
    ffns = {name: backbone.model.get_submodule(name) for name in backbone.ffn_names}
    return {name: seed_expert(ffn, like[name]) for name, ffn in ffns.items()}
