"""icecache bench generation: quality where most of the context was decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icecache.cli.bench_common import METHOD_HELP, finish, method_names, show_table
from icecache.cli.options import MOST_TOKENS, NumberFormat, Settings, parse_settings
from icecache.cli.usage import numbers
from icecache.config import Config
from icecache.outputs import check_output_file, check_output_folder


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
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens that are prefilled exactly.")
    ] = 256,
    budget: Annotated[str, typer.Option(help="Token budgets, comma-separated.")] = "64,256",
    method: Annotated[str | None, typer.Option(help=METHOD_HELP)] = None,
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
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; one that was cut off goes on.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Where the results go as well.")] = None,
) -> None:
    """Feed texts token by token: KL to full attention by position, from a short prompt on."""
    from icecache.bench.generation_plan import Checkpoints, GenerationPlan
    from icecache.models.local import check_model

    budgets = numbers("--budget", budget, 1, MOST_TOKENS)
    engine = parse_settings(settings)
    for one in budgets:
        Config(**{**engine, "token_budget": one}).check()
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
    folder = out or Path(f"icecache-generation-{Path(model).name}")
    check_output_folder("--out", folder)
    if json is not None:
        check_output_file("--json", json)
    _run(plan, folder, json)


def _run(plan: object, out: Path, json: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from icecache.bench import generation as run
    from icecache.bench.generation_plan import BLOCK, GenerationPlan
    from icecache.bench.generation_report import SHORT, checkpoint_table, free_table, summary
    from icecache.bench.runner import Record

    assert isinstance(plan, GenerationPlan)
    console, steps = Console(), plan.length - plan.prompt
    names: list[str] = []
    with Progress(console=console) as bar:
        task = bar.add_task("generation", total=None)

        def done(record: Record) -> None:
            names.append(record["sample"])
            bar.update(task, completed=len(names) * steps, description=escape(names[-1]))

        told = run.Progress(
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
