"""The image datasets: every layout that images.load_images reads, made here as real files in small."""

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
from metamoe.errors import UserError

ALL = {"train": 0, "validation": 0, "test": 0}
CLASSES = ["Japanese-Chin", "egyptian_mau", "Pug"]  # label order is not alphabetical


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def data(tmp_path):
    """A --data-root with the three clients in CoOp's layout and ImageNet with CoOp's class names."""
    make_coop(tmp_path / "oxford_pets", "split_zhou_OxfordPets.json", "images", CLASSES)
    make_coop(tmp_path / "oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg", ["globe-flower", "rose"])
    make_coop(
        tmp_path / "eurosat", "split_zhou_EuroSAT.json", "2750", ["Annual Crop Land", "Forest"], nested=True
    )
    make_public(tmp_path / "imagenet" / "images" / "train")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 tench\nn01443537 great white_Shark\n")
    return tmp_path


def fails(*parts, **kwargs):
    """The one line that load_images ends in; it must contain every one of `parts`."""
    with pytest.raises(UserError) as error:
        images.load_images(**{"clients": ["pets"], "sizes": ALL, "n_public": 0, "seed": 0} | kwargs)
    for part in parts:
        assert str(part) in str(error.value), error.value
    return str(error.value)


# --- CoOp's layout


@pytest.mark.parametrize(
    "text, want",
    [
        ("Saint_Bernard", "saint bernard"),
        ("hard-leaved pocket orchid", "hard leaved pocket orchid"),
        ("pug", "pug"),
    ],
)
def test_class_name(text, want):
    assert images.class_name(text) == want


def test_coop_layout(data):
    public, parts = images.load_images(["pets", "flowers", "eurosat"], ALL, 0, 0, {"root": str(data)})
    split = json.loads((data / "oxford_pets" / "split_zhou_OxfordPets.json").read_text())
    names = ["japanese chin", "egyptian mau", "pug"]
    for part, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert parts["pets"][part] == [
            {
                "image": str(data / "oxford_pets" / "images" / file),
                "answer": names[label],
                "source": "pets",
                "choices": names,
            }
            for file, label, _ in split[key]
        ]
    assert (
        parts["flowers"]["test"][-1]["choices"] == ["globe flower", "rose"]
        and parts["flowers"]["test"][-1]["answer"] == "rose"
    )
    assert parts["flowers"]["test"][-1]["image"].startswith(str(data / "oxford_flowers" / "jpg"))
    assert parts["eurosat"]["train"][0]["image"] == str(
        data / "eurosat" / "2750" / "Annual Crop Land" / "0.jpg"
    )
    assert {r["answer"] for r in parts["eurosat"]["train"]} == {"annual crop land", "forest"}
    folder = data / "imagenet" / "images" / "train"
    assert public == [
        {"image": str(folder / w / f"{w}_{i}.JPEG"), "answer": name, "source": "imagenet"}
        for w, name in (("n01440764", "tench"), ("n01443537", "great white shark"))
        for i in range(5)
    ]
    assert json.loads(json.dumps([public, parts])) == [public, parts]
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
    want = images.load_images(["pets"], ALL, 0, 0, {"root": str(data)})[1]["pets"]["test"]
    (data / old).rename(data / new)
    found = images.load_images(["pets"], ALL, 0, 0, {"root": str(data)})[1]["pets"]["test"]
    assert [os.path.basename(r["image"]) for r in found] == [os.path.basename(r["image"]) for r in want]
    assert all(Path(r["image"]).is_file() for r in found)


def test_data_and_public_win_over_the_root_and_may_name_the_image_folder(data, tmp_path, monkeypatch):
    (data / "oxford_pets").rename(data / "mine")
    (data / "imagenet").rename(data / "publics")
    monkeypatch.chdir(data)
    for given in ("mine", str(data / "mine" / "images")):
        public, parts = images.load_images(
            ["pets"], ALL, 0, 0, {"root": "/nowhere", "pets": given, "public": "publics/images/train"}
        )
        assert parts["pets"]["train"][0]["image"] == str(data / "mine" / "images" / "train_0.jpg")
        assert public[0]["answer"] == "tench" and public[0]["image"] == str(
            data / "publics/images/train/n01440764/n01440764_0.JPEG"
        )


