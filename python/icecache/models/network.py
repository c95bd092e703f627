"""Requests made the way the user's pip makes them: proxy, certificates, credentials."""

from __future__ import annotations

import base64
import netrc
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from icecache.models.pip_settings import PipSettings

# What Network.open and reading its responses raise.
NETWORK_ERRORS = (OSError, HTTPException, ValueError)


class Network:
    """Opens http, https and file URLs. Not for several threads at once."""

    def __init__(self, settings: PipSettings) -> None:
        self._timeout = settings.timeout
        self._trusted = frozenset(settings.trusted_hosts)
        self._credentials: dict[str, str] = {}
        for url in (*settings.indexes, *settings.find_links):
            self._remember(urlsplit(url))
        proxies = {"http": settings.proxy, "https": settings.proxy} if settings.proxy else None
        self._checked = _opener(proxies, settings, check=True)
        self._unchecked = _opener(proxies, settings, check=False)

    def open(self, url: str, headers: dict[str, str]) -> Any:
        """The response, to be closed by the caller. Raises one of NETWORK_ERRORS."""
        parts = urlsplit(url)
        self._remember(parts)
        request = urllib.request.Request(without_credentials(url), headers=headers)
        credentials = self._credentials.get(_host(parts)) or _of_netrc(parts.hostname)
        if credentials:
            # Unredirected: another host that the index sends us to must not see them.
            encoded = base64.b64encode(credentials.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        trusted = {parts.hostname, _host(parts)} & self._trusted
        opener = self._unchecked if trusted else self._checked
        return opener.open(request, timeout=self._timeout)

    def _remember(self, parts: SplitResult) -> None:
        if parts.username is not None:
            self._credentials[_host(parts)] = (
                f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            )


class _SameHostKeepsCredentials(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        credentials = req.unredirected_hdrs.get("Authorization")
        if new and credentials and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", credentials)
        return new


def without_credentials(url: str) -> str:
    """`url` without "user:password@", for messages and requests."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=_host(parts))) if parts.netloc else url


def reason(error: BaseException) -> str:
    """What a network error says, in few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    inner = getattr(error, "reason", None) or error
    return str(getattr(inner, "strerror", None) or inner) or type(error).__name__


def _opener(
    proxies: dict[str, str] | None, settings: PipSettings, check: bool
) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if settings.cert:
        context.load_verify_locations(settings.cert)
    if settings.client_cert:
        context.load_cert_chain(settings.client_cert)
    if not check:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return urllib.request.build_opener(
        urllib.request.ProxyHandler(proxies),
        urllib.request.HTTPSHandler(context=context),
        _SameHostKeepsCredentials(),
    )


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _of_netrc(host: str | None) -> str | None:
    if not host:
        return None
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return f"{found[0]}:{found[2] or ''}" if found else None
