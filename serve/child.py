"""`python -m serve.child [-] MODULE [ARGUMENT ...]`: run a module that must not outlive its parent.

Standard input is a pipe that the parent holds. When the parent ends, however it ends, the pipe
closes, and this process gets the SIGTERM that the parent could no longer send. With `-`, the first
line of the pipe is a JSON list of further arguments, which every user of the machine could read on
the command line.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading


def main() -> None:
    """Watch standard input in the background and become the module."""
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-":
        sys.argv = [*sys.argv[1:], *json.loads(_first_line())]
    threading.Thread(target=_follow_parent, daemon=True).start()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _first_line() -> bytes:
    """Read no further than the line's end; the rest is for the thread that watches."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(sys.stdin.fileno(), 1)
        if not piece:
            sys.exit("The parent ended before it sent the arguments.")
        line += piece
    return line


def _follow_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
