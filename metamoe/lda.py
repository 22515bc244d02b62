"""Routing by linear discriminant analysis (`--init lda`): the clients' means in the metric of what is routed.

Products favour the directions in which all inputs vary. Were the routed z~ of Eq. 6 of client p normal with
mean mu_p and covariance S, the likeliest client would be the one of the largest z~ . S^-1 mu_p - mu_p^T S^-1
mu_p / 2. S comes from public samples in the seed model alone.
"""

import torch

from metamoe.backbones.base import unwrap

SHRINK = 0.5  # of S towards a multiple of the identity: few public samples stand against d^2 / 2 covariances


@torch.no_grad()
def routed_covariance(backbone, records, lam):
    """S (L, d, d) float64: (1 - lam)^2 S_token + (1 - (1 - lam)^2) S_context in each layer.

    S_token is the covariance of the records' tokens, each record of the same weight, S_context that of their
    token means, the router's context: S is that of z~ = (1 - lam) z + lam z_x. One batch of tokens is kept.
    """
    ffns = [unwrap(backbone.model).get_submodule(name) for name in backbone.ffn_names]
    d, own, inputs = backbone.width, (1 - lam) ** 2, {}
    sums = torch.zeros(len(ffns), d, device=backbone.device, dtype=torch.float64)
    squares = torch.zeros(len(ffns), d, d, device=backbone.device, dtype=torch.float64)
    hooks = [ffn.register_forward_pre_hook(lambda ffn, args: inputs.update({ffn: args[0]})) for ffn in ffns]
    for _, mask, forward in backbone.prompt_batches(backbone.model, records, "covariance of D_0"):
        with backbone.autocast():
            forward()
        weight = mask / mask.sum(1, keepdim=True)  # (b, T), 1 a record
        for layer, ffn in enumerate(ffns):
            z = inputs[ffn].float().masked_fill(~mask.unsqueeze(-1), 0)  # (b, T, d)
            mean = (z * weight.unsqueeze(-1)).sum(1)  # (b, d)
            rows = (1 - own) ** 0.5 * mean
            if own:
                tokens = z[mask] * (own * weight[mask]).sqrt().unsqueeze(1)  # (tokens, d)
                rows = torch.cat([rows, tokens])
            squares[layer] += rows.T @ rows
            sums[layer] += mean.sum(0)
    for hook in hooks:
        hook.remove()
    mean = sums / len(records)  # (L, d)
    return (squares / len(records) - mean.unsqueeze(2) * mean.unsqueeze(1)).cpu()


def discriminants(vectors, covariance):
    """(routing vectors, K x (L, d), biases, K x (L,)) of the means `vectors`, K x (L, d), and S (L, d, d).

    e = c S^-1 mu and b = -c mu^T S^-1 mu / 2, with S shrunk by SHRINK towards its mean variance. c, which
    changes no largest logit, sets the temperature: the mean eigenvalue of c S^-1 is 1. Where S is a multiple
    of the identity this is the start of `--offset`, e = mu.
    """
    means, d = torch.stack(list(vectors)).double(), covariance.shape[-1]  # (K, L, d)
    e, bias = torch.empty_like(means), torch.empty_like(means[..., 0])
    for layer, S in enumerate(covariance):
        variance = S.diagonal().mean()
        inverse = torch.linalg.inv((1 - SHRINK) * S + SHRINK * variance * torch.eye(d, dtype=S.dtype))
        mu = means[:, layer]  # (K, d)
        e[:, layer] = mu @ (inverse * (d / inverse.trace()))
        bias[:, layer] = (e[:, layer] * mu).sum(1) / -2
    return list(e.float()), list(bias.float())
