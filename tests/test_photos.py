"""Folders of one's own photos: what is read, what is not and why, and no photo in two parts."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamoe.data import user
from metamoe.data.decoding import BadImage, open_image
from metamoe.data.glyphs.model import Tokenizer
from metamoe.errors import UserError

ALL = dict(train=0, validation=0, test=0)


@pytest.fixture
def pets(tmp_path):
    """Two classes of 30 photos each, all different."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(30):
            colour = (8 * i, 100 * number, 0)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def read(folder, **sizes):
    return user.own_images("pets", str(folder), ALL | sizes, 0)


def images(parts):
    return {part: [record["image"] for record in records] for part, records in parts.items()}


def test_what_is_read_is_said(pets, capsys):
    assert sum(map(len, read(pets).values())) == 60
    assert "pets: cat 30, dog 30\n" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", (".JPG", ".jfif", ".jpe", ".webp", ".tiff", ".bmp", ".ppm"))
def test_formats_that_pillow_opens_are_read(pets, suffix):
    kind = {".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".ppm": "PPM"}.get(suffix.lower(), suffix[1:])
    Image.new("RGB", (8, 8), (200, 10, 10)).save(pets / "cat" / f"new{suffix}", format=kind)
    assert sum(map(len, read(pets).values())) == 61


def test_photos_in_folders_of_a_class_are_its_own(pets, capsys):
    (pets / "dog" / "2023").mkdir()
    for i in range(10):
        shutil.move(pets / "dog" / f"{i}.png", pets / "dog" / "2023")
    found = [record for records in read(pets).values() for record in records]
    assert sum(record["answer"] == "dog" for record in found) == 30
    assert "dog 30" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("test", "val", "train"))
def test_a_class_may_be_called_as_a_part_is(pets, name, capsys):
    shutil.move(pets / "cat", pets / name)
    assert len(read(pets)["train"][0]["choices"]) == 2
    assert f"{name} 30" in capsys.readouterr().out


def test_what_is_not_read_is_said_with_its_reason(pets, capsys):
    for i in range(10):
        (pets / "cat" / f"{i}.heic").write_bytes(b"x")
    (pets / "dog" / "notes.txt").write_text("x")
    (pets / "dog" / ".DS_Store").write_text("x")
    for name in (".ipynb_checkpoints", "@eaDir"):
        shutil.copytree(pets / "cat", pets / name)
    (pets / "bird").mkdir()
    parts = read(pets)
    assert parts["train"][0]["choices"] == ["cat", "dog"]
    out = capsys.readouterr().out
    for said in (".heic: 10", ".txt: 1", "folders: .ipynb_checkpoints, @eaDir", "without an image: bird"):
        assert said in out
    assert "DS_Store" not in out


def test_copies_of_a_photo_are_in_one_part(pets, capsys):
    for i in range(10):
        for copy in range(3):
            shutil.copy(pets / "cat" / f"{i}.png", pets / "cat" / f"copy {i} {copy}.png")
    found = images(read(pets))
    content = {part: {Path(path).read_bytes() for path in paths} for part, paths in found.items()}
    assert not content["train"] & (content["test"] | content["validation"])
    assert not content["validation"] & content["test"]
    assert "copies of validation or test images" in capsys.readouterr().out


def test_parts_that_are_folders_are_refused(pets, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(pets, tmp_path / "split" / part)
    with pytest.raises(UserError, match="train, val, not classes: .*split/train"):
        read(tmp_path / "split")


def test_photos_outside_any_class_are_told_where_to_go(pets):
    with pytest.raises(UserError, match="30 images lie in .*a folder with the class's name"):
        read(pets / "cat")


def test_a_caption_that_glyph_clip_cannot_read_is_refused():
    assert Tokenizer(16)(["alpha", ""]).shape == (2, 16)
    with pytest.raises(UserError, match="собака"):
        Tokenizer(16)(["собака"])


def opened(path, image, **options):
    image.save(path, **options)
    return open_image(str(path))


def test_16_bits_are_scaled_and_values_without_a_white_are_refused(tmp_path):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = opened(tmp_path / "a.png", Image.fromarray(grey))
    assert np.array_equal(np.asarray(found)[..., 0], np.round(grey / 257))
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        with pytest.raises(BadImage, match=f"mode {mode}"):
            opened(tmp_path / f"{mode}.tiff", Image.fromarray(grey.astype(dtype)))


def test_more_than_8_bits_are_scaled_as_the_file_says(tmp_path):
    """A TIFF has its bits and whether 0 is white; of a very long image the middle alone is kept."""
    for bits, white, pixels, want in ((12, 1, b"\xff\xf8\0", [255, 128]), (16, 0, b"\0\0\xff\xff", [255, 0])):
        (tmp_path / "a.tiff").write_bytes(tiff(bits, white, pixels))
        assert np.asarray(open_image(str(tmp_path / "a.tiff")))[0, :, 1].tolist() == want
    (tmp_path / "a.pgm").write_bytes(b"P5 40 1 1023\n" + b"\x03\xff" * 40)
    assert open_image(str(tmp_path / "a.pgm")).getpixel((0, 0)) == (255, 255, 255)


def tiff(bits, white, pixels):
    """A TIFF of 2 x 1 grey pixels."""
    fields = {256: 2, 257: 1, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    return header + struct.pack("<H", len(fields)) + entries + bytes(4)


def test_pixels_are_taken_as_stored_whatever_exif_says(tmp_path):
    """As open_clip and torchvision take them."""
    exif, image = Image.Exif(), Image.new("RGB", (6, 4))
    exif[274] = 6
    image.putpixel((0, 0), (0, 0, 255))
    found = opened(tmp_path / "a.png", image, exif=exif)
    assert found.size == (6, 4) and found.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("size", ((16_000, 1), (3, 400)))
def test_of_a_very_long_image_the_middle_is_taken(tmp_path, size):
    rows = np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[1], size[0])
    image = Image.fromarray((rows % 251).astype(np.uint8))
    found = np.asarray(opened(tmp_path / "long.png", image))[..., 0]
    assert max(found.shape) == 16 * min(size) and min(found.shape) == min(size)
    middle = [(whole - part) // 2 for whole, part in zip(rows.shape, found.shape, strict=True)]
    assert found[0, 0] == rows[middle[0], middle[1]] % 251
    assert opened(tmp_path / "fine.png", Image.new("L", (64, 4))).size == (64, 4)
