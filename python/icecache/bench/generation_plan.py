"""What a run of `icecache bench generation` is asked for. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from icecache.bench.suites import Data, find_suite
from icecache.errors import InvalidArgument

TASK = "generation"
BLOCK = 256  # positions that full attention takes at once, and that numbers are given for

_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Checkpoints:
    """Where an index is built anew: at multiples of `every` tokens (0: nowhere), for `steps`."""

    every: int = 0
    steps: int = 32  # at most BLOCK

    def places(self, start: int, length: int) -> list[int]:
        """Tokens held, between a prompt of `start` and a text of `length` tokens; the steps from
        the last place end with the text."""
        if not self.every:
            return []
        multiples = range(self.every, length + 1, self.every)
        places = {min(place, length - self.steps) for place in multiples}
        return sorted(place for place in places if place > start)


@dataclass(frozen=True)
class GenerationPlan:
    """What makes the numbers of a run. Lengths are in tokens."""

    model: str  # a folder, or "smollm2"
    methods: Sequence[str] = ()  # all for none
    budgets: Sequence[int] = (64, 256)
    data: Path | None = None  # a text or a folder of them; else Python's reference
    samples: int = 1  # stretches of each text
    length: int = 2048  # of a stretch, its prompt included
    prompt: int = 256
    switch_at: int | None = None  # where a stretch goes on with the next one's text
    is_own: bool = False  # each prompt goes on with what full attention writes
    free: int = 0  # that each method writes by itself; 0: nothing
    is_greedy: bool = False  # in what is written
    seed: int = 0
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    dtype: str = "float32"
    engine: dict[str, Any] = field(default_factory=dict)  # fields of icecache.Config

    @property
    def temperature(self) -> float:
        """Of what is written."""
        return 0.0 if self.is_greedy else _TEMPERATURE

    def arguments(self) -> dict[str, Any]:
        """Runs with the same arguments may go on in one folder; `samples` may grow."""
        made = {**asdict(self), "suite": TASK, "data": str(self.data) if self.data else None}
        del made["samples"]
        return made

    def check(self) -> None:
        """Raises InvalidArgument for texts that are none, and for what contradicts itself.

        Loads no model.
        """
        if self.data is not None:
            find_suite("text").check(Data(self.data))
        if not 1 <= self.prompt < self.length:
            raise InvalidArgument(
                f"--prompt: expected 1 or more, and less than --length {self.length}, got "
                f"{self.prompt}"
            )
        if self.switch_at is not None and not self.prompt <= self.switch_at < self.length:
            raise InvalidArgument(
                f"--switch-at: expected at least --prompt {self.prompt} and less than --length "
                f"{self.length}, got {self.switch_at}"
            )
        if self.switch_at is not None and self.is_own:
            raise InvalidArgument("--switch-at: expected none with --own, whose text is one")
        steps = self.checkpoints.steps
        if self.checkpoints.every and not steps <= min(BLOCK, self.length - self.prompt - 1):
            raise InvalidArgument(
                f"--rebuilt-steps: expected at most {BLOCK} and less than the "
                f"{self.length - self.prompt} tokens after the prompt, got {steps}"
            )
