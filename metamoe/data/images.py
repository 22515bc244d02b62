"""The paper's image datasets: Pets, Flowers, EuroSAT, and ImageNet as the public set.

A record is a dict with `image`, `answer` (a class name), `source` and, for client records, `choices` (the
client's class names in label order). `image` is the path of a file or a row of a Hugging Face dataset:
{"dataset", "split", "row", "column"} and, where it has several, "config".
"""

import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from metamoe.data.image_folder import read_image_folder
from metamoe.data.sources import dataset_at, holds_dataset, locate, open_dataset, read_rows
from metamoe.data.splits import balanced, stratified
from metamoe.errors import UserError

# client name -> (hub id, CoOp's split file, its image folder, names of the folder that holds both, CoOp's
# first; in any case and spelling of `_` and `-`). Each hub id has its classes in the ClassLabel `label`
# (timm's pets a `label_cat_dog` besides). Flowers has its original split there (1020 / 1020 / 6149 images),
# CoOp's is 4093 / 1633 / 2463.
IMAGE_CLIENTS = {
    "pets": (
        "timm/oxford-iiit-pet",
        "split_zhou_OxfordPets.json",
        "images",
        ["oxford_pets", "pets", "oxford-iiit-pet", "oxford-iiit-pets"],
    ),
    "flowers": (
        "dpdl-benchmark/oxford_flowers102",
        "split_zhou_OxfordFlowers.json",
        "jpg",
        ["oxford_flowers", "flowers", "flowers102", "oxford_flowers102", "102flowers"],
    ),
    "eurosat": ("timm/eurosat-rgb", "split_zhou_EuroSAT.json", "2750", ["eurosat", "eurosat_rgb"]),
}


# gated: its hub page asks to accept the terms
IMAGENET = ("ILSVRC/imagenet-1k", ["imagenet", "imagenet-1k", "ILSVRC2012", "ILSVRC"])


# EuroSAT's own class names, without spaces -> what CoOp's split file calls them.
EUROSAT_NAMES = {
    "annualcrop": "annual crop land",
    "herbaceousvegetation": "herbaceous vegetation land",
    "highway": "highway or road",
    "industrial": "industrial buildings",
    "pasture": "pasture land",
    "permanentcrop": "permanent crop land",
    "residential": "residential buildings",
    "sealake": "sea or lake",
}


def class_name(text):
    """A class name as prompts have it: lower-case, `_` and `-` as spaces."""
    return " ".join(re.sub("[_-]", " ", text.lower()).split())


def load_images(clients, sizes, n_public, seed, sources):
    """Return (public records, {client: {"train" | "validation" | "test": records}}), as load_bigbench.

    `sizes`: {"train": n, "validation": n, "test": n}; fewer than there are is a subset as balanced over the
    classes as can be, fixed by the seed; 0 means all. `n_public`: a uniform subset of D_0, the same for
    every seed; 0: all.
    None: it is not read. `sources`: {"root": folder of the datasets' folders, NAME or "public": a folder or
    hub id (ID or
    ID:CONFIG)}, each may be None or absent; a dataset with neither comes from its default hub id. Raises
    UserError where data are missing, incomplete or fewer than asked for.
    """
    parts = {}
    for name in clients:
        choices, found = client_images(name, seed, sources)
        parts[name] = {}
        for part, size in sizes.items():
            images, labels = found[part]
            if size > len(images) or not images and part != "validation":
                raise UserError(
                    f"client {name}: its {part} part has {len(images)} images, --{part}-size {size} asked "
                    f"for: " + ("lower it (0: all there are)" if images else "name a dataset that has some")
                )
            rng = np.random.default_rng([seed, zlib.crc32(f"{name} {part}".encode())])
            parts[name][part] = [
                {"image": images[i], "answer": choices[labels[i]], "source": name, "choices": choices}
                for i in balanced(labels, size or len(labels), rng)
            ]
    return None if n_public is None else public_images(n_public, sources), parts


def client_images(name, seed, sources):
    """(class names, {part: (images, labels)}) of a client, out of CoOp's files or a Hugging Face dataset."""
    hub_id, split_file, image_folder, spellings = IMAGE_CLIENTS[name]
    where, flag = locate(name, hub_id, spellings, sources)
    local = os.path.isabs(where)  # the parent below: where the folder of the images itself was named
    folder = next((f for f in (Path(where), Path(where).parent) if local and (f / split_file).exists()), None)
    if not local or folder != Path(where) and holds_dataset(where):
        names, parts = read_dataset(name, where, flag, seed)
    elif folder:
        names, parts = read_split(folder, split_file, image_folder)
    else:
        raise UserError(
            f"{flag}: {where} holds neither {split_file} (CoOp's DATASETS.md links it; the images go into "
            f"{image_folder}/ "
            f"beside it) nor a Hugging Face dataset (hub id: {hub_id})"
        )
    names = [class_name(n) for n in names]
    if name == "eurosat":
        names = [EUROSAT_NAMES.get(n.replace(" ", ""), n) for n in names]
    check_names(names, flag)
    if len(set(names)) < len(names):
        raise UserError(
            f"{flag}: two of its classes are called {Counter(names).most_common(1)[0][0]!r}: every class "
            f"needs a name of its own"
        )
    return names, parts


