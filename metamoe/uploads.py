"""What a client uploads, and the one reader of it, which takes nothing on trust.

manifest.json        format, client, variant, the agreement's and D_0's hashes, every file's size and hash
proxies.json         m indices into D_0, sorted
router.safetensors   routing vectors (L, d)
adapter/             the expert, a PEFT adapter; or ffn.safetensors, its whole FFNs
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from metamoe.adapters import complete, expert_of, read_adapter
from metamoe.agreement import FORMAT, agreement_hash
from metamoe.atomic import atomic
from metamoe.check_run import is_name
from metamoe.cli import DATA, WITHOUT_PROXIES
from metamoe.errors import UserError
from metamoe.privacy.flags import is_claim, told
from metamoe.rundir import inside, read_json, sha256
from metamoe.untrusted import UploadError, check_tensors, parse_json, parse_tensors, read_folder

MANIFEST, PROXIES, ROUTER, FFN = "manifest.json", "proxies.json", "router.safetensors", "ffn.safetensors"
CONFIG, FACTORS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
FILES = [MANIFEST, PROXIES, ROUTER, CONFIG, FACTORS], [MANIFEST, PROXIES, ROUTER, FFN]
TEXT_BYTES, HEADER_BYTES = 2**18, 2**16  # the most of a JSON file, and of a safetensors file's header


@dataclasses.dataclass
class Upload:
    """An upload that has passed every check."""

    client: str
    variant: str
    digest: str  # SHA-256 of its manifest
    proxies: list  # m indices into D_0
    expert: dict  # as for moe.unify
    vectors: torch.Tensor  # (L, d)
    privacy: dict | None  # what the client claims (docs/privacy.md)
    bias: torch.Tensor | None = None  # (L,), of an anchored expert


def upload_variant(data, selection, full_ffn=False):
    """The folder name of an upload below clients/NAME/upload/: client and server must agree on it."""
    return f"{data}-{selection}" + ("-full" if full_ffn else "")


def expert_variant(data, selection, full_ffn=False):
    """The expert's folder name. One that knows no proxies serves every selection."""
    if data in WITHOUT_PROXIES:
        return f"{data}-full" if full_ffn else data
    return upload_variant(data, selection, full_ffn)


def terms(run):
    """What the manifests of a federation have in common."""
    same = {"public": run["public"]["sha256"], "seed_model": run["seed_model"]}
    return {"format": FORMAT, "agreement": agreement_hash(run), **same}


def receive(run_dir, run, given, variant):
    """Check the folders that clients have sent and copy all of them to RUN/clients/NAME/upload/VARIANT.

    given: NAME=DIR of each. What is written are the bytes that were checked, whatever happens to the folder.
    """
    accepted = {}
    for value in given:
        name, _, source = value.partition("=")
        if not source or name in accepted:
            raise UserError(f"--upload {value}: give NAME=DIR, each client once")
        try:
            content = read_folder(source, limits(run_dir, run), FILES)
            open_upload(run_dir, run, name, content, variant)
        except UploadError as error:
            raise UserError(f"client {name}: upload {source}: {error}") from None
        target = run_dir / "clients" / name / "upload" / variant
        if not (target / MANIFEST).exists():
            accepted[name] = target, content
        elif sha256(target / MANIFEST) != digest_of(content):
            again = f"sent another one before, which is in {target}; remove that to take this one"
            raise UserError(f"client {name}: upload {source}: {again}")
    for name, (target, content) in accepted.items():
        inside(run_dir, "clients", name, "upload")
        with atomic(target) as part:
            for file, data in content.items():
                (part / file).parent.mkdir(parents=True, exist_ok=True)
                (part / file).write_bytes(data)
        print(f"unify_moe: {name}: upload taken, {sum(map(len, content.values())) / 1e6:.1f} MB")


def read_upload(run_dir, run, name, variant):
    """The client's Upload in the run directory; UserError names the client, the file and what is wrong."""
    folder = run_dir / "clients" / name / "upload" / variant
    if not folder.exists():
        here = f"run train_expert.py for that client and variant, or pass --upload {name}=FOLDER"
        raise UserError(f"client {name}: upload {folder} is missing: {here}")
    try:
        return open_upload(run_dir, run, name, read_folder(folder, limits(run_dir, run), FILES), variant)
    except UploadError as error:
        raise UserError(f"client {name}: upload {folder}: {error}: have the client send it again") from None


