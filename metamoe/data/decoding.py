"""Images of records, decoded."""

import errno
import io

import numpy as np

from metamoe.data.sources import open_dataset
from metamoe.errors import UserError
from metamoe.progress import progress


class BadImage(Exception):
    """An image that is missing or does not decode; the message names its file or row."""


LONGEST = 16  # times as long as wide: of a longer image the middle is taken
_OPENED = {}  # datasets opened in this process


def open_image(image, seen=_OPENED):
    """The RGB PIL image of a record's `image`, pixels as stored (no turning by EXIF).

    `seen` keeps opened datasets. Raises BadImage where the image is missing or does not decode to its end,
    UserError where its dataset does not load.
    """
    from PIL import Image

    name = file = image
    if isinstance(image, dict):
        name = f"row {image['row']} of {image['dataset']}, split {image['split']}"
        dataset = dataset_of(image, name, seen)
    try:
        if isinstance(image, dict):
            cell = dataset[image["row"]][image["column"]]
            file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        with Image.open(file) as opened:
            return to_rgb(middle(opened), opened)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged data
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EISDIR):
            raise
        raise BadImage(f"{name}: {type(error).__name__}: {error}") from None


def middle(image):
    """The middle of an image that is far longer than wide: resized whole, it would fill the memory.

    Of the resized image scoring uses the central square, which is not lost; training crops lie in the middle.
    """
    short, long = sorted(image.size)
    if long <= LONGEST * short:
        return image
    half = LONGEST * short // 2
    width, height = (min(size, 2 * half) for size in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_rgb(image, opened):
    """8 bits a channel; 16 bits are scaled, where Pillow would cut them off. ValueError for other values.

    opened: the whole image as its file was opened, which knows the format; a crop does not.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I" and opened.format in ("PNG", "PPM"):
        tags = getattr(opened, "tag_v2", {})  # of a TIFF: 258 is its bits, 262 whether 0 is white
        values = np.asarray(image).astype(np.float64) / (2 ** tags.get(258, (16,))[0] - 1)
        values = 1 - values if tags.get(262) == 0 else values
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        why = f"mode {image.mode}, whose white nobody knows"
        raise ValueError(f"its values are of {why}: save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns of the direct way
        image = image.convert("RGBA")
    return image.convert("RGB")


def dataset_of(image, name, seen):
    """The dataset that an image is a row of, with the column of undecoded images alone."""
    import datasets

    key = tuple(image.get(field) for field in ("dataset", "config", "split", "column"))
    if key not in seen:
        column, dataset = image["column"], open_dataset(image, name).get(image["split"])
        if dataset is None or column not in dataset.features:
            why = f"no such split or no column {column} there any more"
            raise UserError(f"{name}: {why}: take the dataset that the run was made with")
        seen[key] = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return seen[key]


def bad_images(records, client):
    """Yield (index, what is wrong with it) of a client's images that do not decode; decodes them all."""
    for index, record in enumerate(progress(records, desc=f"checking {client}", unit="image")):
        try:
            open_image(record["image"])
        except BadImage as error:
            yield index, error


def check_images(records, client):
    """UserError naming the first of a client's images that does not decode."""
    for _, error in bad_images(records, client):
        advice = "replace it, or take a whole copy of the dataset"
        raise UserError(f"client {client}: bad image {error}: {advice}")
