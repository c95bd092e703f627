"""How a token budget is spent: sink and window always, the best of the rest."""

from __future__ import annotations

import torch

from icecache.config import Config
from icecache.errors import InvalidArgument

SINK: int = Config().sink_tokens


def require_budget(budget: int, least: int, parts: str) -> None:
    """InvalidArgument where `budget` is below `least`, the sum of `parts`."""
    if budget < least:
        raise InvalidArgument(f"budget: expected at least {parts}, got {budget}")


def window_of(budget: int) -> int:
    """The engine's default window at this budget; InvalidArgument where not even that fits."""
    window = 16 if budget <= 64 else 32
    require_budget(budget, SINK + window, f"sink + window = {SINK} + {window}")
    return window


def near_tokens(length: int, recent: int) -> torch.Tensor:
    """Sink and the `recent` last tokens, [L] bool."""
    near = torch.zeros(length, dtype=torch.bool)
    near[:SINK] = True
    near[max(0, length - recent) :] = True
    return near


def best_tokens(worth: torch.Tensor, budget: int) -> torch.Tensor:
    """Sink, window, and with what is left the tokens of most `worth` [..., L] -> [..., L] bool."""
    window, length = window_of(budget), worth.shape[-1]
    far = worth[..., SINK : max(SINK, length - window)]
    best = far.topk(min(budget - SINK - window, far.shape[-1]), -1).indices + SINK
    return near_tokens(length, window).expand(worth.shape).scatter(-1, best, True)


def take_fitting(worth: torch.Tensor, sizes: torch.Tensor, room: int) -> torch.Tensor:
    """Groups of tokens, best first; one that is larger than what is left of `room` is passed over.

    worth, sizes: [Hkv, C] -> [Hkv, C] bool
    """
    taken = torch.zeros(worth.shape, dtype=torch.bool)
    order = worth.sort(dim=-1, descending=True, stable=True).indices.tolist()
    for head, (ranked, tokens) in enumerate(zip(order, sizes.tolist(), strict=True)):
        left, chosen = room, []
        for group in ranked:
            if left == 0:
                break
            if tokens[group] <= left:
                left -= tokens[group]
                chosen.append(group)
        taken[head, chosen] = True
    return taken
