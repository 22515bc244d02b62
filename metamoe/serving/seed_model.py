"""Loading the seed model of a saved MoE through transformers."""

import json
import os
import sys
from pathlib import Path

import torch

# For every from_pretrained: no code that comes with a model is run, nothing is asked, no pickle is read.
SAFE = {"trust_remote_code": False, "use_safetensors": True}
_torchvision_operators = []  # what fix_torchvision defined; it must stay alive


def load_seed(folder: Path, seed: str, options: dict):
    """The seed model of the MoE in `folder`, in eval mode.

    seed: "seed" of moe_config.json, a hub id or a local folder's name and "/". options: for from_pretrained.
    Raises FileNotFoundError, in one line, where it is not there.
    """
    if not seed:
        raise FileNotFoundError(
            f"{folder} does not say what its seed model was: give it, moe.load(folder, model)"
        )
    source = find(folder, seed.removesuffix("/")) if seed.endswith("/") else seed
    fix_torchvision()
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(source, **SAFE | options).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"the seed model {source!r} of {folder} cannot be loaded ({reason}): "
            "give it, moe.load(folder, model)"
        ) from None


def find(folder: Path, name: str) -> str:
    """The local folder called `name`: the run's own (for RUN/moe/MODEL), in METAMOE_CACHE, or beside
    `folder`."""
    places, local = [], folder.parent.parent / "local.json"
    own = json.loads(local.read_text()).get("seed_model") if local.exists() else None
    if own and Path(own).name == name:
        places.append(Path(own))
    cache = Path(os.environ.get("METAMOE_CACHE") or "~/.cache/metamoe").expanduser()
    places += [cache / name, folder.parent / name]
    for place in places:
        if (place / "config.json").exists():
            return str(place)
    raise FileNotFoundError(
        f"the seed model {name!r} of {folder} is not there, looked for {', '.join(map(str, places))}: "
        "give it, moe.load(folder, model)"
    )


def fix_torchvision():
    """Let transformers, peft and open_clip import a torchvision whose compiled operators do not load.

    With a CPU build of torch, a CUDA build of torchvision fails on import at the two operators it registers
    fakes for; defining their schemas first is enough, since nothing here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # the half-imported package
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_operators.append(library)
