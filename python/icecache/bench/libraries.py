"""Libraries and data of the benchmarks that are looked for only when they are used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from icecache.errors import Unavailable


def library(name: str) -> Any:
    """The module of this name. Raises Unavailable with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed: pip install 'icecache[bench]'") from error


def hub_file(repository: str, name: str) -> Path:
    """A file of a Hugging Face data set, fetched once.

    Raises Unavailable where it cannot be had; the message says which file to fetch by hand.
    """
    hub = library("huggingface_hub")
    try:
        return Path(hub.hf_hub_download(repository, name, repo_type="dataset"))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(
            f"{name} of the data set {repository} could not be fetched ({error}); "
            "fetch it elsewhere and name it as the data"
        ) from error
