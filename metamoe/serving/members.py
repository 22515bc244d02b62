"""Clients that leave or join a unified model: unify_moe.py's --without, --extend and --compress."""

import torch

import moe
from metamoe.atomic import locked
from metamoe.errors import UserError
from metamoe.flag_values import positive_int
from metamoe.routing import of_one_length
from metamoe.rundir import check_name, check_whole, finished, making, read_json, settings_of, sha256
from metamoe.start import set_bias, start

MERGED = "+"  # between the clients in the name of an expert that --compress has merged; no name has it


def add_member_flags(parser):
    """What makes a model of one that is there."""
    flag = parser.add_argument
    without = "leave the expert NAME out of the model (--name, else the method's): a model of its own"
    flag("--without", metavar="NAME", help=without)
    joining = "add the clients that the model RUN/moe/MODEL lacks and train again, to a model --name"
    flag("--extend", metavar="MODEL", help=joining)
    fewer = "merge like experts of the model (--name, else the method's) to K in all: a model of its own"
    flag("--compress", type=positive_int, metavar="K", help=fewer)


def check_member_flags(args):
    """UserError where two of them are given."""
    given = [flag for flag in ("without", "extend", "compress") if getattr(args, flag)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: one after the other")


def parts_of(names):
    """The clients of experts with these names."""
    return MERGED.join(names).split(MERGED)


def expert_of(client, names):
    """The name among these of the expert that is the client's, alone or merged; None where there is none."""
    return next((name for name in names if client in parts_of([name])), None)


def source_model(args, run_dir, flag):
    """(folder, settings) of the model that --name or --method names; UserError unless it is a whole MoE."""
    base = check_name("--name", args.name or args.method)
    source = run_dir / "moe" / base
    if not (source / "moe_config.json").exists():
        where = run_dir / "moe"
        raise UserError(
            f"{flag}: there is no MoE {base} in {where}: make it first, or name another with --name"
        )
    made = settings_of(source)
    if made.get("method") != args.method:
        raise UserError(f"--method {args.method}: {base} was made with {made.get('method')}")
    check_whole(source, "make it again")
    return source, made


def leave_out(args, run_dir):
    """Write RUN/moe/MODEL-without-NAME, the model without that client's expert; returns its folder."""
    check_name("--without", args.without)
    flag = f"--without {args.without}"
    source, made = source_model(args, run_dir, flag)
    folder = source.with_name(f"{source.name}-without-{args.without}")
    settings = made | {"name": folder.name, "from": sha256(source / "moe.safetensors")}
    settings["without"] = made.get("without", []) + [args.without]
    with locked(folder):
        if finished(folder, settings, args.force):
            print(f"unify_moe: {folder.name}: is there already, skipped")
            return folder
        try:
            config, tensors = remove_expert(*moe.read(source), args.without)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None
        with making(folder, settings) as part:
            moe.write(part, config, tensors)
    names = config["names"]
    print(f"unify_moe: {folder.name}: {len(names)} experts ({', '.join(names)}), no training")
    return folder


def check_extension(args, run_dir, run, settings):
    """What `done.json` records of the model that --extend names; UserError where it does not go with these
    settings."""
    folder, flag = run_dir / "moe" / check_name("--extend", args.extend), f"--extend {args.extend}"
    if not (folder / "moe_config.json").exists():
        raise UserError(f"{flag}: there is no such MoE in {run_dir / 'moe'}")
    if args.name in (None, args.extend):
        raise UserError(f"{flag}: give the extended model a --name of its own")
    check_whole(folder, "make it again")
    made, config = settings_of(folder), read_json(folder / "moe_config.json")
    merged = [name for name in config["names"] if MERGED in name]
    if merged:
        raise UserError(f"{flag}: {merged[0]} is one expert: extend the model before it, compress the result")
    for key in ("method", "init", "top_k", "weighting", "offset", "context", "seed_expert"):
        if made.get(key) != settings[key]:
            option = f"--{key.replace('_', '-')} {settings[key]}"
            raise UserError(
                f"{option}: {args.extend} was made with {made.get(key)}, and is extended with the same"
            )
    if made.get("variant") != settings["variant"]:
        uploads = f"made from the uploads {made.get('variant')}, now {settings['variant']}"
        raise UserError(f"{flag}: {uploads}: pass the same --data and --selection")
    if not set(run["clients"]) - set(config["names"]):
        raise UserError(f"{flag}: has an expert of every client of this run already")
    return {"model": args.extend, "moe": sha256(folder / "moe.safetensors")}


def extend(backbone, run_dir, run, name, uploads, settings):
    """The model RUN/moe/NAME with the experts of the clients that it lacks, before its final training.

    uploads: {client: its Upload} of all clients of the run. Where settings["init"] is "unit", the new routing
    vectors get the mean length of those that are there.
    """
    config, tensors = moe.read(run_dir / "moe" / name)
    new = {client: upload for client, upload in uploads.items() if client not in config["names"]}
    vectors, bias = [upload.vectors for upload in new.values()], None
    if settings["init"] == "unit":
        there = [tensors[f"{ffn}.router.vectors"].norm(dim=1).mean() for ffn in config["ffn_names"]]
        vectors = of_one_length(vectors, torch.stack(there))
    elif settings["init"] != "random":
        vectors, bias = start(backbone, run_dir, run, new, settings)
    joining = [(client, new[client].expert, own) for client, own in zip(new, vectors, strict=True)]
    model = moe.assemble(backbone.model, config, tensors, joining)
    set_bias(model, bias)
    return model


def remove_expert(config, tensors, name):
    """(configuration, tensors) of what `moe.read` returns, without the expert, its weights and vectors.

    The outputs are those of `moe.disable_expert`. ValueError for an unknown expert, or the last one.
    """
    names = config["names"]
    if expert_of(name, names) not in (None, name):
        raise ValueError(f"{name!r} is a part of the merged expert {expert_of(name, names)!r}, and stays")
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
