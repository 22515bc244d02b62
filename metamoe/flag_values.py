"""What the values of flags may be, checked by argparse. Needs Python's standard library alone."""

import argparse
import contextlib
import re

MOST = 10**9


def number(kind, least, most=MOST):
    """A flag's type: an int or a float (the `kind`) of this range."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:  # false for NaN
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be {what} from {least} to {most}")

    return convert


positive_int = number(int, 1)
count = number(int, 0)
random_seed = number(int, 0, 2**32 - 1)
positive_float = number(float, 1e-12)
not_negative = number(float, 0)
fraction = number(float, 0, 1)


def given_text(text):
    """A flag's type: any text but an empty one, which would read as if the flag were not there."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be UTF-8") from None
    return text


class Parser(argparse.ArgumentParser):
    """A parser whose flags without a type take given_text."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.register("type", None, given_text)


def one_line(message):
    """argparse's message as this project writes it: the flag by its first name, its value, what is wrong."""
    message = re.sub(r"^argument ([^:/]+)[^:]*", r"\1", message)
    return message.replace(": ", " ", 1) if ": must " in message else message
