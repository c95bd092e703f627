"""What a token budget costs in quality, on a real model and real prompts.

SmolLM2-135M-Instruct, all 30 layers sparse, teacher-forced along full attention's own greedy
continuation. All methods decode in the same run, on the same prefill, one row of a batch each.
KL is KL(full || method) of the next-token distribution: the mean over 24 steps of a prompt, then
over prompts. Needles count when a method finds them decoding freely.

    python benchmarks/python/bench_quality.py --json benchmarks/results/quality.json --check
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import icecache
import torch
import typer
from icecache.bench.decoder import Decoder
from icecache.bench.methods import METHODS, find_methods
from icecache.bench.prefill import Prefill, load, prefill, save
from icecache.bench.prompts import Prompt
from icecache.bench.quality import DecodeStats, decode_stats
from icecache.bench.report import machine, write_json
from icecache.bench.summary import broken_bounds, lines, results
from icecache.models.local import load_model
from quality_prompts import DATA, check_data, quality_prompts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

STEPS = 24

console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with longbench_mini/ and text/.")] = DATA,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 18,
    budgets: Annotated[str, typer.Option(help="Token budgets, comma-separated.")] = "64,128,256",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, comma-separated, of "
            + ", ".join(dict.fromkeys(method.name for method in METHODS))
        ),
    ] = "full,icecache,topk,paper,quest,streaming",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for IceCache's own rows.")
    ] = None,
    prefill_dir: Annotated[
        Path | None, typer.Option(help="Keeps prefills (0.2 GB a prompt) for the next run.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail where a bound is broken.")] = False,
) -> None:
    """Measure KL to full attention, agreement and needles of every method and budget."""
    check_data(data)
    sizes = [int(text) for text in budgets.split(",")]
    names = [name for name in methods.split(",") if name]
    fields = dict(setting.split("=", 1) for setting in settings or [])
    chosen = [
        method.with_fields(fields) if method.name == "icecache" else method
        for method in find_methods(names)
    ]
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    decoder = Decoder(model)
    wanted = quality_prompts(tokenizer, data, prompts)
    stats: list[DecodeStats] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * (1 + len(sizes)))
        for prompt in wanted:
            bar.update(task, description=f"{prompt.name}: prefill")
            made = _prefill(decoder, prompt, tokenizer.eos_token_id, prefill_dir)
            bar.advance(task)
            needle = (tokenizer, prompt.answer) if prompt.answer else None
            for size in sizes:
                bar.update(task, description=f"{prompt.name}: {size} tokens")
                stats += decode_stats(decoder, prompt.name, made, chosen, size, needle)
                bar.advance(task)
    numbers = results(stats)
    lengths = [int(prompt.tokens.shape[0]) for prompt in wanted]
    meta: dict[str, Any] = {
        **machine(),
        "model": "SmolLM2-135M-Instruct, float32",
        "layers": decoder.num_layers,
        "steps": STEPS,
        "prompts": {prompt.name: length for prompt, length in zip(wanted, lengths, strict=True)},
        "settings": fields,
    }
    if json is not None:
        write_json(json, meta, numbers)
    _show(stats, lengths)
    ratios = {one.name: one.value for one in numbers if "ratio" in one.name}
    console.print("  ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    broken = broken_bounds(numbers)
    for line in broken:
        console.print(f"[red]{line}[/]")
    if check and broken:
        raise typer.Exit(1)


def _prefill(decoder: Decoder, prompt: Prompt, end: int, folder: Path | None) -> Prefill:
    path = None if folder is None else folder / f"{prompt.name}.safetensors"
    if path is not None and path.is_file():
        made = load(path)
        if made and torch.equal(made.tokens, prompt.tokens) and made.steps == STEPS:
            return made
    made = prefill(decoder, prompt.tokens, STEPS, end)
    if path is not None:
        save(made, path)
    return made


def _show(stats: list[DecodeStats], lengths: list[int]) -> None:
    title = f"{len(lengths)} prompts of {min(lengths):,} to {max(lengths):,} tokens"
    table = Table("method", title=title)
    columns = ("tokens", "KL mean", "median", "worst", "agreement", "mass", "needles", "n")
    for column in columns:
        table.add_column(column, justify="right")
    previous = None
    for line in sorted(lines(stats), key=lambda line: line.budget):
        if previous is not None and line.budget != previous:
            table.add_section()
        previous = line.budget
        table.add_row(
            line.label,
            str(line.budget),
            f"{line.kl:.4f}",
            f"{line.median:.4f}",
            f"{line.worst:.4f}",
            f"{line.agreement:.1%}",
            f"{line.mass:.1%}",
            f"{line.needles}/{line.needles_of}",
            str(line.n),
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
