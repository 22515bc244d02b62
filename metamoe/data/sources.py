"""Where a dataset lies: a folder, a file, or a Hugging Face dataset by hub id."""

import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError

SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder of datasets.save_to_disk
PARQUET = ("*.parquet", "data/*.parquet", "train/*.parquet")  # as in a repository of the hub


def locate(name, hub_id, spellings, sources, file_ok=False):
    """(where, flag): an existing folder's (or file's) absolute path or a hub id, and the flag it comes from.

    sources: {"root": folder of the data sets' folders, NAME or "public": a folder or hub id (ID or
    ID:CONFIG)}, each may be None or absent; with neither a data set comes from its default hub id.
    spellings: names of its folder in the root, in any case and spelling of `_` and `-`.
    """
    option = "--public " if name == "public" else f"--dataset {name}="
    if sources.get(name):
        return given_place(sources[name], option, hub_id, file_ok)
    if not sources.get("root"):
        return hub_id, f"{option}{hub_id} (the default)"
    root = Path(sources["root"]).expanduser()
    flag = f"--data-root {root}"
    if not root.is_dir():
        raise UserError(f"{flag}: no such folder; name the one that holds {spellings[0]}")
    plain = {}
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir() or file_ok and entry.name.endswith(".json"):
            plain[plain_name(entry.name)] = entry.path
    for spelling in map(plain_name, spellings):
        if spelling in plain:
            return os.path.abspath(plain[spelling]), flag
    missing = f"no folder {spellings[0]} there (nor {', '.join(spellings[1:])})"
    advice = f"put the dataset there, or pass {option}PATH_OR_ID (hub id: {hub_id})"
    raise UserError(f"{flag}: {missing}: {advice}")


def given_place(given, option, hub_id, file_ok):
    """As locate, for what a flag gives."""
    flag, path = option + given, Path(given).expanduser()
    if path.is_dir() or file_ok and path.is_file():
        return os.path.abspath(path), flag
    what = "folder; name the dataset's folder or its hub id"
    if file_ok and path.suffix in (".jsonl", ".json"):
        what = "file; name a JSON-lines file, a dataset's folder or its hub id"
    elif not path.exists() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", given):
        return given, flag
    raise UserError(f"{flag}: no such {what} (such as {hub_id})")


def plain_name(name):
    """A folder's name in lower case, letters and digits alone."""
    return re.sub(r"[\W_]", "", name.lower())


def holds_dataset(path):
    """Whether a folder was written by datasets.save_to_disk or holds parquet files."""
    return any(next(Path(path).glob(pattern), None) for pattern in (*SAVED, *PARQUET))


def open_dataset(where, flag):
    """{split: datasets.Dataset} of {"dataset": hub id or folder, "config": ...}; UserError where it fails."""
    import datasets

    name = where["dataset"]
    try:
        splits = load_splits(name, where.get("config"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = f"does not load ({type(error).__name__}: {error})"
        if os.path.isabs(name):
            raise UserError(f"{flag}: {name} {why}: make this copy of the dataset again") from None
        none = "there is no such folder here, and as a hub id (ID, or ID:CONFIG where it has several)"
        copy = "name a local copy (--dataset NAME=FOLDER, --public FOLDER, or --data-root FOLDER for all)"
        raise UserError(f"{flag}: {none} it {why}: log in where the hub asks for it, or {copy}") from None
    if not isinstance(splits, dict):
        return {"train": splits}
    if "train" not in splits:
        why = f"a split called train is needed, there is {', '.join(splits)}"
        raise UserError(f"{flag}: {why}: name another copy of the dataset")
    return splits


def load_splits(name, config):
    """What `datasets` makes of a folder or of a hub id: data files alone, it runs no scripts."""
    import datasets

    if os.path.isabs(name) and any(os.path.exists(os.path.join(name, file)) for file in SAVED):
        return datasets.load_from_disk(name)
    try:
        return datasets.load_dataset(name, config)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(name, config, revision="refs/convert/parquet")  # the hub's conversion


def dataset_at(where):
    """The first fields of a record's `image` for a hub id (ID:CONFIG in two) or a folder."""
    name, _, config = (where, "", "") if os.path.isabs(where) else where.partition(":")
    return {"dataset": name, "config": config} if config else {"dataset": name}


def read_rows(dataset, split, flag):
    """(image column, class names, labels of all rows (n,) int64) of a split, without reading an image.

    Of several image columns `image` counts, of several label columns `label`, else that of most classes.
    """
    import datasets

    features = dataset.features
    images = [c for c in features if isinstance(features[c], datasets.Image)]
    labels = [c for c in features if isinstance(features[c], datasets.ClassLabel)]
    flag = f"{flag}: its split {split} has"
    if not images or not labels:
        missing = f"no {'ClassLabel' if images else 'Image'} column, only {', '.join(features)}"
        raise UserError(f"{flag} {missing}: name a dataset for image classification")
    image = min(images, key=lambda c: c != "image")
    label = min(labels, key=lambda c: (c != "label", -features[c].num_classes))
    values = dataset.select_columns([label]).with_format("arrow")[:][label].to_numpy()
    if len(values) and not values.min() >= 0:  # -1, or NaN for an empty cell
        raise UserError(f"{flag} images without a label: name a copy that has them")
    return image, features[label].names, values.astype(np.int64)
