"""The paper's image datasets: Pets, Flowers, EuroSAT, and ImageNet as the public set.

A record is a dict with `image`, `answer` (a class name), `source` and, for client records, `choices` (the
client's class names in label order). `image` is the path of a file or a row of a Hugging Face dataset:
{"dataset", "split", "row", "column"} and, where it has several, "config".
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metamoe.data.image_folder import read_image_folder
from metamoe.data.sources import dataset_at, holds_dataset, locate, open_dataset, read_rows
from metamoe.data.splits import balanced, rng_of, stratified
from metamoe.errors import UserError

# gated: its hub page asks to accept the terms
IMAGENET = ("ILSVRC/imagenet-1k", ["imagenet", "imagenet-1k", "ILSVRC2012", "ILSVRC"])


SPLIT_NAMES = {"train": ["train"], "validation": ["validation", "val", "valid", "dev"], "test": ["test"]}


def class_names(names, flag):
    """Class names as prompts have them: lower-case, `_` and `-` as spaces. UserError where classes are
    numbered: CLIP's text encoder needs names."""
    names = [" ".join(re.sub("[_-]", " ", name.lower()).split()) for name in names]
    for name in names:
        if re.fullmatch(r"n?[ _]?\d+", name):
            raise UserError(
                f"{flag}: a class is called {name!r} there, and CLIP needs names: take a copy of the "
                "dataset whose labels are named"
            )
    return names


class ImageSet(NamedTuple):
    """A data set of images with named classes: in CoOp's layout or as a Hugging Face dataset."""

    hub_id: str  # its ClassLabel `label` has the classes
    split_file: str  # CoOp's
    image_folder: str  # CoOp's, beside the split file
    spellings: list  # names of the folder that holds both, CoOp's first; in any case and spelling of `_`, `-`
    renamed: dict = {}  # its class names, without spaces -> what CoOp's split file calls them
    family = "images"

    def load(self, name, sizes, seed, sources):
        """{"train" | "validation" | "test": records}.

        A size below what there is gives a subset as balanced over the classes as can be, fixed by the
        random seed; 0 means all. `sources`: {"root": folder of the data sets' folders, NAME or "public": a
        folder or hub id (ID or ID:CONFIG)}, each may be None or absent; with neither a data set comes from
        its default hub id. Raises UserError where data are missing, incomplete or fewer than asked for.
        """
        choices, found = self.read(name, seed, sources)
        parts = {}
        for part, size in sizes.items():
            images, labels = found[part]
            if size > len(images) or not images and part != "validation":
                advice = "lower it (0: all there are)" if images else "name a dataset that has some"
                raise UserError(
                    f"client {name}: its {part} part has {len(images)} images, --{part}-size {size} asked "
                    f"for: {advice}"
                )
            rng = rng_of(seed, f"{name} {part}")
            parts[part] = [
                {"image": images[i], "answer": choices[labels[i]], "source": name, "choices": choices}
                for i in balanced(labels, size or len(labels), rng)
            ]
        return parts

    def read(self, name, seed, sources):
        """(class names, {part: (images, labels)}) out of CoOp's files or a Hugging Face dataset."""
        where, flag = locate(name, self.hub_id, self.spellings, sources)
        local, folder = os.path.isabs(where), Path(where)
        if local and not (folder / self.split_file).exists():  # the folder of the images itself was named
            folder = folder.parent
        coop = local and (folder / self.split_file).exists()
        if not local or folder != Path(where) and holds_dataset(where):
            names, parts = read_dataset(name, where, flag, seed)
        elif coop:
            names, parts = read_split(folder, self.split_file, self.image_folder)
        else:
            raise UserError(
                f"{flag}: {where} holds neither {self.split_file} (CoOp's DATASETS.md links it; the images "
                f"go into {self.image_folder}/ beside it) nor a Hugging Face dataset (hub id: {self.hub_id})"
            )
        names = [self.renamed.get(n.replace(" ", ""), n) for n in class_names(names, flag)]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise UserError(
                f"{flag}: two of its classes are called {twice!r}: every class needs a name of its own"
            )
        return names, parts


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
CLIENTS = {
    "pets": ImageSet(
        "timm/oxford-iiit-pet",
        "split_zhou_OxfordPets.json",
        "images",
        ["oxford_pets", "pets", "oxford-iiit-pet", "oxford-iiit-pets"],
    ),
    # the hub's copy has the original split (1020 / 1020 / 6149 images), CoOp's is 4093 / 1633 / 2463
    "flowers": ImageSet(
        "dpdl-benchmark/oxford_flowers102",
        "split_zhou_OxfordFlowers.json",
        "jpg",
        ["oxford_flowers", "flowers", "flowers102", "oxford_flowers102", "102flowers"],
    ),
    "eurosat": ImageSet(
        "timm/eurosat-rgb", "split_zhou_EuroSAT.json", "2750", ["eurosat", "eurosat_rgb"], EUROSAT_NAMES
    ),
}


