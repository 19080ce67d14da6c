"""A local page to drop images on. It shows the class, the confidence and the parts that support it."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from carmodels.ensembling.network import Ensemble, load_image
from carmodels.ensembling.occlusion import occlusion_map
from carmodels.study import Study
from tune.serving import local_page
from tune.serving.inference import Threshold

MOST_BYTES = 40_000_000  # per image
MOST_CLASSES = 5  # shown on the page


@dataclass(frozen=True)
class Desk:
    """The ensemble behind the page. A lock admits one image at a time."""

    ensemble: Ensemble
    limit: Threshold
    turn: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, content: bytes) -> dict[str, Any]:
        """The most likely classes of an image, in order. ValueError if the file is not an image."""
        with self.turn:
            probs = self.ensemble.probabilities([self._opened(content)])[0]
        names = self.ensemble.spec.class_names
        order = np.argsort(-probs, kind="stable")[:MOST_CLASSES].tolist()
        return {
            "sure": bool(self.limit.sure(probs[None])[0]),
            "classes": [{"column": k, "name": names[k], "probability": float(probs[k])} for k in order],
        }

    def parts(self, content: bytes) -> dict[str, Any]:
        """Occlusion map: drop in the top class's probability when a part is hidden, row by row."""
        with self.turn:
            image = self._opened(content)
            column = int(self.ensemble.probabilities([image])[0].argmax())
            return {"falls": occlusion_map(self.ensemble, image, column).tolist()}

    def _opened(self, content: bytes) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image"
            path.write_bytes(content)
            return load_image(path, self.ensemble.spec.max_size)


def serve(study: Study, ensemble: Ensemble, limit: Threshold, port: int, say: Callable[[str], None]) -> int:
    """Serve the page on this machine only, until Ctrl-C. Images are not kept."""
    visitor = partial(_Visitor, Desk(ensemble, limit), render(study, limit))
    return local_page.serve(visitor, port, "Drop images on", say)


def render(study: Study, limit: Threshold) -> str:
    """The page as HTML."""
    here = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined)
    names = study.metadata["class_names"]
    return environment.get_template("drop.html").render(
        name=study.folder.name, limit=limit, names=names, most_bytes=MOST_BYTES
    )


class _Visitor(local_page.LocalPage):
    """Handles one request."""

    def __init__(self, desk: Desk, page: str, *arguments: Any) -> None:
        self.desk, self.page = desk, page
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.path == "/":
            self.send(HTTPStatus.OK, "text/html", self.page)
        else:
            self.send(HTTPStatus.NOT_FOUND, "text/plain", "there is one page, /")

    def do_POST(self) -> None:
        jobs: dict[str, Callable[[bytes], dict[str, Any]]] = {
            "/answer": self.desk.answer,
            "/parts": self.desk.parts,
        }
        length = self.headers.get("Content-Length", "")
        if self.path not in jobs:
            self._refuse(HTTPStatus.NOT_FOUND, "images go to /answer or /parts")
        elif not length.isdecimal() or int(length) > MOST_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an image may have {MOST_BYTES // 10**6} MB at most"
            )
        else:
            try:
                found = jobs[self.path](self.rfile.read(int(length)))
            except ValueError as reason:
                self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, f"This file is of no use: {reason}.")
            else:
                self.send(HTTPStatus.OK, "application/json", json.dumps(found))

    def _refuse(self, status: HTTPStatus, words: str) -> None:
        self.close_connection = True
        self.send(status, "application/json", json.dumps({"error": words}))