def test_sizes_balance_the_classes_and_follow_the_seed(data):
    def load(seed, train=8, test=5):
        parts = images.load_images(
            ["pets"], {"train": train, "validation": 0, "test": test}, 4, seed, {"root": str(data)}
        )[1]["pets"]
        return {part: [r["image"] for r in records] for part, records in parts.items()}, Counter(
            r["answer"] for r in parts["train"]
        )

    first, counts = load(0)
    assert {part: len(images) for part, images in first.items()} == {"train": 8, "validation": 9, "test": 5}
    assert sorted(counts.values()) == [2, 3, 3]
    assert len(set(sum(first.values(), []))) == 22  # parts are disjoint
    assert first == load(0)[0]
    assert (
        all(first[part] != load(1)[0][part] for part in ("train", "test"))
        and first["validation"] == load(1)[0]["validation"]
    )
    assert first["test"] == load(0, train=3)[0]["test"]  # a part does not depend on another's size
    assert set(load(0, train=3)[0]["train"]) < set(first["train"])


def test_balanced_gives_small_classes_whole():
    labels = [0] * 50 + [1] * 2 + [2] * 9
    chosen = splits.balanced(labels, 20, np.random.default_rng(3))
    assert Counter(labels[i] for i in chosen) == {0: 9, 1: 2, 2: 9} and chosen == sorted(set(chosen))
    assert chosen != list(range(9)) + list(range(50, 61))
    assert splits.balanced(labels, 61, np.random.default_rng(3)) == list(range(61))


def test_the_public_subset_is_one_for_every_seed(data):
    def drawn(n, seed):
        return [r["image"] for r in images.load_images([], ALL, n, seed, {"root": str(data)})[0]]

    every = drawn(0, 0)
    assert drawn(4, 0) == drawn(4, 7) == [image for image in every if image in drawn(4, 0)] != every[:4]
    assert len(set(drawn(4, 0))) == 4 and drawn(10, 1) == every
    fails("--public-size 11", "10 images", sizes=ALL, clients=[], n_public=11, sources={"root": str(data)})


def test_more_than_there_is(data):
    fails(
        "client pets",
        "--test-size 13",
        "12 images",
        sizes={"train": 1, "validation": 1, "test": 13},
        sources={"root": str(data)},
    )
    make_coop(data / "oxford_pets", "split_zhou_OxfordPets.json", "images", CLASSES, counts=(6, 0, 4))
    assert images.load_images(["pets"], ALL, 0, 0, {"root": str(data)})[1]["pets"]["validation"] == []
    fails(
        "validation part has 0 images",
        sizes={"train": 1, "validation": 1, "test": 1},
        sources={"root": str(data)},
    )
    make_coop(data / "oxford_pets", "split_zhou_OxfordPets.json", "images", CLASSES, counts=(0, 3, 4))
    fails("train part has 0 images", sources={"root": str(data)})


def test_missing_data_says_what_was_looked_for(data):
    sources = {"root": str(data)}
    missing = data / "oxford_pets" / "images" / "val_20.jpg"
    missing.unlink()
    fails(missing, "split_zhou_OxfordPets.json", data / "oxford_pets" / "images", sources=sources)
    (data / "oxford_pets" / "split_zhou_OxfordPets.json").unlink()
    fails(data / "oxford_pets", "split_zhou_OxfordPets.json", "timm/oxford-iiit-pet", sources=sources)
    (data / "oxford_pets").rename(data / "cats")
    fails(f"--data-root {data}", "oxford_pets", "--data pets=", "timm/oxford-iiit-pet", sources=sources)
    fails("--data-root /nowhere", sources={"root": "/nowhere"})
    fails("--data pets=/nowhere/pets", "no such folder", sources={"pets": "/nowhere/pets"})
    (data / "imagenet").rename(data / "photos")
    fails("--public PATH_OR_ID", "imagenet", clients=[], sources=sources)
    (data / "empty").mkdir()
    fails(f"--public {data / 'empty'}", "train/CLASS", clients=[], sources={"public": str(data / "empty")})


