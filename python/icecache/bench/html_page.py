"""What pages of results are made of: a page that needs nothing beside itself, tables, plots."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from icecache.bench.libraries import library

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
  color: #1c2733; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #dde3e8; }
td { white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.ours { background: #eef5ff; }
figure { display: inline-block; margin: .5em 1em .5em 0; vertical-align: top; }
figcaption { font-size: 13px; color: #5a6875; max-width: 32em; }
pre { background: #f4f6f8; padding: .8em; overflow-x: auto; font-size: 13px; }
"""


def html_page(title: str, parts: Iterable[str]) -> str:
    """HTML of a page with this title over its parts."""
    heading = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{heading}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{heading}</h1>{''.join(parts)}</body></html>\n"
    )


def html_settings(settings: dict[str, Any]) -> str:
    """What was run, as the last part of a page."""
    return f"<h2>Run</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>"


def html_table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """`rows`: the CSS class of each, and its cells."""
    head = "".join(f"<th>{html.escape(one)}</th>" for one in header)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>"
        for kind, row in rows
    )
    made = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{made}</div>'


def html_figure(caption: str, draw: Callable[[Any], None], width: float = 5.4) -> str:
    """A plot as SVG, `width` in inches; `draw` is called with its axes."""
    library("matplotlib").use("svg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=(width, 4), layout="constrained")
    draw(axes)
    if axes.get_legend_handles_labels()[0]:  # below: over no curve
        drawing.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    text = io.StringIO()
    drawing.savefig(text, format="svg", metadata={"Date": None})
    plt.close(drawing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
