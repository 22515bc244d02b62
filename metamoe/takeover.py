"""No client takes over another's tokens: how long its routing vectors are, and whose tokens it draws."""

import numpy as np
import torch

import moe
from metamoe.backbones.base import dtype_name
from metamoe.backbones.distributed import processes
from metamoe.errors import UserError
from metamoe.records import read_records, usable_public
from metamoe.rundir import read_json, write_json

PUBLIC_SAMPLES = 128  # of D_0, whose routing vectors the clients' are measured against
CLIENT_PROXIES = 32  # of each client, whose tokens are followed


def public_lengths(backbone, run_dir, run):
    """{"dtype", "mean": [length of each layer's routing vector of D_0], "samples": [mean of its samples']}.

    Of a random sample of D_0 in the seed model; computed once, and kept in RUN/public/lengths.json.
    """
    kept, dtype = run_dir / "public" / "lengths.json", dtype_name(backbone.dtype)
    if kept.exists() and read_json(kept)["dtype"] == dtype:
        return read_json(kept)
    public = read_records(run_dir / "public" / "records.jsonl")
    usable = np.random.default_rng([run["seed"], 19]).permutation(usable_public(run_dir, public))
    sample = [public[i] for i in np.sort(usable[:PUBLIC_SAMPLES])]
    vectors, lengths = backbone.input_means(backbone.model, sample, label="routing vectors of D_0")
    return {"dtype": dtype, "mean": vectors.norm(dim=1).tolist(), "samples": lengths.tolist()}


def check_lengths(backbone, run_dir, run, uploads, bound):
    """{client: [length of each layer's routing vector over that of D_0's samples]}; UserError out of bounds.

    Eq. 6 takes products: a vector of ten times the length would draw every token. A mean is no longer than
    its samples are on average, and shorter the more these differ, in D_0 the most: so a vector may be up to
    `bound` times as long as D_0's samples, and down to D_0's mean over `bound`.
    """
    lengths, ratios = public_lengths(backbone, run_dir, run), {}
    for name, upload in uploads.items():
        own = upload.vectors.norm(dim=1).tolist()
        for layer, (length, mean, samples) in enumerate(
            zip(own, lengths["mean"], lengths["samples"], strict=True)
        ):
            if not mean / bound <= length <= samples * bound:
                allowed = f"{mean / bound:.3g} to {samples * bound:.3g} are allowed (--length-bound)"
                where = f"its routing vector in layer {layer} has length {length:.3g}"
                raise UserError(f"client {name}: {where}: {allowed}")
        ratios[name] = [
            length / max(sample, 1e-12) for length, sample in zip(own, lengths["samples"], strict=True)
        ]
    kept = run_dir / "public" / "lengths.json"
    if processes().is_main_process and not (kept.exists() and read_json(kept) == lengths):
        write_json(kept, lengths)
    return ratios


def some_proxies(public, upload):
    """Up to CLIENT_PROXIES of the client's proxies, spread over all."""
    step = max(1, len(upload.proxies) // CLIENT_PROXIES)
    return [public[i] for i in upload.proxies[::step][:CLIENT_PROXIES]]


@torch.no_grad()
def attraction(backbone, model, public, uploads):
    """{client: {expert: share}} of the tokens of the clients' proxies, mean over the layers."""
    found, names = {}, model.moe_config["names"]
    model.eval()
    for name, upload in uploads.items():
        sample = some_proxies(public, upload)
        model.routing.record = True
        moe.reset_counts(model)
        for _, _, forward in backbone.prompt_batches(model, sample, label=f"routing of {name}'s proxies"):
            with backbone.autocast():
                forward()
        counts = moe.counts(model).double()  # (L, K)
        found[name] = dict(zip(names, (counts / counts.sum(1, keepdim=True)).mean(0).tolist(), strict=True))
    model.routing.record = False
    return found


def tell_routing(model, ratios, tokens):
    """Say how long the clients' routing vectors are and where their proxies go; warn of a takeover."""
    for name, shares in tokens.items():
        lengths, most = ratios[name], max(shares, key=shares.get)
        told = ", ".join(f"{expert} {100 * share:.0f}%" for expert, share in shares.items())
        span = f"{min(lengths):.2f} to {max(lengths):.2f} times as long as D_0's samples"
        print(f"unify_moe: {model}: {name}: routing vectors {span}; its proxies' tokens go to {told}")
        if most != name and shares[most] > 0.5:
            print(f"unify_moe: {model}: WARNING: {most} draws most of the tokens of {name}'s proxies")
