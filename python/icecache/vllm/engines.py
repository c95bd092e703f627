"""The engines of one worker: an engine has one shape, and layers of a model may have several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from icecache import Config, Engine, HeadStats, InvalidArgument, Phase
from icecache.device_engine import DeviceEngine
from icecache.machine import usable_memory
from icecache.shape import CacheShape

Ids: TypeAlias = tuple[int, ...]  # a sequence: its number in each engine


@dataclass(frozen=True)
class Layer:
    """A layer of the model whose attention the engines compute."""

    name: str
    shape: CacheShape  # of this layer alone
    owner: str | None = None  # the layer whose keys and values it attends to, if not its own
    sinks: torch.Tensor | None = None  # [Hq] a logit in each head's softmax, beside the tokens'


@dataclass(frozen=True)
class Place:
    """Where the keys and values that a layer attends to are."""

    engine: int
    layer: int  # of that engine
    is_last: bool = True  # of all layers that attend to them


class HostEngine(Engine):
    """The engine on the CPU, whose steps need nothing beforehand."""

    room_step = 0  # requests grow token by token

    @property
    def tokens(self) -> int:
        """Tokens that there is memory for, of all sequences."""
        return int(self.config.host_memory) // self.shape.stored_bytes(self.config.kv_dtype)

    def all_stats(self) -> list[HeadStats]:
        """Of each layer and KV head."""
        heads = range(self.num_kv_heads)
        return [self.stats(layer, head) for layer in range(self.num_layers) for head in heads]

    def prepare(self, seq: int, count: int, phase: Phase) -> None:
        """Nothing."""

    def begin(
        self,
        seqs: Sequence[int],
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
    ) -> None:
        """Nothing."""


class Engines:
    """The verbs of an engine for sequences that are one in each of several. Not thread-safe."""

    def __init__(self, engines: Sequence[HostEngine | DeviceEngine]) -> None:
        self._engines = list(engines)
        self.room_step = self._engines[0].room_step
        # Parameters in use; `host_memory` and `dense_layers` are those of the first engine.
        self.config = self._engines[0].config

    @property
    def tokens(self) -> int:
        """Tokens that there is memory for, of all sequences."""
        return min(engine.tokens for engine in self._engines)

    @property
    def host_memory(self) -> int:
        """Bytes of pages, of all sequences."""
        return sum(int(engine.config.host_memory) for engine in self._engines)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers and KV heads, as an index holds them."""
        return sum(shape.stored_bytes(self.config.kv_dtype) for shape in self.shapes)

    @property
    def shapes(self) -> list[CacheShape]:
        """Of each engine."""
        return [engine.shape for engine in self._engines]

    def new_sequence(self) -> Ids:
        """As Engine.new_sequence()."""
        return tuple(engine.new_sequence() for engine in self._engines)

    def fork(self, seq: Ids, length: int) -> Ids:
        """As Engine.fork(), in all engines or in none."""
        made: list[int] = []
        try:
            for engine, of in zip(self._engines, seq, strict=True):
                made.append(engine.fork(of, length))
        except BaseException:
            for engine, of in zip(self._engines, made, strict=False):
                engine.release(of)
            raise
        return tuple(made)

    def retain(self, seq: Ids) -> None:
        """As Engine.retain(). Each engine ends what it retains by itself."""
        for engine, of in zip(self._engines, seq, strict=True):
            engine.retain(of)

    def contains(self, seq: Ids) -> bool:
        """False where an engine does not have it any more."""
        return all(engine.contains(of) for engine, of in zip(self._engines, seq, strict=True))

    def truncate(self, seq: Ids, length: int) -> None:
        """As Engine.truncate(). A sequence that raises must be released."""
        for engine, of in zip(self._engines, seq, strict=True):
            engine.truncate(of, length)

    def release(self, seq: Ids) -> None:
        """Ends a sequence in each engine that has it."""
        for engine, of in zip(self._engines, seq, strict=True):
            if engine.contains(of):
                engine.release(of)

    def prepare(self, seq: Ids, count: int, phase: Phase) -> None:
        """As DeviceEngine.prepare()."""
        for engine, of in zip(self._engines, seq, strict=True):
            engine.prepare(of, count, phase)

    def begin(
        self,
        seqs: Sequence[Ids],
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
    ) -> None:
        """As DeviceEngine.begin()."""
        for index, engine in enumerate(self._engines):
            engine.begin([seq[index] for seq in seqs], firsts, counts, phases)

    def step_packed(
        self,
        seqs: Sequence[Ids],
        place: Place,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        outputs: torch.Tensor,
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
        lse: torch.Tensor | None = None,
    ) -> None:
        """As Engine.step_packed(), in the engine of a layer."""
        if not place.is_last:  # a prompt is indexed once all its queries have been seen
            phases = [Phase.PREFILL if phase == Phase.PROMPT_END else phase for phase in phases]
        self._engines[place.engine].step_packed(
            [seq[place.engine] for seq in seqs],
            place.layer,
            queries,
            keys,
            values,
            outputs,
            firsts,
            counts,
            phases,
            lse,
        )

    def all_stats(self) -> list[HeadStats]:
        """Of all layers and KV heads."""
        return [stats for engine in self._engines for stats in engine.all_stats()]

    def pool_bytes(self) -> int:
        """Bytes of pages in use, of `host_memory`."""
        return sum(engine.pool_bytes() for engine in self._engines)

    def residents(self) -> tuple[int, int]:
        """Sequences that a device holds whole, and the bytes of it that are for such."""
        held = [e.memory() for e in self._engines if isinstance(e, DeviceEngine)]
        return sum(m.resident_sequences for m in held), sum(m.resident_bytes for m in held)

    def sequences(self) -> int:
        """Sequences that any engine has. Waits for background work."""
        return max(engine.memory().sequences for engine in self._engines)

    def check_integrity(self) -> None:
        """As Engine.check_integrity(), of engines on the CPU."""
        for engine in self._engines:
            if isinstance(engine, HostEngine):
                engine.check_integrity()


