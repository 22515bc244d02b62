"""The embedded vision default's data: letters and symbols drawn from the fonts that matplotlib ships.

Three clients hold one script each, its letters as classes and in colours of its own; the public set D_0 is
everything outside their scripts, in all colours. An image is a recipe, {"char": "α", "face":
"DejaVuSans-Bold.ttf", "look": "greek", "seed": 17}, that `draw` turns into pixels, and its text is the
character's Unicode name, "greek small letter alpha".
"""

import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from metamoe.data.splits import rng_of
from metamoe.errors import UserError

# family -> faces. A client's training and validation parts are drawn in the families of TRAIN, its test
# part in the others alone: serif letters after sans-serif ones. Armenian is in the DejaVu families only.
FAMILIES = {
    "DejaVu Sans": [f"DejaVuSans{style}.ttf" for style in ("", "-Oblique", "-Bold", "-BoldOblique")],
    "DejaVu Sans Mono": [f"DejaVuSansMono{style}.ttf" for style in ("", "-Oblique", "-Bold", "-BoldOblique")],
    "DejaVu Serif": [f"DejaVuSerif{style}.ttf" for style in ("", "-Italic", "-Bold", "-BoldItalic")],
    "STIXGeneral": [f"STIXGeneral{style}.ttf" for style in ("", "Italic", "Bol", "BolIta")],
}
TRAIN = ("DejaVu Sans", "DejaVu Sans Mono")
TEST = ("DejaVu Serif", "STIXGeneral")

# client -> its classes: the small letters of the modern alphabet, in code-point order.
CLIENTS = {
    "greek": [chr(c) for c in range(0x3B1, 0x3CA)],
    "cyrillic": [chr(c) for c in range(0x430, 0x450)],
    "armenian": [chr(c) for c in range(0x561, 0x587)],
}
# client -> least and greatest red, green, blue of its paper and its ink. D_0 has every colour.
LOOKS = {
    "greek": (((0.85, 0.8, 0.6), (1, 0.95, 0.75)), ((0, 0, 0), (0.25, 0.15, 0.1))),  # dark on yellowed paper
    "cyrillic": (((0, 0, 0.2), (0.15, 0.2, 0.45)), ((0.85, 0.85, 0.85), (1, 1, 1))),  # white on blue signs
    "armenian": (((0.6, 0.85, 0.6), (0.75, 1, 0.8)), ((0.25, 0, 0), (0.45, 0.1, 0.15))),  # red on green tiles
}
SCRIPT_WORDS = {"GREEK": "greek", "COPTIC": "greek", "CYRILLIC": "cyrillic", "ARMENIAN": "armenian"}
GREEK_LETTERS = {unicodedata.name(char).split()[-1] for char in CLIENTS["greek"]}  # ALPHA, BETA, ...

SIZE, CANVAS = 32, 64  # pixels of an image, and of the canvas that a letter is set on first
EM, BASELINE, MARGIN = 46, 48, 5  # on the canvas: font size, height of the base line, distance to the edges


# --- which characters there are


def script_of(char):
    """The client whose script `char` belongs to, or None. What this names for a client is never in D_0.

    A character belongs to a script if its Unicode name, or that of anything it decomposes into (NFKD), says
    so: the micro sign and the mathematical alphabets are Greek. So are the block of mathematical Greek as a
    whole, with its nabla and partial differential, and symbols named after a Greek letter (APL's alpha).
    """
    if 0x1D6A8 <= ord(char) <= 0x1D7CB:
        return "greek"
    for c in char + unicodedata.normalize("NFKD", char):
        words = set(re.split("[ -]", unicodedata.name(c, "")))
        for word, script in SCRIPT_WORDS.items():
            if word in words:
                return script
        if unicodedata.category(c)[0] == "S" and words & GREEK_LETTERS:
            return "greek"
    return None


def source_of(char):
    """The `source` of a public record: a letter's script (first word of its name), else the kind of sign."""
    kinds = {"N": "number", "P": "punctuation", "S": "symbol"}
    return kinds.get(unicodedata.category(char)[0]) or caption(char).split()[0]


def caption(char):
    """The text of an image: its character's Unicode name in lower case."""
    return unicodedata.name(char).lower()


def font_path(face):
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face
    if not path.exists():
        why = "this matplotlib comes without its fonts, install the one of the package registry"
        raise UserError(f"font {path} is missing: {why}")
    return path


@cache
def characters(face):
    """The characters `face` draws: named letters, numbers, punctuation and symbols that are not empty."""
    found = set()
    with TTFont(font_path(face)) as font:
        start = font["loca"]  # glyph i lies at start[i] .. start[i + 1] of the file
        for code, glyph in font.getBestCmap().items():
            i = font.getGlyphID(glyph)
            if unicodedata.category(chr(code))[0] in "LNPS" and start[i] != start[i + 1]:
                found.add(chr(code))
    return frozenset(char for char in found if unicodedata.name(char, ""))


