"""The `icecache` command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from icecache.cli.bench import bench
from icecache.cli.config import config
from icecache.cli.demo import demo
from icecache.cli.doctor import doctor
from icecache.cli.environment import prepare
from icecache.cli.generate import generate
from icecache.cli.serve import serve
from icecache.cli.usage import Command, UsageError
from icecache.errors import Error

__all__ = ["app", "main"]

# Commands that compute: torch's threads start with an environment that suits shared cores.
_COMPUTE = {"bench", "demo", "generate"}


class _Commands(TyperGroup):
    """Commands that end an error with one line on stderr.

    Exit status 2: what the user asked for cannot be done. 1: anything unforeseen. --debug raises.
    """

    def make_context(self, *given: Any, **options: Any) -> Any:
        return _told(False, super().make_context, *given, **options)

    def invoke(self, ctx: Any) -> Any:
        return _told(bool(ctx.params.get("debug")), super().invoke, ctx)


def _told(debug: bool, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What `call` returns; ends an error with a line, or raises it where `debug` asks for that."""
    try:
        return call(*given, **options)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", "icecache")
        _say(f"{error.format_message()} ({command} --help shows what there is)")  # type: ignore[attr-defined]
        raise typer.Exit(2) from None
    except (Error, OSError, MemoryError) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        _say(str(error) or type(error).__name__)
        raise typer.Exit(2) from None
    except (RuntimeError, LookupError, TypeError, ValueError, AssertionError) as error:
        # click's own control flow is made of RuntimeErrors.
        if debug or type(error).__module__.startswith(("click", "typer")):
            raise
        _say(f"{type(error).__name__}: {error} (icecache --debug ... shows where)")
        raise typer.Exit(1) from None


def _say(message: str) -> None:
    typer.secho("error: " + " ".join(message.split()), fg="red", err=True)


app = typer.Typer(
    cls=_Commands,
    help="Long contexts in a small KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from icecache import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that a terminal lacks ends no run
    if context.invoked_subcommand == "serve":
        return  # the environment is vLLM's
    # Models are local folders: transformers would else ask a server about some of their files.
    if context.invoked_subcommand != "bench":  # whose data may come from there
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Warnings of transformers would interleave with the generated text.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for command in (demo, generate, doctor, config):
    app.command(cls=Command)(command)
# vLLM's flags are passed on as they are.
_AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(cls=Command, context_settings=_AS_THEY_ARE)(serve)
app.add_typer(bench, name="bench")


def main() -> None:
    """The command, in a process of its own: reads its arguments, and ends it."""
    if _COMPUTE & {*sys.argv[1:]}:
        prepare()
    app(prog_name="icecache")
