"""Errors that the user can mend: one line on stderr, exit code 2 (with METAMOE_DEBUG=1 the traceback too)."""

import errno
import os
import sys
import time
import traceback

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can put right; printed as one line, exit code 2."""


# This process is one of several, under `accelerate launch` (see processes), and not the main one.
SEVERAL = int(os.environ.get("WORLD_SIZE", 1)) > 1
FOLLOWER = SEVERAL and os.environ.get("RANK", "0") != "0"

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def run_main(main):
    """Run a script's `main()`; what the user can put right ends in one line on stderr and exit code 2."""
    if FOLLOWER:  # the main process says everything once; libraries draw no bars either
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False
    try:
        main()
    except UserError as error:
        _complain(str(error))
    except OSError as error:
        if error.errno not in DISK:
            raise
        _complain_of_disk(f"{error.filename or 'a file'}: {error.strerror}")
    except SafetensorError as error:  # how it says that the disk is full
        if "(os error " not in str(error):
            raise
        _complain_of_disk(f"a file: {error}")
    except RuntimeError as error:
        if not (SEVERAL and "by peer" in str(error)):
            raise
        # A connection broke: another process has ended and says why, and the launcher ends this one.
        time.sleep(60)
        sys.exit(2)
    except KeyboardInterrupt:
        if not FOLLOWER:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


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
