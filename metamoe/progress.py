"""Progress of a long step: a bar on a terminal, elsewhere a line every 30 seconds with the time left."""

import sys

from tqdm import tqdm

from metamoe.errors import FOLLOWER

SECONDS = 30  # between two lines in a log


class Lines:
    """What tqdm writes as a bar, written as lines."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        line = text.strip("\r\n ")
        if line:
            self.stream.write(line + "\n")

    def flush(self):
        self.stream.flush()


def progress(iterable=None, show=True, **options):
    """tqdm(iterable, **options), readable in a log too. show: False for a step too short to be worth it."""
    if not show or FOLLOWER:  # of several processes only the main one reports
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    layout = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {elapsed} so far, {remaining} left"
    options |= dict.fromkeys(("delay", "mininterval", "maxinterval"), SECONDS)  # a shorter step says nothing
    return tqdm(iterable, file=Lines(sys.stderr), bar_format=layout, **options)
