"""Private texts that stand in the public set: a client counts them on its own machine, and nobody is told."""

from collections import Counter
from itertools import chain

from metamoe.records import read_records


def overlap(private, public, whole_text=False):
    """How many texts of `private` stand in `public` word for word; records of images are left out.

    Compared are the prompts, with `whole_text` prompt and answer, without regard to case and white space.
    Only hashes of the private texts are in memory.
    """
    texts, both = Counter(hashes(private, whole_text)), set()
    for text in hashes(public, whole_text):
        if text in texts:
            both.add(text)
    return sum(texts[text] for text in both)


def hashes(records, whole_text):
    for record in records:
        if "prompt" in record:
            text = record["prompt"] + (record["answer"] if whole_text else "")
            yield hash(" ".join(text.casefold().split()))


def warn_of_overlap(name, folder, public, whole_text=False):
    """Print one line where D_0 holds texts of the client's private folder. It is written nowhere."""
    parts = [read_records(part) for part in sorted(folder.glob("*.jsonl"))]
    count = overlap(chain(*parts), public, whole_text)
    if count:
        share = f"{count} of its {sum(map(len, parts))} private texts stand in the public set word for word"
        print(f"select_proxies: WARNING: {name}: {share}", flush=True)
