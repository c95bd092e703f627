"""What a token budget costs in quality, on real models and real prompts.

All methods decode in the same run, on the same prefill, one row of a batch each. KL is
KL(full || method) of the next-token distribution: the mean over the steps of a prompt, then over
prompts; "worst step" is that of all prompts.

SmolLM2-135M-Instruct, all 30 layers sparse: prompts of 3,000 to 5,000 tokens, teacher-forced along
full attention's own greedy continuation, 24 steps. Needles count when a method finds them decoding
freely.

Gemma-3-270M, three full layers with D = 256: four texts at each of --lengths, along the texts' own
next 32 tokens; ten numbers hidden in --needle-length tokens of essays count where each of their
tokens is the most likely one after those before it. Skipped where the model is not there
(gemma3.py says how it gets there).

    python benchmarks/python/bench_quality.py --json benchmarks/results/quality.json --check
    python benchmarks/python/bench_quality.py --model gemma3 --json quality_gemma3.json
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import icecache
import torch
import typer
from gemma3 import absent, gemma3
from icecache.bench.decoder import Decoder
from icecache.bench.methods import METHODS, Method, find_methods, with_settings
from icecache.bench.prefill import Prefill, load, prefill, save
from icecache.bench.prompts import Prompt
from icecache.bench.quality import DecodeStats, Subject, decode_stats
from icecache.bench.report import Result, machine, write_json
from icecache.bench.summary import broken_bounds, lines, results
from icecache.models.local import load_model
from lengths import parse_lengths
from long_contexts import Context, grouped_results, long_bounds, needle_contexts, text_contexts
from quality_prompts import DATA, check_data, quality_prompts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

STEPS = 24

console = Console()


class Model(str, Enum):
    """What is measured."""

    smollm2 = "smollm2"
    gemma3 = "gemma3"


@dataclass(frozen=True)
class Plan:
    """Which methods, at which budgets, on what."""

    data: Path
    methods: list[Method]
    budgets: list[int]
    prompts: int
    lengths: list[int]
    needle_length: int  # 0: no needles
    prefill_dir: Path | None


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    model: Annotated[Model, typer.Option(help="Which model.")] = Model.smollm2,
    data: Annotated[Path, typer.Option(help="Folder with longbench_mini/ and text/.")] = DATA,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts of SmolLM2.")] = 18,
    lengths: Annotated[
        str, typer.Option(help="Tokens of Gemma's contexts, comma-separated.")
    ] = "4096,8192,16384,30000",
    needle_length: Annotated[
        int, typer.Option(min=0, help="Tokens that Gemma's needles are hidden in; 0: none.")
    ] = 29_800,
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
        Path | None,
        typer.Option(help="Keeps SmolLM2's prefills (0.2 GB a prompt) for the next run."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail where a bound is broken.")] = False,
) -> None:
    """Measure KL to full attention, agreement and needles of every method and budget."""
    check_data(data)
    fields = dict(setting.split("=", 1) for setting in settings or [])
    chosen = with_settings(find_methods([name for name in methods.split(",") if name]), fields)
    sizes = [int(text) for text in budgets.split(",")]
    wanted = sorted(parse_lengths(lengths))
    plan = Plan(data, chosen, sizes, prompts, wanted, needle_length, prefill_dir)
    if model is Model.gemma3 and (reason := absent()):
        console.print(f"skipped: {reason}")
        return
    numbers, meta, broken = _smollm2(plan) if model is Model.smollm2 else _gemma3(plan)
    if json is not None:
        write_json(json, {**machine(), **meta, "settings": fields}, numbers)
    ratios = {one.name: one.value for one in numbers if "ratio" in one.name}
    console.print("  ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    for line in broken:
        console.print(f"[red]{line}[/]")
    if check and broken:
        raise typer.Exit(1)


Measured = tuple[list[Result], dict[str, Any], list[str]]  # numbers, what they are of, bounds


def _smollm2(plan: Plan) -> Measured:
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    decoder = Decoder(model)
    wanted = quality_prompts(tokenizer, plan.data, plan.prompts)
    stats: list[DecodeStats] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * (1 + len(plan.budgets)))
        for prompt in wanted:
            bar.update(task, description=f"{prompt.name}: prefill")
            made = _prefill(decoder, prompt, tokenizer.eos_token_id, plan.prefill_dir)
            bar.advance(task)
            needle = (tokenizer, prompt.answer) if prompt.answer else None
            subject = Subject(prompt.name, made, needle)
            for size in plan.budgets:
                bar.update(task, description=f"{prompt.name}: {size} tokens")
                stats += decode_stats(decoder, subject, plan.methods, size)
                bar.advance(task)
    sizes = [int(prompt.tokens.shape[0]) for prompt in wanted]
    _show(f"{len(sizes)} prompts of {min(sizes):,} to {max(sizes):,} tokens", stats)
    meta = {
        "model": "SmolLM2-135M-Instruct, float32",
        "layers": decoder.num_layers,
        "steps": STEPS,
        "prompts": {prompt.name: length for prompt, length in zip(wanted, sizes, strict=True)},
    }
    numbers = results(stats)
    return numbers, meta, broken_bounds(numbers)


def _gemma3(plan: Plan) -> Measured:
    model, tokenizer = load_model(gemma3(), "float32")
    decoder = Decoder(model)
    stats: dict[str, list[DecodeStats]] = defaultdict(list)
    steps = 0
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("prefill", total=None)
        for context in _contexts(decoder, tokenizer, plan):
            subject = Subject(context.name, context.made, is_answer=context.is_needle)
            steps = context.made.steps if not context.is_needle else steps
            for size in plan.budgets:
                bar.update(task, description=f"{context.name}: {size} tokens", advance=1)
                stats[context.group] += decode_stats(decoder, subject, plan.methods, size)
            bar.update(task, description="prefill")
    for group, made in stats.items():
        _show(f"Gemma-3-270M, {group}", made)
    numbers = grouped_results(stats)
    meta = {
        "model": "Gemma-3-270M, float32",
        "layers": decoder.num_layers,
        "steps": steps,
        "lengths": plan.lengths,
        "needle_length": plan.needle_length,
    }
    return numbers, meta, broken_bounds(numbers, long_bounds(numbers, list(stats)))


def _contexts(decoder: Decoder, tokenizer: Any, plan: Plan) -> Iterator[Context]:
    yield from text_contexts(decoder, tokenizer, plan.data, plan.lengths)
    if plan.needle_length:
        yield from needle_contexts(decoder, tokenizer, plan.data, plan.needle_length)


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


def _show(title: str, stats: Sequence[DecodeStats]) -> None:
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in ("tokens", "KL", "median", "worst", "step", "agreed", "mass", "needles", "n"):
        table.add_column(column, justify="right", no_wrap=True)
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
            f"{line.worst_step:.3f}",
            f"{line.agreement:.1%}",
            f"{line.mass:.1%}",
            f"{line.needles}/{line.needles_of}" if line.needles_of else "",
            str(line.n),
        )
    console.print(table)
    console.print("[dim]worst: mean of a prompt; step: the worst one of all prompts[/]")


if __name__ == "__main__":
    typer.run(main)
