"""A tree of images, one folder for each class."""

import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError

IMAGENET_TRAIN = ["train", "images/train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "."]
UNPACK = "unpack ILSVRC2012_img_train.tar and the archives in it there"
CLASS_NAME_FILES = ["classnames.txt", "LOC_synset_mapping.txt", "synset_words.txt"]
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read_image_folder(where, flag, below=IMAGENET_TRAIN, advice=UNPACK):
    """(class names, labels, function from an index to its path) of a tree CLASS/IMAGE.

    The classes' folders lie in `where` itself or in one of the folders `below` it, the first that has any.
    """
    for train in (os.path.abspath(Path(where) / folder) for folder in below):
        folders = class_folders(train)
        if folders:
            break
    labels, files, kept = [], [], []
    for folder in folders:
        listed = sorted(os.listdir(os.path.join(train, folder)))
        names = [n for n in listed if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
        if names:  # no stat of a file: ImageNet has 1.3 million
            labels += [len(kept)] * len(names)
            files += names
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
        files = "CoOp's classnames.txt ('n01440764 tench' a line) or Kaggle's LOC_synset_mapping.txt"
        raise UserError(f"{flag}: no name for the class {unnamed[0]} of {train}: put {files} into {where}")
    return names, np.array(labels), lambda i: os.path.join(train, kept[labels[i]], files[i])


def class_folders(train):
    """The sorted names of the folders in `train`, less those of other splits; none where it is no folder."""
    if not os.path.isdir(train):
        return []
    others = ("val", "validation", "test")
    return sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and entry.name not in others)


def names_of(train, folders):
    """{folder: class name} from the first file near `train` that names any of the folders."""
    # Kaggle's file lies four levels above its train folder
    for file in (place / name for place in (train, *train.parents[:4]) for name in CLASS_NAME_FILES):
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            lines = [line.split(maxsplit=1) for line in text.splitlines()]
            named = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in folders}
            if named:
                return named
    return {}
