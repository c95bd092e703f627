"""RULER's variable tracking: which variables hold a value, through a chain of assignments."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence
from functools import partial

from icecache.bench.tasks.ruler_haystack import NOISE
from icecache.bench.tasks.ruler_maker import CountTokens, Draft, distinct, fit

NEW_TOKENS = 30
_VARIABLES = 5  # of one chain of four hops
_EXAMPLE_TOKENS = 500  # the solved example in front of the question has at most so many
_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)


class ChainMaker:
    """Size counts noises between the assignments of the question.

    The solved example has the same places in all samples, and other names in each.
    """

    questions = None

    def __init__(self, seed: int, count: CountTokens) -> None:
        def example(size: int) -> Draft:
            return _random_question(random.Random(seed), size, 3, set())

        found = fit(example, count, _VARIABLES, _VARIABLES, _EXAMPLE_TOKENS)
        self._noises = found.size if found else _VARIABLES
        self._places = random.Random(seed).sample(range(self._noises), _VARIABLES)

    def least(self, index: int) -> int:
        return _VARIABLES

    def draft(self, index: int, chance: random.Random, size: int) -> Draft:
        taken = {"VAR"}
        names = _names(chance, 3, taken)
        (value,) = distinct(partial(_value, chance), 1, taken)
        example = _question(names, value, self._noises, self._places)
        solved = f"{example.prompt}{example.answer_prefix} {' '.join(names)}\n\n"
        asked = _random_question(chance, size, 5, taken)
        return Draft(solved + asked.prompt, asked.answer_prefix, asked.answers)


def _random_question(chance: random.Random, noises: int, letters: int, taken: set[str]) -> Draft:
    names = _names(chance, letters, taken)
    (value,) = distinct(partial(_value, chance), 1, taken)
    return _question(names, value, noises, chance.sample(range(noises), len(names)))


def _question(names: Sequence[str], value: str, noises: int, places: Sequence[int]) -> Draft:
    links = [f"VAR {names[0]} = {value}"]
    links += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
    lines = [NOISE] * noises
    for number, (place, link) in enumerate(zip(sorted(places), links, strict=True)):
        lines.insert(place + number, link)
    prompt = _TEMPLATE.format(context="\n".join(lines), value=value)
    return Draft(prompt, _PREFIX.format(count=len(names), value=value), tuple(names))


def _names(chance: random.Random, letters: int, taken: set[str]) -> list[str]:
    def draw() -> str:
        return "".join(chance.choices(string.ascii_uppercase, k=letters))

    return distinct(draw, _VARIABLES, taken)


def _value(chance: random.Random) -> str:
    return str(chance.randrange(10_000, 99_999))
