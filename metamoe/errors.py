"""Errors that the user can mend: one line on stderr, exit code 2 (with METAMOE_DEBUG=1 the traceback too)."""

import contextlib
import os
import signal
import sys
import time
import traceback

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can put right; printed as one line, exit code 2."""


# This process is one of several, under `accelerate launch` (see processes), and not the main one.
SEVERAL = int(os.environ.get("WORLD_SIZE", 1)) > 1
FOLLOWER = SEVERAL and os.environ.get("RANK", "0") != "0"

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process as Ctrl-C does; its argument is the signal's number."""


def run_main(main):
    """Run a script's `main()`; what the user can put right ends in one line on stderr and exit code 2."""
    if FOLLOWER:  # the main process says everything once; libraries draw no bars either
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False
    try:
        with _signals():
            _check_utf8()
            main()
    except UserError as error:
        _complain(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        _complain_of_disk(f"{error.filename or 'a file'}: {error.strerror}")
    except SafetensorError as error:  # how it says that the disk is full
        if "(os error " in str(error):
            _complain_of_disk(f"a file: {error}")
        _complain(f"a safetensors file is damaged ({error}): make it again")
    except RuntimeError as error:
        if not (SEVERAL and "by peer" in str(error)):
            raise
        # A connection broke: another process has ended and says why, and the launcher ends this one.
        time.sleep(60)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if not FOLLOWER and "METAMOE_RUN_ALL" not in os.environ:  # run_all.sh says it itself
            print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))


@contextlib.contextmanager
def _signals():
    """SIGTERM and SIGHUP end this process as Ctrl-C does, if they end it at all (`nohup`)."""
    own = os.getpid()

    def interrupt(number, frame):
        if os.getpid() != own:  # a process that decodes images, forked
            os._exit(128 + number)
        for each in ours:  # the first is enough, while temporary files are removed
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    ours = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    if FOLLOWER:  # has no files, and may be in a call that no handler interrupts
        ours = []
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _check_utf8():
    """UserError where the command line is not UTF-8: its words stand in files and in what is printed."""
    for before, word in zip(["", *sys.argv], sys.argv, strict=False):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            flag = f"{before} " if before.startswith("--") else ""
            raise UserError(f"{flag}{word!a}: must be UTF-8: give it another name") from None


def _complain_of_disk(what):
    _complain(f"cannot write or read {what}; nothing half-written was left")


def _complain(message):
    # As a rule the same is wrong in the main process: it says so, and the launcher ends this one.
    if FOLLOWER:
        time.sleep(10)
    if os.environ.get("METAMOE_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
