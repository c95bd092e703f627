"""Optional libraries, imported when a baseline first needs them."""

from __future__ import annotations

from typing import Any

from icecache.errors import Unavailable


def load_faiss() -> Any:
    """The module; Unavailable where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise Unavailable("FAISS is not installed: pip install 'icecache[bench]'") from error
    return faiss
