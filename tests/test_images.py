"""The image datasets in every layout that is read, made here as real files in small."""

import io
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import datasets
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
TENCH = "n01440764 tench\n"


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
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
    (tmp_path / "imagenet" / "classnames.txt").write_text(TENCH + "n01443537 great white_Shark\n")
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


def answers(records):
    return [record["answer"] for record in records]


def files_of(records):
    return [os.path.basename(record["image"]) for record in records]


def test_coop_layout(data):
    parts = {name: load(name, data) for name in ("pets", "flowers", "eurosat")}
    split = json.loads((data / "oxford_pets" / PETS[0]).read_text())
    for part, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        for record, (file, label, _) in zip(parts["pets"][part], split[key], strict=True):
            image = str(data / "oxford_pets" / "images" / file)
            assert record == {"image": image, "answer": NAMES[label], "source": "pets", "choices": NAMES}
    last, land = parts["flowers"]["test"][-1], parts["eurosat"]["train"]
    assert last["choices"] == ["globe flower", "rose"] and last["answer"] == "rose"
    assert last["image"].startswith(str(data / "oxford_flowers" / "jpg"))
    assert land[0]["image"] == str(data / "eurosat" / "2750" / "Annual Crop Land" / "0.jpg")
    assert set(answers(land)) == {"annual crop land", "forest"}
    folder, found = data / "imagenet" / "images" / "train", public(data)
    assert found == [
        {"image": str(folder / w / f"{w}_{i}.JPEG"), "answer": name, "source": "imagenet"}
        for w, name in (("n01440764", "tench"), ("n01443537", "great white shark"))
        for i in range(5)
    ]
    assert json.loads(json.dumps([found, parts])) == [found, parts]
    decoding.check_images(parts["pets"]["train"], "pets")


def test_class_names_lose_their_signs_and_stay_different(data):
    texts = ["Saint_Bernard", "hard-leaved pocket orchid", "pug"]
    assert images.class_names(texts, "") == ["saint bernard", "hard leaved pocket orchid", "pug"]
    make_coop(data / "oxford_pets", *PETS, ["tabby-cat", "Tabby_cat"])
    fails("'tabby cat'", sources=data)


def test_other_spellings(data):
    """Of the dataset's folder and of its images' folder, which may also lie beside it."""
    want = files_of(load("pets", data)["test"])
    for old, *others in (
        ("oxford_pets", "OxfordPets", "PETS", "oxford-iiit-pet"),
        ("oxford_pets/images", "images", "oxford_pets/jpg"),
    ):
        for new in others:
            (data / old).rename(data / new)
            found = load("pets", data)["test"]
            assert files_of(found) == want and all(Path(record["image"]).is_file() for record in found)
            (data / new).rename(data / old)


def test_dataset_and_public_win_over_the_root_and_may_name_a_folder_in_it(data, monkeypatch):
    (data / "oxford_pets").rename(data / "mine")
    (data / "imagenet").rename(data / "publics")
    monkeypatch.chdir(data)
    for given in ("mine", str(data / "mine" / "images")):
        train = load("pets", {"root": "/nowhere", "pets": given})["train"]
        assert train[0]["image"] == str(data / "mine" / "images" / "train_0.jpg")
    copy = data / "mine" / "copy"  # a dataset below a split file
    write_hf("disk", copy, train=hf_dataset([0, 1] * 5))
    train = load("pets", {"root": str(data), "pets": str(copy)})["train"]
    assert train[0]["image"]["dataset"] == str(copy)
    first = public({"root": "/nowhere", "public": "publics/images/train"})[0]
    image = data / "publics/images/train/n01440764/n01440764_0.JPEG"
    assert first["answer"] == "tench" and first["image"] == str(image)


