"""How a script's process starts and ends: its standard streams, Ctrl-C, its exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from tune.cli.options import guarded


def start(parser: Callable[[], argparse.ArgumentParser], run: Callable[[argparse.Namespace], int]) -> int:
    """Read the command line and run a script. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams()
    try:
        return guarded(run, parser().parse_args())
    finally:
        _flush()


def _open_streams() -> None:
    """Open the standard streams that are closed, so that no file takes their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")  # class names in a terminal that is not UTF-8


def _flush() -> None:
    """Write what is left for standard output. What nobody reads is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
