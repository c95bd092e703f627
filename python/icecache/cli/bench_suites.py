"""icecache bench SUITE: what a token budget costs in quality, beside other methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icecache.cli.options import Settings, parse_settings
from icecache.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

    from icecache.bench.runner import Record

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

# What fits beside each other on a terminal; the report has all.
_SHOWN = ("method", "tokens", "score", "of full", "agreement", "KL", "gold likelihood", "mass")


def add_suites(app: typer.Typer) -> None:
    """A command for each suite."""
    for name, text in SUITES.items():
        app.command(name, help=text)(_command(name))


def _command(suite: str) -> Callable[..., None]:
    def command(
        model: Annotated[
            str, typer.Option(help='Folder with a model, or "smollm2"; of a server, its name.')
        ] = "smollm2",
        budget: Annotated[str, typer.Option(help="Token budgets, comma-separated.")] = "64,128,256",
        method: Annotated[
            str, typer.Option(help='Methods, comma-separated; "all" for every one.')
        ] = "full,icecache,topk,paper,quest,streaming",
        task: Annotated[str, typer.Option(help="Tasks, comma-separated; all where empty.")] = "",
        data_dir: Annotated[
            Path | None, typer.Option(help="Local data; else from the Hugging Face hub.")
        ] = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="Samples in all, of each task in turn.")
        ] = None,
        lengths: Annotated[
            str, typer.Option(help="Tokens of generated prompts, comma-separated.")
        ] = "",
        samples: Annotated[
            int, typer.Option(min=1, help="Generated samples of each task and length.")
        ] = 5,
        seed: Annotated[int, typer.Option(help="Of generated samples.")] = 0,
        max_length: Annotated[
            int | None, typer.Option(min=1, help="Longer prompts lose their middle.")
        ] = None,
        max_new_tokens: Annotated[
            int | None, typer.Option(min=1, help="Of an answer, where the task allows more.")
        ] = None,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        settings: Settings = None,
        workers: Annotated[
            int | None,
            typer.Option(min=1, help="Processes with a model each; else as many as fit."),
        ] = None,
        endpoint: Annotated[
            str | None, typer.Option(help="Ask this OpenAI-compatible server instead (.../v1).")
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Folder of the run; one that was cut off goes on.")
        ] = None,
        json: Annotated[Path | None, typer.Option(help="Where the results go as well.")] = None,
    ) -> None:
        from icecache.bench.evaluate import Plan
        from icecache.bench.methods import METHODS
        from icecache.bench.suites import Data

        names = _words(method)
        if names == ["all"]:
            names = list(dict.fromkeys(one.name for one in METHODS))
        plan = Plan(
            model=model,
            methods=["served"] if endpoint else names,
            budgets=_numbers("--budget", budget),
            data=Data(data_dir, _words(task), _numbers("--lengths", lengths), samples, seed),
            limit=limit,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            engine=parse_settings(settings),
            workers=workers,
            endpoint=endpoint,
        )
        _run(suite, plan, out or Path(f"icecache-{suite}-{Path(model).name}"), json)

    return command


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise InvalidArgument(f"{option}: expected numbers and commas, got {text!r}") from None


def _run(name: str, plan: object, out: Path, json: Path | None) -> None:
    import shutil

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from icecache.bench import evaluate as run
    from icecache.bench.suites import find_suite

    assert isinstance(plan, run.Plan)
    console = Console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}"), console=console) as bar:
        task = bar.add_task(name, total=None, last="")
        told = run.Progress(
            begin=lambda count: bar.update(task, total=count),
            done=lambda record: bar.update(
                task, advance=1, last=f"{record['task']} {record['tokens']:,} tokens"
            ),
        )
        records = run.evaluate(find_suite(name), plan, out, told)
    _show(console, records)
    console.print(f"[dim]{out}/report.html, results.json, samples.jsonl[/]", highlight=False)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "results.json", json)


def _show(console: Console, records: list[Record]) -> None:
    from rich.table import Table

    from icecache.bench.html_report import method_rows

    header, rows = method_rows(records, _SHOWN)
    table = Table(title=f"{len(records)} samples; % where no unit is given", box=None)
    for name in header:
        justify: Literal["left", "right"] = "left" if name == "method" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    previous = None
    for budget, row in rows:
        if previous is not None and budget != previous:
            table.add_section()
        previous = budget
        table.add_row(*row)
    console.print(table)
