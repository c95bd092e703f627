"""Gemma-3-270M: wide heads (D = 256), layers of a sliding window beside full ones, 32k positions.

Its terms of use are Gemma's: nothing here fetches it. A folder for `from_pretrained` is made from a
GGUF file of the model by

    python benchmarks/python/gemma3.py MODEL.gguf
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from icecache.models.cache import cache_root, make_folder
from icecache.models.gguf import convert

VARIABLE = "ICECACHE_GEMMA3"


def gemma3() -> Path:
    """Where the model is, whether it is there or not: what ICECACHE_GEMMA3 names, or the cache."""
    return Path(os.environ.get(VARIABLE) or cache_root() / "gemma-3-270m").expanduser()


def absent() -> str | None:
    """Why there is no model; None where there is one."""
    if (gemma3() / "config.json").is_file():
        return None
    return (
        f"Gemma-3-270M is not in {gemma3()}: set {VARIABLE} to a folder with it, or make one from "
        "a GGUF file by python benchmarks/python/gemma3.py MODEL.gguf"
    )


def main(
    gguf: Annotated[Path, typer.Argument(help="The model as a GGUF file.", exists=True)],
) -> None:
    """Make the model's folder from a GGUF file."""
    folder = gemma3()
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_folder(folder, lambda new: convert(gguf.resolve(), new))
    print(folder)


if __name__ == "__main__":
    typer.run(main)
