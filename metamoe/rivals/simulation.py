"""A simulated federation that exchanges weights in every round, as a row of the results tables.

THE RUN READS EVERY CLIENT'S PRIVATE TRAINING RECORDS IN ONE PROCESS, as the upper bound does. It is there for
comparison alone: in a federation the records stay where they are and the weights travel, up and down in every
round. exchange.json says how many bytes that are.
"""

import time

import numpy as np

import moe
from metamoe import cli
from metamoe.agreement import check_here, read_local
from metamoe.atomic import locked
from metamoe.backbones import run_backbone
from metamoe.backbones.distributed import processes
from metamoe.backbones.training import use_checkpointing
from metamoe.errors import UserError
from metamoe.methods import METHODS
from metamoe.model_settings import resolve, sources
from metamoe.party import label_set
from metamoe.records import read_records
from metamoe.rivals.comigs import PERSONAL, mixture
from metamoe.rivals.rounds import Client, run_rounds
from metamoe.rundir import finished, inside, making, write_json
from metamoe.sending import save_expert

LOUD = "A SIMULATED FEDERATION: THIS PROCESS READS ALL CLIENTS' PRIVATE TRAINING RECORDS"


def simulate(args, run_dir, run):
    """RUN/moe/NAME/ of unify_moe.py's `args`, made where it is not there yet; returns the folder."""
    settings, local = resolve(args, run_dir, run), read_local(run_dir)
    resolved, name = cli.announce(args, "unify_moe", settings), settings["name"]
    if processes(args.device).num_processes > 1:
        raise UserError(f"--method {args.method}: is one process: not under accelerate launch")
    check_here(run_dir, run, run["clients"], local)
    folder = inside(run_dir, "moe") / name
    with locked(folder):
        made_from = sources(run_dir, run, settings)
        if finished(folder, settings, args.force, made_from):
            print(f"unify_moe: {name}: is there already, skipped")
            return folder
        cli.save_settings(run_dir, "unify_moe", name, resolved)
        print(f"unify_moe: {name}: {LOUD}", flush=True)  # ahead of the progress, also in a log
        backbone = run_backbone(run, local, args)
        start = time.perf_counter()
        model, clients, losses = train(args, run_dir, run, backbone, settings)
        with making(folder, settings, run_dir, made_from) as part:
            exchanged = write(part, backbone, model, clients, losses)
            seconds = time.perf_counter() - start
            write_json(part / "timing.json", {"unify_seconds": seconds})
    ends = "loss {:.3f} -> {:.3f}".format(np.mean(losses[0]), np.mean(losses[-1]))
    sent = f"{exchanged['sent'] / 1e6:.1f} MB up and as many down a client"
    print(f"unify_moe: {name}: {len(losses)} rounds, {ends}, {sent}, {seconds:.1f} s")
    return folder


def train(args, run_dir, run, backbone, settings):
    """(the model, the clients with their trained weights, each round's losses)."""
    checkpointing = use_checkpointing(args.gradient_checkpointing, run, backbone)
    lora, clients = (settings["rank"], settings["alpha"], run["seed"]), []
    personal = METHODS[args.method].personal
    model = mixture(backbone, *lora) if personal else backbone.add_lora(*lora)
    for name in run["clients"]:
        home = run_dir / "clients" / name
        records = read_records(home / "private" / "train.jsonl")
        classes = label_set(backbone, run_dir, home)
        clients.append(Client(name, records, classes, backbone, model, settings))
    if checkpointing:
        backbone.checkpoint(model)
    return model, clients, run_rounds(model, clients, settings["rounds"], settings["name"])


def write(folder, backbone, model, clients, losses):
    """Write the model, or each client's own; returns what exchange.json holds, of one client."""
    for client in clients:
        client.take_model()
        if client.routers:
            moe.save(model, folder / PERSONAL / client.name)
    if not hasattr(model, "moe_config"):
        save_expert(model, backbone, folder, full_ffn=False)
    size = len(losses) * sum(tensor.nbytes for tensor in clients[0].shared())
    exchanged = {"rounds": len(losses), "sent": size, "received": size}
    exchanged["personal"] = hasattr(model, "moe_config")
    write_json(folder / "exchange.json", exchanged)
    write_json(folder / "losses.json", sum(losses, []))
    return exchanged