def read_uploads(run_dir, run, variant):
    """{client: Upload} of all clients; says what each claims of its privacy."""
    uploads = {name: read_upload(run_dir, run, name, variant) for name in run["clients"]}
    for name, upload in uploads.items():
        if upload.privacy:
            print(f"unify_moe: {name}: its upload claims {told(upload.privacy)}")
    return uploads


def limits(run_dir, run):
    """{file: the most bytes that it can have} under the agreement."""
    shapes = [shape for ffn in ffn_shapes(run_dir).values() for shape in ffn.values()]
    header = HEADER_BYTES + 512 * len(shapes)
    factors = sum(4 * run["rank"] * sum(shape) for shape in shapes if len(shape) == 2)
    return {
        MANIFEST: TEXT_BYTES,
        CONFIG: TEXT_BYTES,
        PROXIES: 64 + 32 * run["proxies"],
        ROUTER: header + 4 * math.prod(vectors_shape(run_dir)),
        FACTORS: header + factors,
        FFN: header + sum(4 * math.prod(shape) for shape in shapes),
    }


def ffn_shapes(run_dir):
    """{FFN: {its parameter: shape}} of the seed model, in its order."""
    return dict(read_json(run_dir / "public" / "ffns.json")["ffns"])


def vectors_shape(run_dir):
    """[L, d]: one vector for each FFN, of the width that it reads."""
    found = read_json(run_dir / "public" / "ffns.json")
    return [len(found["ffns"]), found["width"]]


def digest_of(content):
    return hashlib.sha256(content[MANIFEST]).hexdigest()


def open_upload(run_dir, run, name, content, variant=None):
    """The Upload that these bytes are, of this variant; UploadError for the first thing that is wrong."""
    manifest, shapes = parse_json(content[MANIFEST], MANIFEST), ffn_shapes(run_dir)
    found = check_manifest(manifest, run, name, variant)
    check_files(manifest["files"], content)
    proxies = parse_json(content[PROXIES], PROXIES)
    check_proxies(proxies, run)
    router = read_router(content, vectors_shape(run_dir), manifest["data"])
    try:
        expert = read_factors(content, shapes, run) if FACTORS in content else read_ffns(content, shapes)
    except UserError as error:
        raise UploadError(error) from None
    return Upload(name, found, digest_of(content), proxies, expert, privacy=manifest["privacy"], **router)


def check_manifest(manifest, run, name, variant):
    """The variant that it names; UploadError where the upload is not this client's under this agreement."""
    if name not in run["clients"]:
        raise UploadError(f"the agreement has no client {name}, only {', '.join(run['clients'])}")
    expected = {"client": name, **terms(run)}
    about = ["data", "selection", "full_ffn", "privacy"]
    if not isinstance(manifest, dict) or manifest.keys() != {*expected, *about, "files"}:
        raise UploadError(f"{MANIFEST}: has not the keys that this version of the project writes")
    reasons = {"client": "another client's", "public": "made with another public set"}
    reasons |= {"seed_model": "made with another seed model", "format": "of another version of the format"}
    reasons["agreement"] = "made under another agreement (run.json)"
    for key, reason in reasons.items():
        if manifest[key] != expected[key]:
            raise UploadError(f"{MANIFEST}: {key} {str(manifest[key])[:80]}: the upload is {reason}")
    data, selection, full, privacy = (manifest[key] for key in about)
    known = isinstance(data, str) and data in DATA and isinstance(full, bool)
    if not (known and isinstance(selection, str) and is_name(selection)):
        raise UploadError(f"{MANIFEST}: its data, selection and full_ffn name no variant")
    if not is_claim(privacy):
        raise UploadError(f"{MANIFEST}: its privacy is no claim that this version of the project writes")
    found = upload_variant(data, selection, full)
    if variant not in (None, found):
        raise UploadError(f"{MANIFEST}: the upload is {found}, not {variant}")
    return found


