"""icecache demo: full attention beside IceCache and other methods, on one long document."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icecache.cli.options import MOST_TOKENS
from icecache.outputs import check_output_file

if TYPE_CHECKING:
    from icecache.demo.run import Row

_OTHERS = 128  # token budget of the other methods, and of the report's traces


def demo(
    document: Annotated[
        Path | None,
        typer.Option("--document", "-d", help="A text file; Python's reference if not given."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=400,
            max=MOST_TOKENS,
            help="Cut the document to this length; default 3500, or your file.",
        ),
    ] = None,
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path(
        "icecache-report.html"
    ),
    picture: Annotated[
        Path | None, typer.Option(help="Where the same goes as a picture (.png, .svg).")
    ] = None,
    model: Annotated[
        str, typer.Option(help='A local folder with a transformers model, or "smollm2".')
    ] = "smollm2",
    seed: Annotated[int, typer.Option(help="Of the hidden numbers.")] = 0,
) -> None:
    """Hide needles in a long document, ask for them, and show what attention looked at."""
    from icecache.bench.libraries import library
    from icecache.documents import read_document
    from icecache.models.local import check_model

    check_output_file("--report", report, make_folders=False)
    if picture is not None:
        check_output_file("--picture", picture, make_folders=False)
        library("matplotlib.figure")
    if document is not None:
        read_document(document)
    check_model(model)

    from rich.console import Console
    from rich.markup import escape

    from icecache.demo.document import make_document
    from icecache.demo.run import STEPS
    from icecache.models.local import check_context, load_model, load_tokenizer, model_folder

    console = Console()
    folder = model_folder(model)
    made = make_document(load_tokenizer(folder), document, tokens, seed)
    length = made.tokens.shape[0]
    with console.status("loading the model"):
        loaded, tokenizer = load_model(folder, "float32")
    check_context(loaded.config, length + made.longest_question, STEPS)
    console.print(
        f"[bold]{escape(made.name)}[/]: {length:,} tokens, {len(made.needles)} numbers hidden in it"
    )
    rows, write = _run(console, loaded, tokenizer, made, folder.name)
    console.print(_table(rows))
    console.print(
        "[dim]The number beside a name: tokens attended exactly per KV head and step. agree: the "
        "same most likely token as full attention; KL: divergence from it, nats; mass: share of "
        "the attention that was exact; read per step and held on the device: MiB, all heads.[/]"
    )
    write(report, picture)
    console.print(f"The report: [bold]{escape(str(report.resolve()))}[/] (open it in a browser)")


def _run(
    console: Any, model: Any, tokenizer: Any, document: Any, name: str
) -> tuple[list[Row], Callable[[Path, Path | None], None]]:
    """The rows, and what writes the report and the picture."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from icecache.bench.decoder import Decoder
    from icecache.config import Config
    from icecache.demo.methods import compared
    from icecache.demo.picture import write_picture
    from icecache.demo.report import Facts, write_report
    from icecache.demo.run import Question, run_demo
    from icecache.demo.trace import QuestionTrace, trace_question

    decoder = Decoder(model)
    traces: list[QuestionTrace] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1)

        def on_progress(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        def on_question(number: int, question: Question) -> None:
            bar.update(task, description=f"question {number + 1}: what IceCache looked at")
            traces.append(trace_question(decoder, tokenizer, question, _OTHERS))

        methods = compared((256, 128, 64), _OTHERS)
        rows = run_demo(decoder, tokenizer, document, methods, on_progress, on_question)
    facts = Facts(
        model=name,
        num_layers=decoder.num_layers,
        num_kv_heads=decoder.num_kv_heads,
        traced_budget=_OTHERS,
        machine=_machine(),
        config=Config(token_budget=_OTHERS).to_dict(),
    )
    pieces = [tokenizer.decode([int(token)]) for token in document.tokens]

    def write(report: Path, picture: Path | None) -> None:
        write_report(report, facts, document, pieces, rows, traces)
        if picture is not None:
            write_picture(picture, facts, document, rows, traces[0])

    return rows, write


def _machine() -> str:
    import torch

    import icecache
    from icecache.machine import cpu_name

    build = icecache.build_info()
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads, {icecache.simd_level()} kernels; "
        f"icecache {build.version}, torch {torch.__version__}, Python {platform.python_version()}. "
        "Tokens per second are of one sequence, the whole model, after the prefill; they are not "
        "comparable between machines. Keys and values are float32. Attention mass is the share "
        "that was attended exactly, as the engine estimates it."
    )


def _table(rows: list[Row]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits a terminal of 80 columns
    table.add_column("method", no_wrap=True)
    for title in ("needles", "agree", "KL", "mass", "tok/s", "read", "held"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        found = " ".join("[green]✓[/]" if hit else "[red]✗[/]" for hit in row.found)
        name = row.name if row.budget is None else f"{row.name} {row.budget}"
        table.add_row(
            f"[bold cyan]{name}[/]" if row.name == "IceCache" else name,
            found,
            f"{row.agreement:.1%}",
            "–" if row.budget is None else f"{row.kl:.4f}",
            "–" if row.mass is None else f"{row.mass:.1%}",
            f"{row.tokens_per_second:.1f}",
            f"{row.bytes_per_step / 2**20:.1f}",
            f"{row.device_bytes / 2**20:.1f}",
        )
    return table
