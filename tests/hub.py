"""A local stand-in for the Hugging Face hub, and a process that downloads from it."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

FETCH = (
    "import json, sys; from carmodels.models.backbones import known_backbones; "
    "from carmodels.models.weights import Weights; "
    "print(json.dumps(known_backbones(Weights('hub'), sys.argv[1:])))"
)


def fetch_from(
    endpoint: str, home: Path, backbone: str = "lcnet_050", **more: str
) -> subprocess.CompletedProcess[str]:
    """The download in a fresh process, from a hub at `endpoint`; `more`: of the environment.

    Prints what is known of the backbone, as JSON.
    """
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", FETCH, backbone],
        env=env,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )


@contextmanager
def serving(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """A hub with the repositories in `folder`; `seen` of it are the paths that were asked for."""
    handler = partial(Hub, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of the hub as a download needs: the file, its length, a commit and an entity tag."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The hub's answer for a file that a repository does not hold."""
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "a" * 40)
        name = self.path.rpartition("/")[2]  # the cache keeps one file for each tag
        self.send_header("ETag", f'"{hashlib.sha1(name.encode()).hexdigest()}"')
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
