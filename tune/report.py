"""python tune/report.py results/demo

Write a study's report: report.html in its folder, one page that opens without a network. Of several studies
the page puts them side by side (compare.html beside the first). With --serve the page is shown at a local
address instead, and follows searches that go on.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path

import torch

from carmodels.ensembling.network import load_ensemble
from carmodels.files import user_path
from carmodels.study import Study
from tune.cli import session
from tune.cli.options import CACHE_LIMIT, Parser, add_cache_options, guarded, out_file
from tune.monitor.terminal import Screen
from tune.reporting import comparison, page
from tune.reporting.mistakes import write_thumbnails
from tune.serving import local_page

REFRESH_SECONDS = 20
PORT = 8770


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add(
        "studies",
        metavar="STUDY_DIR",
        type=Path,
        nargs="+",
        help="a folder under results/; several are compared",
    )
    add("--out", type=Path, metavar="HTML", help="write the page to this file instead")
    add(
        "--thumbnails",
        action="store_true",
        help="show images of the most confident mistakes, with what spoke for each answer",
    )
    add_cache_options(p)
    add("--serve", action="store_true", help="show the page at a local address until Ctrl-C")
    add("--port", type=int, metavar="N", help=f"of that address ({PORT}; 0: any)")
    return p


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Write the page and say where it is, or serve it."""
    check(options)
    studies = [Study(user_path(folder)) for folder in options.studies]
    out = out_file(options)
    if options.thumbnails:
        ensemble = load_ensemble(studies[0]).to("cuda" if torch.cuda.is_available() else "cpu")
        write_thumbnails(studies[0], ensemble, session.data_of(studies[0], options, screen))
    several = len(studies) > 1
    if options.serve:
        make = partial(comparison.render, studies) if several else partial(page.render, studies[0])
        return serve(studies, make, PORT if options.port is None else options.port, screen)
    path = comparison.write_comparison(studies, out) if several else page.write_report(studies[0], out)
    screen.say(f"{'Comparison' if several else 'Report'}: {path}")
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, before any work."""
    if options.port is not None and not options.serve:
        raise ValueError(f"--port {options.port} is for --serve; add that or leave it out")
    if options.out and options.serve:
        raise ValueError(f"--out {options.out} is for a page that is written; leave it or --serve out")
    out_file(options)
    if not options.thumbnails and (options.cache or options.cache_limit != CACHE_LIMIT):
        raise ValueError("--cache and --cache-limit are for --thumbnails; add that or leave them out")
    if options.thumbnails and len(options.studies) > 1:
        raise ValueError("--thumbnails is for the report of one study; leave it or the other studies out")


def serve(studies: list[Study], make: Callable[[int], str], port: int, screen: Screen) -> int:
    """Show the page on this machine alone, made anew for every request, until Ctrl-C."""
    begun = ", ".join(study.metadata["begun"] for study in studies)  # one clear line where one is no study

    class Page(local_page.LocalPage):
        def do_GET(self) -> None:
            if not self.from_here:
                return self.refuse_others()
            try:
                status, text = HTTPStatus.OK, make(REFRESH_SECONDS)
            except ValueError as error:
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, waiting(str(error))
            return self.send(status, "text/html", text)

    return local_page.serve(Page, port, f"Report of the search of {begun}:", screen.say)


def waiting(words: str) -> str:
    """A page that looks again by itself."""
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    return f"<!doctype html>{refresh}<title>Waiting</title><p>{html.escape(words)}</p>"


if __name__ == "__main__":
    sys.exit(guarded(run, parser().parse_args()))