def place_layers(layers: Sequence[Layer]) -> tuple[list[CacheShape], dict[str, Place]]:
    """The shape of each engine, and the place of each layer by its name; `layers` in model order.

    Raises InvalidArgument for a layer that attends to what another has, but in another shape.
    """
    # By the owner of keys and values: its shape, and the last layer that attends to them.
    shapes = {layer.name: layer.shape for layer in layers if layer.owner is None}
    last = {layer.owner or layer.name: layer.name for layer in layers}
    counts: dict[CacheShape, int] = {}
    numbers = {}
    for owner, shape in shapes.items():
        numbers[owner] = counts.setdefault(shape, 0)
        counts[shape] += 1
    places = {}
    for layer in layers:
        owner = layer.owner or layer.name
        if shapes.get(owner) != layer.shape:
            raise InvalidArgument(
                f"IceCache does not serve {layer.name} ({layer.shape}), which attends to the keys "
                f"and values of {owner} ({shapes.get(owner, 'not served')}): serve this model with "
                "stock vLLM"
            )
        engine = [*counts].index(layer.shape)
        places[layer.name] = Place(engine, numbers[owner], is_last=last[owner] == layer.name)
    return [replace(shape, num_layers=count) for shape, count in counts.items()], places


def split_config(
    config: Config, shapes: Sequence[CacheShape], places: Sequence[Place]
) -> list[Config]:
    """The parameters of each engine: host memory by the bytes of a token, dense layers by number.

    `places`: of each layer that has keys and values of its own, in the model's order. Raises
    InvalidArgument for a dense layer that does not exist.
    """
    if len(shapes) == 1:
        return [config]
    config.check()
    memory = config.host_memory or usable_memory() // 2
    sizes = [shape.stored_bytes(config.kv_dtype) for shape in shapes]
    dense: list[list[int]] = [[] for _ in shapes]
    for number in (int(word) for word in config.dense_layers.split(",") if word.strip()):
        if not number < len(places):
            raise InvalidArgument(
                f"dense_layers must name layers from 0 to {len(places) - 1}, got {number}"
            )
        dense[places[number].engine].append(places[number].layer)
    given: dict[str, Any] = config.to_dict()
    return [
        Config(
            **{
                **given,
                "host_memory": memory * size // sum(sizes),
                "dense_layers": ",".join(str(number) for number in numbers),
            }
        )
        for size, numbers in zip(sizes, dense, strict=True)
    ]
