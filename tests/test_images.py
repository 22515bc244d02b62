"""The image datasets in every layout that is read, made here as real files in small."""

import io
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_coop, make_public, picture, save_picture

from metamoe.data import decoding, images, splits
from metamoe.data.registry import DATASETS
from metamoe.errors import UserError

ALL = {"train": 0, "validation": 0, "test": 0}
CLASSES = ["Japanese-Chin", "egyptian_mau", "Pug"]  # label order is not alphabetical
NAMES = ["japanese chin", "egyptian mau", "pug"]
PETS = ("split_zhou_OxfordPets.json", "images")


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def data(tmp_path):
    """A --data-root with the three clients in CoOp's layout and ImageNet with CoOp's class names."""
    make_coop(tmp_path / "oxford_pets", *PETS, CLASSES)
    make_coop(tmp_path / "oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg", ["globe-flower", "rose"])
    land = ["Annual Crop Land", "Forest"]
    make_coop(tmp_path / "eurosat", "split_zhou_EuroSAT.json", "2750", land, nested=True)
    make_public(tmp_path / "imagenet" / "images" / "train")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 tench\nn01443537 great white_Shark\n")
    return tmp_path


def load(name, sources, seed=0, **sizes):
    """The parts of a client; `sources`: of a --data-root where it is a path."""
    sources = sources if isinstance(sources, dict) else {"root": str(sources)}
    return DATASETS[name].load(name, ALL | sizes, seed, sources)


def public(sources, size=0):
    return images.public_images(size, sources if isinstance(sources, dict) else {"root": str(sources)})


def fails(*parts, name="pets", sources, **sizes):
    """The one line that reading ends in must contain every one of `parts`; `name`: or "public"."""
    with pytest.raises(UserError) as error:
        public(sources, **sizes) if name == "public" else load(name, sources, **sizes)
    for part in parts:
        assert str(part) in str(error.value), error.value


def files_of(records):
    return [os.path.basename(record["image"]) for record in records]


# --- CoOp's layout


def test_class_names():
    texts = ["Saint_Bernard", "hard-leaved pocket orchid", "pug"]
    assert images.class_names(texts, "") == ["saint bernard", "hard leaved pocket orchid", "pug"]


def test_coop_layout(data):
    parts = {name: load(name, data) for name in ("pets", "flowers", "eurosat")}
    split = json.loads((data / "oxford_pets" / PETS[0]).read_text())
    for part, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        for record, (file, label, _) in zip(parts["pets"][part], split[key], strict=True):
            image = str(data / "oxford_pets" / "images" / file)
            assert record == {"image": image, "answer": NAMES[label], "source": "pets", "choices": NAMES}
    last = parts["flowers"]["test"][-1]
    assert last["choices"] == ["globe flower", "rose"] and last["answer"] == "rose"
    assert last["image"].startswith(str(data / "oxford_flowers" / "jpg"))
    land = parts["eurosat"]["train"]
    assert land[0]["image"] == str(data / "eurosat" / "2750" / "Annual Crop Land" / "0.jpg")
    assert {record["answer"] for record in land} == {"annual crop land", "forest"}
    folder, found = data / "imagenet" / "images" / "train", public(data)
    assert found == [
        {"image": str(folder / w / f"{w}_{i}.JPEG"), "answer": name, "source": "imagenet"}
        for w, name in (("n01440764", "tench"), ("n01443537", "great white shark"))
        for i in range(5)
    ]
    assert json.loads(json.dumps([found, parts])) == [found, parts]
    decoding.check_images(parts["pets"]["train"], "pets")


@pytest.mark.parametrize(
    "old, new",
    [
        ("oxford_pets", "OxfordPets"),
        ("oxford_pets", "PETS"),
        ("oxford_pets", "oxford-iiit-pet"),
        ("oxford_pets/images", "images"),  # the images beside the dataset's folder
        ("oxford_pets/images", "oxford_pets/jpg"),
    ],
)
def test_other_spellings(data, old, new):
    want = load("pets", data)["test"]
    (data / old).rename(data / new)
    found = load("pets", data)["test"]
    assert files_of(found) == files_of(want) and all(Path(record["image"]).is_file() for record in found)


