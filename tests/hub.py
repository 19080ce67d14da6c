"""A local stand-in for the Hugging Face hub, and a process that downloads from it."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
from pathlib import Path

FETCH = (
    "from carmodels.models.backbones import fetch_weights; from carmodels.models.weights import Weights; "
    "fetch_weights(Weights('hub'), ['lcnet_050'])"
)


def fetch_from(endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """timm's own download in a fresh process, from a hub at `endpoint`; `more`: of the environment."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", FETCH], env=env, text=True, capture_output=True, timeout=200, check=False
    )


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of the hub as a download needs: the file, its length, a commit and an entity tag."""

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{"b" * 40}"')
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
