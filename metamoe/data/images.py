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
from metamoe.data.splits import balanced, public_subset, rng_of, stratified
from metamoe.errors import UserError

# gated: its hub page asks to accept the terms
IMAGENET = ("ILSVRC/imagenet-1k", ["imagenet", "imagenet-1k", "ILSVRC2012", "ILSVRC"])
SPLIT_NAMES = {"train": ["train"], "validation": ["validation", "val", "valid", "dev"], "test": ["test"]}
AGAIN = "download it again (CoOp's DATASETS.md links it)"


def class_names(names, flag):
    """Class names as prompts have them: lower-case, `_` and `-` as spaces. UserError for numbered classes."""
    names = [" ".join(re.sub("[_-]", " ", name.lower()).split()) for name in names]
    for name in names:
        if re.fullmatch(r"n?[ _]?\d+", name):
            why = f"a class is called {name!r} there, and CLIP needs names"
            raise UserError(f"{flag}: {why}: take a copy of the dataset whose labels are named")
    return names


class ImageSet(NamedTuple):
    """A data set of images with named classes: in CoOp's layout or as a Hugging Face dataset."""

    hub_id: str  # its ClassLabel `label` has the classes
    split_file: str  # CoOp's
    image_folder: str  # CoOp's, beside the split file
    spellings: list  # names of the folder that holds both, CoOp's first
    renamed: dict = {}  # its class names, without spaces -> what CoOp's split file calls them
    family = "images"

    def load(self, name, sizes, seed, sources):
        """{"train" | "validation" | "test": records}. `sources`: as for `locate`.

        A size below what there is gives a subset as balanced over the classes as can be, fixed by the
        random seed; 0 means all. Raises UserError where data are missing or fewer than asked for.
        """
        choices, found = self.read(name, seed, sources)
        parts = {}
        for part, size in sizes.items():
            items = found[part]
            if size > len(items) or not items and part != "validation":
                has = f"its {part} part has {len(items)} images, --{part}-size {size} asked for"
                advice = "lower it (0: all there are)" if items else "name a dataset that has some"
                raise UserError(f"client {name}: {has}: {advice}")
            labels = [label for _, label in items]
            chosen = balanced(labels, size or len(items), rng_of(seed, f"{name} {part}"))
            shared = {"source": name, "choices": choices}
            parts[part] = [{"image": items[i][0], "answer": choices[labels[i]], **shared} for i in chosen]
        return parts

    def read(self, name, seed, sources):
        """(class names, {part: [(image, label)]}) out of CoOp's files or a Hugging Face dataset."""
        where, flag = locate(name, self.hub_id, self.spellings, sources)
        local, folder = os.path.isabs(where), Path(where)
        if local and (folder / self.split_file).exists():
            names, parts = read_split(folder, self.split_file, self.image_folder)
        elif not local or holds_dataset(where):
            names, parts = read_dataset(name, where, flag, seed)
        elif (folder.parent / self.split_file).exists():  # the folder of the images itself was named
            names, parts = read_split(folder.parent, self.split_file, self.image_folder)
        else:
            links = f"CoOp's DATASETS.md links it; the images go into {self.image_folder}/ beside it"
            neither = f"neither {self.split_file} ({links}) nor a Hugging Face dataset"
            raise UserError(f"{flag}: {where} holds {neither} (hub id: {self.hub_id})")
        names = [self.renamed.get(n.replace(" ", ""), n) for n in class_names(names, flag)]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            why = f"two of its classes are called {twice!r}"
            raise UserError(f"{flag}: {why}: every class needs a name of its own")
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
EUROSAT = ["eurosat", "eurosat_rgb"]
PETS = ["oxford_pets", "pets", "oxford-iiit-pet", "oxford-iiit-pets"]
# the hub's copy has the original split (1020 / 1020 / 6149 images), CoOp's is 4093 / 1633 / 2463
FLOWERS_ID = "dpdl-benchmark/oxford_flowers102"
FLOWERS = ["oxford_flowers", "flowers", "flowers102", "oxford_flowers102", "102flowers"]
CLIENTS = {
    "pets": ImageSet("timm/oxford-iiit-pet", "split_zhou_OxfordPets.json", "images", PETS),
    "flowers": ImageSet(FLOWERS_ID, "split_zhou_OxfordFlowers.json", "jpg", FLOWERS),
    "eurosat": ImageSet("timm/eurosat-rgb", "split_zhou_EuroSAT.json", "2750", EUROSAT, EUROSAT_NAMES),
}