def test_dataset_and_public_win_over_the_root_and_may_name_the_image_folder(data, monkeypatch):
    (data / "oxford_pets").rename(data / "mine")
    (data / "imagenet").rename(data / "publics")
    monkeypatch.chdir(data)
    for given in ("mine", str(data / "mine" / "images")):
        train = load("pets", {"root": "/nowhere", "pets": given})["train"]
        assert train[0]["image"] == str(data / "mine" / "images" / "train_0.jpg")
    first = public({"root": "/nowhere", "public": "publics/images/train"})[0]
    image = data / "publics/images/train/n01440764/n01440764_0.JPEG"
    assert first["answer"] == "tench" and first["image"] == str(image)


def test_sizes_balance_the_classes_and_follow_the_seed(data):
    of = lambda seed, train=8, test=5: load("pets", data, seed, train=train, test=test)  # noqa: E731
    first, other, small = of(0), of(1), of(0, train=3)
    assert {part: len(records) for part, records in first.items()} == {"train": 8, "validation": 9, "test": 5}
    assert sorted(Counter(record["answer"] for record in first["train"]).values()) == [2, 3, 3]
    assert len({record["image"] for part in first.values() for record in part}) == 22  # parts are disjoint
    assert first == of(0) and first["validation"] == other["validation"]
    assert first["train"] != other["train"] and first["test"] != other["test"]
    assert first["test"] == small["test"]  # a part does not depend on another's size
    assert set(files_of(small["train"])) < set(files_of(first["train"]))


def test_balanced_gives_small_classes_whole():
    labels = [0] * 50 + [1] * 2 + [2] * 9
    chosen = splits.balanced(labels, 20, np.random.default_rng(3))
    assert Counter(labels[i] for i in chosen) == {0: 9, 1: 2, 2: 9} and chosen == sorted(set(chosen))
    assert chosen != list(range(9)) + list(range(50, 61))
    assert splits.balanced(labels, 61, np.random.default_rng(3)) == list(range(61))


def test_the_public_subset_is_drawn_from_all(data):
    every, few = public(data), public(data, 4)
    assert few == public(data, 4) == [record for record in every if record in few] != every[:4]
    assert len(set(files_of(few))) == 4 and public(data, 10) == every
    fails("--public-size 11", "10 images", name="public", size=11, sources=data)


def test_more_than_there_is(data):
    fails("client pets", "--test-size 13", "12 images", train=1, validation=1, test=13, sources=data)
    make_coop(data / "oxford_pets", *PETS, CLASSES, counts=(6, 0, 4))
    assert load("pets", data)["validation"] == []
    fails("validation part has 0 images", train=1, validation=1, test=1, sources=data)
    make_coop(data / "oxford_pets", *PETS, CLASSES, counts=(0, 3, 4))
    fails("train part has 0 images", sources=data)


def test_missing_data_says_what_was_looked_for(data):
    missing = data / "oxford_pets" / "images" / "val_20.jpg"
    missing.unlink()
    fails(missing, PETS[0], data / "oxford_pets" / "images", sources=data)
    (data / "oxford_pets" / PETS[0]).unlink()
    fails(data / "oxford_pets", PETS[0], "timm/oxford-iiit-pet", sources=data)
    (data / "oxford_pets").rename(data / "cats")
    fails(f"--data-root {data}", "oxford_pets", "--dataset pets=", "timm/oxford-iiit-pet", sources=data)
    fails("--data-root /nowhere", sources="/nowhere")
    fails("--dataset pets=/nowhere/pets", "no such folder", sources={"pets": "/nowhere/pets"})
    (data / "imagenet").rename(data / "photos")
    fails("--public PATH_OR_ID", "imagenet", name="public", sources=data)
    empty = data / "empty"
    empty.mkdir()
    fails(f"--public {empty}", "train/CLASS", name="public", sources={"public": str(empty)})


