"""Where a dataset lies: a folder, a file, or a Hugging Face dataset by hub id."""

import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError


def locate(name, hub_id, spellings, sources, file_ok=False):
    """(where, flag): an existing folder's (or file's) absolute path or a hub id, and the flag and value it
    comes from, for error lines.
    """
    option = "--public " if name == "public" else f"--dataset {name}="
    if given := sources.get(name):
        flag, path = option + given, Path(given).expanduser()
        if path.is_dir() or file_ok and path.is_file():
            return os.path.abspath(path), flag
        if file_ok and path.suffix in (".jsonl", ".json"):
            raise UserError(
                f"{flag}: no such file; name a JSON-lines file, a dataset's folder or its hub id (such as "
                f"{hub_id})"
            )
        if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", given):
            raise UserError(
                f"{flag}: no such folder; name the dataset's folder or its hub id (such as {hub_id})"
            )
        return given, flag
    if not sources.get("root"):
        return hub_id, f"{option}{hub_id} (the default)"
    root = Path(sources["root"]).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds {spellings[0]}")
    entries = [
        e
        for e in sorted(os.scandir(root), key=lambda e: e.name)
        if e.is_dir() or file_ok and e.name.endswith(".json")
    ]
    plain = {re.sub(r"[\W_]", "", entry.name.lower()): entry.path for entry in entries}
    for spelling in spellings:
        if path := plain.get(re.sub(r"[\W_]", "", spelling.lower())):
            return os.path.abspath(path), f"--data-root {root}"
    raise UserError(
        f"--data-root {root}: no folder {spellings[0]} there (nor {', '.join(spellings[1:])}): put the "
        f"dataset there, "
        f"or pass {option}PATH_OR_ID (hub id: {hub_id})"
    )


def holds_dataset(path):
    """Whether a folder was written by datasets.save_to_disk or holds parquet files as a hub repository
    does.
    """
    patterns = ("dataset_dict.json", "state.json", "*.parquet", "data/*.parquet", "train/*.parquet")
    return any(next(Path(path).glob(pattern), None) for pattern in patterns)


def open_dataset(where, flag):
    """{split: datasets.Dataset} of {"dataset": hub id or folder, "config": ...}; UserError where it does
    not load.
    """
    import datasets

    name, local = where["dataset"], os.path.isabs(where["dataset"])
    try:
        if local and any(
            os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")
        ):
            splits = datasets.load_from_disk(name)
        else:
            try:
                splits = datasets.load_dataset(name, where.get("config"))
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                # the hub's own conversion
                splits = datasets.load_dataset(name, where.get("config"), revision="refs/convert/parquet")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = f"does not load ({type(error).__name__}: {error})"
        if local:
            raise UserError(f"{flag}: {name} {why}: make this copy of the dataset again") from None
        raise UserError(
            f"{flag}: there is no such folder here, and as a hub id (ID, or ID:CONFIG where it has "
            f"several) it {why}: log in where the "
            "hub asks for it, or name a local copy (--dataset NAME=FOLDER, --public FOLDER, or --data-root "
            "FOLDER for all)"
        ) from None
    splits = splits if isinstance(splits, dict) else {"train": splits}
    if "train" not in splits:
        raise UserError(
            f"{flag}: a split called train is needed, there is {', '.join(splits)}: name another copy of "
            f"the dataset"
        )
    return splits


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
    images = sorted(
        (c for c in features if isinstance(features[c], datasets.Image)), key=lambda c: c != "image"
    )
    labels = sorted(
        (c for c in features if isinstance(features[c], datasets.ClassLabel)),
        key=lambda c: (c != "label", -features[c].num_classes),
    )
    if not images or not labels:
        raise UserError(
            f"{flag}: its split {split} has no {'ClassLabel' if images else 'Image'} column, only "
            f"{', '.join(features)}: "
            "name a dataset for image classification"
        )
    values = dataset.select_columns(labels[:1]).with_format("arrow")[:][labels[0]].to_numpy()
    if len(values) and not values.min() >= 0:  # -1, or NaN for an empty cell
        raise UserError(f"{flag}: its split {split} has images without a label: name a copy that has them")
    return images[0], features[labels[0]].names, values.astype(np.int64)