def test_sizes_balance_the_classes_and_follow_the_random_seed(data):
    first, other = (load("pets", data, seed, train=8, test=5) for seed in (0, 1))
    small = load("pets", data, train=3, test=5)
    assert {part: len(records) for part, records in first.items()} == {"train": 8, "validation": 9, "test": 5}
    assert sorted(Counter(answers(first["train"])).values()) == [2, 3, 3]
    assert len({record["image"] for part in first.values() for record in part}) == 22  # parts are disjoint
    assert first == load("pets", data, train=8, test=5) and first["validation"] == other["validation"]
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
    pets, missing = data / "oxford_pets", data / "oxford_pets" / "images" / "val_20.jpg"
    missing.unlink()
    fails(missing, PETS[0], pets / "images", sources=data)
    (pets / PETS[0]).unlink()
    fails(pets, PETS[0], "timm/oxford-iiit-pet", sources=data)
    pets.rename(data / "cats")
    fails(f"--data-root {data}", "oxford_pets", "--dataset pets=", "timm/oxford-iiit-pet", sources=data)
    fails("--data-root /nowhere", sources="/nowhere")
    fails("--dataset pets=/nowhere/pets", "no such folder", sources={"pets": "/nowhere/pets"})
    (data / "imagenet").rename(data / "photos")
    fails("--public PATH_OR_ID", "imagenet", name="public", sources=data)
    (data / "empty").mkdir()
    sources = {"public": str(data / "empty")}
    fails(f"--public {data / 'empty'}", "train/CLASS", name="public", sources=sources)
    # without paths the hub is asked, which the tests do not reach: HF_HUB_OFFLINE is set
    fails("--dataset pets=timm/oxford-iiit-pet", "does not load", "--data-root", sources={})
    flowers = {"flowers": "some/flowers"}
    fails("--dataset flowers=some/flowers", "no such folder here", name="flowers", sources=flowers)
    fails("--public ILSVRC/imagenet-1k", name="public", sources={"root": None, "public": None})


def test_a_damaged_split_file(data):
    path = data / "oxford_pets" / PETS[0]
    split = json.loads(path.read_text())
    swapped = [[file, {0: 1, 1: 0}.get(label, label), name] for file, label, name in split["val"]]
    damaged = [split | {"val": val} for val in ([["a.jpg", 0]], split["test"], swapped)]  # test: listed twice
    without = {key: split[key] for key in ("train", "test")}
    for text in ("{", *map(json.dumps, [without, *damaged])):
        path.write_text(text)
        fails(path, "damaged", "download it again", sources=data)


def test_image_folder_with_names_for_folders(tmp_path):
    make_public(tmp_path, ("Steam-Train", "cat"), count=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "._cat_0.JPEG").touch()  # what macOS leaves
    save_picture(tmp_path / "val" / "flat.jpg")
    records = public({"public": str(tmp_path)})
    assert files_of(records) == ["Steam-Train_0.JPEG", "Steam-Train_1.JPEG", "cat_0.JPEG", "cat_1.JPEG"]
    assert answers(records) == ["steam train"] * 2 + ["cat"] * 2


def test_wnids_need_names_and_kaggles_are_found(tmp_path):
    place, sources = tmp_path / "ILSVRC/Data/CLS-LOC", {"public": str(tmp_path)}
    make_public(place / "train", count=2)
    (place / "val").mkdir()
    parts = "n01440764", "classnames.txt", "LOC_synset_mapping.txt", tmp_path
    fails(*parts, name="public", sources=sources)
    (tmp_path / "classnames.txt").write_text(TENCH)
    fails("n01443537", name="public", sources=sources)
    (tmp_path / "classnames.txt").unlink()
    lines = "n01440764 tench, Tinca tinca\nn01443537 great white shark, white shark\nn9 other\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(lines)
    for given in (tmp_path, place / "train"):
        assert answers(public({"public": str(given)})) == ["tench"] * 2 + ["great white shark"] * 2


# --- Hugging Face datasets


def hf_dataset(labels, names=CLASSES, start=0, without=()):
    kinds, count = {"file": datasets.Value("string"), "image": datasets.Image()}, len(labels)
    kinds |= {"kind": datasets.ClassLabel(names=["cat", "dog"]), "label": datasets.ClassLabel(names=names)}
    columns = {"file": [f"f{i}" for i in range(count)], "image": [picture(start + i) for i in range(count)]}
    columns |= {"kind": [0] * count, "label": labels}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    return dataset.remove_columns(list(without))