def read_split(folder, split_file, image_folder):
    """(class names, {part: (paths, labels)}) from a split file of CoOp's: lists of [path below the image
    folder, label, class name]."""
    path = folder / split_file
    again = "download it again (CoOp's DATASETS.md links it)"
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        listed = {
            part: [(str(file), int(label), str(name)) for file, label, name in split[key]]
            for part, key in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {again}") from None
    items = [item for part in listed.values() for item in part]
    names = dict(sorted({label: name for _, label, name in items}.items()))
    twice = len({file for file, _, _ in items}) < len(items)
    if twice or any(names[label] != name for _, label, name in items):
        raise UserError(f"{path} is damaged (a label with two names, or an image listed twice): {again}")
    index = {label: i for i, label in enumerate(names)}
    place = place_of(items, folder, image_folder)
    parts = {}
    for part, found in listed.items():
        images = [os.path.join(place, file) for file, _, _ in found]
        parts[part] = images, [index[label] for _, label, _ in found]
        for image in images:
            if not os.path.exists(image):
                raise UserError(
                    f"{image} is missing, {path} lists it: unpack the dataset's images into {place}"
                )
    return list(names.values()), parts


def place_of(items, folder, image_folder):
    """The folder that the listed images lie in: CoOp's, or another one where they are unpacked."""
    below = (image_folder, ".", "images", "jpg", "2750", "EuroSAT")
    places = [base / sub for base in (folder, folder.parent) for sub in below]
    there = (place for place in places if items and (place / items[0][0]).exists())
    return os.path.abspath(next(there, places[0]))


def read_dataset(name, where, flag, seed):
    """(class names, {part: (images, labels)}) of a Hugging Face dataset; a missing part is cut out of train.

    20% of it for test, then 10% of the rest for validation, of each class alike, fixed by the random seed.
    """
    at = dataset_at(where)
    splits = open_dataset(at, flag)
    parts, names = {}, None  # of a part: fields of its images, rows (n,), labels (n,)
    for part, spellings in SPLIT_NAMES.items():
        split = next((s for s in spellings if s in splits), None)
        if not split:
            continue
        column, found, labels = read_rows(splits[split], split, flag)
        if names not in (None, found):
            raise UserError(
                f"{flag}: its splits train and {split} have different classes: name a copy where they agree"
            )
        names = found
        parts[part] = {**at, "split": split, "column": column}, np.arange(len(labels)), labels
    for part, share in (("test", 0.2), ("validation", 0.1)):
        if part not in parts:
            image, rows, labels = parts["train"]
            out = stratified(labels, share, rng_of(seed, f"{name} cut {part}"))
            parts[part] = image, rows[out], labels[out]
            parts["train"] = image, rows[~out], labels[~out]
    return names, {
        part: ([{**image, "row": row} for row in rows.tolist()], labels.tolist())
        for part, (image, rows, labels) in parts.items()
    }


def public_images(size, sources, skip_bad=False):
    """D_0: `size` records of ImageNet's training set (0: all), a uniform subset in the dataset's order, the
    same for every random seed.

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

    names = class_names([name.split(",")[0] for name in names], flag)
    if size > len(labels):
        raise UserError(f"--public-size {size}: {flag} has {len(labels)} images: lower it (0: all)")
    chosen = np.arange(len(labels))
    if size:
        chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:size])
    source = Path(where).name
    return [{"image": image_of(i), "answer": names[labels[i]], "source": source} for i in chosen.tolist()]
