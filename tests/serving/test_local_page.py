"""Pages for this machine alone; what they show is tested with the scripts that serve them."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tune.commands import run_report
from tune.serving import drop_page, local_page
from tune.serving.local_page import REFUSAL, LocalPage, serve


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is taken .*; give another, or 0 for any"):
            serve(LocalPage, port, "Here:", print)


class Desk:
    """Notes what it is asked, as the drop page's desk."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def answer(self, content: bytes) -> dict[str, object]:
        self.asked.append(content)
        return {}

    parts = answer


@pytest.fixture(params=["drop page", "report"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Desk]]:
    """The port of one of the project's pages, and what is behind it."""
    desk = Desk()
    if request.param == "drop page":
        page = partial(drop_page._Visitor, desk, "the page")
    else:
        taken: list[type[LocalPage]] = []
        monkeypatch.setattr(local_page, "serve", lambda page, *rest: taken.append(page) or 0)
        study = SimpleNamespace(metadata={"begun": "today"})
        screen = SimpleNamespace(say=print)
        run_report.serve([study], lambda refresh: "the page", 0, screen)  # type: ignore[list-item, arg-type]
        [page] = taken
    with ThreadingHTTPServer(("127.0.0.1", 0), page) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port, desk
        server.shutdown()


def asked(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text of an answer. PORT in a header stands for the page's port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in {"Content-Length": "5" if method == "POST" else "0", **headers}.items():
        connection.putheader(name, value.replace("PORT", str(port)))
    connection.endheaders(b"image" if method == "POST" else None)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"},
    {"Host": "127.0.0.1.evil.example:PORT"},
    {"Host": ""},
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://127.0.0.1:PORT"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:PORT"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
]


@pytest.mark.server
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_another_site_sends_is_refused_in_one_line(
    served: tuple[int, Desk], method: str, headers: dict[str, str]
) -> None:
    port, desk = served
    path = "/answer" if method == "POST" else "/"
    assert asked(port, method, path, headers) == (403, REFUSAL)
    assert not desk.asked


@pytest.mark.server
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:PORT"},
        {"Host": "localhost:9999", "Origin": "http://localhost:9999"},  # a port forwarded by SSH
        {"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
def test_the_page_itself_and_a_typed_address_are_answered(
    served: tuple[int, Desk], headers: dict[str, str]
) -> None:
    port, desk = served
    assert asked(port, "GET", "/", headers) == (200, "the page")
    status, _ = asked(port, "POST", "/answer", headers)
    assert (status, desk.asked) in [(200, [b"image"]), (501, [])]  # a report takes no POST


@pytest.mark.server
def test_a_link_on_another_site_opens_the_page_and_a_form_there_sends_nothing(
    served: tuple[int, Desk],
) -> None:
    port, desk = served
    clicked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert asked(port, "GET", "/", clicked) == (200, "the page")
    assert asked(port, "POST", "/answer", clicked) == (403, REFUSAL)
    assert not desk.asked


def test_no_other_module_serves_pages() -> None:
    """Whoever adds a page inherits what refuses other sites."""
    packages = (Path(__file__).parents[2] / name for name in ("carmodels", "tune"))
    files = [file for package in packages for file in package.rglob("*.py")]
    assert [f.name for f in files if "http.server" in f.read_text()] == ["local_page.py"]