def write_hf(kind, folder, **splits):
    if kind == "disk":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
        return
    (folder / "data").mkdir(parents=True)
    for split, dataset in splits.items():
        dataset.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


def pixel(image, *seen):
    return decoding.open_image(image, *seen).getpixel((0, 0))[0]


@pytest.mark.parametrize("kind, middle", [("disk", "val"), ("parquet", "validation")])
def test_a_local_dataset_with_all_parts(tmp_path, kind, middle):
    others = {"test": hf_dataset([0, 2], start=100), middle: hf_dataset([1, 1], start=50)}
    write_hf(kind, tmp_path / "pets", train=hf_dataset([2, 0, 1, 0]), **others)
    photos = hf_dataset([1, 0, 0], ["tench, Tinca tinca", "great-white shark, white shark"], 200)
    write_hf(kind, tmp_path / "imagenet", train=photos, test=hf_dataset([0], ["a", "b"]))
    parts, found = load("pets", tmp_path), public(tmp_path)
    where = {"dataset": str(tmp_path / "pets"), "split": "train", "column": "image"}
    assert [record["image"] for record in parts["train"]] == [where | {"row": row} for row in range(4)]
    assert answers(parts["train"]) == [NAMES[label] for label in (2, 0, 1, 0)]
    assert answers(parts["validation"]) == ["egyptian mau"] * 2
    assert answers(parts["test"]) == ["japanese chin", "pug"]
    assert all(record["source"] == "pets" and record["choices"] == NAMES for record in parts["train"])
    assert answers(found) == ["great white shark", "tench", "tench"] and found[2]["source"] == "imagenet"
    assert pixel(found[2]["image"]) == 202  # PNG inside: exact
    assert [pixel(record["image"]) for record in parts["test"]] == [100, 101]
    assert json.loads(json.dumps([found, parts])) == [found, parts]


def test_missing_parts_are_cut_out_of_train(tmp_path):
    hf_dataset([0] * 40 + [1] * 20 + [2] * 1).save_to_disk(str(tmp_path / "single"))

    def rows(seed, **sizes):
        parts = load("pets", {"pets": str(tmp_path / "single")}, seed, **sizes)
        counts = [Counter(answers(records)) for records in parts.values()]
        return {part: [r["image"]["row"] for r in records] for part, records in parts.items()}, counts

    first, counts = rows(0)
    assert counts[0] == {"japanese chin": 29, "egyptian mau": 14, "pug": 1}
    assert counts[1] == {"japanese chin": 3, "egyptian mau": 2}
    assert counts[2] == {"japanese chin": 8, "egyptian mau": 4}
    assert sorted(sum(first.values(), [])) == list(range(61))  # disjoint, and nothing lost
    assert first == rows(0)[0] and first["test"] != rows(1)[0]["test"]
    small = rows(0, train=10)[0]
    assert set(small["train"]) < set(first["train"]) and small["test"] == first["test"]
    write_hf("disk", tmp_path / "two", train=hf_dataset([0, 1] * 10), test=hf_dataset([2], start=90))
    parts = load("pets", {"pets": str(tmp_path / "two")})
    assert [len(parts[p]) for p in ALL] == [18, 2, 1] and parts["test"][0]["image"]["split"] == "test"


