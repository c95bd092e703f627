"""Where the user's pip looks for packages, and how it gets there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass

_PUBLIC_INDEX = "https://pypi.org/simple"


@dataclass(frozen=True)
class PipSettings:
    """The options of pip that decide where a package comes from; URLs may hold credentials."""

    indexes: tuple[str, ...] = (_PUBLIC_INDEX,)  # simple indexes, in order
    find_links: tuple[str, ...] = ()  # folders, files, and pages with links
    proxy: str = ""  # "": as the environment says
    cert: str = ""  # file with certificates of authorities; "": the system's
    client_cert: str = ""  # file with the user's own certificate and key
    trusted_hosts: tuple[str, ...] = ()  # "host" or "host:port" whose certificate is not checked
    timeout: float = 15.0  # seconds without a byte


def pip_settings() -> PipSettings:
    """What pip of this interpreter would use: its files, and over them the PIP_* variables.

    The variables alone where the environment has no pip.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    options = _of_listing(done.stdout) if done.returncode == 0 else {}
    options.update(_of_environment())
    return _settings(options)


def _of_listing(listing: str) -> dict[str, str]:
    """Options of the lines "section.name='value'"; [download] goes over [install] over [global]."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, "download": {}}
    for line in listing.split("\n"):
        key, equals, value = line.partition("=")
        section, dot, name = key.rpartition(".")
        if equals and dot and section in sections:
            with suppress(ValueError, SyntaxError):  # a notice, of another form
                sections[section][name] = str(ast.literal_eval(value.strip()))
    return {name: value for options in sections.values() for name, value in options.items()}


def _of_environment() -> dict[str, str]:
    return {
        name[4:].lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_") and value
    }


def _settings(options: dict[str, str]) -> PipSettings:
    indexes: tuple[str, ...] = ()
    if options.get("no-index", "").lower() not in {"1", "true", "yes", "on"}:
        first = options.get("index-url", _PUBLIC_INDEX)
        indexes = (first, *options.get("extra-index-url", "").split())
    try:
        timeout = float(options.get("timeout", options.get("default-timeout", "")))
    except ValueError:
        timeout = PipSettings.timeout
    return PipSettings(
        indexes=indexes,
        find_links=tuple(options.get("find-links", "").split()),
        proxy=options.get("proxy", ""),
        cert=options.get("cert", ""),
        client_cert=options.get("client-cert", ""),
        trusted_hosts=tuple(options.get("trusted-host", "").split()),
        timeout=timeout,
    )
