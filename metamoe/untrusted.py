"""Files from strangers, read once and believed in nothing: regular files within limits, strict JSON, finite
tensors of the expected names and shapes."""

import json
import os
import stat

from safetensors import SafetensorError
from safetensors.torch import load

LARGEST = 65504.0  # float16's: no weight of a model that works is larger
FLOATS = ("torch.float32", "torch.bfloat16", "torch.float16")


class UploadError(Exception):
    """What is wrong with a file that somebody has sent; the reader adds whose and where."""


def read_folder(folder, most, choices):
    """{name: bytes} of a folder that holds the files of one of the `choices` and nothing else.

    most: {name: the most bytes that it may have}; names may be of one folder deeper. Links, pipes and devices
    are refused. Each file is opened once, through no link: what is checked is what was read.
    """
    root = open_folder(os.fspath(folder))
    try:
        names = list_files(root, {name.split("/")[0] for name in most if "/" in name})
        fitting = [choice for choice in choices if set(choice) <= set(names)]
        nearest = max(choices, key=lambda choice: len(set(choice) & set(names)))
        for name in sorted(set(names) ^ set(fitting[0] if fitting else nearest)):
            what = "does not belong in it" if name in names else "is missing"
            raise UploadError(f"{name[:80]!r} {what}")
        return {name: read_file(root, name, most[name]) for name in sorted(names)}
    finally:
        os.close(root)


def list_files(root, folders):
    """The names in an open folder, those in its `folders` as FOLDER/NAME."""
    names = []
    for name in os.listdir(root):
        if name not in folders:
            names.append(name)
            continue
        inner = open_folder(name, root)
        try:
            names += [f"{name}/{file}" for file in os.listdir(inner)]
        finally:
            os.close(inner)
    return names


def open_folder(name, parent=None):
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except (OSError, ValueError) as error:
        raise UploadError(f"{name!r} is no folder of files ({error})") from None


def read_file(root, name, most):
    """The bytes of a regular file in an open folder, or in a folder of it."""
    *folders, file = name.split("/")
    parent = open_folder(folders[0], root) if folders else os.dup(root)
    try:
        # without O_NONBLOCK opening a pipe would wait for its writer
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    except OSError as error:
        raise UploadError(f"{name} cannot be read ({error.strerror})") from None
    finally:
        os.close(parent)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise UploadError(f"{name} is no regular file")
    with open(opened, "rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise UploadError(f"{name} is larger than the {most:,} bytes that it can have here")
    return data


def read_file_at(path, most):
    """The bytes of a regular file at a path, at most so many."""
    folder = open_folder(os.path.dirname(os.path.abspath(path)))
    try:
        return read_file(folder, os.path.basename(path), most)
    finally:
        os.close(folder)


def parse_json(data, name):
    """JSON without NaN and without keys that come twice; UploadError for anything else."""

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON")

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UploadError(f"{name} is damaged ({str(error)[:80]})") from None


def parse_tensors(data, name):
    """{key: tensor} of a safetensors file's bytes."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UploadError(f"{name} is damaged ({str(error)[:80]})") from None


def check_tensors(tensors, shapes, name):
    """UploadError unless these are the tensors, of these shapes, floating and finite."""
    for key in sorted(tensors.keys() ^ shapes.keys()):
        what = "does not belong in it" if key in tensors else "is missing"
        raise UploadError(f"{name}: {key[:120]} {what}")
    for key, tensor in tensors.items():
        if list(tensor.shape) != list(shapes[key]):
            raise UploadError(f"{name}: {key} has shape {list(tensor.shape)}, not {list(shapes[key])}")
        if str(tensor.dtype) not in FLOATS:
            raise UploadError(f"{name}: {key} is {tensor.dtype}, not float32, bfloat16 or float16")
        if not (tensor.abs() <= LARGEST).all():  # NaN is not <= either
            raise UploadError(f"{name}: {key} holds NaN, infinity or a number above {LARGEST:.0f}")
