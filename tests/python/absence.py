"""What a test does where something that it needs is absent."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(reason: str, remedy: str) -> NoReturn:
    """Skips the test; fails it with ICECACHE_REQUIRE_SHARED=1."""
    if os.environ.get("ICECACHE_REQUIRE_SHARED") == "1":
        pytest.fail(f"{reason}, but ICECACHE_REQUIRE_SHARED=1")
    pytest.skip(f"{reason} ({remedy})")
