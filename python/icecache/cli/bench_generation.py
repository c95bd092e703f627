"""icecache bench generation: quality where most of the context was decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icecache.cli.bench_common import (
    JsonFile,
    MethodNames,
    OutFolder,
    budgets_and_fields,
    finish,
    method_names,
    run_folder,
    show_table,
)
from icecache.cli.options import MOST_TOKENS, NumberFormat, Settings


def generation(
    model: Annotated[str, typer.Option(help='Folder with a model, or "smollm2".')] = "smollm2",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="A text, or a folder of .txt; else Python's own reference."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Stretches of each text.")] = 1,
    length: Annotated[
        int, typer.Option(min=2, max=MOST_TOKENS, help="Tokens of a stretch, prompt included.")
    ] = 2048,
    prompt: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens that are prefilled.")
    ] = 256,
    budget: Annotated[str, typer.Option(help="Token budgets, comma-separated.")] = "64,256",
    method: MethodNames = None,
    own: Annotated[
        bool, typer.Option("--own", help="Along what full attention writes after each prompt.")
    ] = False,
    switch_at: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="From here on, the text of the next stretch."),
    ] = None,
    rebuilt_every: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_TOKENS, help="Tokens between indexes built anew, to compare; 0: none."
        ),
    ] = 0,
    rebuilt_steps: Annotated[
        int, typer.Option(min=1, max=256, help="Steps that each of them is followed for.")
    ] = 32,
    free: Annotated[
        int,
        typer.Option(min=0, max=MOST_TOKENS, help="Tokens that each method writes by itself."),
    ] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="--own and --free without chance; else sampled.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=1 << 32, help="Of --own and --free.")] = 0,
    dtype: Annotated[NumberFormat, typer.Option(help="Number format.")] = NumberFormat.float32,
    settings: Settings = None,
    out: OutFolder = None,
    json: JsonFile = None,
) -> None:
    """Feed texts token by token: KL to full attention by position, from a short prompt on."""
    from icecache.bench.generation_plan import Checkpoints, GenerationPlan
    from icecache.models.local import check_model

    budgets, engine = budgets_and_fields(budget, settings)
    plan = GenerationPlan(
        model=model,
        methods=method_names(method),
        budgets=budgets,
        data=data_dir,
        samples=samples,
        length=length,
        prompt=prompt,
        switch_at=switch_at,
        is_own=own,
        free=free,
        is_greedy=greedy,
        seed=seed,
        checkpoints=Checkpoints(rebuilt_every, rebuilt_steps),
        dtype=dtype.value,
        engine=engine,
    )
    plan.check()
    check_model(model)
    _run(plan, run_folder("generation", model, out, json), json)


def _run(plan: object, out: Path, json: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from icecache.bench import generation as run
    from icecache.bench.generation_plan import BLOCK, GenerationPlan
    from icecache.bench.generation_report import SHORT, checkpoint_table, free_table, summary
    from icecache.bench.runner import Progress as Told
    from icecache.bench.runner import Record

    assert isinstance(plan, GenerationPlan)
    console, steps = Console(), plan.length - plan.prompt
    names: list[str] = []
    with Progress(console=console) as bar:
        task = bar.add_task("generation", total=None)

        def done(record: Record) -> None:
            names.append(record["sample"])
            bar.update(task, completed=len(names) * steps, description=escape(names[-1]))

        told = Told(
            begin=lambda count: bar.update(task, total=count * steps),
            tick=lambda: bar.advance(task),
            done=done,
        )
        records = run.measure(plan, out, told)
    title = f"{len(records)} texts; late: second half, block: {BLOCK} positions"
    show_table(console, title, summary(records, SHORT))
    for title, made in (
        ("indexes built anew over the same keys and values", checkpoint_table(records)),
        ("written freely", free_table(records)),
    ):
        if made[1]:
            show_table(console, title, made)
    finish(console, out, json)
