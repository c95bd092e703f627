"""Requests made the way the user's pip makes them: proxy, certificates, credentials."""

from __future__ import annotations

import base64
import netrc
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from icecache.models.pip_settings import PipSettings

# What Network.open and reading its responses raise.
NETWORK_ERRORS = (OSError, HTTPException, ValueError)
_BLOCK = 1 << 16  # bytes of one read
_LEAST_RATE = 2048  # bytes a second: what is slower is given up

Connect = Callable[..., socket.socket]


class TooSlowError(TimeoutError):
    """A server that sends next to nothing."""


class Pace:
    """Holds what is read, by one response or several after each other, to a least rate."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._start, self._got = time.monotonic(), 0

    def blocks(self, response: Any) -> Iterator[bytes]:
        """What the response holds, as it comes. Raises TooSlowError."""
        while block := response.read1(_BLOCK):
            yield block
            self._got += len(block)
            self._check()
        self._check()

    def _check(self) -> None:
        seconds = time.monotonic() - self._start
        if seconds < self._patience:
            return
        if self._got < _LEAST_RATE * seconds:
            raise TooSlowError(f"too slow: {self._got} bytes in {seconds:.1f} s")
        self._start, self._got = time.monotonic(), 0


class Network:
    """Opens http, https and file URLs. Not for several threads at once."""

    def __init__(self, settings: PipSettings, *, patience: float | None = None) -> None:
        """`patience`: seconds until a server must have sent its headers, redirects included, and
        within which a Pace must be kept; a minute, or what pip's timeout asks for."""
        self._patience = max(60.0, 4 * settings.timeout) if patience is None else patience
        self._timeout = min(settings.timeout, self._patience)
        self._trusted = frozenset(settings.trusted_hosts)
        self._credentials: dict[str, str] = {}
        self._sockets: list[socket.socket] = []  # of connections whose headers are awaited
        for url in (*settings.indexes, *settings.find_links):
            with suppress(ValueError):  # told when it is opened
                self._remember(urlsplit(url))
        proxies = {"http": settings.proxy, "https": settings.proxy} if settings.proxy else None
        self._checked = self._opener(proxies, settings, check=True)
        self._unchecked = self._opener(proxies, settings, check=False)

    def open(self, url: str, headers: dict[str, str]) -> Any:
        """The response, to be closed by the caller. Raises one of NETWORK_ERRORS."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", "file"):
            raise ValueError(f"expected http, https or file, got {without_credentials(url)}")
        self._remember(parts)
        request = urllib.request.Request(without_credentials(url), headers=headers)
        credentials = self._credentials.get(_host(parts)) or _of_netrc(parts.hostname)
        if credentials:
            # Unredirected: another host that the index sends us to must not see them.
            encoded = base64.b64encode(credentials.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        trusted = {parts.hostname, _host(parts)} & self._trusted
        opener = self._unchecked if trusted else self._checked
        with self._deadline():
            response = opener.open(request, timeout=self._timeout)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            response.close()
            raise ValueError(f"it is sent as {encoding}, which was not asked for")
        return response

    def pace(self) -> Pace:
        """Of a download, or of a page."""
        return Pace(self._patience)

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """Ends the connections that are opened inside when patience does.

        Their own timeout begins anew with each byte: a server could send headers for ever.
        """
        over = threading.Event()

        def end() -> None:
            over.set()
            for one in [*self._sockets]:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._patience, end)
        timer.daemon = True
        timer.start()
        cause: BaseException | None = None
        try:
            yield
        except NETWORK_ERRORS as error:
            if not over.is_set():
                raise
            cause = error
        finally:
            timer.cancel()
            while self._sockets:
                self._sockets.pop().close()
        if over.is_set():  # headers that were cut off look whole
            raise TooSlowError(f"no answer within {self._patience:g} s") from cause

    def _connect(self, *given: Any, **options: Any) -> socket.socket:
        made = socket.create_connection(*given, **options)
        self._sockets.append(made.dup())  # TLS takes the socket itself away
        return made

    def _opener(
        self, proxies: dict[str, str] | None, settings: PipSettings, check: bool
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
            _PlainHandler(self._connect),
            _SecureHandler(self._connect, context),
            _SameHostKeepsCredentials(),
        )

    def _remember(self, parts: SplitResult) -> None:
        if parts.username is not None:
            self._credentials[_host(parts)] = (
                f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            )


class _PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, connect: Connect) -> None:
        super().__init__()
        self._connect = connect

    def http_open(self, req: urllib.request.Request) -> Any:
        make: Any = partial(_connection, HTTPConnection, self._connect)
        return self.do_open(make, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, connect: Connect, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._connect, self._certificates = connect, context

    def https_open(self, req: urllib.request.Request) -> Any:
        make: Any = partial(_connection, HTTPSConnection, self._connect)
        return self.do_open(make, req, context=self._certificates)


def _connection(kind: Callable[..., Any], connect: Connect, host: str, **options: Any) -> Any:
    """A connection to `host` ("name:port") whose socket `connect` will make."""
    made = kind(host, **options)
    made._create_connection = connect
    return made


class _SameHostKeepsCredentials(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            text = f"redirection to {without_credentials(newurl)} is not allowed"
            raise urllib.error.HTTPError(req.full_url, code, text, headers, fp)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        credentials = req.unredirected_hdrs.get("Authorization")
        if new and credentials and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", credentials)
        return new


def without_credentials(url: str) -> str:
    """`url` without "user:password@", for messages and requests."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL
        return url.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=_host(parts))) if parts.netloc else url


def reason(error: BaseException) -> str:
    """What a network error says, in few words."""
    if isinstance(error, urllib.error.HTTPError):
        return " ".join(f"HTTP {error.code} {error.reason}".split())
    inner = getattr(error, "reason", None) or error
    return str(getattr(inner, "strerror", None) or inner) or type(error).__name__


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