def test_without_paths_the_hub_is_asked_and_its_refusal_is_one_line():
    """HF_HUB_OFFLINE is set in the tests: the hub is not reached."""
    fails("--data pets=timm/oxford-iiit-pet", "does not load", "--data-root", sources={})
    fails(
        "--data flowers=some/flowers",
        "no such folder here",
        clients=["flowers"],
        sources={"flowers": "some/flowers"},
    )
    fails("--public ILSVRC/imagenet-1k", clients=[], sources={"root": None, "public": None})


@pytest.mark.parametrize(
    "damage",
    [
        lambda split: "{",
        lambda split: json.dumps({"train": split["train"], "test": split["test"]}),
        lambda split: json.dumps(split | {"val": [["a.jpg", 0]]}),
        lambda split: json.dumps(split | {"val": split["test"]}),  # the same images in two parts
        lambda split: json.dumps(
            split | {"val": [[f, 1 - l if l < 2 else l, n] for f, l, n in split["val"]]}
        ),
    ],
)
def test_a_damaged_split_file(data, damage):
    path = data / "oxford_pets" / "split_zhou_OxfordPets.json"
    path.write_text(damage(json.loads(path.read_text())))
    fails(path, "damaged", "download it again", sources={"root": str(data)})


def test_two_classes_of_one_name(data):
    make_coop(data / "oxford_pets", "split_zhou_OxfordPets.json", "images", ["tabby-cat", "Tabby_cat"])
    fails("'tabby cat'", sources={"root": str(data)})


# --- ImageNet trees


def test_image_folder_with_kaggles_names(tmp_path):
    make_public(tmp_path / "ILSVRC/Data/CLS-LOC/train", count=2)
    (tmp_path / "ILSVRC/Data/CLS-LOC/val").mkdir()
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 great white shark, white shark\nn9 other\n"
    )
    for given in (tmp_path, tmp_path / "ILSVRC/Data/CLS-LOC/train"):
        public = images.public_images(0, {"public": str(given)})
        assert [r["answer"] for r in public] == ["tench"] * 2 + ["great white shark"] * 2


def test_image_folder_with_names_for_folders(tmp_path):
    make_public(tmp_path, ("Steam-Train", "cat", "empty"), count=2)
    for file in (tmp_path / "empty").iterdir():
        file.unlink()
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "._cat_0.JPEG").touch()  # what macOS leaves
    save_picture(tmp_path / "val" / "flat.jpg")
    assert [
        (os.path.basename(r["image"]), r["answer"])
        for r in images.public_images(0, {"public": str(tmp_path)})
    ] == [
        ("Steam-Train_0.JPEG", "steam train"),
        ("Steam-Train_1.JPEG", "steam train"),
        ("cat_0.JPEG", "cat"),
        ("cat_1.JPEG", "cat"),
    ]


def test_wnids_without_names(tmp_path):
    make_public(tmp_path / "train")
    fails(
        "n01440764",
        "classnames.txt",
        "LOC_synset_mapping.txt",
        tmp_path,
        clients=[],
        sources={"public": str(tmp_path)},
    )
    (tmp_path / "classnames.txt").write_text("n01440764 tench\n")
    fails("n01443537", clients=[], sources={"public": str(tmp_path)})


# --- Hugging Face datasets


