"""The prompts that quality is measured on: samples of LongBench, and needles in essays."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from icecache import InvalidArgument
from icecache.bench.prompts import Prompt, default_prompts

_BESIDE = Path(__file__).resolve().parents[2].parent / "shared"
DATA = Path(os.environ.get("ICECACHE_SHARED", _BESIDE)) / "data"


def check_data(data: Path) -> None:
    """Raises InvalidArgument where `data` is not a folder with longbench_mini/ and text/."""
    if not (data / "longbench_mini").is_dir():
        raise InvalidArgument(f"--data must hold longbench_mini/ and text/, got {data}")


def quality_prompts(tokenizer: Any, data: Path, count: int) -> list[Prompt]:
    """The first `count`."""
    essays = data / "text" / "PaulGrahamEssays.json"
    return list(islice(default_prompts(tokenizer, data / "longbench_mini", essays), count))
