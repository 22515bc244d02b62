"""Who takes part in a run: all parties at once, one of them, or the coordinator, who makes the agreement."""

from pathlib import Path

from metamoe.agreement import agreement_hash, check_here
from metamoe.check_run import check_client_name, check_clients, check_run, is_name
from metamoe.data.registry import FAMILIES
from metamoe.errors import UserError
from metamoe.party import local_places, own_client
from metamoe.presets import PRESETS
from metamoe.run_settings import (
    PART_SIZES,
    check_names,
    check_numbers,
    given_settings,
    known_clients,
    with_defaults,
)
from metamoe.rundir import check_client, open_run, read_json, read_run


def start_run(args):
    """(agreement, local, clients to select for): of the flags and the preset, checked against what is there.

    local: as agreement.read_local gives it, and "own": {NAME: {"path", "train", "validation", "test"}} of the
    clients with data of their own, where sizes of 0 are shares of 80/10/10. Nothing is written yet: data and
    seed model may still be missing.
    """
    run_file = Path(args.run_dir) / "run.json"
    found = read_run(args.run_dir) if run_file.exists() else {}
    theirs = read_agreement(args, found) if args.agreement else found
    own, alone, joined = client_flags(args)
    backbone = theirs["backbone"] if theirs else args.backbone or "smollm2-135m"
    check_names(args, backbone)
    settings = given_settings(args, backbone)
    local = local_places(args, backbone, own)
    if joined:
        return join_run(args, settings, local, found, *joined)
    if args.agreement:
        return take_part(args, settings, local, theirs, alone)
    if args.make_agreement:
        return agree(args, settings, local, found, backbone)
    if own:
        settings["clients"] = (args.clients or []) + list(own)
    only_own = all_own(local) if found else bool(own) and not args.clients
    if not found:
        settings = with_defaults(settings, local, backbone, only_own)
        local["clients"] = settings["clients"]
    check_numbers(found or settings, local, only_own)
    run = open_run(args.run_dir, **settings)
    return run, local, check_here(args.run_dir, run, alone or local["clients"], local)


def read_agreement(args, found):
    """The agreement that --agreement names; UserError where the run directory has another one."""
    if not Path(args.agreement).is_file():
        raise UserError(f"--agreement {args.agreement}: no such file; name the coordinator's run.json")
    theirs = read_json(args.agreement)
    check_run(theirs, f"--agreement {args.agreement}")
    names = theirs["clients"]
    if found and (
        agreement_hash(found) != agreement_hash(theirs) or found["clients"] != names[: len(found["clients"])]
    ):
        where = f"--run-dir {args.run_dir} was made under another agreement"
        raise UserError(f"--agreement {args.agreement}: {where}: use another --run-dir")
    return theirs


def take_part(args, settings, local, run, alone):
    """start_run for --agreement: this party's clients are those of --client; the server names none."""
    if args.clients or args.make_agreement:
        raise UserError("--agreement: names the clients: leave out --clients and --make-agreement")
    for name in [*local["own"], *alone]:
        check_client(run, name)
        settings |= dict.fromkeys(PART_SIZES if name in local["own"] else ())  # sizes are the client's own
    check_given(f"--agreement {args.agreement}", run, settings)
    known = known_clients(run["backbone"])
    for name in alone:
        if name not in known and name not in local["clients"]:
            raise UserError(f"--client {name}: give its data: --client {name}=PATH")
    if (
        run["public_size"] == 0
        and not local["sources"]
        and not FAMILIES[PRESETS[run["backbone"]]["data"]].files
    ):
        raise UserError(
            f"--public: name your copy of the agreed public set of {run['public']['records']} records"
        )
    local["clients"] = list(dict.fromkeys([*local["clients"], *alone, *local["own"]]))
    check_numbers(run, local, True)
    return run, local, local["clients"]


