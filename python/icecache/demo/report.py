"""The demo's report: one HTML file that needs no network."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from icecache.demo.document import Document
from icecache.demo.run import Row
from icecache.demo.trace import QuestionTrace
from icecache.errors import Error


@dataclass(frozen=True)
class Facts:
    """What the report says about the run itself."""

    model: str
    num_layers: int
    num_kv_heads: int
    traced_budget: int
    machine: str
    config: dict[str, Any]


def write_report(
    path: Path,
    facts: Facts,
    document: Document,
    tokens: list[str],
    rows: list[Row],
    traces: list[QuestionTrace],
) -> None:
    """`tokens`: the text of each token of the document. Raises Error where it cannot be written."""
    data = {
        "facts": asdict(facts),
        "document": {"name": document.name, "tokens": tokens},
        "rows": [
            _finite({**asdict(row), "tokens_per_second": row.tokens_per_second}) for row in rows
        ],
        "questions": [trace.to_dict() for trace in traces],
    }
    # A "<" in the document's text could end the page's script, or, by "<!--<script>", keep its end
    # from being seen.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files("icecache.demo").joinpath("report.html").read_text(encoding="utf-8")
    try:
        path.write_text(template.replace("/*DATA*/null", text), encoding="utf-8")
    except OSError as error:
        raise Error(f"the report cannot be written to {path}: {error.strerror or error}") from error


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Without NaN, which JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
