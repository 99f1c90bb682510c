"""Who may see the page, and what else can be asked for: nobody and nothing."""

import http.client
import threading
from collections.abc import Iterator

import pytest

from eggroll_llm.errors import ConfigError
from eggroll_llm.system.local_page import LocalPage


@pytest.fixture(scope="module")
def server() -> Iterator[LocalPage]:
    with LocalPage(lambda: "<p>ä</p>", "default-src 'none'") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: LocalPage, path: str = "/", method: str = "GET", hosts: tuple[str, ...] = ("localhost",), **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in [*(("Host", host) for host in hosts), *headers.items()]:
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_it_listens_on_this_machine_only(server: LocalPage) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:8000", "127.0.0.1:1"])
def test_the_page_goes_to_a_browser_here_with_headers_that_shield_it(server: LocalPage, host: str) -> None:
    status, text, headers = ask(server, hosts=(host,))
    assert (status, text, headers["Content-Type"]) == (200, "<p>ä</p>", "text/html; charset=utf-8")
    assert headers["Content-Security-Policy"] == "default-src 'none'"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Access-Control-Allow-Origin"] is None
    assert ask(server, hosts=(host,), If_None_Match=headers["ETag"])[:2] == (304, "")


@pytest.mark.parametrize(
    "hosts", [(), ("evil.example",), ("evil.example:80",), ("127.0.0.1.evil.example",), ("localhost", "evil.example")]
)
def test_a_name_that_is_not_this_machine_is_refused(server: LocalPage, hosts: tuple[str, ...]) -> None:
    status, text, _ = ask(server, hosts=hosts)
    assert (status, "<p>" in text) == (403, False)


def test_there_is_nothing_else_to_ask_for(server: LocalPage) -> None:
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/", "//etc/passwd", "/?x", "http://localhost/", "x"):
        assert ask(server, path)[:2] == (404, "There is one page here: /")
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask(server, method=method)[0] == 501


def test_a_port_that_cannot_be_had(server: LocalPage) -> None:
    for port in (server.server_address[1], 70_000):
        with pytest.raises(ConfigError, match=rf"^port {port}: cannot be used \(.*\)\. Name another one, or 0 for any"):
            LocalPage(lambda: "", "", port)
