"""Work of tune/report.py: writes a study's page or serves it."""

from __future__ import annotations

import argparse
import html
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from carmodels.files import user_path
from carmodels.study import Study
from tune.cli.options import out_file
from tune.monitor.terminal import Screen
from tune.reporting import comparison, page
from tune.serving import local_page

REFRESH_SECONDS = 20


def run(options: argparse.Namespace, screen: Screen, port: int) -> int:
    """Write the page and print its path, or serve it."""
    studies = [Study(user_path(folder)) for folder in options.studies]
    if out := out_file(options):
        for study in studies:
            study.refuse_own(out)
    if options.thumbnails:
        add_thumbnails(studies[0], options, screen)
    several = len(studies) > 1
    if options.serve:
        make = partial(comparison.render, studies) if several else partial(page.render, studies[0])
        return serve(studies, make, port, screen)
    path = comparison.write_comparison(studies, out) if several else page.write_report(studies[0], out)
    for study in studies:
        if study.damage:
            screen.say(f"{study.damage}.", "yellow")
    screen.say(f"{'Comparison' if several else 'Report'}: {path}")
    if warning := comparison.holdout_warning(comparison.opened(studies)) if several else "":
        screen.say(warning, "yellow")
    return 0


def add_thumbnails(study: Study, options: argparse.Namespace, screen: Screen) -> None:
    """Write thumbnails of the ensemble's worst mistakes for the page."""
    import torch  # these imports take seconds, and only thumbnails need them

    from carmodels.ensembling.network import load_ensemble
    from tune.cli import session
    from tune.reporting.thumbnails import write_thumbnails

    ensemble = load_ensemble(study).to("cuda" if torch.cuda.is_available() else "cpu")
    write_thumbnails(study, ensemble, session.data_of(study, options, screen))


def serve(studies: list[Study], make: Callable[[int], str], port: int, screen: Screen) -> int:
    """Serve the page to this machine only, until Ctrl-C. Each request renders it again."""
    begun = ", ".join(study.metadata["begun"] for study in studies)  # ValueError without a study

    class Page(local_page.LocalPage):
        def do_GET(self) -> None:
            try:
                status, text = HTTPStatus.OK, make(REFRESH_SECONDS)
            except ValueError as error:
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, waiting(str(error))
            self.send(status, "text/html", text)

    return local_page.serve(Page, port, f"Report of the search of {begun}:", screen.say)


def waiting(words: str) -> str:
    """A page that reloads itself."""
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    return f"<!doctype html>{refresh}<title>Waiting</title><p>{html.escape(words)}</p>"
