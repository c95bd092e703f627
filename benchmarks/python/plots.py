"""Pictures of benchmarks/results for the documentation.

    python benchmarks/python/plots.py --results benchmarks/results --out docs

step_time.png, speedup.png, kernels.png and baselines.png; those whose results are not there are
left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

ROOT = Path(__file__).resolve().parents[2]
WIDTH, DPI = 8.3, 150  # inches; about the width of a README's column at twice its resolution
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
OURS, RIVALS = "#1f5fbf", ("#d9822b", "#7a7a7a", "#3c9d5d", "#a4519e", "#8c6d31")
NAMES = {
    "icecache": "IceCache",
    "dense": "dense (our kernels)",
    "sdpa": "torch SDPA",
    "torch_bfloat16": "torch matmul + topk, bfloat16",
    "torch_float32": "torch matmul + topk, float32",
    "flat": "FAISS flat",
    "ivf": "FAISS IVF",
    "hnsw": "FAISS HNSW",
}


class Results:
    """One file of benchmarks/results."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.meta: dict[str, Any] = data["meta"]
        self.all: list[dict[str, Any]] = data["results"]

    def by_length(self, prefix: str) -> list[tuple[int, float]]:
        """(tokens, value) of `prefix` followed by a length, ascending."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)(k?)")
        found = []
        for one in self.all:
            match = pattern.fullmatch(one["name"])
            if match:
                tokens = int(match[1]) * (1024 if match[2] else 1)
                found.append((tokens, float(one["value"])))
        return sorted(found)

    def where(self, threads: int | None = None) -> str:
        """Hardware and commit, for a caption."""
        count = self.meta["torch_threads"] if threads is None else threads
        parts = [self.meta["cpu"], self.meta["simd"], f"{count} thread{'s' * (count != 1)}"]
        if self.meta.get("commit"):
            parts.append(self.meta["commit"])
        return ", ".join(parts)


def new_figure(height: float) -> Figure:
    """With a strip at the bottom for the caption."""
    return Figure(
        figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(rect=(0, 0.045, 1, 0.955))
    )


def caption(figure: Figure, text: str) -> None:
    figure.text(0.99, 0.005, text, ha="right", va="bottom", fontsize=8, color="#555555")


def length_axis(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(lengths)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens in the cache")


def plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def lines(axes: Axes, results: Results, named: dict[str, str]) -> None:
    """One line for each `prefix: label` that has results; the first is ours."""
    lengths: list[int] = []
    for number, (prefix, name) in enumerate(named.items()):
        points = results.by_length(prefix)
        if not points:
            continue
        colour = OURS if number == 0 else RIVALS[(number - 1) % len(RIVALS)]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        lengths += [tokens for tokens, _ in points]
    length_axis(axes, lengths)
    axes.legend()


def step_time(files: dict[str, Results]) -> Figure:
    step = files["step"]
    figure = new_figure(4.4)
    axes = figure.subplots()
    axes.set_yscale("log")
    lines(axes, step, {f"step_us_{name}_": NAMES[name] for name in ("icecache", "dense", "sdpa")})
    plain_numbers(axes)
    axes.set_ylabel("one step of one layer [µs]")
    shape = step.all[0]["params"]
    axes.set_title(
        f"{shape['kv_heads']} KV heads of {shape['group']} query heads, D = {shape['head_dim']}, "
        f"{shape['dtype']}, budget {shape['token_budget']}",
        fontsize=11,
    )
    caption(figure, step.where())
    return figure


def speedup(files: dict[str, Results]) -> Figure:
    step = files["step"]
    figure = new_figure(4.4)
    axes = figure.subplots()
    points = step.by_length("step_speedup_")
    label = "one layer (bfloat16, D = 128) over the faster of dense and SDPA"
    axes.plot(*zip(*points, strict=True), marker="o", color=OURS, label=label)
    lengths = [tokens for tokens, _ in points]
    if "generate" in files:
        for prefix, name, colour in (
            ("decode_speedup_", "SmolLM2-135M (float32) over DynamicCache", RIVALS[0]),
            ("decode_speedup_static_", "SmolLM2-135M over a preallocated cache", RIVALS[2]),
        ):
            real = files["generate"].by_length(prefix)
            axes.plot(*zip(*real, strict=True), marker="s", ls="", color=colour, label=name)
    axes.axhline(1, color="#555555", linewidth=1)
    axes.set_yscale("log")
    plain_numbers(axes)
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    length_axis(axes, lengths)
    axes.set_ylabel("times as fast as full attention")
    axes.legend()
    places = (
        {"layer": step.where(), "model": files["generate"].where()} if "generate" in files else {}
    )
    if len(set(places.values())) > 1:  # measured on machines that differ
        caption(figure, "; ".join(f"{what}: {where}" for what, where in places.items()))
    else:
        caption(figure, step.where())
    return figure


def kernels(files: dict[str, Results]) -> Figure:
    """Roofline: what each kernel reaches of the lower of the two roofs at its intensity."""
    results = files["kernels"]
    read, macs = results.meta["read_gbs"], results.meta["fma_gmacs"]
    figure = new_figure(5.2)
    axes = figure.subplots()
    intensity = [2**-3, macs / read, 2**8]
    roof = [min(read * x, macs) for x in intensity]
    label = f"{read:.1f} GB/s read, {macs:.0f} GMAC/s fp32"
    axes.plot(intensity, roof, color="#555555", label=label)
    kinds = sorted({kernel_name(one) for one in results.all if is_in_roofline(one)})
    colours = dict(zip(kinds, matplotlib.color_sequences["tab10"] * 2, strict=False))
    seen: set[str] = set()
    for one in filter(is_in_roofline, results.all):
        params, name = one["params"], kernel_name(one)
        x, y = params["gmac_per_s"] / params["gb_per_s"], params["gmac_per_s"]
        in_memory = "/memory" in one["name"]
        axes.plot(
            x,
            y,
            marker="o" if in_memory else "^",
            ls="",
            color=colours[name],
            markerfacecolor=colours[name] if in_memory else "white",
            label=None if name in seen else name,
        )
        seen.add(name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("multiply-adds per byte")
    axes.set_ylabel("GMAC/s")
    axes.set_title("filled: operands in memory; open: in the second-level cache", fontsize=11)
    axes.legend(fontsize=9)
    caption(figure, results.where(threads=1))
    return figure


def kernel_name(one: dict[str, Any]) -> str:
    return str(one["name"]).split("/")[0]


def is_in_roofline(one: dict[str, Any]) -> bool:
    """Kernels that read and multiply, with D = 128 and pages in bfloat16."""
    name, params = one["name"], one["params"]
    other = "/D:64" in name or re.match(r"(attend_pages|row_logits|add_rows)\w*/float32", name)
    return not other and "gmac_per_s" in params and "gb_per_s" in params


def baselines(files: dict[str, Results]) -> Figure:
    build, search = files["build"], files["search"]
    figure = new_figure(4.6)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_yscale("log")
    lines(
        left,
        build,
        {"build_ms_": NAMES["icecache"], **{f"build_ms_{n}_": NAMES[n] for n in ("ivf", "hnsw")}},
    )
    left.set_ylabel("building the index of one head [ms]")
    rivals = ("torch_float32", "torch_bfloat16", "flat", "ivf", "hnsw")
    lines(
        right,
        search,
        {"select_us_": NAMES["icecache"], **{f"search_us_{n}_": NAMES[n] for n in rivals}},
    )
    right.set_ylabel("finding the tokens of one step [µs]")
    for axes in (left, right):
        plain_numbers(axes)
        axes.legend(fontsize=8)
    figure.suptitle("one KV head, D = 128, one thread", fontsize=11)
    caption(figure, build.where(threads=1))
    return figure


# File name, what it needs, what draws it.
PLOTS: tuple[tuple[str, set[str], Callable[[dict[str, Results]], Figure]], ...] = (
    ("step_time.png", {"step"}, step_time),
    ("speedup.png", {"step"}, speedup),
    ("kernels.png", {"kernels"}, kernels),
    ("baselines.png", {"build", "search"}, baselines),
)


def main(
    results: Annotated[Path, typer.Option(help="Folder with *.json.")] = ROOT
    / "benchmarks/results",
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = ROOT / "docs",
) -> None:
    """Draw every plot whose results are there."""
    names = ("step", "kernels", "build", "search", "generate")
    files = {
        name: Results(results / f"{name}.json")
        for name in names
        if (results / f"{name}.json").is_file()
    }
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for file, needed, draw in PLOTS:
            if needed <= files.keys():
                draw(files).savefig(out / file, dpi=DPI)
                print(out / file)


if __name__ == "__main__":
    typer.run(main)
