"""Ctrl-C or SIGTERM while a stage script is still importing, which takes seconds: one line and exit code 130.

`prime.cli` imports this before all else, and a stage script `prime.cli`. Nothing can be lost yet, so the process just
ends. Where work begins, `prime.runs.files.stop_between_writes` takes over.
"""

import os
import signal
import sys

SCRIPTS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STOPPED = "stopped; run the same command again to go on"


def _leave(signum: int, frame: object) -> None:
    os.write(2, f"{os.path.basename(sys.argv[0])}: {STOPPED}\n".encode())
    os._exit(130)


if os.path.dirname(os.path.abspath(sys.argv[0])) == SCRIPTS:  # not where others import the package
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _leave)