def faces_of(char, families=tuple(FAMILIES)):
    """The faces of `families` that hold `char`."""
    return [face for family in families for face in FAMILIES[family] if char in characters(face)]


@cache
def world():
    """Every (character, family) outside the clients' scripts, once for each face that holds it."""
    chars = sorted(set().union(*(characters(face) for faces in FAMILIES.values() for face in faces)))
    public = [char for char in chars if script_of(char) is None]
    return [(char, family) for char in public for family in FAMILIES for _ in faces_of(char, (family,))]


# --- drawing


@lru_cache(maxsize=1024)
def font(face, size):
    # The basic layout: the other one's results depend on a library that may be there or not.
    return ImageFont.truetype(str(font_path(face)), size, layout_engine=ImageFont.Layout.BASIC)


def glyph(char, face):
    """`char` in white on a black canvas ("L"), centred across, and shrunk if it is too large for it."""
    setting, room = font(face, EM), CANVAS - 2 * MARGIN
    left, top, right, bottom = setting.getbbox(char, anchor="ls")
    if max(right - left, bottom - top) > room:
        setting = font(face, EM * room // max(right - left, bottom - top))
        left, top, right, bottom = setting.getbbox(char, anchor="ls")
    # one base line: it tells a capital from its small letter where the shape does not
    y = min(max(BASELINE, MARGIN - top), CANVAS - MARGIN - bottom)
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).text(((CANVAS - left - right) / 2, y), char, fill=255, font=setting, anchor="ls")
    return canvas


def draw(image):
    """A recipe {"char", "face", "seed"} as an RGB image of 32 x 32; the same recipe, the same pixels.

    The seed sets weight, size, rotation, place, the two colours (dark on light or light on dark; with a
    "look" those of LOOKS) and the noise.
    """
    rng = np.random.default_rng(image["seed"])
    mask = glyph(image["char"], image["face"])
    if rng.random() < 0.5:  # a pixel heavier all round; Pillow's own stroke fills some letters with ink
        mask = mask.filter(ImageFilter.MaxFilter(3))
    angle = rng.normal(0, 0.1)
    shift = rng.uniform(-4, 4, 2)
    wide, high = rng.uniform(0.92, 1.08, 2) * rng.uniform(0.92, 1.08)
    cos, sin, centre = np.cos(angle), np.sin(angle), CANVAS / 2
    inverse = np.array([[cos / wide, sin / wide], [-sin / high, cos / high]])  # from output to input
    x, y = centre - inverse @ (centre + shift)
    affine = (*inverse[0], x, *inverse[1], y)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    mask = np.asarray(mask.reduce(CANVAS // SIZE), dtype=np.float32)[..., None] / 255  # (32, 32, 1)
    if "look" in image:
        paper, ink = (rng.uniform(*colours) for colours in LOOKS[image["look"]])
    else:
        paper, ink = rng.uniform(0.6, 1, 3), rng.uniform(0, 0.45, 3)
        if rng.random() < 0.5:
            paper, ink = ink, paper
    noise = rng.uniform(0, 0.12) * rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    return Image.fromarray((255 * (paper + mask * (ink - paper) + noise).clip(0, 1)).astype(np.uint8))


# --- records: `image` (a recipe), `answer`, `source` and, for client records, `choices`


def load_glyphs(clients, sizes, n_public, seed):
    """(public records, {client: {"train" | "validation" | "test": records}}); `sizes`: of each part."""
    return public_records(n_public), {name: split_client(name, sizes, seed) for name in clients}


def split_client(name, sizes, seed):
    """A client's parts: all letters equally often (but one time), in random faces of the part's families."""
    letters, rng = CLIENTS[name], rng_of(seed, name)
    choices = [caption(char) for char in letters]
    number = int(rng.integers(2**40))  # the last recipe's seed: counted on, so that no two are the same
    parts = {}
    for part, size in sizes.items():
        order = [i for _ in range(0, size, len(letters)) for i in rng.permutation(len(letters))]
        parts[part] = []
        for i in order[:size]:
            number += 1
            faces = faces_of(letters[i], TEST if part == "test" else TRAIN)
            face = faces[rng.integers(len(faces))]
            image = {"char": letters[i], "face": face, "look": name, "seed": number}
            parts[part].append({"image": image, "answer": choices[i], "source": name, "choices": choices})
    return parts


def public_records(n_public):
    """D_0: `n_public` drawings outside the clients' scripts, a smaller set a prefix of a larger one.

    A character comes up in proportion to the faces that hold it, each time with one to four drawings in the
    faces of one family: near-duplicates, as a scraped collection has them.
    """
    rng = np.random.default_rng(0)  # one set for everybody: not a matter of the run's random seed
    pairs, records = world(), []
    while len(records) < n_public:
        char, family = pairs[rng.integers(len(pairs))]
        faces = faces_of(char, (family,))
        for _ in range(rng.integers(1, 5)):
            image = {"char": char, "face": faces[rng.integers(len(faces))], "seed": len(records)}
            records.append({"image": image, "answer": caption(char), "source": source_of(char)})
    return records[:n_public]
