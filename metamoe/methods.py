"""METHODS: every row of the results tables that the server makes, one entry each. All else follows from it.

`unify_moe.py --method NAME` makes the row, run_all.sh makes all of them, evaluate.py takes titles and the
ablation tables from here. The paper's numbers are in report/paper_results.json, under the same names.
"""

import textwrap
from dataclasses import dataclass, field

# The paper's ablation tables, and two of our own.
SELECTION = "Proxy selection (Table 5)"
POOL = "What the DPP chooses from"
ROUTER = "Context-aware router (Tables 6, 7)"
EXPERTS = "Proxy-aligned experts (Tables 8, 9, 13)"
FINAL = "Final training (Table 14)"
START = "Start of the routing vectors"
WEIGHTS = "Weights of the chosen experts"


@dataclass(frozen=True)
class Method:
    """One row of the results tables. The fields from `data` to `balancing_loss` are flags of unify_moe.py.

    title: its name in the main table. Without one it is an ablation, made by `run_all.sh --ablations` alone.
    about: one line for unify_moe.py's --help.
    merge: how the server combines the uploads: "moe", or a module of metamoe/rivals/ with a function
        merge(uploads, folder). "simulation" takes no uploads: metamoe/rivals/simulation.py.
    rounds: of a simulated federation that exchanges weights in every round; the run then reads all clients'
        private training records. personal: it ends with a model for each client, not with one.
    like: the method whose final learning rate (presets.py) it takes where there is none under its own name.
    sections: {ablation table: its label there}.
    """

    title: str = ""
    about: str = ""
    merge: str = "moe"
    # experts trained on private data and proxies; "private" or "proxies": on these alone; "anchored": on
    # private data beside the seed model
    data: str = "aligned"
    selection: str = "dpp"  # rule that chose the proxies (select_proxies.RULES)
    context: str = "on"  # router with the sequence's mean (Eq. 6); "off": on the token alone
    # routing vectors start at the clients' means; "unit": of one length; "lda": discriminants; "arrow": the
    # experts' singular vectors; or "random"
    init: str = "uploaded"
    train: str = "all"  # final training of router and experts; "router", or "none"
    # that it trains on; "public": as many random ones; "proxies+public"; "private": the clients' data
    samples: str = "proxies"
    weighting: str = "stopgrad"  # of the chosen experts (moe.WEIGHTINGS)
    top_k: int = 1  # at most: where there are fewer experts, as many
    offset: bool = False
    seed_expert: bool = False
    routing_loss: float = (
        0.0  # weight of the router's loss against the proxies' clients, beside the task loss
    )
    balancing_loss: float = 0.0  # weight of BTX's loss, for as many tokens to every expert
    rounds: int = 0
    personal: bool = False
    like: str = "metamoe"
    sections: dict = field(default_factory=dict)
    extra: bool = False  # a row that `run_all.sh --rivals` makes, the default run not


def rival(title, about, **switches):
    """A method whose experts are trained on private data alone."""
    return Method(title, about, data="private", selection="similarity", **switches)


def flexolmo(label, section, **changed):
    """An ablation of FlexOlmo's row."""
    switches = {"data": "private", "selection": "similarity"} | changed
    return Method(context="off", train="router", like="flexolmo", sections={section: label}, **switches)


def anchored(title, about, **switches):
    """FlexOlmo with coordinated experts, biases and the public model, as in arXiv 2507.07024."""
    switches |= {"data": "anchored", "selection": "similarity", "samples": "proxies+public"}
    switches |= {"context": "off", "weighting": "renormalized", "top_k": 4, "seed_expert": True}
    return Method(title, about, like="flexolmo", extra=True, **switches)


def metamoe(label, section, **changed):
    """An ablation of MetaMoE's row."""
    return Method(sections={section: label}, **changed)


