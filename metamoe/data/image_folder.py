"""A tree of images, one folder for each class."""

import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError

# below its folder
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
        folders = (
            sorted(
                e.name
                for e in os.scandir(train)
                if e.is_dir() and e.name not in ("val", "validation", "test")
            )
            if train.is_dir()
            else []
        )
        if folders:
            break
    train = os.path.abspath(train)
    labels, files, kept = [], [], []
    for folder in folders:
        found = sorted(
            n
            for n in os.listdir(os.path.join(train, folder))
            if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")
        )
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
    named = {}
    # Kaggle's file lies four levels above its train folder
    for place in (Path(train), *Path(train).parents[:4]):
        for file in (place / name for name in CLASS_NAME_FILES):
            if not named and file.is_file():
                lines = [
                    line.split(maxsplit=1)
                    for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
                ]
                named = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in kept}
    names = [named.get(folder, folder) for folder in kept]
    if unnamed := [name for name in names if re.fullmatch(r"n\d{8}", name)]:
        raise UserError(
            f"{flag}: no name for the class {unnamed[0]} of {train}: put CoOp's classnames.txt "
            f"('n01440764 tench' a line) "
            f"or Kaggle's LOC_synset_mapping.txt into {where}"
        )
    return names, np.array(labels), lambda i: os.path.join(train, kept[labels[i]], files[i])
