"""Keeps functions that call the engine out of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def outside_graphs(function: FunctionT) -> FunctionT:
    """`function`, run eagerly under torch.compile; fullgraph=True raises an error that says why."""
    reason = "IceCache keeps tokens in an engine of its own; compile without fullgraph=True"
    return cast(
        FunctionT,
        torch.compiler.disable(function, reason=reason),
    )
