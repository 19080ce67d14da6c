"""python tune/report.py results/demo

Write a study's report: report.html in its folder, one page that opens without a network. With --serve the
page is shown at a local address instead, and follows a search that goes on.
"""

from __future__ import annotations

import argparse
import html
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from carmodels.files import user_path
from carmodels.study import Study
from tune import setup
from tune.console import Screen
from tune.page import render, write_report

REFRESH_SECONDS = 20
PORT = 8770


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = setup.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", metavar="STUDY_DIR", type=Path, help="a folder under results/")
    p.add_argument("--serve", action="store_true", help="show the page at a local address until Ctrl-C")
    p.add_argument("--port", type=int, metavar="N", help=f"of that address ({PORT}; 0: any)")
    return p


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Write the page and say where it is, or serve it."""
    study = Study(user_path(options.study))
    if options.serve:
        return serve(study, PORT if options.port is None else options.port, screen)
    if options.port is not None:
        raise ValueError(f"--port {options.port} is for --serve; add that or leave it out")
    screen.say(f"Report: {write_report(study)}")
    return 0


def serve(study: Study, port: int, screen: Screen) -> int:
    """Show the page on this machine alone, made anew for every request, until Ctrl-C."""
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} must be from 0 to 65535")
    facts = study.facts  # one clear line where this is no study

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                status, text = HTTPStatus.OK, render(study, refresh=REFRESH_SECONDS)
            except ValueError as error:
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, waiting(str(error))
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *words: object) -> None:
            """Nothing: the terminal is for what matters."""

    with ThreadingHTTPServer(("127.0.0.1", port), Page) as server:
        screen.say(
            f"Report of the search of {facts['begun']}: http://127.0.0.1:{server.server_port} (Ctrl-C ends)."
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            screen.say("Ended.")
    return 0


def waiting(words: str) -> str:
    """A page that looks again by itself."""
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    return f"<!doctype html>{refresh}<title>Waiting</title><p>{html.escape(words)}</p>"


if __name__ == "__main__":
    sys.exit(setup.guarded(run, parser().parse_args()))
