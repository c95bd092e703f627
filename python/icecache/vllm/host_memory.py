"""How much memory a request takes."""

from __future__ import annotations

from typing import NamedTuple

from icecache import Config

# With index="tree" or "positional"; of the 1.2 slots a token that a tree takes at most, the rest is
# for the ends of short requests.
_SHARE = 1.25
_PAGES = 4  # that sinks, window and index begin and do not fill


class Room(NamedTuple):
    """What a request takes of host memory: `share` slots a token, and `ends`."""

    share: float = _SHARE
    ends: int = _PAGES * 16


TREE = Room()


def room_of(config: Config) -> Room:
    """By the engine's parameters in use: the index of the paper opens more pages than a tree."""
    many = 1_000_000
    return Room(max(_SHARE, config.most_slots(many) / many), _PAGES * int(config.page_size))


def slots_needed(tokens: int, step: int = 0, room: Room = TREE) -> int:
    """Token slots, of every layer and KV head, that a request of `tokens` takes.

    With `step` on a CUDA device, where room grows by steps of so many tokens; else on the CPU.
    """
    return -(-tokens // step) * step if step else int(tokens * room.share) + room.ends
