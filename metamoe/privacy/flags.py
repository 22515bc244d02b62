"""--epsilon, --delta and --private-parts of the stages that touch private data."""

import math

from metamoe.backbones.distributed import ALONE, processes
from metamoe.errors import UserError
from metamoe.flag_values import number

PARTS = ("relevance", "vectors", "expert")
DELTA = 1e-5
UNIT = "one private record, added or removed"
_finite = number(float, 0.1, 100)  # the accountant errs by up to 0.01


def epsilon(text):
    """A flag's value: a number, or inf, the mechanisms without noise and clipping."""
    return math.inf if text == "inf" else _finite(text)


def add_privacy_flags(parser):
    flag = parser.add_argument
    budget = (
        "a budget of differential privacy for each client's upload: what it sends gets noise, and its "
        "privacy.json remembers what was spent (inf: the same without noise and clipping)"
    )
    flag("--epsilon", type=epsilon, help=budget)
    loss = f"its delta, well below one over the number of private records (default: {DELTA})"
    flag("--delta", type=number(float, 1e-12, 0.1), help=loss)
    parts = "what the budget covers, in shares; the rest of the upload has no guarantee (default: all three)"
    flag("--private-parts", nargs="+", choices=PARTS, help=parts)


def privacy_terms(args):
    """{"epsilon", "delta", "parts"} of the flags, None without --epsilon; UserError where they do not fit."""
    if args.epsilon is None:
        for flag in ("delta", "private_parts"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')}: needs --epsilon, the budget")
        return None
    if processes(args.device) is not ALONE:
        raise UserError("--epsilon: not under accelerate launch: one process makes a client's upload")
    parts = [part for part in PARTS if part in (args.private_parts or PARTS)]
    return {"epsilon": args.epsilon, "delta": args.delta or DELTA, "parts": parts}


def private_settings(args):
    """What the flags add to an expert's settings; UserError where others do not go with DP-SGD."""
    settings, terms = {"fixed_a": True} if args.fixed_a else {}, privacy_terms(args)
    if args.fixed_a and args.full_ffn:
        raise UserError("--fixed-a: is about LoRA factors, --full-ffn has none: leave one out")
    if not terms:
        return settings
    if "expert" in terms["parts"] and args.data != "proxies":
        for flag in ("full_ffn", "gradient_checkpointing"):
            if getattr(args, flag):
                why = (
                    "does not go with a private expert, which takes the LoRA factors' gradient of each sample"
                )
                raise UserError(f"--{flag.replace('_', '-')}: {why}: leave it out")
        settings["batch_size"] = args.batch_size  # the default is a share of the noisy count
    return settings | {"privacy": told(terms)}


def relevance_settings(terms):
    """What the terms add to the settings of relevance and proxies."""
    return {"privacy": told(terms)} if terms and "relevance" in terms["parts"] else {}


def is_claim(privacy):
    """Whether what a manifest claims is null, or what Budget.claim writes."""
    if privacy is None:
        return True
    keys = {"epsilon", "delta", "unit", "clipping", "parts"}
    if not isinstance(privacy, dict) or privacy.keys() != keys or privacy["unit"] != UNIT:
        return False
    parts, clipping = privacy["parts"], privacy["clipping"]
    if not isinstance(parts, list) or not parts or parts != [part for part in PARTS if part in parts]:
        return False
    if not isinstance(clipping, dict) or not clipping.keys() <= set(parts):
        return False
    numbers = [privacy["epsilon"], privacy["delta"]]
    for value in clipping.values():
        numbers += value if isinstance(value, list) else [value]
    if not all(type(value) in (int, float) and 0 < value < math.inf for value in numbers):
        return False
    return privacy["delta"] < 1


def told(terms):
    """The terms in words."""
    if not terms:
        return "none"
    limits = f"epsilon {terms['epsilon']:.12g}, delta {terms['delta']:.12g}"
    return f"{limits} for {', '.join(terms['parts'])}"