def test_without_paths_the_hub_is_asked_and_its_refusal_is_one_line():
    """HF_HUB_OFFLINE is set in the tests: the hub is not reached."""
    fails("--dataset pets=timm/oxford-iiit-pet", "does not load", "--data-root", sources={})
    flowers = {"flowers": "some/flowers"}
    fails("--dataset flowers=some/flowers", "no such folder here", name="flowers", sources=flowers)
    fails("--public ILSVRC/imagenet-1k", name="public", sources={"root": None, "public": None})


@pytest.mark.parametrize(
    "damage",
    [
        lambda split: None,
        lambda split: {"train": split["train"], "test": split["test"]},
        lambda split: split | {"val": [["a.jpg", 0]]},
        lambda split: split | {"val": split["test"]},  # the same images in two parts
        lambda split: split | {"val": [[f, {0: 1, 1: 0}.get(c, c), n] for f, c, n in split["val"]]},
    ],
)
def test_a_damaged_split_file(data, damage):
    path = data / "oxford_pets" / PETS[0]
    damaged = damage(json.loads(path.read_text()))
    path.write_text(json.dumps(damaged) if damaged else "{")
    fails(path, "damaged", "download it again", sources=data)


def test_two_classes_of_one_name(data):
    make_coop(data / "oxford_pets", *PETS, ["tabby-cat", "Tabby_cat"])
    fails("'tabby cat'", sources=data)


# --- ImageNet trees


def test_image_folder_with_kaggles_names(tmp_path):
    make_public(tmp_path / "ILSVRC/Data/CLS-LOC/train", count=2)
    (tmp_path / "ILSVRC/Data/CLS-LOC/val").mkdir()
    lines = "n01440764 tench, Tinca tinca\nn01443537 great white shark, white shark\nn9 other\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(lines)
    for given in (tmp_path, tmp_path / "ILSVRC/Data/CLS-LOC/train"):
        answers = [record["answer"] for record in public({"public": str(given)})]
        assert answers == ["tench"] * 2 + ["great white shark"] * 2


def test_image_folder_with_names_for_folders(tmp_path):
    make_public(tmp_path, ("Steam-Train", "cat", "empty"), count=2)
    for file in (tmp_path / "empty").iterdir():
        file.unlink()
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "._cat_0.JPEG").touch()  # what macOS leaves
    save_picture(tmp_path / "val" / "flat.jpg")
    records = public({"public": str(tmp_path)})
    assert files_of(records) == ["Steam-Train_0.JPEG", "Steam-Train_1.JPEG", "cat_0.JPEG", "cat_1.JPEG"]
    assert [record["answer"] for record in records] == ["steam train"] * 2 + ["cat"] * 2


def test_wnids_without_names(tmp_path):
    make_public(tmp_path / "train")
    sources = {"public": str(tmp_path)}
    parts = "n01440764", "classnames.txt", "LOC_synset_mapping.txt", tmp_path
    fails(*parts, name="public", sources=sources)
    (tmp_path / "classnames.txt").write_text("n01440764 tench\n")
    fails("n01443537", name="public", sources=sources)


# --- Hugging Face datasets


def hf_dataset(labels, names, start=0, without=()):
    import datasets

    count, kind = len(labels), datasets.ClassLabel(names=["cat", "dog"])
    columns = {
        "file": (datasets.Value("string"), [f"f{i}" for i in range(count)]),
        "image": (datasets.Image(), [picture(start + i) for i in range(count)]),
        "kind": (kind, [0] * count),
        "label": (datasets.ClassLabel(names=names), labels),
    }
    columns = {name: column for name, column in columns.items() if name not in without}
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    return datasets.Dataset.from_dict(
        {name: cells for name, (_, cells) in columns.items()}, features=features
    )


def write_hf(kind, folder, **splits):
    import datasets

    if kind == "disk":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
        return
    (folder / "data").mkdir(parents=True)
    for split, dataset in splits.items():
        dataset.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


def pixel(record):
    return decoding.open_image(record["image"]).getpixel((0, 0))[0]