def agree(args, settings, local, found, backbone):
    """start_run for --make-agreement: nobody's data are here; of a run that is there more clients."""
    names = args.make_agreement
    if args.client or args.clients:
        raise UserError("--make-agreement: names the clients, whose data stay with them: leave out --client")
    for name in names:
        check_client_name(name, "--make-agreement")
    if found:
        check_given(f"--run-dir {args.run_dir}", found, settings)
        if names[: len(found["clients"])] != found["clients"]:
            before = " ".join(found["clients"])
            raise UserError(f"--make-agreement {' '.join(names)}: name first those that are in it: {before}")
        run = {**found, "clients": names}
    else:
        known = known_clients(backbone)
        settings["clients"] = names
        run = with_defaults(settings, local, backbone, not set(names) & set(known))
        open_run(args.run_dir, **run)
    check_numbers(run, local, True)
    return run, local, []


def check_given(where, run, settings):
    """UserError where a flag gives another setting than the agreement has."""
    for key, value in settings.items():
        if value is not None and value != run.get(key):
            flag = f"--{key.replace('_', '-')} {value}"
            raise UserError(f"{flag}: the agreement ({where}) has {run.get(key)}: leave it out")


def client_flags(args):
    """({NAME: PATH} and [NAME] of the --client, (NAME, PATH or "") of --join or None)."""
    own, alone, joined = {}, [], None
    for value in args.client or []:
        name, path = name_and_path("--client", value, "each NAME once,", own)
        if path:
            own[name] = path
        else:
            alone.append(name)
    if args.join:
        joined = name_and_path("--join", args.join, "NAME", own)
    return own, alone, joined


def name_and_path(flag, value, give, taken):
    """NAME and PATH ("" where there is none) of a flag's value; UserError where they cannot be."""
    name, equals, path = value.partition("=")
    if not is_name(name) or equals and (not path or name in taken):
        letters = "NAME of letters, digits, '-', '_' and '.'"
        raise UserError(f"{flag} {value}: give {give} or NAME=PATH, {letters}")
    check_client_name(name, flag)
    return name, path


def all_own(local):
    """Whether all clients here bring data of their own."""
    return all(name in local["own"] for name in local["clients"])


def join_run(args, settings, local, found, name, path):
    """start_run for --join: the run with one client more, whose sizes the flags give."""
    before = local["own"].get(name, {})
    check_join(args, found, before, name, path)
    run = {**found, "clients": list(dict.fromkeys([*found["clients"], name]))}
    check_clients(run["clients"], "--join")
    entry = own_client(args, path or before.get("path"), before)
    if before and entry != before:
        raise UserError(f"--join {name}: joined with other sizes before ({before}): take another name")
    if path or before:
        local["own"][name] = entry
        settings |= dict.fromkeys(PART_SIZES)
    elif name not in found["clients"] and all_own(local):  # the first whose sizes are the run's
        run |= {key: settings[key] or PRESETS[found["backbone"]][key] for key in PART_SIZES}
        settings |= dict.fromkeys(PART_SIZES)
    open_run(args.run_dir, **settings | {"clients": None})
    local["clients"] = list(dict.fromkeys([*local["clients"], name]))
    return run, local, [name]


def check_join(args, found, before, name, path):
    """UserError where this client cannot join the run."""
    known = known_clients(found["backbone"]) if found else []
    there, why = name in found.get("clients", []), None
    if not found:
        why = "holds no run yet (no run.json): name its clients with --client or --clients"
        why = f"--run-dir {args.run_dir} {why}"
    elif args.client or args.clients or args.public:
        why = "one client joins a run as it is: leave out --client, --clients and --public"
    elif not path and name not in known and not there:
        why = f"{found['backbone']} has {', '.join(known)}; data of your own: --join {name}=PATH"
    elif there and path and path != before.get("path") or before and path not in ("", before["path"]):
        where = Path(args.run_dir) / "run.json"
        why = f"a client of that name is in {where} already, with other data: take another name"
    if why:
        raise UserError(f"--join {name}: {why}")
