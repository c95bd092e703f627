"""icecache serve: vLLM's OpenAI server with long contexts in bounded KV memory."""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
from typing import Annotated, Any

import typer

from icecache.cli.environment import additions
from icecache.cli.options import Settings, parse_settings
from icecache.errors import InvalidArgument, Unavailable

_PORT = 8000  # vLLM's, where none is given


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='Folder or name of a model, or "smollm2".')],
    token_budget: Annotated[
        int | None, typer.Option(help="Tokens attended per KV head in a decode step.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Memory for pages, e.g. 8G; of each worker.")
    ] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print vLLM's command line and exit.")
    ] = False,
) -> None:
    """Serve MODEL through vLLM's OpenAI server. All other flags are vLLM's own.

    For example: icecache serve MODEL --token-budget 256 --host-memory 8G --port 8000
    """
    from icecache.cli.server_command import SMOLLM2, Flags, server_command, server_environment
    from icecache.cli.server_settings import check_settings, is_on_cpu, model_shape

    given = {"token_budget": token_budget, "host_memory": host_memory}
    fields: dict[str, Any] = parse_settings(settings, **given)
    flags = Flags(context.args)
    on_cpu = is_on_cpu()
    folder = _folder(model) if model != SMOLLM2 else _smollm2()
    shape = model_shape(folder)
    command = server_command(model, folder, fields, flags, on_cpu=on_cpu, all_full=shape.all_full)
    check_settings(fields, model, shape, flags, on_cpu=on_cpu)
    added = server_environment(os.environ, flags, on_cpu=on_cpu) | additions(os.environ)
    if dry_run:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
        typer.echo(" ".join([*assignments, shlex.join(command)]))
        return
    if importlib.util.find_spec("vllm") is None:
        raise Unavailable("vLLM is not installed: docs/vllm.md says how, make setup-vllm does it")
    _check_version()
    host, port = flags.value("--host"), flags.number("--port", _PORT, 0, 65535)
    _check_port(host, port)
    environment = os.environ | added
    if context.find_root().params.get("debug"):
        os.execve(command[0], command, environment)  # vLLM's output as it is
    name = (flags.value("--served-model-name") or model).split()[0]
    address = f'http://{_reachable(host)}:{port}/v1, model "{name}"'
    from icecache.cli.server_process import run_server

    _say("starting vLLM; its modules take half a minute to import, more on a busy machine")
    raise typer.Exit(run_server(command, environment, _say, address))


def _say(text: str) -> None:
    typer.secho(f"icecache: {text}", fg="cyan", err=True)


def _smollm2() -> str:
    from icecache.models import smollm2

    return str(smollm2())


def _folder(model: str) -> str:
    """`model`, where vLLM may find something under that name. Raises InvalidArgument."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or path.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise InvalidArgument(
            f'model must be a folder, a name on the Hugging Face hub or "smollm2", got {model}'
        )
    return model


def _check_version() -> None:
    """Raises Unavailable for a vLLM that the plugin is not made for; imports none."""
    from icecache.vllm.plugin import END, FIRST, installed_version, is_supported_version

    if not is_supported_version():
        versions = f"{FIRST[0]}.{FIRST[1]} or newer and below {END[0]}.{END[1]}"
        raise Unavailable(f"vLLM must be {versions}, got {installed_version()}")


def _check_port(host: str | None, port: int) -> None:
    """Raises InvalidArgument where another server listens there."""
    family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host or "", port))
        except OSError as error:
            raise InvalidArgument(
                f"--port {port} cannot be used: {error.strerror}; give another one with --port"
            ) from None


def _reachable(host: str | None) -> str:
    if host in (None, "", "0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in str(host) else str(host)