def test_a_hub_id(tmp_path, monkeypatch):
    """What the hub would be asked for, answered from a local copy."""
    write_hf("parquet", tmp_path / "hub", train=hf_dataset([0, 1] * 10, ["AnnualCrop", "Forest"]))
    asked, load_dataset = [], datasets.load_dataset

    def answer(name, config=None):
        asked.append((name, config))
        return load_dataset(str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    record = load("eurosat", {})["test"][0]
    found, seen = public({"public": "me/photos:small"}), {}
    assert asked == [("timm/eurosat-rgb", None), ("me/photos", "small")]
    assert record["choices"] == ["annual crop land", "forest"]
    assert record["image"]["dataset"] == "timm/eurosat-rgb" and "config" not in record["image"]
    where = {"dataset": "me/photos", "config": "small", "split": "train", "column": "image"}
    assert found[1]["image"] == where | {"row": 1}
    assert [pixel(r["image"], seen) for r in found[:3]] == [0, 1, 2]
    assert asked[2:] == [("me/photos", "small")] and len(seen) == 1  # opened once


def test_datasets_that_do_not_do(tmp_path):
    one = hf_dataset([0])
    for number, (parts, splits_of) in enumerate(
        [
            (["no ClassLabel column", "file, image"], {"train": hf_dataset([0], without=("label", "kind"))}),
            (["no Image column"], {"train": hf_dataset([0], without=("image",))}),
            (["without a label", "split test"], {"train": one, "test": hf_dataset([-1, 0])}),
            (["without a label"], {"train": hf_dataset([0, None])}),
            (["different classes"], {"train": one, "test": hf_dataset([0], CLASSES[::-1])}),
            (["called train", "there is test"], {"test": one}),
            (["'10'", "needs names"], {"train": hf_dataset([0], ["10", "2"])}),
        ]
    ):
        folder = tmp_path / f"{number}"
        write_hf("disk", folder, **splits_of)
        fails(f"--dataset pets={folder}", *parts, sources={"pets": str(folder)})
    write_hf("parquet", tmp_path / "cut", train=one)
    next((tmp_path / "cut" / "data").iterdir()).write_bytes(b"PAR1")
    fails(tmp_path / "cut", "does not load", sources={"pets": str(tmp_path / "cut")})


def test_every_mode_becomes_rgb(tmp_path):
    path = tmp_path / "image.jpg"  # the Pets have such files: what is in them, not their name, counts
    for mode, kind, colour, want in (
        ("L", "JPEG", 90, (90, 90, 90)),
        ("CMYK", "JPEG", (0, 0, 0, 155), (100, 100, 100)),
        ("RGBA", "PNG", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", "PNG", (7, 0), (7, 7, 7)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("RGB", "GIF", (255, 0, 0), (255, 0, 0)),
    ):
        Image.new(mode, (5, 4), colour).save(path, kind)
        image = decoding.open_image(str(path))
        assert image.mode == "RGB" and image.size == (5, 4)
        assert np.abs(np.array(image.getpixel((2, 2))) - want).max() <= (1 if kind == "JPEG" else 0)


@pytest.mark.parametrize("info", [{}, {"transparency": bytes([10, 100])}, {"transparency": 1}])
def test_a_palette_image(tmp_path, info):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.save(tmp_path / "p.png", **info)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoding.open_image(str(tmp_path / "p.png")).getpixel((0, 0)) == (40, 50, 60)


def test_bad_images_are_named(data):
    whole, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    path, content = data / "oxford_pets" / "images" / "train_2.jpg", whole.getvalue()
    records = load("pets", data)["train"]
    path.write_bytes(content)
    decoding.check_images(records, "pets")
    for bad in (content[: len(content) // 2], b"", b"not an image"):
        path.write_bytes(bad)
        with pytest.raises(decoding.BadImage, match=str(path)):
            decoding.open_image(str(path))
        with pytest.raises(UserError, match=f"client pets: bad image {path}.*replace"):
            decoding.check_images(records, "pets")
    path.unlink()
    with pytest.raises(decoding.BadImage, match=str(path)):
        decoding.open_image(str(path))
    decoding.check_images(records[:2], "pets")


def test_bad_rows_are_named(tmp_path):
    good = io.BytesIO()
    picture(5).save(good, "PNG")
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": good.getvalue()[:40], "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(str(tmp_path / "d"))
    image = {"dataset": str(tmp_path / "d"), "split": "train", "row": 0, "column": "image"}
    assert pixel(image) == 5
    for row in (1, 2, 3):
        with pytest.raises(decoding.BadImage, match=f"row {row} of {tmp_path / 'd'}, split train"):
            decoding.open_image(image | {"row": row})
    with pytest.raises(UserError, match=r"column photo.*made with"):
        decoding.open_image(image | {"column": "photo"})
