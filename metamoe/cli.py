"""What the stages' command lines share: their flags, and their settings (the preset, overridden by flags)."""

import argparse
import json
import sys
import textwrap

from metamoe import flag_values
from metamoe.backbones.base import check_device, dtype_name, machine
from metamoe.backbones.distributed import processes
from metamoe.errors import UserError
from metamoe.flag_values import not_negative, number, one_line, positive_float, positive_int
from metamoe.rundir import inside, is_name, write_json

DATA = ("aligned", "private", "proxies", "anchored")
WITHOUT_PROXIES = ("private", "anchored")  # of these the ones whose expert sees none


class Parser(flag_values.Parser):
    """Its errors are one line, like all others."""

    def error(self, message):
        raise UserError(one_line(message))


def stage_parser(doc, **run_dir):
    """A parser with the stage's docstring above its flags, and --run-dir."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, **{"help": "folder of the run", **run_dir})
    return parser


def add_machine_flags(parser):
    """Where and how a stage computes, and --print-config."""
    flag = parser.add_argument
    workers = "processes that decode images (default: one a core with CUDA, else none)"
    flag("--workers", type=number(int, 0, 1000), help=workers)
    flag("--device", type=device_name, default="auto", help="auto (CUDA if there is one), cpu or cuda")
    dtypes = ["auto", "float32", "bfloat16"]
    flag("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 where the hardware computes in it")
    flag("--print-config", action="store_true", help="print all settings as JSON and end; nothing is written")


def add_upload_flags(parser, data, selection):
    """Which of a client's uploads; data, selection: the defaults (None: the method's)."""
    default = "(default: %(default)s)" if data else "(default: the method's)"
    flag = parser.add_argument
    experts = "experts trained on private data and proxies, on private data, on proxies, or on private data "
    experts += f"beside the frozen seed model {default}"
    flag("--data", choices=DATA, default=data, help=experts)
    rule = f"rule that chose the proxies, any of select_proxies.py's {default}"
    flag("--selection", type=folder_name, default=selection, metavar="RULE", help=rule)
    flag("--full-ffn", action="store_true", help="experts are the FFN weights themselves, not LoRA factors")


def add_training_flags(parser):
    """The optimiser's settings; the defaults are the backbone's preset."""
    flag = parser.add_argument
    epochs = "passes over the training data (default: the preset's, like all below)"
    flag("--epochs", type=positive_int, help=epochs)
    flag("--lr", type=positive_float, help="learning rate")
    flag("--batch-size", type=positive_int, help="samples a step")
    flag("--optimizer", choices=["adamw", "sgd"], help="sgd: with Nesterov momentum 0.9")
    flag("--weight-decay", type=not_negative, help="of the optimiser, never of lambda")
    recompute = "language models: recompute activations in the backward instead of keeping them"
    flag("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help=recompute)


def device_name(text):
    """A flag's value that names a device which is there."""
    check_device(text)
    return text


def folder_name(text):
    """A flag's value that names a folder."""
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters, digits, '-', '_' and '.'")
    return text


def from_preset(args, preset, keys):
    """{flag: its value, else the preset's}; keys: {flag: key of the preset}."""
    settings = {}
    for flag, key in keys.items():
        value = getattr(args, flag)
        settings[flag] = preset[key] if value is None else value
    return settings


def announce(args, stage, settings):
    """Print and return the settings with device and dtype; with --print-config print them as JSON and end."""
    device, dtype = machine(args)
    settings = settings | {"device": str(device), "dtype": dtype_name(dtype)}
    if args.print_config:
        print(json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False))
        sys.exit()
    words = []
    for key, value in settings.items():
        text = " ".join(map(str, value)) if isinstance(value, list | tuple | dict) else str(value)
        if text and value is not None:
            words.append(f"{key} {text}")
    print(textwrap.fill(f"{stage}: {', '.join(words)}", 110, subsequent_indent="    "), flush=True)
    return settings


def save_settings(run_dir, stage, what, settings):
    """Write RUN/settings/STAGE/WHAT/settings.json, before the work begins."""
    if processes().is_main_process:
        write_json(inside(run_dir, "settings", stage, what) / "settings.json", settings)
