"""How much memory a request takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from icecache import Config
from icecache.shape import CacheShape

# With index="tree" or "positional"; of the 1.2 slots a token that a tree takes at most, the rest is
# for the ends of short requests.
_SHARE = 1.25
_PAGES = 4  # that sinks, window and index begin and do not fill


class Room(NamedTuple):
    """What a request takes of host memory: `share` slots a token, and `ends`.

    With kv_dtype=int8 up to `unsealed` of its tokens are as the model makes them, and take `excess`
    slots more each.
    """

    share: float = _SHARE
    ends: int = _PAGES * 16
    unsealed: int = 0
    excess: float = 0.0


TREE = Room()


def room_of(config: Config, shapes: Sequence[CacheShape] = ()) -> Room:
    """By the engines' parameters in use, and their shapes, which kv_dtype=int8 needs to know.

    The index of the paper opens more pages than a tree.
    """
    many = 1_000_000
    room = Room(max(_SHARE, config.most_slots(many) / many), _PAGES * int(config.page_size))
    stored = sum(shape.stored_bytes(config.kv_dtype) for shape in shapes)
    excess = sum(shape.token_bytes for shape in shapes) / stored - 1 if stored else 0.0
    if excess <= 0:
        return room
    # Whole sequences, short of dense_tokens; else what has not been sealed yet.
    unsealed = max(config.dense_tokens, config.segment_tokens + 2 * config.window_tokens)
    return room._replace(unsealed=unsealed, excess=excess)


def slots_needed(tokens: int, step: int = 0, room: Room = TREE) -> int:
    """Token slots, of every layer and KV head, that a request of `tokens` takes.

    With `step` on a CUDA device, where room grows by steps of so many tokens; else on the CPU.
    """
    if step:
        return -(-tokens // step) * step
    return int(tokens * room.share + min(tokens, room.unsealed) * room.excess) + room.ends
