"""What a client sends: the samples behind its routing vectors, the files of the upload, its manifest."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from metamoe.atomic import atomic
from metamoe.backbones.base import unwrap
from metamoe.errors import UserError
from metamoe.privacy.ledger import LEDGER
from metamoe.rundir import read_json, sha256, write_json
from metamoe.uploads import FFN, MANIFEST, PROXIES, ROUTER, terms

PACKED = "packed.json"  # in a client's folder


def private_half(file, records):
    """The private samples behind the routing vectors: half of the `records` of the file, drawn by its hash.

    Nobody without the data knows which half, and with one record more it is another one. So neither the means
    over private data and proxies of two uploads, nor those of two data sets that differ in a record, can be
    solved for the number of samples or for that record (docs/privacy.md). The same data give the same half.
    """
    order = np.random.default_rng(int(sha256(file), 16)).permutation(len(records))
    return [records[i] for i in sorted(order[: (len(records) + 1) // 2])]


def packed(client):
    """{upload: hash of its manifest} of all that the client has made for others."""
    return read_json(client / PACKED) if (client / PACKED).exists() else {}


def check_again(client, upload, made, again):
    """UserError where the client has sent another upload before, and is not to send one `again`.

    made: whether the expert of this one is there already, so that it would be the same.
    """
    before = [name for name in packed(client) if name != upload or not made]
    tells = "what differs between two uploads tells what the data behind them do not share (docs/privacy.md)"
    if before and again:
        print(f"train_expert: {client.name}: {upload} beside {', '.join(before)}: {tells}")
    elif before:
        one = f"has made its upload, {', '.join(before)}"
        raise UserError(f"client {client.name}: {one}: {tells}: --again makes {upload} all the same")


def save_result(model, backbone, sent, folder, full_ffn):
    """Write the expert and what the router gets as they are sent; sent: "vectors" (L, d), perhaps "bias"."""
    save_expert(model, backbone, folder, full_ffn)
    save_file({key: tensor.bfloat16() for key, tensor in sent.items()}, folder / ROUTER)


def save_expert(model, backbone, folder, full_ffn):
    if full_ffn:
        state = {}
        for ffn in backbone.ffn_names:
            for key, value in unwrap(model).get_submodule(ffn).state_dict().items():
                state[f"{ffn}.{key}"] = value.contiguous()
        save_file(state, folder / FFN)
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path = Path(backbone.source).name  # not the client's paths
        config.target_modules = sorted(config.target_modules)  # a set has another order each time
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's model-card template


def pack(expert, proxies, upload, run, about, sends):
    """Write the upload: the files of the expert's folder, the proxies' indices, the manifest.

    sends: it leaves this party, and may be moved away: the client keeps in mind that it has made it.
    """
    own_notes = shutil.ignore_patterns("done.json", "losses.json", LEDGER)
    with atomic(upload) as part:
        shutil.copytree(expert, part, ignore=own_notes, copy_function=shutil.copyfile)
        write_json(part / PROXIES, sorted(proxies))  # not in the order of their scores
        write_manifest(part, run, about)
    if sends:
        client = upload.parents[1]
        write_json(client / PACKED, packed(client) | {upload.name: sha256(upload / MANIFEST)})


def write_manifest(upload, run, about):
    """Close an upload folder. about: its client, data, selection, full_ffn and privacy."""
    files = {}
    for path in sorted(path for path in upload.rglob("*") if path.is_file()):
        files[str(path.relative_to(upload))] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(upload / MANIFEST, {**about, **terms(run), "files": files})
