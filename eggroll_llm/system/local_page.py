"""One page for a browser on this machine: bound to 127.0.0.1, read-only, with no other address than "/".

A web site that the reader visits can make the browser ask this server, under a name of its own (DNS rebinding): so
requests for another host than this machine are refused, and other sites may not read, embed or frame the answer. Other
users of the machine can open the page.
"""

import hashlib
import re
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from eggroll_llm.errors import ConfigError

ADDRESS = "127.0.0.1"
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)  # any port: ssh forwards from another one


class LocalPage(ThreadingHTTPServer):
    """Serves what `page` returns, from several threads. Use as a context manager."""

    daemon_threads = True

    def __init__(self, page: Callable[[], str], policy: str, port: int = 0) -> None:
        """Listen on a port, 0 for a free one; `policy` is the page's content security policy. Raises ConfigError."""
        self.page, self.policy = page, policy
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"port {port}: cannot be used ({reason}). Name another one, or 0 for any.") from error

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: LocalPage
    timeout = 10  # seconds: browsers open connections on which they ask nothing

    def do_GET(self) -> None:
        """Answer with the page, or with nothing when the browser has it."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This page is for a browser on this machine only.")
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is one page here: /")
        else:
            self._answer(HTTPStatus.OK, "text/html", self.server.page())

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, body = HTTPStatus.NOT_MODIFIED, b""
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "ETag": tag,
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the browser has gone
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""
