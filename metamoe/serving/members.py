"""An expert that leaves a saved model for good; moe.disable_expert takes it out of a loaded one."""


def remove_expert(config, tensors, name):
    """(configuration, tensors) of what `moe.read` returns, without the expert, its weights and vectors.

    The outputs are those of `moe.disable_expert`. ValueError for an unknown expert, or the last one.
    """
    names = config["names"]
    if name not in names:
        raise ValueError(f"no expert is called {name!r}; there are {', '.join(names)}")
    keep = [p for p, other in enumerate(names) if other != name]
    if not keep:
        raise ValueError(f"{name!r} is the last expert: a model without one has no FFN")
    config = config | {
        "names": [names[p] for p in keep],
        "top_k": min(config["top_k"], len(keep)),
        "scaling": [own and [own[p] for p in keep] for own in config["scaling"]],
        "disabled": [other for other in config["disabled"] if other != name],
    }
    return config, {key: t if key.endswith(".router.lam") else t[keep] for key, t in tensors.items()}
