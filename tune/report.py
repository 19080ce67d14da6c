"""python tune/report.py results/demo

Write a study's report: report.html in its folder, one page that opens without a network. Of several studies
the page puts them side by side (compare.html beside the first). With --serve the page is shown at a local
address instead, and follows searches that go on.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports last ends it without a traceback

import argparse
import sys

from tune.cli.entry import start
from tune.cli.options import (
    CACHE_LIMIT,
    Parser,
    add_cache_options,
    check_address_space,
    check_cache_limit,
    out_file,
    path,
)

PORT = 8770


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(__doc__)
    add = p.add_argument
    add(
        "studies",
        metavar="STUDY_DIR",
        type=path,
        nargs="+",
        help="a folder under results/; several are compared",
    )
    add("--out", type=path, metavar="HTML", help="write the page to this file instead")
    add("--serve", action="store_true", help="show the page at a local address until Ctrl-C")
    add("--port", type=int, metavar="N", help=f"port of that address ({PORT}; 0: any)")
    add("--thumbnails", action="store_true", help="show images of the most confident mistakes")
    add_cache_options(p)
    return p


def run(options: argparse.Namespace) -> int:
    """Check the options, then import the command, which takes seconds, and run it."""
    check(options)
    from tune.commands import run_report
    from tune.monitor.terminal import Screen

    with Screen() as screen:
        return run_report.run(options, screen, PORT if options.port is None else options.port)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a wrong combination of options."""
    if options.port is not None and not options.serve:
        raise ValueError(f"--port {options.port} is for --serve; add that or leave it out")
    if options.out and options.serve:
        raise ValueError(f"--out {options.out} is for a page that is written; leave it or --serve out")
    out_file(options)
    if not options.thumbnails and (options.cache or options.cache_limit != CACHE_LIMIT):
        raise ValueError("--cache and --cache-limit are for --thumbnails; add that or leave them out")
    check_cache_limit(options)
    check_address_space(report=True)
    if options.thumbnails and len(options.studies) > 1:
        raise ValueError("--thumbnails is for the report of one study; leave it or the other studies out")


if __name__ == "__main__":
    sys.exit(start(parser, run))
