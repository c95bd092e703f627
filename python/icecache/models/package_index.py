"""Looks a file up where pip would: folders of links, and simple indexes (PEP 503 and 691)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

from icecache.errors import Error
from icecache.models.network import NETWORK_ERRORS, Network, reason, without_credentials
from icecache.models.pip_settings import PipSettings

_MOST_BYTES = 8 << 20  # of an index of one project, or a page with links
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"


@dataclass(frozen=True)
class _Link:
    url: str
    digest: str  # sha256, "" where the source gives none

    @property
    def filename(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]


def find_file(
    network: Network, settings: PipSettings, project: str, filename: str, digest: str
) -> str:
    """URL of `filename` of `project`, from the first source that has it.

    A file that its source says has another sha256 than `digest` is passed over. Raises Error
    naming each source and why it does not serve.
    """
    sources = [*settings.find_links]
    sources += [f"{index.rstrip('/')}/{project}/" for index in settings.indexes]
    failures = []
    for source in sources:
        try:
            links = [link for link in _links(network, source) if link.filename == filename]
        except (*NETWORK_ERRORS, RuntimeError) as error:  # RuntimeError: nobody's home
            failures.append(f"{without_credentials(source)}: {reason(error)}")
            continue
        for link in links:
            if link.digest in ("", digest):
                return link.url
        why = f"no {filename}"
        if links:
            why = f"its {filename} has sha256 {links[0].digest}, expected {digest}"
        failures.append(f"{without_credentials(source)}: {why}")
    tried = "; ".join(failures) or "pip is configured with neither an index nor links"
    raise Error(f"{filename} was not found ({tried})")


def _links(network: Network, source: str) -> list[_Link]:
    path = _local_path(source)
    if path is not None:
        if (path / "index.html").is_file():
            path /= "index.html"
        if path.is_dir():
            return [_Link(file.resolve().as_uri(), "") for file in path.iterdir()]
        if path.suffix not in {".html", ".htm"}:
            return [_Link(path.resolve().as_uri(), "")] if path.is_file() else []
        return _html_links(path.read_text(encoding="utf-8"), path.resolve().as_uri())
    with network.open(source, {"Accept": _ACCEPT}) as response:
        kind = response.headers.get("Content-Type", "text/html")
        if "json" not in kind and "html" not in kind:
            raise ValueError(f"expected an index in HTML or JSON, got {kind}")
        text = _page(network, response).decode("utf-8")
        base = response.url
    return _json_links(text, base) if "json" in kind else _html_links(text, base)


def _page(network: Network, response: Any) -> bytes:
    text = bytearray()
    for block in network.pace().blocks(response):
        text += block
        if len(text) > _MOST_BYTES:
            raise ValueError(f"expected an index of at most {_MOST_BYTES >> 20} MiB, got more")
    length = response.headers.get("Content-Length")
    if length is not None and len(text) < int(length):
        raise ConnectionError(f"the connection ended at {len(text)} of {length} bytes")
    return bytes(text)


def _local_path(source: str) -> Path | None:
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme in {"http", "https"} else Path(source).expanduser()


def _json_links(text: str, base: str) -> list[_Link]:
    try:
        return [
            _Link(urljoin(base, file["url"]), file.get("hashes", {}).get("sha256", ""))
            for file in json.loads(text)["files"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a simple index: {error!r}") from error
    except RecursionError as error:
        raise ValueError("not a simple index: nested too deeply") from error


def _html_links(text: str, base: str) -> list[_Link]:
    parser = _Anchors()
    try:
        parser.feed(text)
    except AssertionError as error:  # how it tells some broken declarations
        raise ValueError(f"not a simple index: {str(error)[:80]}") from error
    links = []
    for href in parser.hrefs:
        url, fragment = urldefrag(urljoin(base, href))
        name, _, value = fragment.partition("=")
        links.append(_Link(url, value if name == "sha256" else ""))
    return links


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]
