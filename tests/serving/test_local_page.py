"""Pages for this machine alone; what they show is tested with the scripts that serve them."""

from __future__ import annotations

import socket

import pytest

from tune.serving.local_page import LocalPage, serve


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is taken .*; give another, or 0 for any"):
            serve(LocalPage, port, "Here:", print)
