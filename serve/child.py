"""`python -m serve.child MODULE [ARGUMENT ...]`: run a module that must not outlive its parent.

Standard input is a pipe that the parent holds and never writes to. When the parent ends, however it
ends, the pipe closes, and this process gets the SIGTERM that the parent could no longer send.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def main() -> None:
    """Watch standard input in the background and become the module."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _follow_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
