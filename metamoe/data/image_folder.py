"""A tree of images, one folder for each class."""

import functools
import os
import re
from pathlib import Path

import numpy as np

from metamoe.errors import UserError

IMAGENET_TRAIN = ["train", "images/train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "."]
UNPACK = "unpack ILSVRC2012_img_train.tar and the archives in it there"
CLASS_NAME_FILES = ["classnames.txt", "LOC_synset_mapping.txt", "synset_words.txt"]
JUNK = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
# Pillow lists them, and needs other programs to read them
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF")
SPLITS = ("train", "val", "validation", "test")


def read_image_folder(where, flag, below=IMAGENET_TRAIN, advice=UNPACK):
    """(class names, labels, function from an index to its path, what was left out) of a tree CLASS/IMAGE.

    The classes' folders lie in `where` itself or in one of the folders `below` it, the first that has any.
    Images may lie in folders of a class's folder. Left out: {reason: count or names}.
    """
    own = below == ["."]
    for train in (os.path.abspath(Path(where) / folder) for folder in below):
        folders, left_out = class_folders(train, own)
        if folders:
            break
    labels, files, kept, empty = [], [], [], []
    for folder in folders:
        found = image_files(os.path.join(train, folder), left_out)
        if found:  # no stat of a file: ImageNet has 1.3 million
            labels += [len(kept)] * len(found)
            files += found
            kept.append(folder)
        else:
            empty.append(folder)
    if own:
        check_own_tree(where, flag, train, kept)
        left_out |= {"classes without an image": ", ".join(empty)} if empty else {}
    if not files:
        places = "in CLASS/"
        if not own:
            places = "in train/CLASS/ (such as train/n01440764/n01440764_18.JPEG) "
            places += "nor in CLASS/, and no parquet files"
        raise UserError(f"{flag}: {where} holds no images {places}: {advice}")
    named = names_of(Path(train), kept)
    names = [named.get(folder, folder) for folder in kept]
    unnamed = [name for name in names if re.fullmatch(r"n\d{8}", name)]
    if unnamed:
        files = "CoOp's classnames.txt ('n01440764 tench' a line) or Kaggle's LOC_synset_mapping.txt"
        raise UserError(f"{flag}: no name for the class {unnamed[0]} of {train}: put {files} into {where}")
    return names, np.array(labels), lambda i: os.path.join(train, kept[labels[i]], files[i]), left_out


@functools.cache
def suffixes():
    """The suffixes of the formats that Pillow opens here."""
    from PIL import Image

    Image.init()
    openable = Image.OPEN.keys() - set(NO_PICTURES)
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in openable)


def image_files(folder, left_out):
    """The images below `folder`, sorted, as paths relative to it; other files are counted in `left_out`."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not junk(name))
        inside = os.path.relpath(place, folder)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in suffixes():
                found.append(name if inside == "." else os.path.join(inside, name))
            else:
                left_out[suffix or "without a suffix"] = left_out.get(suffix or "without a suffix", 0) + 1
    return sorted(found)


def junk(folder):
    """Whether a program, not a person, made a folder of this name."""
    return folder.startswith(".") or folder in JUNK


def class_folders(train, own):
    """(the sorted names of the folders in `train`, {reason: names} of what in it is no class).

    Folders of other splits are left out, but not of one's `own` data: there "test" may be a class.
    """
    if not os.path.isdir(train):
        return [], {}
    names = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    made = [name for name in names if junk(name)]
    folders = [name for name in names if not junk(name) and (own or name not in SPLITS[1:])]
    return folders, {"folders": ", ".join(made)} if made else {}


def check_own_tree(where, flag, train, kept):
    """UserError, with advice that fits, where a folder of one's own is not CLASS/IMAGE."""
    if kept and set(kept) <= set(SPLITS):
        inside = [entry.name for entry in os.scandir(os.path.join(train, kept[0])) if entry.is_dir()]
        if inside:
            advice = f"name the folder that holds the classes, such as {os.path.join(where, kept[0])}"
            raise UserError(f"{flag}: {where} holds the parts {', '.join(kept)}, not classes: {advice}")
    if not kept and os.path.isdir(train):
        loose = [name for name in os.listdir(train) if os.path.splitext(name)[1].lower() in suffixes()]
        if loose:
            lie = f"{len(loose)} images lie in {where} itself, such as {min(loose)}"
            raise UserError(f"{flag}: {lie}: put those of each class into a folder with the class's name")


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
