"""Results of benchmarks: the JSON form that all of them share, and tables on a terminal."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import icecache
from icecache.machine import cpu_name, usable_cores


@dataclass(frozen=True)
class Result:
    """One number: `name` is stable between versions, `params` say how it came about."""

    name: str
    value: float
    unit: str
    params: dict[str, Any] = field(default_factory=dict)


def commit() -> str | None:
    """Of the checkout that the package runs from, "-dirty" where its sources differ; else None."""

    def git(*command: str) -> str:
        folder = Path(icecache.__file__).parent
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        # Not the results: a benchmark that writes its own does not make the next one's dirty.
        changed = git("status", "--porcelain", "--", ":/csrc", ":/include", ":/python")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def machine() -> dict[str, Any]:
    """Hardware, versions and command line: what a number means nothing without."""
    build = icecache.build_info()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "simd": icecache.simd_level(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "icecache": build.version,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "command": " ".join(Path(word).name for word in sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, meta: dict[str, Any], results: list[Result]) -> None:
    """{"meta": {...}, "results": [{"name", "value", "unit", "params"}]}"""
    data = {"meta": meta, "results": [asdict(result) for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