def hf_dataset(labels, names, start=0, **more):
    import datasets

    features = {
        "file": datasets.Value("string"),
        "image": datasets.Image(),
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
        "label": datasets.ClassLabel(names=names),
    }
    columns = {
        "file": [f"f{i}" for i in range(len(labels))],
        "image": [picture(start + i) for i in range(len(labels))],
        "kind": [0] * len(labels),
        "label": labels,
    }
    for column in more.get("without", ()):
        del features[column], columns[column]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_hf(kind, folder, **splits):
    import datasets

    if kind == "disk":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        for split, dataset in splits.items():
            dataset.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


def pixel(image):
    return decoding.open_image(image).getpixel((0, 0))[0]


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_a_local_dataset_with_all_parts(tmp_path, kind):
    middle = "val" if kind == "disk" else "validation"
    write_hf(
        kind,
        tmp_path / "pets",
        train=hf_dataset([2, 0, 1, 0], CLASSES),
        test=hf_dataset([0, 2], CLASSES, 100),
        **{middle: hf_dataset([1, 1], CLASSES, 50)},
    )
    photos = hf_dataset([1, 0, 0], ["tench, Tinca tinca", "great-white shark, white shark"], 200)
    write_hf(kind, tmp_path / "imagenet", train=photos, test=hf_dataset([0], ["a", "b"]))
    public, parts = images.load_images(["pets"], ALL, 0, 0, {"root": str(tmp_path)})
    names = ["japanese chin", "egyptian mau", "pug"]
    assert parts["pets"]["train"] == [
        {
            "image": {"dataset": str(tmp_path / "pets"), "split": "train", "row": row, "column": "image"},
            "answer": names[label],
            "source": "pets",
            "choices": names,
        }
        for row, label in enumerate([2, 0, 1, 0])
    ]
    assert [r["answer"] for r in parts["pets"]["validation"]] == ["egyptian mau"] * 2
    assert [r["answer"] for r in parts["pets"]["test"]] == ["japanese chin", "pug"]
    assert [r["answer"] for r in public] == ["great white shark", "tench", "tench"] and public[2][
        "source"
    ] == "imagenet"
    assert [pixel(r["image"]) for r in parts["pets"]["test"]] == [100, 101] and pixel(
        public[2]["image"]
    ) == 202  # PNG inside: exact
    assert json.loads(json.dumps([public, parts])) == [public, parts]


def test_missing_parts_are_cut_out_of_train(tmp_path):
    labels = [0] * 40 + [1] * 20 + [2] * 1
    hf_dataset(labels, CLASSES).save_to_disk(str(tmp_path / "single"))

    def rows(seed, **sizes):
        parts = images.load_images(
            ["pets"],
            ALL | sizes,
            1,
            seed,
            {"pets": str(tmp_path / "single"), "public": str(tmp_path / "single")},
        )[1]["pets"]
        counts = {part: Counter(r["answer"] for r in records) for part, records in parts.items()}
        return {part: [r["image"]["row"] for r in records] for part, records in parts.items()}, counts

    first, counts = rows(0)
    assert counts == {
        "train": {"japanese chin": 29, "egyptian mau": 14, "pug": 1},
        "validation": {"japanese chin": 3, "egyptian mau": 2},
        "test": {"japanese chin": 8, "egyptian mau": 4},
    }
    assert sorted(sum(first.values(), [])) == list(range(61))  # disjoint, and nothing lost
    assert first == rows(0)[0] and first["test"] != rows(1)[0]["test"]
    assert (
        set(rows(0, train=10)[0]["train"]) < set(first["train"])
        and rows(0, train=10)[0]["test"] == first["test"]
    )
    write_hf(
        "disk", tmp_path / "two", train=hf_dataset([0, 1] * 10, CLASSES), test=hf_dataset([2], CLASSES, 90)
    )
    parts = images.load_images(
        ["pets"], ALL, 1, 0, {"pets": str(tmp_path / "two"), "public": str(tmp_path / "two")}
    )[1]["pets"]
    assert [len(parts[p]) for p in ALL] == [18, 2, 1] and parts["test"][0]["image"]["split"] == "test"


