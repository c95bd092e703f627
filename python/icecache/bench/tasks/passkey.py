"""A pass key in a long text of nothing (Mohtashami and Jaggi, 2023)."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from icecache.bench.tasks.task import Sample, Task
from icecache.errors import InvalidArgument

CountTokens = Callable[[str], int]

_START = (
    "There is important information hidden inside a lot of irrelevant text. Find it and memorize "
    "it. I will quiz you about it afterwards.\n\n"
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "\n\nWhat is the pass key?"
_PREFIX = " The pass key is"
_PROBE = 16  # repetitions that tell the tokens of one


def score(prediction: str, sample: Sample) -> float:
    """1 where the first number is the pass key."""
    match = re.search(r"\d+", prediction)
    return float(match is not None and match.group() == sample.answers[0])


TASK = Task("passkey", "first_number", 16, chat=True, score=score)
TASKS = (TASK,)


def make_sample(count_tokens: CountTokens, length: int, depth: float, seed: int = 0) -> Sample:
    """A five-digit pass key at `depth` (0: start, 1: end), as long as fits into `length` tokens.

    Prompt and answer prefix count, a chat template does not. The key depends on all but the
    tokenizer. Raises InvalidArgument for a depth outside [0, 1] and a length without room.
    """
    if not 0 <= depth <= 1:
        raise InvalidArgument(f"depth: expected 0 to 1, got {depth}")
    key = str(random.Random(f"passkey {length} {depth:g} {seed}").randrange(10_000, 100_000))

    def tokens(repeats: int) -> int:
        return count_tokens(_text(key, repeats, depth) + _PREFIX)

    repeats = _most_repeats(tokens, length)
    return Sample(
        name=f"{length}_{depth:g}_{seed}",
        prompt=_text(key, repeats, depth),
        answers=(key,),
        answer_prefix=_PREFIX,
        length=tokens(repeats),
        fields={"depth": depth, "seed": seed},
    )


def _text(key: str, repeats: int, depth: float) -> str:
    before = round(depth * repeats)
    hidden = _FILLER * before + _KEY.format(key=key) + _FILLER * (repeats - before)
    return _START + hidden.rstrip() + _QUESTION


def _most_repeats(tokens: Callable[[int], int], length: int) -> int:
    least = tokens(0)
    if least > length:
        raise InvalidArgument(f"length: expected at least {least} tokens, got {length}")
    each = max(1, (tokens(_PROBE) - least) // _PROBE)
    return bisect.bisect_right(range((length - least) // each + 2), length, key=tokens) - 1


@dataclass(frozen=True)
class PasskeySource:
    """Every length at every depth, each `repeats` times with keys of their own."""

    count_tokens: CountTokens
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 1
    seed: int = 0

    def samples(self, task: Task) -> Iterator[Sample]:
        for length in self.lengths:
            for depth in self.depths:
                for number in range(self.repeats):
                    yield make_sample(self.count_tokens, length, depth, self.seed + number)