def read_split(folder, split_file, image_folder):
    """As ImageSet.read, of CoOp's split file: lists of [path below the image folder, label, class name]."""
    path = folder / split_file
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        keys = {"train": "train", "validation": "val", "test": "test"}
        listed = {part: [(str(f), int(c), str(name)) for f, c, name in split[keys[part]]] for part in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from None
    items = [item for part in listed.values() for item in part]
    names = dict(sorted({label: name for _, label, name in items}.items()))
    twice = len({file for file, _, _ in items}) < len(items)
    if twice or any(names[label] != name for _, label, name in items):
        raise UserError(f"{path} is damaged (a label with two names, or an image listed twice): {AGAIN}")
    index = {label: i for i, label in enumerate(names)}
    place, parts = place_of(items, folder, image_folder), {}
    for part, found in listed.items():
        parts[part] = [(os.path.join(place, file), index[label]) for file, label, _ in found]
    listed = [image for found in parts.values() for image, _ in found]
    missing = [image for image in listed if not os.path.exists(image)]
    if missing:
        many = (
            f"{len(missing)} of the {len(listed)} images that {path} lists are missing, such as {missing[0]}"
        )
        raise UserError(f"{many}: unpack the dataset's images into {place}")
    return list(names.values()), parts


def place_of(items, folder, image_folder):
    """The folder that the listed images lie in: CoOp's, or another one where they are unpacked."""
    below = (image_folder, ".", "images", "jpg", "2750", "EuroSAT")
    places = [base / sub for base in (folder, folder.parent) for sub in below]
    there = (place for place in places if items and (place / items[0][0]).exists())
    return os.path.abspath(next(there, places[0]))


def read_dataset(name, where, flag, seed):
    """As ImageSet.read, of a Hugging Face dataset; a missing part is cut out of train.

    20% of it for test, then 10% of the rest for validation, of each class alike, fixed by the random seed.
    """
    at = dataset_at(where)
    splits = open_dataset(at, flag)
    parts, names = {}, None
    for part, spellings in SPLIT_NAMES.items():
        split = next((s for s in spellings if s in splits), None)
        if not split:
            continue
        column, found, labels = read_rows(splits[split], split, flag)
        if names not in (None, found):
            why = f"its splits train and {split} have different classes"
            raise UserError(f"{flag}: {why}: name a copy where they agree")
        names = found
        where = {**at, "split": split, "column": column}
        parts[part] = [({**where, "row": row}, label) for row, label in enumerate(labels.tolist())]
    for part, share in (("test", 0.2), ("validation", 0.1)):
        if part not in parts:
            train = parts["train"]
            labels = np.array([label for _, label in train])
            out = stratified(labels, share, rng_of(seed, f"{name} cut {part}"))
            parts[part] = [train[i] for i in np.flatnonzero(out)]
            parts["train"] = [train[i] for i in np.flatnonzero(~out)]
    return names, parts


def public_images(size, sources, skip_bad=False):
    """D_0: `size` records of ImageNet's training set (0: all), a uniform subset in the dataset's order.

    Read from an ImageFolder tree or a Hugging Face dataset. Of comma-separated synonyms the first is the
    class name; classes that share it ("crane") are one class to everybody.
    """
    where, flag = locate("public", *IMAGENET, sources)
    if os.path.isabs(where) and not holds_dataset(where):
        names, labels, image_of, _ = read_image_folder(where, flag)
    else:
        at = dataset_at(where)
        column, names, labels = read_rows(open_dataset(at, flag)["train"], "train", flag)

        def image_of(row):
            return {**at, "split": "train", "row": row, "column": column}

    names = class_names([name.split(",")[0] for name in names], flag)
    chosen = public_subset(len(labels), size, f"{flag} has {len(labels)} images")
    source = Path(where).name
    return [{"image": image_of(i), "answer": names[labels[i]], "source": source} for i in chosen.tolist()]
