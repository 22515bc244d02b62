"""What a unified model starts from: experts and routing vectors, the seed model's (e_0) among them."""

from types import SimpleNamespace

import numpy as np
import torch

import moe
from metamoe.backbones.base import dtype_name
from metamoe.backbones.distributed import processes
from metamoe.backbones.embedding import keep_array, read_array
from metamoe.errors import UserError
from metamoe.lda import discriminants, routed_covariance
from metamoe.records import read_records, usable_public
from metamoe.routing import start_vectors
from metamoe.rundir import finished_file, versions

PUBLIC_SAMPLES = 3000  # of D_0 that the seed model's mean and covariance are taken over, at most


def seed_sample(run_dir, run):
    """Up to PUBLIC_SAMPLES random readable records of D_0, the same for all parties."""
    public = read_records(run_dir / "public" / "records.jsonl")
    chosen = np.random.default_rng([run["seed"], 17]).permutation(usable_public(run_dir, public))
    return [public[i] for i in chosen[:PUBLIC_SAMPLES]]


def public_mean(backbone, run_dir, run):
    """(L, d): the seed model's mean FFN inputs on `seed_sample`, computed once: RUN/public/mean-DTYPE.npy."""
    path = run_dir / "public" / f"mean-{dtype_name(backbone.dtype)}.npy"
    made_from = versions(run_dir, "public/records.jsonl")
    with processes().main_process_first():
        there = finished_file(path, {}, made_from=made_from)
    if there:
        return torch.from_numpy(read_array(path, len(backbone.ffn_names)).copy())
    sample = seed_sample(run_dir, run)
    mean = backbone.routing_vectors(backbone.model, sample, label="routing vectors of D_0")
    if processes().is_main_process:
        keep_array(path, mean.numpy(), {}, made_from)
    return mean


def seed_expert(ffn, like):
    """e_0 of Eq. 6: the seed model's own FFN as an expert like another; LoRA zeros stay zero."""
    if "scaling" in like:
        return {key: v if key == "scaling" else torch.zeros_like(v) for key, v in like.items()}
    return {key: v.detach().clone() for key, v in ffn.named_parameters()}


def with_seed_model(backbone, run_dir, run, uploads):
    """The uploads {name: Upload} behind that of e_0, "seed": the seed model's FFNs and mean inputs on D_0."""
    like = next(iter(uploads.values())).expert
    ffns = {name: backbone.model.get_submodule(name) for name in backbone.ffn_names}
    own = SimpleNamespace(expert={name: seed_expert(ffn, like[name]) for name, ffn in ffns.items()})
    own.vectors = public_mean(backbone, run_dir, run)
    own.bias = torch.zeros(len(ffns))
    return {"seed": own, **uploads}


def start(backbone, run_dir, run, uploads, settings):
    """(routing vectors K x (L, d), biases K x (L,) or None) that these uploads' experts start with."""
    vectors = [upload.vectors for upload in uploads.values()]
    if settings["init"] == "lda":
        lam = settings["lambda_init"] if settings["context"] == "on" else 0.0
        return discriminants(vectors, routed_covariance(backbone, seed_sample(run_dir, run), lam))
    if settings["init"] == "arrow":
        linear = backbone.ffn_linears[0]  # gate_proj or c_fc
        return [prototypes(name, upload.expert, linear) for name, upload in uploads.items()], None
    bias = [upload.bias for upload in uploads.values()] if settings["data"] == "anchored" else None
    return start_vectors(vectors, settings["init"], run["seed"]), bias


def prototypes(name, expert, linear):
    """(L, d): Arrow's routing vectors, the top right singular vector of B A of that linear in each FFN.

    name: the client's. Where B A is 0, so is the vector.
    """
    rows = []
    for ffn, own in expert.items():
        if f"{linear}.lora_A" not in own:
            why = f"its expert has no LoRA of {linear} in {ffn}, whose singular vector would route"
            raise UserError(f"client {name}: {why}: use another --init")
        A, B = own[f"{linear}.lora_A"].double(), own[f"{linear}.lora_B"].double()  # (r, d), (h, r)
        _, S, Vh = torch.linalg.svd(torch.linalg.qr(B).R @ A, full_matrices=False)  # of B A, B = Q R
        rows.append(Vh[0] * (S[0] > 0))
    return torch.stack(rows).float()


@torch.no_grad()
def set_bias(model, bias):
    """Set the last K experts' biases, K x (L,); None: they stay."""
    if bias is None:
        return
    for layer, own in zip(moe.layers(model), torch.stack(bias, 1), strict=True):  # (K,)
        layer.router.bias[-len(own) :] = own