@pytest.mark.parametrize("kind, middle", [("disk", "val"), ("parquet", "validation")])
def test_a_local_dataset_with_all_parts(tmp_path, kind, middle):
    parts = {"test": hf_dataset([0, 2], CLASSES, 100), middle: hf_dataset([1, 1], CLASSES, 50)}
    write_hf(kind, tmp_path / "pets", train=hf_dataset([2, 0, 1, 0], CLASSES), **parts)
    photos = hf_dataset([1, 0, 0], ["tench, Tinca tinca", "great-white shark, white shark"], 200)
    write_hf(kind, tmp_path / "imagenet", train=photos, test=hf_dataset([0], ["a", "b"]))
    parts, found = load("pets", tmp_path), public(tmp_path)
    where = {"dataset": str(tmp_path / "pets"), "split": "train", "column": "image"}
    assert [record["image"] for record in parts["train"]] == [where | {"row": row} for row in range(4)]
    answers = {part: [record["answer"] for record in records] for part, records in parts.items()}
    assert answers["train"] == [NAMES[label] for label in (2, 0, 1, 0)]
    assert answers["validation"] == ["egyptian mau"] * 2 and answers["test"] == ["japanese chin", "pug"]
    assert all(record["source"] == "pets" and record["choices"] == NAMES for record in parts["train"])
    assert [record["answer"] for record in found] == ["great white shark", "tench", "tench"]
    assert found[2]["source"] == "imagenet" and pixel(found[2]) == 202  # PNG inside: exact
    assert [pixel(record) for record in parts["test"]] == [100, 101]
    assert json.loads(json.dumps([found, parts])) == [found, parts]


def test_missing_parts_are_cut_out_of_train(tmp_path):
    hf_dataset([0] * 40 + [1] * 20 + [2] * 1, CLASSES).save_to_disk(str(tmp_path / "single"))

    def rows(seed, **sizes):
        parts = load("pets", {"pets": str(tmp_path / "single")}, seed, **sizes)
        counts = [Counter(record["answer"] for record in records) for records in parts.values()]
        return {part: [r["image"]["row"] for r in records] for part, records in parts.items()}, counts

    first, counts = rows(0)
    assert counts[0] == {"japanese chin": 29, "egyptian mau": 14, "pug": 1}
    assert counts[1] == {"japanese chin": 3, "egyptian mau": 2}
    assert counts[2] == {"japanese chin": 8, "egyptian mau": 4}
    assert sorted(sum(first.values(), [])) == list(range(61))  # disjoint, and nothing lost
    assert first == rows(0)[0] and first["test"] != rows(1)[0]["test"]
    small = rows(0, train=10)[0]
    assert set(small["train"]) < set(first["train"]) and small["test"] == first["test"]
    two = {"train": hf_dataset([0, 1] * 10, CLASSES), "test": hf_dataset([2], CLASSES, 90)}
    write_hf("disk", tmp_path / "two", **two)
    parts = load("pets", {"pets": str(tmp_path / "two")})
    assert [len(parts[p]) for p in ALL] == [18, 2, 1] and parts["test"][0]["image"]["split"] == "test"


def test_a_dataset_below_a_split_file_is_the_dataset(data):
    copy = data / "oxford_pets" / "copy"
    write_hf("disk", copy, train=hf_dataset([0, 1] * 5, CLASSES))
    train = load("pets", {"root": str(data), "pets": str(copy)})["train"]
    assert train[0]["image"]["dataset"] == str(copy)