def test_a_dataset_below_a_split_file_is_the_dataset(data):
    write_hf("disk", data / "oxford_pets" / "copy", train=hf_dataset([0, 1] * 5, CLASSES))
    records = images.load_images(
        ["pets"], ALL, 0, 0, {"root": str(data), "pets": str(data / "oxford_pets" / "copy")}
    )[1]["pets"]["train"]
    assert records[0]["image"]["dataset"] == str(data / "oxford_pets" / "copy")


def test_a_hub_id(tmp_path, monkeypatch):
    """What the hub would be asked for, answered from a local copy."""
    import datasets

    write_hf("parquet", tmp_path / "hub", train=hf_dataset([0, 1] * 10, ["AnnualCrop", "Forest"]))
    asked, load = [], datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config=None: asked.append((name, config)) or load(str(tmp_path / "hub")),
    )
    public, parts = images.load_images(["eurosat"], ALL, 0, 0, {"public": "me/photos:small"})
    assert asked == [("timm/eurosat-rgb", None), ("me/photos", "small")]
    assert parts["eurosat"]["test"][0]["choices"] == ["annual crop land", "forest"]
    assert (
        parts["eurosat"]["test"][0]["image"]["dataset"] == "timm/eurosat-rgb"
        and "config" not in parts["eurosat"]["test"][0]["image"]
    )
    assert public[1]["image"] == {
        "dataset": "me/photos",
        "config": "small",
        "split": "train",
        "row": 1,
        "column": "image",
    }
    seen = {}
    assert [decoding.open_image(r["image"], seen).getpixel((0, 0))[0] for r in public[:3]] == [0, 1, 2]
    assert asked[2:] == [("me/photos", "small")] and len(seen) == 1  # opened once


def test_datasets_that_do_not_do(tmp_path):
    def fails_with(*parts, **splits):
        folder = tmp_path / f"d{len(list(tmp_path.iterdir()))}"
        write_hf("disk", folder, **splits)
        fails(f"--data pets={folder}", *parts, sources={"pets": str(folder)})

    fails_with(
        "no ClassLabel column", "file, image", train=hf_dataset([0], CLASSES, without=("label", "kind"))
    )
    fails_with("no Image column", train=hf_dataset([0], CLASSES, without=("image",)))
    fails_with(
        "without a label", "split test", train=hf_dataset([0], CLASSES), test=hf_dataset([-1, 0], CLASSES)
    )
    fails_with("without a label", train=hf_dataset([0, None], CLASSES))
    fails_with("different classes", train=hf_dataset([0], CLASSES), test=hf_dataset([0], CLASSES[::-1]))
    fails_with("called train", "there is test", test=hf_dataset([0], CLASSES))
    fails_with("'10'", "needs names", train=hf_dataset([0], ["10", "2"]))
    write_hf("parquet", tmp_path / "cut", train=hf_dataset([0], CLASSES))
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
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        whole, "JPEG"
    )
    path = data / "oxford_pets" / "images" / "train_2.jpg"
    records = images.load_images(["pets"], ALL, 0, 0, {"root": str(data)})[1]["pets"]["train"]
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

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    good = io.BytesIO()
    picture(5).save(good, "PNG")
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": good.getvalue()[:40], "path": None}, None]
    datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 1]}, features=features).save_to_disk(
        str(tmp_path / "d")
    )
    image = {"dataset": str(tmp_path / "d"), "split": "train", "row": 0, "column": "image"}
    assert pixel(image) == 5
    for row in (1, 2, 3):
        with pytest.raises(decoding.BadImage, match=f"row {row} of {tmp_path / 'd'}, split train"):
            decoding.open_image(image | {"row": row})
    with pytest.raises(UserError, match=r"column photo.*made with"):
        decoding.open_image(image | {"column": "photo"})