def check_names(names, flag):
    """UserError where classes are numbered: CLIP's text encoder needs names."""
    for name in names:
        if re.fullmatch(r"n?[ _]?\d+", name):
            raise UserError(
                f"{flag}: a class is called {name!r} there, and CLIP needs names: take a copy of the "
                f"dataset whose labels are named"
            )


def read_split(folder, split_file, image_folder):
    """(class names, {part: (paths, labels)}) from a split file of CoOp's: lists of [path below the image
    folder, label, class name].
    """
    path = folder / split_file
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        listed = {
            part: [(str(file), int(label), str(name)) for file, label, name in split[key]]
            for part, key in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): download it again (CoOp's DATASETS.md "
            f"links it)"
        ) from None
    items = [item for part in listed.values() for item in part]
    names = dict(sorted({label: name for _, label, name in items}.items()))
    index = {label: i for i, label in enumerate(names)}
    if any(names[label] != name for _, label, name in items) or len({file for file, _, _ in items}) < len(
        items
    ):
        raise UserError(
            f"{path} is damaged (a label with two names, or an image listed twice): download it again "
            f"(CoOp's DATASETS.md links it)"
        )
    places = [
        base / sub
        for base in (folder, folder.parent)
        for sub in (image_folder, ".", "images", "jpg", "2750", "EuroSAT")
    ]
    place = os.path.abspath(next((p for p in places if items and (p / items[0][0]).exists()), places[0]))
    parts = {
        part: ([os.path.join(place, file) for file, _, _ in found], [index[label] for _, label, _ in found])
        for part, found in listed.items()
    }
    for image in (image for images, _ in parts.values() for image in images):
        if not os.path.exists(image):
            raise UserError(f"{image} is missing, {path} lists it: unpack the dataset's images into {place}")
    return list(names.values()), parts


def read_dataset(name, where, flag, seed):
    """(class names, {part: (images, labels)}) of a Hugging Face dataset; a missing part is cut out of train.

    20% of it for test, then 10% of the rest for validation, of each class alike, fixed by the seed.
    """
    splits = open_dataset(dataset_at(where), flag)
    parts, names = {}, None
    for part, spellings in (
        ("train", ("train",)),
        ("validation", ("validation", "val", "valid", "dev")),
        ("test", ("test",)),
    ):
        if split := next((s for s in spellings if s in splits), None):
            column, found, labels = read_rows(splits[split], split, flag)
            if names not in (None, found):
                raise UserError(
                    f"{flag}: its splits train and {split} have different classes: name a copy where they "
                    f"agree"
                )
            names = found
            parts[part] = (
                {**dataset_at(where), "split": split, "column": column},
                np.arange(len(labels)),
                labels,
            )
    for part, share in (("test", 0.2), ("validation", 0.1)):
        if part not in parts:
            image, rows, labels = parts["train"]
            out = stratified(
                labels, share, np.random.default_rng([seed, zlib.crc32(f"{name} cut {part}".encode())])
            )
            parts[part], parts["train"] = (image, rows[out], labels[out]), (image, rows[~out], labels[~out])
    return names, {
        part: ([{**image, "row": row} for row in rows.tolist()], labels.tolist())
        for part, (image, rows, labels) in parts.items()
    }


def public_images(n_public, sources):
    """D_0: `n_public` records of ImageNet's training set (0: all), a uniform subset in the dataset's order.

    Read from an ImageFolder tree or a Hugging Face dataset. Of comma-separated synonyms the first is the
    class name; classes that share it ("crane") are one class to everybody.
    """
    where, flag = locate("public", *IMAGENET, sources)
    if os.path.isabs(where) and not holds_dataset(where):
        names, labels, image_of = read_image_folder(where, flag)
    else:
        at = dataset_at(where)
        column, names, labels = read_rows(open_dataset(at, flag)["train"], "train", flag)

        def image_of(row):
            return {**at, "split": "train", "row": row, "column": column}

    names = [class_name(name.split(",")[0]) for name in names]
    check_names(names, flag)
    if n_public > len(labels):
        raise UserError(f"--public-size {n_public}: {flag} has {len(labels)} images: lower it (0: all)")
    rng = np.random.default_rng(0)  # one public set for everybody, as in public_records
    chosen = np.sort(rng.permutation(len(labels))[:n_public]) if n_public else np.arange(len(labels))
    return [
        {"image": image_of(i), "answer": names[labels[i]], "source": Path(where).name}
        for i in chosen.tolist()
    ]
