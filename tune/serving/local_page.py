"""HTTP pages that are served on this machine only."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REFUSAL = "this page answers no other site: type its address, http://127.0.0.1 and the port, into the browser"


class LocalPage(BaseHTTPRequestHandler):
    """One request to a page that listens on 127.0.0.1."""

    timeout = 60  # seconds to wait for data of a request

    def parse_request(self) -> bool:
        """Whether to handle the request. Answers one that another site sent with 403, whatever its method."""
        if not super().parse_request():
            return False
        if not self.from_here:
            self.close_connection = True  # the body is not read
            self.send(HTTPStatus.FORBIDDEN, "text/plain", REFUSAL)
            return False
        return True

    @property
    def from_here(self) -> bool:
        """Whether the browser names this machine as the page's host, and no other site as the sender.

        A foreign Host is DNS rebinding. Browsers set Sec-Fetch-Site; those that do not set Origin on a POST.
        A link that is clicked elsewhere may open the page: the other site cannot read it.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        local = host.rsplit(":", 1)[0] in ("127.0.0.1", "localhost")
        own = origin is None or origin == f"http://{host}"
        clicked = self.command == "GET" and self.headers.get("Sec-Fetch-Dest") == "document"
        return (
            local and own and (clicked or self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin"))
        )

    def send(self, status: HTTPStatus, kind: str, text: str) -> None:
        """Send a text with MIME type `kind`."""
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        """Requests are not logged to the terminal."""


def serve(page: Callable[..., LocalPage], port: int, words: str, say: Callable[[str], None]) -> int:
    """Serve on this machine only, until Ctrl-C. `words` are printed before the address.

    ValueError if the port is out of range or taken.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} must be from 0 to 65535")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), page)
    except OSError as error:
        raise ValueError(f"--port {port} is taken ({error.strerror}); give another, or 0 for any") from None
    with server:
        say(f"{words} http://127.0.0.1:{server.server_port} (Ctrl-C ends).")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("Ended.")
    return 0
