"""What a search opens to the network: pages on loopback alone, Ray's own ports to those with its token."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPException
from urllib.request import urlopen

import psutil
import pytest
import ray

# Ray's gRPC ports listen everywhere, whatever its options say; none of them is ours.
RAYS_OWN = (
    "raylet",
    "gcs_server",
    "ray::",
    "runtime_env",
    "dashboard",
    "log_monitor",
    "monitor.py",
    "pytest",
)


def listening() -> list[tuple[str, int, str]]:
    """(address, port, process) of what this process and its children listen on."""
    here = psutil.Process()
    names = {p.pid: " ".join(p.cmdline()) for p in [here, *here.children(recursive=True)]}
    found = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in names]
    return [(c.laddr.ip, c.laddr.port, names[c.pid]) for c in found]


def test_the_dashboard_listens_on_loopback_alone(own_ray: str) -> None:
    port = int(own_ray.rsplit(":", 1)[1])
    assert [ip for ip, at, _ in listening() if at == port] == ["127.0.0.1"]


@pytest.mark.usefixtures("own_ray")
def test_what_listens_elsewhere_is_rays_own() -> None:
    elsewhere = [name for ip, _, name in listening() if ip != "127.0.0.1"]
    assert not [name for name in elsewhere if not any(part in name for part in RAYS_OWN)]


@pytest.mark.usefixtures("own_ray")
def test_without_the_token_others_can_read_metrics_and_no_other_page() -> None:
    """Ray's metrics, for Prometheus, are open to all. What docs/security.md says of them is this."""
    pages = []
    for ip, port, _ in listening():
        host = "127.0.0.1" if ip in ("0.0.0.0", "::") else ip
        with suppress(OSError, HTTPException), urlopen(f"http://{host}:{port}/metrics", timeout=5) as page:
            pages.append((ip, page.read().decode()))
    elsewhere = [text for ip, text in pages if ip != "127.0.0.1"]  # other tests may have pages on loopback
    assert elsewhere
    for text in elsewhere:
        values = [line for line in text.splitlines() if not line.startswith("#")]
        assert values
        assert not [line for line in values if not re.fullmatch(r"[a-zA-Z_:][\w:]*({.*})? \S+", line)]


@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize(("environment", "enters"), [({}, True), ({"RAY_AUTH_MODE": "disabled"}, False)])
def test_nobody_enters_without_the_token(environment: dict[str, str], enters: bool) -> None:
    address = ray.get_runtime_context().gcs_address
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False); print('entered', ray.cluster_resources())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ("entered" in done.stdout) is enters, done.stderr
    assert ("AuthenticationError" in done.stderr) is not enters, done.stderr
