"""icecache serve: vLLM's OpenAI server with long contexts in bounded KV memory."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from icecache.cli.options import Settings, parse_settings
from icecache.errors import InvalidArgument, Unavailable

_MAX_NUM_SEQS = 64  # where the user names no --max-num-seqs

# Set from our own options: given as vLLM's too, one of the two would be ignored.
_OURS = (
    "--additional-config",
    "--kv-transfer-config",
    "--scheduler-cls",
    "--enable-prefix-caching",
)


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
    given = {"token_budget": token_budget, "host_memory": host_memory}
    fields: dict[str, Any] = parse_settings(settings, **given)
    if model == "smollm2":
        from icecache.models import smollm2

        model = str(smollm2())
    command = server_command(model, fields, context.args)
    if dry_run:
        import shlex

        typer.echo(shlex.join(command))
        return
    if importlib.util.find_spec("vllm") is None:
        raise Unavailable('vLLM is not installed: pip install "icecache[vllm]"')
    from icecache.vllm.support import check_version

    check_version()
    os.execv(command[0], command)


def server_command(model: str, fields: dict[str, Any], flags: Sequence[str]) -> list[str]:
    """The command that starts the server. Raises InvalidArgument for flags that are set here."""
    from icecache.vllm import engine_args

    names = {flag.split("=", 1)[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    for flag in _OURS:
        if flag in names:
            raise InvalidArgument(
                f"{flag}: icecache serve sets it; use --token-budget, --host-memory and --set, or "
                "start vLLM by its own command"
            )
    arguments = engine_args(**fields)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--additional-config", json.dumps(arguments["additional_config"])]
    command += ["--kv-transfer-config", json.dumps(arguments["kv_transfer_config"])]
    command += ["--scheduler-cls", arguments["scheduler_cls"]]
    command += ["--no-enable-prefix-caching", "--no-disable-hybrid-kv-cache-manager"]
    if "--max-num-seqs" not in names:
        command += ["--max-num-seqs", str(_MAX_NUM_SEQS)]
    if "--num-gpu-blocks-override" not in names and _is_all_ours(model):
        # One block a request, and the one that vLLM keeps for itself.
        seqs = _value(flags, "--max-num-seqs") or str(_MAX_NUM_SEQS)
        if not seqs.isdigit():
            raise InvalidArgument(f"--max-num-seqs must be a number of requests, got {seqs!r}")
        command += ["--num-gpu-blocks-override", str(int(seqs) + 1)]
    return [*command, *flags]


def _is_all_ours(model: str) -> bool:
    """True where no layer but full attention, which the engine serves, takes blocks of vLLM."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError):  # vLLM will tell, in its own words
        return False
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None) is None
    return {*types} == {"full_attention"}


def _value(flags: Sequence[str], name: str) -> str | None:
    """Of the last `--name VALUE` or `--name=VALUE`."""
    value = None
    for index, flag in enumerate(flags):
        key, equals, text = flag.partition("=")
        if key.replace("_", "-") == name:
            value = text if equals else (flags[index + 1] if index + 1 < len(flags) else "")
    return value
