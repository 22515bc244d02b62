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


def run_main(main):
    """Run a script's `main()`; what the user can put right ends in one line on stderr and exit code 2."""
    if FOLLOWER:  # what there is to say is said once, by the main process; libraries draw no bars either
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
            errno.EEXIST,
            errno.ENOTDIR,
        ):
            raise
        sys.exit(
            _complain(
                f"cannot write or read {error.filename or 'a file'}: {error.strerror}; "
                "nothing half-written was left"
            )
        )
    except SafetensorError as error:  # its way to say that the disk is full
        if "(os error " not in str(error):
            raise
        sys.exit(_complain(f"cannot write or read a file: {error}; nothing half-written was left"))
    except RuntimeError as error:
        if not (SEVERAL and "by peer" in str(error)):
            raise
        # a connection broke: another process has ended and says why, and the launcher ends this one
        time.sleep(60)
        sys.exit(2)
    except KeyboardInterrupt:
        if not FOLLOWER:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    # the same is wrong in the main process, as a rule: it says so, and the launcher ends this one
    if FOLLOWER:
        time.sleep(10)
    if os.environ.get("METAMOE_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
