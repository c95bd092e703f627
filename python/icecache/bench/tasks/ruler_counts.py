"""RULER's aggregation: the common words of a numbered list, the frequent ones of a coded text."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from icecache.bench.tasks.ruler_haystack import all_words, compound
from icecache.bench.tasks.ruler_maker import Draft, distinct

CWE_NEW_TOKENS = 120
_CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10

FWE_NEW_TOKENS = 50
_FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
_FWE_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_DOTS = "..."  # the most frequent "word", which is to be ignored
_ALPHA = 2.0  # a word of rank k is there in proportion to k**-2
_ZETA = math.pi**2 / 6  # the sum of those


class _Repeats(NamedTuple):
    """How often each common and each other word is in a list."""

    common: int
    other: int


class CommonWordsMaker:
    """Size counts different words. A solved example stands in front of the question.

    Where more words are wanted than wonderwords has, the others are followed by adjective-nouns.
    """

    questions = None

    def __init__(self, length: int) -> None:
        short = length < 4096
        self._repeats = _Repeats(6, 1) if short else _Repeats(30, 3)
        self._example_size = 20 if short else 40
        self._example_repeats = _Repeats(3, 1) if short else _Repeats(10, 3)

    def least(self, index: int) -> int:
        return _COMMON + 1

    def draft(self, index: int, chance: random.Random, size: int) -> Draft:
        words = chance.sample(all_words(), self._example_size)
        example = _numbered_list(chance, words, self._example_repeats)
        solution = _numbered(example.answers)
        words = chance.sample(all_words(), len(all_words()))[:size]
        words += distinct(partial(compound, chance), size - len(words), set(words))
        asked = _numbered_list(chance, words, self._repeats)
        solved = f"{example.prompt}{example.answer_prefix} {solution}\n"
        return Draft(solved + asked.prompt, asked.answer_prefix, asked.answers)


def _numbered_list(chance: random.Random, words: Sequence[str], repeats: _Repeats) -> Draft:
    """The first ten of `words` are the common ones."""
    common, other = words[:_COMMON], words[_COMMON:]
    listed = [*common] * repeats.common + [*other] * repeats.other
    chance.shuffle(listed)
    return Draft(_CWE_TEMPLATE.format(context=_numbered(listed)), _CWE_PREFIX, tuple(common))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


class FrequentWordsMaker:
    """Size counts words of an endless vocabulary; those of the actual one are a little fewer."""

    questions = None

    def __init__(self, length: int) -> None:
        self._vocabulary = max(5, (length - FWE_NEW_TOKENS) // 50)

    def least(self, index: int) -> int:
        return 74  # ranks 4 and 5 differ by size * (1/16 - 1/25) / zeta, from here on at least 1

    def draft(self, index: int, chance: random.Random, size: int) -> Draft:
        def draw() -> str:
            return "".join(chance.choices(string.ascii_lowercase, k=6))

        vocabulary = [_DOTS, *distinct(draw, self._vocabulary - 1, set())]
        text: list[str] = []
        for rank, word in enumerate(vocabulary, 1):
            text += [word] * int(size * rank**-_ALPHA / _ZETA)
        chance.shuffle(text)
        prompt = _FWE_TEMPLATE.format(context=" ".join(text))
        return Draft(prompt, _FWE_PREFIX, tuple(vocabulary[1:4]))
