"""icecache bench lm-eval: lm-evaluation-harness with the model `icecache`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import typer

from icecache.errors import Unavailable


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness: all arguments are those of its command lm_eval.

    For example: icecache bench lm-eval --model_args pretrained=smollm2,token_budget=256 --tasks
    gsm8k_cot --limit 20. The model is icecache where no other is named.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise Unavailable("lm_eval is not installed: pip install 'icecache[lm-eval]'")
    os.execv(sys.executable, command(context.args))


def command(arguments: Sequence[str]) -> list[str]:
    """The command line with the model registered; `arguments` as of lm_eval, subcommands too."""
    given = list(arguments)
    subcommand = given[:1] if given and not given[0].startswith("-") else []
    flags = given[len(subcommand) :]
    runs = subcommand in ([], ["run"]) and flags not in ([], ["-h"], ["--help"])
    named = any(flag.split("=", 1)[0] in ("--model", "-M") for flag in flags)
    model = ["--model", "icecache"] if runs and not named else []
    start = [sys.executable, "-m", "icecache.bench.lm_eval_model"]
    return [*start, *subcommand, *model, *flags]
