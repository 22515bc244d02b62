"""Fewer experts without training: unify_moe.py --compress merges those that compute alike."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import average, cut_tree
from scipy.spatial.distance import squareform

import moe
from metamoe import cli
from metamoe.agreement import read_local
from metamoe.atomic import locked
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.errors import UserError
from metamoe.records import read_records
from metamoe.rundir import finished, making, sha256, versions
from metamoe.serving.members import MERGED, parts_of, source_model
from metamoe.takeover import some_proxies
from metamoe.uploads import read_upload


def compress(args, run_dir, run):
    """Write RUN/moe/MODEL-compressed-K', the model with its experts merged to K'; returns its folder."""
    if processes(args.device).num_processes > 1:
        raise UserError("--compress: is one process: start it with python, not under accelerate launch")
    count, flag = args.compress, f"--compress {args.compress}"
    source, made = source_model(args, run_dir, flag)
    config, tensors = moe.read(source)
    if count >= len(config["names"]):
        raise UserError(f"{flag}: must be less than {len(config['names'])}, the experts of {source.name}")
    folder = source.with_name(f"{source.name}-compressed-{count}")
    settings = made | {"name": folder.name, "from": sha256(source / "moe.safetensors")}
    settings |= {"compressed": count, "dtype": args.dtype}
    resolved = cli.announce(args, "unify_moe", settings)
    inside = [name for name in run["clients"] if name in parts_of(config["names"])]
    files = [f"clients/{name}/upload/{made['variant']}/manifest.json" for name in inside]
    with locked(folder):
        made_from = versions(run_dir, "public/records.jsonl", *files)
        if finished(folder, settings, args.force, made_from):
            print(f"unify_moe: {folder.name}: is there already, skipped")
            return folder
        public = read_records(run_dir / "public" / "records.jsonl")
        uploads = [read_upload(run_dir, run, name, made["variant"]) for name in inside]
        sample = [record for upload in uploads for record in some_proxies(public, upload)]
        backbone = run_backbone(run, read_local(run_dir), args)
        cli.save_settings(run_dir, "unify_moe", folder.name, resolved)
        distances, usage = measure(backbone, moe.load(source, backbone.model), sample)
        groups = like_experts(distances, count)
        config, tensors, lost = merge(config, tensors, groups, usage, made.get("init") == "unit")
        with making(folder, settings, run_dir, made_from) as part:
            moe.write(part, config, tensors)
    tell(folder.name, config["names"], groups, usage, lost)
    return folder


@torch.no_grad()
def measure(backbone, model, records):
    """(distances (K, K), usage (L, K)) of the experts on these samples, in the unified model's own forward.

    distances: root mean square of |FFN_p(z) - FFN_q(z)| over the tokens z that reach a layer, over that of
    |FFN_p(z)| over tokens and experts; mean over the layers. usage: (token, choice) pairs of each.
    """
    layers, K = moe.layers(model), len(model.moe_config["names"])
    squares, sizes = torch.zeros(len(layers), K, K, dtype=torch.float64), torch.zeros(len(layers), 1, 1)

    def compare(layer, inputs):
        model.routing.record = False
        outputs = [alone(layer, p, inputs[0])[tokens].float() for p in range(K)]  # K x (n, d)
        outputs = torch.stack(outputs, 1)  # (n, K, d)
        apart = torch.cdist(outputs, outputs, compute_mode="donot_use_mm_for_euclid_dist")
        squares[layer.index] += apart.double().square().sum(0).cpu()
        sizes[layer.index] += outputs.double().square().sum().cpu() / K
        model.routing.record = True

    moe.reset_counts(model.eval())
    hooks = [layer.register_forward_pre_hook(compare) for layer in layers]
    for _, mask, forward in backbone.prompt_batches(model, records, label="experts on the proxies"):
        tokens = mask  # (B, T); the hooks read it
        with backbone.autocast():
            forward()
    for hook in hooks:
        hook.remove()
    model.routing.record = False
    return (squares / sizes).sqrt().mean(0).numpy(), moe.counts(model).double().cpu()


def alone(layer, p, z):
    """FFN_p(z) for all tokens of z (B, T, d)."""
    router, K = layer.router, len(layer.counts)
    before, router.disabled = router.disabled, [q for q in range(K) if q != p]
    try:
        return layer.forward(z)  # without its hooks
    finally:
        router.disabled = before


def like_experts(distances, count):
    """[[p, ...], ...]: the K experts in `count` groups by average linkage; distances: (K, K).

    UserError where a distance is not finite.
    """
    if not np.isfinite(distances).all():
        raise UserError(
            "--compress: an expert gives NaN or infinity on the proxies: leave it out (--without)"
        )
    tree = average(squareform(distances, checks=False))
    label = cut_tree(tree, n_clusters=count)[:, 0]  # fcluster gives fewer where distances are equal
    return [np.flatnonzero(label == own).tolist() for own in dict.fromkeys(label.tolist())]


def merge(config, tensors, groups, usage, one_length=False):
    """(configuration, tensors, (lost, whole)) of what `moe.read` returns, with an expert for each group.

    usage: (L, K), each layer's weights in the means of a group; uniform where it has none there.
    one_length: scale a group's routing vector, the mean of its members', to the mean of their lengths.
    lost, whole: squared norm of the mean products beyond the rank, and of all of it.
    """
    names, scaling = config["names"], config["scaling"]
    members = [parts_of([names[p] for p in group]) for group in groups]
    new = config | {"names": [MERGED.join(own) for own in members]}
    new["members"] = {MERGED.join(own): own for own in members if len(own) > 1}
    new["top_k"] = min(config["top_k"], len(groups))
    if config["kind"] == "lora":
        new["scaling"] = [[own[g[0]] if len(g) == 1 else 1.0 for g in groups] for own in scaling]
    out, norms = dict(tensors), np.zeros(2)
    for layer, ffn in enumerate(config["ffn_names"]):
        weights = [shares(usage[layer, group]) for group in groups]
        own = [key for key in tensors if key.startswith(f"{ffn}.") and not key.endswith(".router.lam")]
        for key in own:
            one = one_length and key.endswith(".router.vectors")
            if config["kind"] == "full" or ".experts." not in key:
                merged = [mean(tensors[key][g], w, one) for g, w in zip(groups, weights, strict=True)]
                out[key] = torch.stack(merged)
        for A in [key for key in own if key.endswith(".A")]:
            B = f"{A[:-1]}B"
            factors = tensors[A], tensors[B], scaling[layer]
            out[A], out[B], found = merge_factors(*factors, groups, weights)
            norms += found
    return new, out, norms


def shares(counts):
    """counts (g,) as weights that sum to 1; uniform where all are 0."""
    return counts / counts.sum() if counts.any() else torch.full_like(counts, 1 / len(counts))


def mean(stack, weights, one_length=False):
    """The weighted mean of a stack (g, ...); one_length: of vectors (g, d), at the mean of their lengths."""
    own = torch.tensordot(weights, stack.double(), 1)
    if one_length:
        own *= (weights @ stack.double().norm(dim=1)) / own.norm().clamp(min=1e-12)
    return own.to(stack.dtype)


def merge_factors(A, B, scaling, groups, weights):
    """(A (K', r, d_in), B (K', d_out, r), squared norms (lost, whole)) of A (K, r, d_in) and B (K, d_out, r).

    A group of one keeps its factors, another gets those of `truncated_mean`.
    """
    new, norms = [], np.zeros(2)
    for group, own in zip(groups, weights, strict=True):
        if len(group) == 1:
            new.append((A[group[0]], B[group[0]]))
            continue
        scale = own * torch.tensor([scaling[p] for p in group], dtype=torch.float64)
        *factors, found = truncated_mean(A[group].double(), B[group].double(), scale)
        new.append([factor.to(A.dtype) for factor in factors])
        norms += found
    A, B = zip(*new, strict=True)
    return torch.stack(A), torch.stack(B), norms


def truncated_mean(A, B, scale):
    """The best factors of rank r of sum_p scale_p B_p A_p: (A (r, d_in), B (d_out, r), (lost, whole)).

    A: (g, r, d_in), B: (g, d_out, r), scale: (g,). lost, whole: squared Frobenius norm beyond rank r, in all.
    QR of the stacked factors leaves a core of at most g r x g r, whose SVD is that of the sum.
    """
    rank = A.shape[1]
    tall = (B * scale.view(-1, 1, 1)).transpose(0, 1).flatten(1)  # (d_out, g r)
    wide = A.flatten(0, 1)  # (g r, d_in)
    (q_out, r_out), (q_in, r_in) = torch.linalg.qr(tall), torch.linalg.qr(wide.T)
    U, S, V = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    new_B = F.pad(q_out @ U[:, :kept] * root, (0, rank - kept))
    new_A = F.pad(root[:, None] * V[:kept] @ q_in.T, (0, 0, 0, rank - kept))
    squares = S.square()
    return new_A, new_B, np.array([squares[rank:].sum(), squares.sum()])


def tell(model, names, groups, usage, lost):
    """Say what was merged, by which weights, and what the truncation cost."""
    for group, name in zip(groups, names, strict=True):
        if len(group) > 1:
            weights = torch.stack([shares(own[group]) for own in usage]).mean(0).tolist()
            told = " and ".join(f"{100 * weight:.0f}%" for weight in weights)
            print(f"unify_moe: {model}: {name} are one expert, weights {told} (mean over the layers)")
    about = f"{len(names)} experts ({', '.join(names)}), no training"
    if lost[1]:
        about += f"; the rank cuts off {100 * lost[0] / lost[1]:.2f}% of the merged products' squared norm"
    print(f"unify_moe: {model}: {about}")
