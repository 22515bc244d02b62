"""A tree of images, one folder for each class."""

import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError

IMAGENET_TRAIN = ["train", "images/train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "."]
CLASS_NAME_FILES = ["classnames.txt", "LOC_synset_mapping.txt", "synset_words.txt"]
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read_image_folder(
    where, flag, below=IMAGENET_TRAIN, advice="unpack ILSVRC2012_img_train.tar and the archives in it there"
):
    """(class names, labels, function from an index to its path) of a tree CLASS/IMAGE, listed without a
    stat per file.

    The classes' folders lie in `where` itself or in one of the folders `below` it, the first that has any.
    """
    for train in (Path(where) / folder for folder in below):
        folders = class_folders(train)
        if folders:
            break
    train = os.path.abspath(train)
    labels, files, kept = [], [], []
    for folder in folders:
        names = sorted(os.listdir(os.path.join(train, folder)))
        found = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
        if found:
            labels += [len(kept)] * len(found)
            files += found
            kept.append(folder)
    if not files:
        places = "in CLASS/"
        if below != ["."]:
            places = "in train/CLASS/ (such as train/n01440764/n01440764_18.JPEG) "
            places += "nor in CLASS/, and no parquet files"
        raise UserError(f"{flag}: {where} holds no images {places}: {advice}")
    named = names_of(Path(train), kept)
    names = [named.get(folder, folder) for folder in kept]
    unnamed = [name for name in names if re.fullmatch(r"n\d{8}", name)]
    if unnamed:
        raise UserError(
            f"{flag}: no name for the class {unnamed[0]} of {train}: put CoOp's classnames.txt ('n01440764 "
            f"tench' a line) or Kaggle's LOC_synset_mapping.txt into {where}"
        )
    return names, np.array(labels), lambda i: os.path.join(train, kept[labels[i]], files[i])


def class_folders(train):
    """The sorted names of the folders in `train`, less those of other splits; none where it is no folder."""
    if not train.is_dir():
        return []
    others = ("val", "validation", "test")
    return sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and entry.name not in others)


def names_of(train, folders):
    """{folder: class name} from the first file near `train` that names any of the folders."""
    # Kaggle's file lies four levels above its train folder
    for place in (train, *train.parents[:4]):
        for file in (place / name for name in CLASS_NAME_FILES):
            if not file.is_file():
                continue
            text = file.read_text(encoding="utf-8", errors="replace")
            lines = [line.split(maxsplit=1) for line in text.splitlines()]
            named = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in folders}
            if named:
                return named
    return {}
