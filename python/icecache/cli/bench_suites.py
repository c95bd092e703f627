"""icecache bench SUITE: what a token budget costs in quality, beside other methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

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
from icecache.cli.options import MOST_THREADS, MOST_TOKENS, NumberFormat, Settings
from icecache.cli.usage import Command, numbers, words
from icecache.errors import InvalidArgument

# name -> help; of icecache.bench.suites, which takes seconds to import.
SUITES = {
    "longbench": "LongBench v1: 21 tasks of question answering, summaries, few-shot and code.",
    "longbench-e": "LongBench-E: 13 tasks with even lengths.",
    "longbench-v2": "LongBench v2: multiple choice over long texts.",
    "ruler": "RULER: needles and other generated tasks of any length.",
    "passkey": "A number in a long text of nothing.",
    "gsm8k": "GSM8K with a chain of thought.",
    "text": "Likelihood of what follows stretches of your own texts.",
}
_MOST_SAMPLES = 1_000_000

# What fits beside each other on a terminal; the report has all.
_SHOWN = ("method", "tokens", "score", "of full", "agreement", "KL", "gold likelihood", "mass")


def add_suites(app: typer.Typer) -> None:
    """A command for each suite."""
    for name, text in SUITES.items():
        app.command(name, cls=Command, help=text)(_command(name))


def _command(suite: str) -> Callable[..., None]:
    def command(
        model: Annotated[
            str, typer.Option(help='Folder with a model, or "smollm2"; of a server, its name.')
        ] = "smollm2",
        budget: Annotated[
            str | None,
            typer.Option(help="Token budgets, comma-separated; else 64,128,256."),
        ] = None,
        method: MethodNames = None,
        task: Annotated[
            str | None, typer.Option(help="Tasks, comma-separated; all if not given.")
        ] = None,
        data_dir: Annotated[
            Path | None, typer.Option(help="Local data; else from the Hugging Face hub.")
        ] = None,
        limit: Annotated[
            int | None,
            typer.Option(min=1, max=_MOST_SAMPLES, help="Samples in all, of each task in turn."),
        ] = None,
        lengths: Annotated[
            str | None, typer.Option(help="Tokens of generated prompts, comma-separated.")
        ] = None,
        samples: Annotated[
            int | None,
            typer.Option(
                min=1, max=_MOST_SAMPLES, help="Generated of each task and length; 5 if not given."
            ),
        ] = None,
        seed: Annotated[
            int | None, typer.Option(help="Of generated samples; 0 if not given.")
        ] = None,
        max_length: Annotated[
            int | None,
            typer.Option(min=2, max=MOST_TOKENS, help="Longer prompts lose their middle."),
        ] = None,
        max_new_tokens: Annotated[
            int | None,
            typer.Option(min=1, max=MOST_TOKENS, help="Of an answer, where the task allows more."),
        ] = None,
        dtype: Annotated[
            NumberFormat | None, typer.Option(help="Number format; float32 if not given.")
        ] = None,
        settings: Settings = None,
        workers: Annotated[
            int | None,
            typer.Option(
                min=1, max=MOST_THREADS, help="Processes with a model each; else as many as fit."
            ),
        ] = None,
        endpoint: Annotated[
            str | None, typer.Option(help="Ask this OpenAI-compatible server instead (.../v1).")
        ] = None,
        out: OutFolder = None,
        json: JsonFile = None,
    ) -> None:
        from icecache.bench.suites import Data, find_suite
        from icecache.models.local import check_model

        if endpoint is not None:
            _check_endpoint(
                endpoint,
                {
                    "--method": method,
                    "--budget": budget,
                    "--dtype": dtype,
                    "--set": settings,
                    "--max-length": max_length,
                },
            )
        budgets, engine = budgets_and_fields("64,128,256" if budget is None else budget, settings)
        data = Data(
            data_dir,
            [] if task is None else words("--task", task),
            [] if lengths is None else numbers("--lengths", lengths, 1, MOST_TOKENS),
            Data.samples if samples is None else samples,
            Data.seed if seed is None else seed,
        )
        chosen = find_suite(suite)
        chosen.check(data)
        for option, value in (("--samples", samples), ("--seed", seed)):
            if value is not None and not chosen.generated:
                raise InvalidArgument(
                    f"{option}: {suite} has samples of its own, of which --limit takes the first; "
                    f"expected none, got {value}"
                )
        if endpoint is None:
            check_model(model)
        folder = run_folder(suite, model, out, json)
        methods = method_names(method)

        from icecache.bench.evaluate import Plan

        plan = Plan(
            model=model,
            methods=["served"] if endpoint else methods,
            budgets=budgets,
            data=data,
            limit=limit,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            dtype=(dtype or NumberFormat.float32).value,
            engine=engine,
            workers=workers,
            endpoint=endpoint,
        )
        _run(suite, plan, folder, json)

    return command


def _check_endpoint(endpoint: str, others: dict[str, object]) -> None:
    """A server attends as it does: what would choose how is refused."""
    wanted = f"--endpoint must be a URL such as http://localhost:8000/v1, got {endpoint!r}"
    try:
        parts = urlsplit(endpoint)
    except ValueError as error:
        raise InvalidArgument(f"{wanted}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(wanted)
    for option, value in others.items():
        if value is not None:
            raise InvalidArgument(
                f"--endpoint: the server attends in its own way; expected no {option}, got "
                f"{getattr(value, 'value', value)}"
            )


def _run(name: str, plan: object, out: Path, json: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from icecache.bench import evaluate as run
    from icecache.bench.html_report import method_rows
    from icecache.bench.runner import Progress as Told
    from icecache.bench.suites import find_suite

    assert isinstance(plan, run.Plan)
    console = Console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}"), console=console) as bar:
        task = bar.add_task(name, total=None, last="")
        told = Told(
            begin=lambda count: bar.update(task, total=count),
            done=lambda record: bar.update(
                task, advance=1, last=escape(f"{record['task']} {record['tokens']:,} tokens")
            ),
        )
        records = run.evaluate(find_suite(name), plan, out, told)
    title = f"{len(records)} samples; % where no unit is given"
    show_table(console, title, method_rows(records, _SHOWN))
    finish(console, out, json)
