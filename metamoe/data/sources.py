"""Where a dataset lies: a folder, a file, or a Hugging Face dataset by hub id."""

import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError


def locate(name, hub_id, spellings, sources, file_ok=False):
    """(where, flag): an existing folder's (or file's) absolute path or a hub id, and the flag and value it
    comes from, for error lines."""
    option = "--public " if name == "public" else f"--dataset {name}="
    if sources.get(name):
        return given_place(sources[name], option, hub_id, file_ok)
    if not sources.get("root"):
        return hub_id, f"{option}{hub_id} (the default)"
    root = Path(sources["root"]).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds {spellings[0]}")
    plain = {}
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir() or file_ok and entry.name.endswith(".json"):
            plain[plain_name(entry.name)] = entry.path
    for spelling in spellings:
        path = plain.get(plain_name(spelling))
        if path:
            return os.path.abspath(path), f"--data-root {root}"
    raise UserError(
        f"--data-root {root}: no folder {spellings[0]} there (nor {', '.join(spellings[1:])}): put the "
        f"dataset there, or pass {option}PATH_OR_ID (hub id: {hub_id})"
    )


def given_place(given, option, hub_id, file_ok):
    """As locate, for what a flag gives."""
    flag, path = option + given, Path(given).expanduser()
    if path.is_dir() or file_ok and path.is_file():
        return os.path.abspath(path), flag
    if file_ok and path.suffix in (".jsonl", ".json"):
        what = "file; name a JSON-lines file, a dataset's folder"
        raise UserError(f"{flag}: no such {what} or its hub id (such as {hub_id})")
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", given):
        raise UserError(f"{flag}: no such folder; name the dataset's folder or its hub id (such as {hub_id})")
    return given, flag


def plain_name(name):
    """A folder's name in lower case, letters and digits alone."""
    return re.sub(r"[\W_]", "", name.lower())


def holds_dataset(path):
    """Whether a folder was written by datasets.save_to_disk or holds parquet files as a hub repository
    does."""
    patterns = ("dataset_dict.json", "state.json", "*.parquet", "data/*.parquet", "train/*.parquet")
    return any(next(Path(path).glob(pattern), None) for pattern in patterns)


def open_dataset(where, flag):
    """{split: datasets.Dataset} of {"dataset": hub id or folder, "config": ...}; UserError where it does
    not load."""
    import datasets

    name = where["dataset"]
    try:
        splits = load_splits(name, where.get("config"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = f"does not load ({type(error).__name__}: {error})"
        if os.path.isabs(name):
            raise UserError(f"{flag}: {name} {why}: make this copy of the dataset again") from None
        raise UserError(
            f"{flag}: there is no such folder here, and as a hub id (ID, or ID:CONFIG where it has "
            f"several) it {why}: log in where the hub asks for it, or name a local copy (--dataset "
            "NAME=FOLDER, --public FOLDER, or --data-root FOLDER for all)"
        ) from None
    if not isinstance(splits, dict):
        return {"train": splits}
    if "train" not in splits:
        raise UserError(
            f"{flag}: a split called train is needed, there is {', '.join(splits)}: name another copy of "
            "the dataset"
        )
    return splits


def load_splits(name, config):
    """What `datasets` makes of a folder or of a hub id."""
    import datasets

    saved = ("dataset_dict.json", "state.json")
    if os.path.isabs(name) and any(os.path.exists(os.path.join(name, file)) for file in saved):
        return datasets.load_from_disk(name)
    try:
        return datasets.load_dataset(name, config)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(
            name, config, revision="refs/convert/parquet"
        )  # the hub's own conversion


def dataset_at(where):
    """The first fields of a record's `image` for a hub id (ID:CONFIG in two) or a folder."""
    name, _, config = (where, "", "") if os.path.isabs(where) else where.partition(":")
    return {"dataset": name, "config": config} if config else {"dataset": name}


def read_rows(dataset, split, flag):
    """(image column, class names, labels of all rows (n,) int64) of a split, without reading an image.

    Of several image columns `image` counts, of several label columns `label`, else the one with the most
    classes.
    """
    import datasets

    features = dataset.features
    images = [c for c in features if isinstance(features[c], datasets.Image)]
    labels = [c for c in features if isinstance(features[c], datasets.ClassLabel)]
    if not images or not labels:
        missing = "ClassLabel" if images else "Image"
        raise UserError(
            f"{flag}: its split {split} has no {missing} column, only {', '.join(features)}: name a dataset "
            "for image classification"
        )
    image = min(images, key=lambda c: c != "image")
    label = min(labels, key=lambda c: (c != "label", -features[c].num_classes))
    values = dataset.select_columns([label]).with_format("arrow")[:][label].to_numpy()
    if len(values) and not values.min() >= 0:  # -1, or NaN for an empty cell
        raise UserError(f"{flag}: its split {split} has images without a label: name a copy that has them")
    return image, features[label].names, values.astype(np.int64)
