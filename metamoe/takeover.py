"""No client takes over another's tokens: how long its routing vectors are, and whose tokens it draws."""

import numpy as np
import torch

import moe
from metamoe.backbones.distributed import processes
from metamoe.errors import UserError
from metamoe.records import read_records, usable_public
from metamoe.rundir import read_json, write_json

PUBLIC_SAMPLES = 128  # of D_0, whose routing vectors the clients' are measured against
CLIENT_PROXIES = 32  # of each client, whose tokens are followed


def public_lengths(backbone, run_dir, run):
    """(L,) the length of the routing vectors of a random sample of D_0 in the seed model."""
    public = read_records(run_dir / "public" / "records.jsonl")
    usable = np.random.default_rng([run["seed"], 19]).permutation(usable_public(run_dir, public))
    sample = [public[i] for i in np.sort(usable[:PUBLIC_SAMPLES])]
    return backbone.routing_vectors(backbone.model, sample, label="routing vectors of D_0").norm(dim=1)


def check_lengths(backbone, run_dir, run, uploads, bound):
    """{client: [length of each layer's routing vector over D_0's]}; UserError for one out of proportion.

    Eq. 6 takes products: a vector of ten times the length would draw every token. bound: a ratio may lie in
    1 / bound to bound. D_0's lengths are computed once, and kept in RUN/public/lengths.json.
    """
    kept, dtype = run_dir / "public" / "lengths.json", str(backbone.dtype)
    known = kept.exists() and read_json(kept)["dtype"] == dtype
    lengths = torch.tensor(read_json(kept)["lengths"]) if known else public_lengths(backbone, run_dir, run)
    ratios = {}
    for name, upload in uploads.items():
        ratios[name] = (upload.vectors.norm(dim=1) / lengths.clamp(min=1e-12)).tolist()
        for layer, ratio in enumerate(ratios[name]):
            if not 1 / bound <= ratio <= bound:
                much = f"{ratio:.2f} times as long as D_0's in layer {layer}"
                allowed = f"{1 / bound:.2g} to {bound:g} are allowed (--length-bound)"
                raise UserError(f"client {name}: its routing vector is {much}: {allowed}")
    if not known and processes().is_main_process:
        write_json(kept, {"dtype": dtype, "lengths": lengths.tolist()})
    return ratios


@torch.no_grad()
def attraction(backbone, model, public, uploads):
    """{client: {expert: share}} of the tokens of the clients' proxies, mean over the layers."""
    found, names = {}, model.moe_config["names"]
    model.eval()
    for name, upload in uploads.items():
        step = max(1, len(upload.proxies) // CLIENT_PROXIES)
        sample = [public[i] for i in upload.proxies[::step][:CLIENT_PROXIES]]
        model.routing.record = True
        moe.reset_counts(model)
        for _, forward in backbone.prompt_batches(model, sample, label=f"routing of {name}'s proxies"):
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
        span = f"{min(lengths):.2f} to {max(lengths):.2f} times as long as D_0's"
        print(f"unify_moe: {model}: {name}: routing vectors {span}; its proxies' tokens go to {told}")
        if most != name and shares[most] > 0.5:
            print(f"unify_moe: {model}: WARNING: {most} draws most of the tokens of {name}'s proxies")
