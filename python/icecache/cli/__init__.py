"""The `icecache` command."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from icecache.cli.bench import bench
from icecache.cli.config import config
from icecache.cli.demo import demo
from icecache.cli.doctor import doctor
from icecache.cli.generate import generate
from icecache.cli.serve import serve
from icecache.errors import Error

__all__ = ["app"]


class _Commands(TyperGroup):
    """Commands that end an error with one line on stderr.

    Exit status 2: what the user asked for cannot be done. 1: anything unforeseen. --debug raises.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Error, OSError, MemoryError) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            _say(str(error) or type(error).__name__)
            raise typer.Exit(2) from None
        except (RuntimeError, LookupError, TypeError, ValueError, AssertionError) as error:
            # click's own control flow is made of RuntimeErrors.
            if ctx.params.get("debug") or type(error).__module__.startswith(("click", "typer")):
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
    if context.invoked_subcommand == "serve":
        return  # the environment is vLLM's
    # Models are local folders: transformers would else ask a server about some of their files.
    if context.invoked_subcommand != "bench":  # whose data may come from there
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Warnings of transformers would interleave with the generated text.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for command in (demo, generate, doctor, config):
    app.command()(command)
# vLLM's flags are passed on as they are.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.add_typer(bench, name="bench")
