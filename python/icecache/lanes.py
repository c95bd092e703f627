"""Lanes: one DeviceCache, and the sequences that stand in its lanes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from icecache.device import ROOM_STEP, DeviceCache, rebuild_is_due
from icecache.errors import Error, InvalidArgument, OutOfPages


@dataclass
class Fork:
    """A sequence without a lane: what it copies, and how many tokens of that (None: all)."""

    source: int
    length: int | None = None

    def tokens(self) -> float:
        return float("inf") if self.length is None else self.length


class Lanes:
    """Which sequence stands in which lane, and what the host has to know of each lane.

    Invariant: a lane is free and empty, or belongs to one sequence. Not thread-safe.
    """

    def __init__(self, cache: DeviceCache) -> None:
        self.cache = cache
        self.of: dict[int, int] = {}  # the lane of each sequence
        self.free = list(range(cache.batch))[::-1]  # the last one is the next to be taken
        # [layers][lanes] tokens, those of a step under way included, and tokens that the index was
        # built from last: 0 before the prompt is complete.
        self.lengths = [[0] * cache.batch for _ in range(cache.num_layers)]
        self.built = [[0] * cache.batch for _ in range(cache.num_layers)]
        # By layer and lane, keys and values [Hkv, T, D] of a prompt that the cache does not have.
        self.prompts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.building: set[int] = set()  # lanes whose prompt's index may not be done yet
        self.extending: set[int] = set()  # lanes whose prompt goes on behind an index
        self.broken: dict[int, str] = {}  # lanes whose index could not be built, and why
        self._error = "its index could not be built"  # the last of index work

    def enter(self, seq: int) -> None:
        """Gives `seq` a free lane."""
        self.of[seq] = self.free.pop()

    def copy(self, lane: int, source: int) -> None:
        """Makes one lane a copy of another, whose index is waited for."""
        self.cache.fork(lane, source)
        self.forget(lane)
        for counts in (*self.lengths, *self.built):
            counts[lane] = counts[source]

    def shorten(self, lane: int, length: int | None) -> bool:
        """Leaves at most `length` tokens in every layer. Says whether there were more."""
        if length is None or all(lengths[lane] <= length for lengths in self.lengths):
            return False
        if length == 0:
            self.empty(lane)
            return True
        self.finish_building()  # what went wrong there is not this lane's
        self.cache.take_back(lane, length)
        for counts in (*self.lengths, *self.built):
            counts[lane] = min(counts[lane], length)
        for (layer, owner), (keys, values) in [*self.prompts.items()]:
            if owner == lane:
                self.prompts[layer, owner] = keys[:, :length], values[:, :length]
        return True

    def empty(self, lane: int) -> None:
        """Takes all tokens of a lane. Waits for the current stream."""
        self.cache.release(lane)
        self.forget(lane)
        for counts in (*self.lengths, *self.built):
            counts[lane] = 0

    def forget(self, lane: int) -> None:
        """Drops the prompt that a lane was given, and what became of its index."""
        for layer in range(self.cache.num_layers):
            self.prompts.pop((layer, lane), None)
        self.building.discard(lane)
        self.extending.discard(lane)
        self.broken.pop(lane, None)

    def leave(self, seq: int) -> None:
        """Ends a sequence: its lane is empty and free. Waits for the current stream."""
        lane = self.of[seq]
        self.empty(lane)
        del self.of[seq]
        self.free.append(lane)

    def rebuild_if_due(self, lane: int, layers: Iterable[int]) -> None:
        """Builds the index of a lane anew in those layers in which it has grown enough."""
        for layer in layers:
            length = self.lengths[layer][lane]
            if rebuild_is_due(length, self.built[layer][lane]):
                self.cache.rebuild(layer, lane)
                self.built[layer][lane] = length

    def prepare_tokens(self, lanes: Sequence[int], layer: int, count: int) -> None:
        """Each of `lanes` can take `count` more tokens in this layer; else InvalidArgument."""
        lengths = self.lengths[layer]
        longest = max(lengths[lane] for lane in lanes)
        if longest + count > self.cache.max_tokens:
            raise InvalidArgument(
                f"max_tokens: the sequence has {longest} tokens and gets {count} more, and there "
                f"is room for {self.cache.max_tokens}; give icecache.enable a larger max_tokens"
            )
        for lane in lanes:
            self.rebuild_if_due(lane, [layer])
            self.cache.reserve(lane, lengths[lane] + count)

    def with_held(
        self, layer: int, lane: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk behind the tokens that the lane's sequence holds, for as long as it is attended.

        These come from wherever they are: from host memory, unless they are on the device, too.
        """
        held_keys, held_values = self.cache.gather(layer, lane)
        return torch.cat((held_keys, keys), dim=1), torch.cat((held_values, values), dim=1)

    def with_earlier_chunks(
        self, layer: int, lane: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk of a prompt, behind those that the lane has."""
        if (layer, lane) not in self.prompts:
            return keys, values
        earlier_keys, earlier_values = self.prompts[layer, lane]
        return torch.cat((earlier_keys, keys), dim=1), torch.cat((earlier_values, values), dim=1)

    def finish_building(self) -> None:
        """Waits for the indexes of prompts. Lanes that lack one are broken: an error of index work
        names nobody, and may come up in any later call of its layer."""
        if not self.building:
            return
        layers = range(self.cache.num_layers)
        for layer in layers:
            self.wait(layer)
        for lane in self.building:
            if any(self.cache.length(layer, lane) == 0 for layer in layers):
                self.broken[lane] = self._error
        self.building.clear()

    def wait(self, layer: int) -> None:
        """Waits for the index work of a layer, and keeps its error for finish_building()."""
        try:
            self.cache.wait(layer)
        except Error as error:
            self._error = str(error)


def take_memory(cache: DeviceCache, device_share: float) -> int:
    """Takes device memory for the indexes of as many tokens as it returns."""
    memory = cache.memory()
    on_host = int(cache.config.host_memory) // cache.shape.token_bytes
    # Of the share, what others have by now does not count.
    left = max(0, memory.free_bytes - int((1 - device_share) * memory.total_bytes))
    longest = -(-cache.max_tokens // ROOM_STEP) * ROOM_STEP
    on_device = left // 2 // memory.token_bytes
    if on_device < min(on_host, longest):
        raise OutOfPages(
            f"half of the {left:,} bytes left to it holds the indexes of {on_device:,} tokens"
        )
    tokens = max(1, min(on_host, cache.batch * longest, on_device))
    cache.limit_tokens(tokens)
    return tokens
