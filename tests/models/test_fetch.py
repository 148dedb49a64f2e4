"""Weights behind a URL: whole and with the named checksum, or one reason why not, in seconds."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kineticlip.models.fetch import checksum_in, fetch_url

BODY = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves BODY; the last part of the path says what goes wrong."""

    seen: list[float | None]
    let_go: threading.Event

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.seen.append(socket.getdefaulttimeout())
        name = self.path.rpartition("/")[2]
        if name == "absent.pt":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        whole = name not in ("cut.pt", "silent.pt")
        self.wfile.write(BODY if whole else BODY[:1000])
        if name == "silent.pt":
            self.wfile.flush()
            self.let_go.wait(20)

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path))
    Handler.seen, Handler.let_go = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}"
        Handler.let_go.set()
        listener.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server: str, tmp_path: Path) -> None:
    url = f"{server}/clip/models/{SHA256}/x.pt"
    for _ in range(2):
        path = fetch_url(url)
        assert path == tmp_path / ".cache" / "clip" / "x.pt"
        assert path.read_bytes() == BODY
    assert len(Handler.seen) == 1


def test_another_file_in_the_cache_is_replaced(server: str, tmp_path: Path) -> None:
    there = tmp_path / ".cache" / "clip" / "x.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"half of a download")
    assert fetch_url(f"{server}/{SHA256}/x.pt") == there
    assert there.read_bytes() == BODY


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (f"{SHA256}/cut.pt", "the connection ended after 1000 of 1280000 bytes"),
        (f"{'0' * 64}/x.pt", "another checksum than its URL names"),
        (f"{SHA256}/absent.pt", "HTTP Error 404"),
        (f"{SHA256}/silent.pt", "timed out"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(
    server: str, tmp_path: Path, path: str, reason: str
) -> None:
    found = fetch_url(f"{server}/{path}", timeout=0.3)
    assert isinstance(found, str)
    assert found.startswith("127.0.0.1: ") and reason in found and "\n" not in found
    assert list(tmp_path.rglob("*.pt")) == []


@pytest.mark.parametrize("default", [None, 7.0])
@pytest.mark.parametrize("name", ["x.pt", "silent.pt", "absent.pt"])
def test_the_timeout_is_of_the_request_and_not_of_the_process(
    server: str, default: float | None, name: str
) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)
    try:
        fetch_url(f"{server}/{SHA256}/{name}", timeout=0.3)
        assert socket.getdefaulttimeout() == default
    finally:
        socket.setdefaulttimeout(before)
    assert Handler.seen == [default]  # while the answer was awaited


@pytest.mark.parametrize(
    ("url", "checksum"),
    [
        (f"https://host/clip/models/{SHA256}/ViT-B-16.pt", SHA256),
        ("https://host/v0.2-weights/vit_b_16-laion400m_e32-55e67d44.pt", "55e67d44"),
        ("https://host/v0.2-weights/vit_b_32-laion2b_e16-af8dbd0c.pth", "af8dbd0c"),
        ("https://host/metaclip/b16_fullcc2.5b.pt", ""),
    ],
)
def test_urls_name_their_checksums(url: str, checksum: str) -> None:
    assert checksum_in(url) == checksum
