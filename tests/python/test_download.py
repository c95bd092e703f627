"""Downloads from package indexes: found, resumed, verified, refused."""

from __future__ import annotations

import base64
import os
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

NOWHERE = "http://127.0.0.1:9"  # a port that refuses


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with package_server() as running:
        yield running


def silent(have: int, total: int | None) -> None:
    pass


def download(server: PackageServer, target: Path) -> None:
    network = Network(PipSettings())
    fetch(network, f"{server.root}/files/{FILENAME}", target, DIGEST, silent, retry_after=0)


def find(settings: PipSettings) -> str:
    return find_file(Network(settings), settings, "thing", FILENAME, DIGEST)


def test_progress_counts_bytes(server: PackageServer, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    target = tmp_path / "file"
    url = f"{server.root}/files/{FILENAME}"
    fetch(Network(PipSettings()), url, target, DIGEST, lambda *call: calls.append(call))
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


def test_errors_of_the_server_and_no_server_are_told(server: PackageServer, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(icecache.Error, match=r"failed: HTTP 503 Service Unavailable"):
        download(server, tmp_path / "file")
    with pytest.raises(icecache.Error, match="Connection refused"):
        fetch(Network(PipSettings()), f"{NOWHERE}/file", tmp_path / "file", DIGEST, silent)


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


def test_no_index_at_all_is_told() -> None:
    with pytest.raises(icecache.Error, match="neither an index nor links"):
        find(PipSettings(indexes=()))


@pytest.mark.parametrize("page", [b"not json", b"[]", b'{"files": [{}]}', b"\xff"])
def test_a_page_that_is_no_index_is_told(
    server: PackageServer, monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    monkeypatch.setattr(PackageServer, "page", lambda self: ("application/json", page))
    with pytest.raises(icecache.Error, match="was not found"):
        find(PipSettings(indexes=(f"{server.root}/simple",)))


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
    fetch(Network(settings), url, tmp_path / "copy", DIGEST, silent)
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
    fetch(Network(settings), url, tmp_path / "file", DIGEST, silent)
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
        fetch(network, url, tmp_path / "file", DIGEST, silent)
        assert other.authorizations == [None]
    server.redirect = f"{server.root}/elsewhere"
    with pytest.raises(icecache.Error, match="HTTP 404"):
        fetch(network, url, tmp_path / "again", DIGEST, silent)
    assert server.authorizations[-2:] == [basic("me:secret")] * 2


def test_the_proxy_is_used(server: PackageServer, tmp_path: Path) -> None:
    settings = PipSettings(proxy=server.root)  # to a proxy, the path is the whole URL
    url = f"http://far.example/files/{FILENAME}"
    fetch(Network(settings), url, tmp_path / "file", DIGEST, silent)
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
