"""Names that users give, and what to say of those that nothing has."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from icecache.errors import InvalidArgument


def unknown(kind: str, name: str, known: Iterable[str]) -> InvalidArgument:
    """The error for a `kind` of thing called `name`, with the nearest known ones, or all."""
    names = list(known)
    near = get_close_matches(name, names, 3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
    return InvalidArgument(f"{kind}: no {kind} is called {name!r}; {hint}")
