"""RULER's needles in a haystack: numbers or uuids to be found by their keys."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from icecache.bench.tasks.ruler_haystack import NOISE, Haystack, compound
from icecache.bench.tasks.ruler_maker import Draft, distinct

NEW_TOKENS = 128
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_TEMPLATE = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # percent of an essay's sentences


@dataclass(frozen=True)
class Needles:
    """What is hidden in what."""

    haystack: str  # "noise", "essay", or "needle": more of the same with other keys
    key_kind: str = "words"  # or "uuids"
    value_kind: str = "numbers"  # or "uuids"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys asked for


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


class NiahMaker:
    """Size counts words of an essay, noises, or needles that are not asked for."""

    questions = None

    def __init__(self, needles: Needles, haystack: Haystack) -> None:
        self._form = needles
        self._haystack = haystack

    def least(self, index: int) -> int:
        return self._form.keys * self._form.values

    def draft(self, index: int, chance: random.Random, size: int) -> Draft:
        form, taken = self._form, set[str]()
        keys = distinct(partial(_draw, chance, form.key_kind), form.keys, taken)
        draw_value = partial(_draw, chance, form.value_kind)
        values = {key: distinct(draw_value, form.values, taken) for key in keys}
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        chance.shuffle(needles)
        asked = chance.sample(keys, form.queries)
        answers = tuple(value for key in asked for value in values[key])
        if form.haystack == "essay":
            context = self._in_essay(chance, size, needles)
        else:
            context = self._in_lines(chance, size, needles, taken)
        return self._ask(context, asked, answers)

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self._form.value_kind, key=key, value=value)

    def _in_essay(self, chance: random.Random, size: int, needles: Sequence[str]) -> str:
        words, ends = self._haystack.essay(size)
        depths = sorted(chance.sample(_DEPTHS, len(needles)))
        places = [[0, *ends][len(ends) * depth // 100] for depth in depths]
        pieces: list[str] = []
        for start, place, needle in zip([0, *places], places, needles, strict=False):
            pieces += [*words[start:place], needle]
        return " ".join([*pieces, *words[places[-1] :]])

    def _in_lines(
        self, chance: random.Random, size: int, needles: Sequence[str], taken: set[str]
    ) -> str:
        places = sorted(chance.sample(range(size), len(needles)), reverse=True)
        lines = [NOISE] * size if self._form.haystack == "noise" else []
        if not lines:
            keys = distinct(partial(_draw, chance, self._form.key_kind), size, taken)
            values = distinct(partial(_draw, chance, self._form.value_kind), size, taken)
            lines = [self._needle(key, value) for key, value in zip(keys, values, strict=True)]
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _ask(self, context: str, asked: Sequence[str], answers: tuple[str, ...]) -> Draft:
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        kind = self._form.value_kind
        if len(answers) == 1:
            forms = {"some": "A", "are": "is", "are_all": "is", "kind": kind.removesuffix("s")}
        else:
            forms = {"some": "Some", "are": "are", "are_all": "are all", "kind": kind}
        prompt = _TEMPLATE.format(context=context, query=query, **forms)
        return Draft(prompt, _PREFIX.format(query=query, **forms), answers)


def _draw(chance: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(chance.randrange(10**6, 10**7))
    if kind == "words":
        return compound(chance)
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))