def test_a_hub_id(tmp_path, monkeypatch):
    """What the hub would be asked for, answered from a local copy."""
    import datasets

    write_hf("parquet", tmp_path / "hub", train=hf_dataset([0, 1] * 10, ["AnnualCrop", "Forest"]))
    asked, load_dataset = [], datasets.load_dataset

    def answer(name, config=None):
        asked.append((name, config))
        return load_dataset(str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    record = load("eurosat", {})["test"][0]
    found = public({"public": "me/photos:small"})
    assert asked == [("timm/eurosat-rgb", None), ("me/photos", "small")]
    assert record["choices"] == ["annual crop land", "forest"]
    assert record["image"]["dataset"] == "timm/eurosat-rgb" and "config" not in record["image"]
    where = {"dataset": "me/photos", "config": "small", "split": "train", "column": "image"}
    assert found[1]["image"] == where | {"row": 1}
    seen = {}
    assert [decoding.open_image(r["image"], seen).getpixel((0, 0))[0] for r in found[:3]] == [0, 1, 2]
    assert asked[2:] == [("me/photos", "small")] and len(seen) == 1  # opened once


def test_datasets_that_do_not_do(tmp_path):
    one, names = hf_dataset([0], CLASSES), iter("abcdefghi")

    def fails_with(*parts, **splits):
        folder = tmp_path / next(names)
        write_hf("disk", folder, **splits)
        fails(f"--dataset pets={folder}", *parts, sources={"pets": str(folder)})

    without = hf_dataset([0], CLASSES, without=("label", "kind"))
    fails_with("no ClassLabel column", "file, image", train=without)
    fails_with("no Image column", train=hf_dataset([0], CLASSES, without=("image",)))
    fails_with("without a label", "split test", train=one, test=hf_dataset([-1, 0], CLASSES))
    fails_with("without a label", train=hf_dataset([0, None], CLASSES))
    fails_with("different classes", train=one, test=hf_dataset([0], CLASSES[::-1]))
    fails_with("called train", "there is test", test=one)
    fails_with("'10'", "needs names", train=hf_dataset([0], ["10", "2"]))
    write_hf("parquet", tmp_path / "cut", train=one)
    next((tmp_path / "cut" / "data").iterdir()).write_bytes(b"PAR1")
    fails(tmp_path / "cut", "does not load", sources={"pets": str(tmp_path / "cut")})


# --- decoding


@pytest.mark.parametrize(
    "mode, format, colour, want",
    [
        ("L", "JPEG", 90, (90, 90, 90)),
        ("CMYK", "JPEG", (0, 0, 0, 155), (100, 100, 100)),
        ("RGBA", "PNG", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", "PNG", (7, 0), (7, 7, 7)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("RGB", "GIF", (255, 0, 0), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, format, colour, want):
    path = tmp_path / "image.jpg"  # the Pets have such files: what is in them, not their name, counts
    Image.new(mode, (5, 4), colour).save(path, format)
    image = decoding.open_image(str(path))
    assert image.mode == "RGB" and image.size == (5, 4)
    assert np.abs(np.array(image.getpixel((2, 2))) - want).max() <= (1 if format == "JPEG" else 0)


@pytest.mark.parametrize("transparency", [None, bytes([10, 100]), 1])
def test_a_palette_image(tmp_path, transparency):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoding.open_image(str(tmp_path / "p.png")).getpixel((0, 0)) == (40, 50, 60)


def test_bad_images_are_named(data):
    whole, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    path = data / "oxford_pets" / "images" / "train_2.jpg"
    records = load("pets", data)["train"]
    path.write_bytes(whole.getvalue())
    decoding.check_images(records, "pets")
    for content in (whole.getvalue()[: len(whole.getvalue()) // 2], b"", b"not an image"):
        path.write_bytes(content)
        with pytest.raises(decoding.BadImage, match=str(path)):
            decoding.open_image(str(path))
        with pytest.raises(UserError, match=f"client pets: bad image {path}.*replace"):
            decoding.check_images(records, "pets")
    path.unlink()
    with pytest.raises(decoding.BadImage, match=str(path)):
        decoding.open_image(str(path))
    decoding.check_images(records[:2], "pets")


def test_bad_rows_are_named(tmp_path):
    import datasets

    good = io.BytesIO()
    picture(5).save(good, "PNG")
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": good.getvalue()[:40], "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(str(tmp_path / "d"))
    image = {"dataset": str(tmp_path / "d"), "split": "train", "row": 0, "column": "image"}
    assert pixel({"image": image}) == 5
    for row in (1, 2, 3):
        with pytest.raises(decoding.BadImage, match=f"row {row} of {tmp_path / 'd'}, split train"):
            decoding.open_image(image | {"row": row})
    with pytest.raises(UserError, match=r"column photo.*made with"):
        decoding.open_image(image | {"column": "photo"})
