"""What the commands in tools/ share. Each imports it before anything else.

On a CPU that other programs use as well, OpenMP's threads would burn the time in which they wait for one another, and a
step take 2 to 20 times as long, unless they are told to sleep. OpenMP reads this once, when PyTorch is loaded.
"""

import logging
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def imported() -> None:
    """Say that a tool has all its modules: from now on Ctrl-C is an exception again, which its main takes care of."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_) -> None:
    sys.stderr.write("stopped\n")
    sys.stderr.flush()
    os._exit(130)


# PyTorch and its like take seconds to load, and an exception in their midst would be a traceback, or be taken for a
# module that is missing. A tool alone may set this, no program that imports it.
_IS_TOOL = Path(sys.argv[0]).resolve().is_relative_to(Path(__file__).resolve().parents[1])
if _IS_TOOL:
    logging.raiseExceptions = False  # with a full disk, every line of a log would be a traceback
if _IS_TOOL and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
