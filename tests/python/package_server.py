"""A small package index on this machine that misbehaves as told."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FILENAME = "thing-1.0-py3-none-any.whl"


@dataclass
class PackageServer:
    """Serves /simple/thing/ and, from /files/, CONTENT."""

    root: str = ""  # "http://127.0.0.1:port"
    json_form: bool = False  # PEP 691 in place of PEP 503
    listed_digest: str = DIGEST  # what the index says; "" for nothing
    limit: int | None = None  # bytes after which the connection ends
    ranges: bool = True  # whether Range is honoured
    status: int | None = None  # answers everything with this error
    altered: bool = False
    credentials: str = ""  # expected Authorization header, "" for none
    redirect: str = ""  # where /files/ sends to
    content_type: str = ""  # of everything, in place of its own
    encoding: str = ""  # Content-Encoding, though the content is as it is
    length: int | None = None  # what Content-Length says; -1: there is none
    endless: bool = False  # bodies go on for ever
    drip: float = 0.0  # seconds between bytes of a body
    header_drip: float = 0.0  # seconds between headers, of which there is no end
    sent: int = 0  # bytes of bodies, as far as this machine took them
    starts: list[int] = field(default_factory=list)  # first byte of each file sent
    authorizations: list[str | None] = field(default_factory=list)  # header of each request

    def page(self) -> tuple[str, bytes]:
        """Content type and text of the project's page."""
        url = f"../../files/{FILENAME}"
        if self.json_form:
            hashes = f'{{"sha256": "{self.listed_digest}"}}' if self.listed_digest else "{}"
            text = (
                f'{{"files": [{{"filename": "{FILENAME}", "url": "{url}", "hashes": {hashes}}}]}}'
            )
            return "application/vnd.pypi.simple.v1+json", text.encode()
        fragment = f"#sha256={self.listed_digest}" if self.listed_digest else ""
        return "text/html", f'<a href="{url}{fragment}">{FILENAME}</a>'.encode()


@contextmanager
def package_server() -> Iterator[PackageServer]:
    """Runs on a free port of this machine."""
    state = PackageServer()
    stopped = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            authorization = self.headers.get("Authorization")
            state.authorizations.append(authorization)
            if state.status is not None:
                self.send_error(state.status)
            elif state.credentials and authorization != state.credentials:
                self.send_error(401)
            elif self.path == "/simple/thing/":
                kind, page = state.page()
                self._send(200, page, kind)
            elif not self.path.endswith(f"/files/{FILENAME}"):
                self.send_error(404)
            elif state.redirect:
                self.send_response(302)
                self.send_header("Location", state.redirect)
                self.end_headers()
            else:
                self._send_file()

        def _send_file(self) -> None:
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            state.starts.append(start)
            content = CONTENT[::-1] if state.altered else CONTENT
            self._send(206 if start else 200, content[start:], "application/zip", state.limit)

        def _send(self, status: int, content: bytes, kind: str, limit: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", state.content_type or kind)
            if state.encoding:
                self.send_header("Content-Encoding", state.encoding)
            if state.length != -1:
                length = len(content) if state.length is None else state.length
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with suppress(OSError):  # the client has gone
                self._write(content[:limit])

        def _write(self, content: bytes) -> None:
            step = 1 if state.drip else 1 << 16
            while not stopped.is_set():
                for at in range(0, len(content), step):
                    self.wfile.write(content[at : at + step])
                    state.sent += step
                    if stopped.wait(state.drip):
                        return
                if not state.endless:
                    return

        def end_headers(self) -> None:
            with suppress(OSError):
                if state.header_drip:
                    self.flush_headers()
                while state.header_drip and not stopped.wait(state.header_drip):
                    self.wfile.write(b"X-More: of it\r\n")
                super().end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    state.root = f"http://127.0.0.1:{httpd.server_address[1]}"
    try:
        yield state
    finally:
        stopped.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()