def check_files(listed, content):
    """UploadError unless the manifest lists these files with their sizes and hashes."""
    if not isinstance(listed, dict):
        raise UploadError(f"{MANIFEST}: its files are no object")
    for file in sorted(listed.keys() ^ (content.keys() - {MANIFEST})):
        raise UploadError(f"{file[:80]!r} is {'not in the manifest' if file in content else 'missing'}")
    for file, found in listed.items():
        data = content[file]
        if found != {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
            raise UploadError(f"{file} was changed after it was packed (its size or hash differs)")


def check_proxies(proxies, run):
    count, m = run["public"]["records"], run["proxies"]
    if not isinstance(proxies, list) or any(type(index) is not int for index in proxies):
        raise UploadError(f"{PROXIES} is no list of integers")
    outside = [index for index in proxies if not 0 <= index < count]
    if outside:
        raise UploadError(f"{PROXIES} names public sample {outside[0]}, D_0 has {count}")
    if len(proxies) != m or len(set(proxies)) != m:
        raise UploadError(f"{PROXIES} has {len(set(proxies))} different indices, {m} are agreed")


def read_router(content, shape, data):
    """{"vectors": (L, d)}, of an anchored expert also "bias" (L,), at most 0; shape: [L, d]."""
    tensors, shapes = parse_tensors(content[ROUTER], ROUTER), {"vectors": shape}
    if data == "anchored":
        shapes["bias"] = shape[:1]
    check_tensors(tensors, shapes, ROUTER)
    if "bias" in tensors and (tensors["bias"] > 0).any():
        raise UploadError(f"{ROUTER}: bias has a number above 0, where an anchored expert's is at most 0")
    return {key: tensor.float() for key, tensor in tensors.items()}


def read_factors(content, shapes, run):
    """The expert of a PEFT adapter: LoRA factors of FFN linears, of at most the agreed rank."""
    config, tensors = parse_json(content[CONFIG], CONFIG), parse_tensors(content[FACTORS], FACTORS)
    expected = {}
    for ffn, own in shapes.items():
        for key, shape in own.items():
            linear = f"base_model.model.{ffn}.{key.removesuffix('.weight')}"
            A = tensors.get(f"{linear}.lora_A.weight")
            if A is not None and A.dim() == 2:
                if not 1 <= len(A) <= run["rank"]:
                    raise UploadError(f"{FACTORS}: {linear} has rank {len(A)}, {run['rank']} is agreed")
                expected[f"{linear}.lora_A.weight"] = [len(A), shape[1]]
                expected[f"{linear}.lora_B.weight"] = [shape[0], len(A)]
    check_tensors(tensors, expected, FACTORS)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    return complete(expert_of(config, tensors, "adapter"), list(shapes), "adapter")


def read_ffns(content, shapes):
    """The expert of whole FFNs."""
    tensors = parse_tensors(content[FFN], FFN)
    expected = {f"{ffn}.{key}": shape for ffn, own in shapes.items() for key, shape in own.items()}
    check_tensors(tensors, expected, FFN)
    return expert_of_ffns({key: tensor.float() for key, tensor in tensors.items()})


def expert_of_ffns(tensors):
    """{FFN: {"gate_proj.weight": tensor, ...}} of {"FFN.gate_proj.weight": tensor}."""
    expert = {}
    for key, tensor in tensors.items():
        ffn, linear, kind = key.rsplit(".", 2)
        expert.setdefault(ffn, {})[f"{linear}.{kind}"] = tensor
    return expert


def read_expert(folder, ffn_names=None):
    """As Upload.expert, of a folder of one's own, such as the soup's: adapter/ (PEFT's) or ffn.safetensors.

    ffn_names: the seed model's; a LoRA then has an entry for each, and UserError names any other module.
    """
    if not (Path(folder) / "adapter").exists():
        return expert_of_ffns(load_file(Path(folder) / FFN))
    expert = read_adapter(Path(folder) / "adapter")
    return complete(expert, ffn_names, folder) if ffn_names else expert
