"""Every data set that a client can bring by its name, and what each family of them shares.

The data sets of a family go with one public set; the `data` of a backbone's preset names the family. All
else follows from these tables: --clients, --dataset, --data-root, and the reading of a run's data.

To add a data set of a family that is there, write one entry in the family's CLIENTS:

    bigbench.Task      a BIG-bench task: its name and a prompt
    questions.TextSet  a multiple-choice data set: where it lies and a function from a row to a record
    images.ImageSet    an image data set: where it lies
    glyphs.world       an alphabet: its letters, and in LOOKS its colours
"""

from collections.abc import Callable
from typing import NamedTuple

from metamoe.data import bigbench, images, questions, user
from metamoe.data.decoding import check_images
from metamoe.data.glyphs import world


class Alphabet(NamedTuple):
    """Drawn letters of world.CLIENTS."""

    family = "glyphs"

    def load(self, name, sizes, seed, source):
        return world.load_glyphs([name], sizes, 0, seed)[1][name]


# name -> entry: `family`, and load(name, sizes, seed, source) = {"train" | "validation" | "test": records}
# with sizes {"train": n, "validation": n, "test": n}. The parts are fixed by the random seed.
LETTERS = dict.fromkeys(world.CLIENTS, Alphabet())
DATASETS = bigbench.CLIENTS | bigbench.MORE_CLIENTS | questions.CLIENTS | images.CLIENTS | LETTERS


class Family(NamedTuple):
    """What the data sets of a family share."""

    # public(size, source, skip_bad) = records of D_0, the same for every random seed
    public: Callable
    # source(sources, its data sets): what its loads take, made once; else `sources`, run.json's
    source: Callable = lambda sources, datasets: sources
    # from folders and hub ids (--data-root, --dataset), where a size of 0 means all there is
    files: bool = False
    # check(records, name): UserError where a client's records cannot be used, after everything is read
    check: Callable = lambda records, name: None
    default: int | None = None  # a run's clients, where none are named: so many, the first; None: all


FAMILIES = {
    "bigbench": Family(bigbench.public_records, bigbench.read_archive, default=len(bigbench.CLIENTS)),
    "qa": Family(questions.public_text, files=True),
    "images": Family(images.public_images, files=True, check=check_images),
    "glyphs": Family(lambda size, source, skip_bad: world.load_glyphs([], {}, size, 0)[0]),
}


class Own(NamedTuple):
    """How a kind of backbone reads the user's own data."""

    client: Callable  # (name, path, sizes, seed, skip_bad) = {part: records}
    public: Callable  # (size, sources, skip_bad) = records of D_0 from sources["public"]


OWN = {"text": Own(user.own_text, questions.public_text), "clip": Own(user.own_images, images.public_images)}


def datasets_of(family):
    """{name: entry} of the family's data sets."""
    return {name: entry for name, entry in DATASETS.items() if entry.family == family}


def default_clients(family):
    """The clients of a run that names none."""
    return list(datasets_of(family))[: FAMILIES[family].default]


def kept_out(family, clients):
    """{name: entry} of the data sets whose texts D_0 must not hold, in a run of these clients.

    The default's, whichever of them take part; all of the family's where others do, so that larger
    federations share one D_0, too.
    """
    known, default = datasets_of(family), default_clients(family)
    if known.keys() & set(clients) <= set(default):
        return {name: known[name] for name in default}
    return known
