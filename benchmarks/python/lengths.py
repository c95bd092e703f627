"""Lengths of sequences as options and as parts of names."""

from __future__ import annotations

import typer


def parse_lengths(text: str) -> list[int]:
    """ "2048,8192" as numbers. Raises typer.BadParameter for anything else or below 512."""
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"must be numbers and commas, got {text!r}") from None
    if min(lengths) < 512:
        raise typer.BadParameter(f"must be at least 512, got {min(lengths)}")
    return lengths


def size(length: int) -> str:
    """ "32k" for 32,768."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