METHODS = {
    "unrestricted": rival(
        "UnrestrictedMoE",
        "the upper bound: as metamoe from private-only experts, final training on ALL CLIENTS' PRIVATE DATA",
        samples="private",
    ),
    "btm": rival("BTM", "no model: evaluate.py averages the private-only experts' predictions", merge="btm"),
    "soup": rival(
        "ModelSoup", "one expert: the mean of the private-only experts' updates B_p A_p", merge="soup"
    ),
    "btx": rival(
        "BTX",
        "private-only experts, random token-level router, both trained on random public samples",
        context="off",
        init="random",
        samples="public",
    ),
    "btx-paper": rival(
        "BTX, top-2, balanced",
        "as btx, but as its own paper has it: two experts a token, the seed model one of them, a balancing "
        "loss",
        context="off",
        init="random",
        samples="public",
        top_k=2,
        weighting="renormalized",
        seed_expert=True,
        balancing_loss=0.01,
        like="btx",
        extra=True,
    ),
    "moa": rival(
        "MoA",
        "private-only experts, random router on the sequence's mean, the router alone trained on proxies, "
        "with a loss that tells it whose proxy a sample is",
        init="random",
        train="router",
        routing_loss=1.0,
        like="flexolmo",
        extra=True,
    ),
    "fedavg": rival(
        "FedAvg",
        "one expert that the clients train and average in 20 rounds: A SIMULATION, THE RUN READS ALL "
        "CLIENTS' PRIVATE TRAINING RECORDS",
        merge="simulation",
        rounds=20,
        extra=True,
    ),
    "comigs": rival(
        "CoMiGS (personalised)",
        "a model for each client: a generalist averaged in 20 rounds, a specialist and a token router of the "
        "client's own: A SIMULATION, THE RUN READS ALL CLIENTS' PRIVATE TRAINING RECORDS",
        merge="simulation",
        rounds=20,
        personal=True,
        extra=True,
    ),
    "flexolmo-random": flexolmo("FlexOlmo, random", SELECTION, selection="random"),
    "flexolmo": rival(
        "FlexOlmo",
        "private-only experts, token-level router from the uploaded vectors, the router alone trained on "
        "proxies chosen by relevance",
        context="off",
        train="router",
        sections={SELECTION: "FlexOlmo, similarity", EXPERTS: "FlexOlmo's router, private data alone"},
    ),
    "flexolmo-lda": rival(
        "FlexOlmo, LDA start",
        "as flexolmo, routing vectors and a bias start at linear discriminants, with the covariance of D_0",
        context="off",
        train="router",
        init="lda",
        like="flexolmo",
        extra=True,
    ),
    "flexolmo-anchored": anchored(
        "FlexOlmo, anchored",
        "FlexOlmo as its own paper has it: private-only experts trained beside the seed model, which is one "
        "of up to four experts a token; router trained on proxies and as many random public samples",
        train="router",
    ),
    "flexolmo-anchored-untrained": anchored(
        "FlexOlmo, anchored, no router training",
        "as flexolmo-anchored, with the router as it was uploaded",
        train="none",
    ),
    "arrow": rival(
        "Arrow",
        "private-only experts, routed without training by the top singular vectors of their LoRA factors, up "
        "to three a token",
        context="off",
        train="none",
        init="arrow",
        weighting="renormalized",
        top_k=3,
        like="flexolmo",
        extra=True,
    ),
    "flexolmo-dpp": flexolmo("FlexOlmo, DPP", SELECTION, selection="dpp"),
    "flexolmo-aligned": flexolmo(
        "FlexOlmo's router, private data and proxies", EXPERTS, data="aligned", selection="dpp"
    ),
    "metamoe-random": metamoe("MetaMoE, random", SELECTION, selection="random"),
    "metamoe-similarity": metamoe("MetaMoE, similarity", SELECTION, selection="similarity"),
    "metamoe-no-context": metamoe("token alone", ROUTER, context="off"),
    "metamoe-private-experts": metamoe("private data alone", EXPERTS, data="private"),
    "metamoe-proxy-experts": metamoe("proxies alone", EXPERTS, data="proxies"),
    "metamoe-untrained": metamoe("none", FINAL, train="none"),
    "metamoe-random-init": metamoe("random", START, init="random"),
    "metamoe-literal": metamoe("pi (Eq. 5)", WEIGHTS, weighting="literal"),
    "metamoe-renormalized": metamoe("pi / sum", WEIGHTS, weighting="renormalized"),
    "metamoe": Method(
        "MetaMoE",
        "proxy-aligned experts, context-aware router from the uploaded vectors, both trained on all proxies",
        sections={
            SELECTION: "MetaMoE, DPP",
            POOL: "the most relevant candidates",
            ROUTER: "with context",
            EXPERTS: "private data and proxies",
            FINAL: "router and experts",
            START: "uploaded means",
            WEIGHTS: "pi / stop_gradient(sum)",
        },
    ),
    "metamoe-unit": Method(
        "MetaMoE, unit vectors",
        "beyond the paper: as metamoe, each layer's routing vectors start at one length, their mean length",
        init="unit",
        sections={START: "uploaded means of one length"},
    ),
    "metamoe-lda": Method(
        "MetaMoE, LDA start",
        "beyond the paper: as metamoe, routing vectors and a bias start at linear discriminants, with the "
        "covariance of D_0",
        init="lda",
        extra=True,
    ),
    "metamoe-dpp-all": metamoe("the whole public set", POOL, selection="dpp-all"),
}


def main_rows(rivals=True):
    """The methods of the main table, in its order; without `rivals` those of the default run."""
    return [name for name, method in METHODS.items() if method.title and (rivals or not method.extra)]


def title(name):
    """A row's name in the tables; a model that is no entry here is called by its folder."""
    base, compressed, count = name.rpartition("-compressed-")
    if compressed and count.isdigit():  # unify_moe.py --compress
        return f"{title(base)}, compressed to {count}"
    return METHODS[name].title or name if name in METHODS else name


def described():
    """A line or two about each method, for unify_moe.py's --help."""
    lines = []
    for name, method in METHODS.items():
        if method.about:
            start = f"    {name:14}"
            lines.append(textwrap.fill(method.about, 106, initial_indent=start, subsequent_indent=" " * 18))
    return "\n".join(lines) + "\n"


def ablations():
    """{ablation table: {row: label}}, the tables in the order of MetaMoE's entry, which is in all of them."""
    found = {section: {} for section in METHODS["metamoe"].sections}
    for name, method in METHODS.items():
        for section, label in method.sections.items():
            found.setdefault(section, {})[name] = label
    return found


def plan(names, with_ablations=False):
    """The stages' commands that make these rows, in order: selections, experts and uploads, models."""
    if with_ablations:
        names = names + [row for row in METHODS if not METHODS[row].title and METHODS[row].like in names]
    uploads = list(dict.fromkeys((METHODS[name].data, METHODS[name].selection) for name in names))
    rules = dict.fromkeys(rule for _, rule in uploads)
    lines = [f"select_proxies.py --selection {rule}" for rule in rules]
    lines += [f"train_expert.py --data {data} --selection {rule}" for data, rule in uploads]
    return lines + [f"unify_moe.py --method {name}" for name in names]
