"""The methods of the results tables: what makes each, its title, and the ablations that compare them."""

# What makes a method: which uploads, the router's context and start, what the final training trains and on
# what.
METHODS = {
    "metamoe": {
        "data": "aligned",
        "selection": "dpp",
        "context": "on",
        "init": "uploaded",
        "train": "all",
        "samples": "proxies",
    },
    "flexolmo": {
        "data": "private",
        "selection": "similarity",
        "context": "off",
        "init": "uploaded",
        "train": "router",
        "samples": "proxies",
    },
    "btx": {
        "data": "private",
        "selection": "similarity",
        "context": "off",
        "init": "random",
        "train": "all",
        "samples": "public",
    },
    "unrestricted": {
        "data": "private",
        "selection": "similarity",
        "context": "on",
        "init": "uploaded",
        "train": "all",
        "samples": "private",
    },
    "soup": {"data": "private", "selection": "similarity"},
    "btm": {"data": "private", "selection": "similarity"},
}


TITLES = {
    "unrestricted": "UnrestrictedMoE",
    "zeroshot": "ZeroShot",
    "btm": "BTM",
    "soup": "ModelSoup",
    "btx": "BTX",
    "flexolmo": "FlexOlmo",
    "metamoe": "MetaMoE",
}


# The paper's ablations: title -> {model: label}, printed where a model beside the main ones is there.
ABLATIONS = {
    "Proxy selection (Table 5)": {
        "flexolmo-random": "FlexOlmo, random",
        "flexolmo": "FlexOlmo, similarity",
        "flexolmo-dpp": "FlexOlmo, DPP",
        "metamoe-random": "MetaMoE, random",
        "metamoe-similarity": "MetaMoE, similarity",
        "metamoe": "MetaMoE, DPP",
    },
    "What the DPP chooses from": {
        "metamoe": "the most relevant candidates",
        "metamoe-dpp-all": "the whole public set",
    },
    "Context-aware router (Tables 6, 7)": {"metamoe-no-context": "token alone", "metamoe": "with context"},
    "Proxy-aligned experts (Tables 8, 9, 13)": {
        "metamoe-private-experts": "private data alone",
        "metamoe-proxy-experts": "proxies alone",
        "metamoe": "private data and proxies",
        "flexolmo": "FlexOlmo's router, private data alone",
        "flexolmo-aligned": "FlexOlmo's router, private data and proxies",
    },
    "Final training (Table 14)": {"metamoe-untrained": "none", "metamoe": "router and experts"},
    "Start of the routing vectors": {"metamoe-random-init": "random", "metamoe": "uploaded means"},
    "Weights of the chosen experts": {
        "metamoe-literal": "pi (Eq. 5)",
        "metamoe-renormalized": "pi / sum",
        "metamoe": "pi / stop_gradient(sum)",
    },
}
