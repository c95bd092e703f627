"""What RULER hides its questions in, and the words they are made of."""

from __future__ import annotations

import bisect
import random
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from icecache.bench.libraries import library
from icecache.bench.tasks.records import read_json, record
from icecache.errors import InvalidArgument

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ENDS_SENTENCE = re.compile(r"[.!?][\"'”’)\]]*$")


@dataclass(frozen=True)
class Haystack:
    """Local texts. Python's own reference stands in for the essays where there are none."""

    essays: Path | None = None  # JSON {"text": ...}: PaulGrahamEssays.json
    squad: Path | None = None  # JSON of SQuAD: dev-v2.0.json, for qa_1
    hotpotqa: Path | None = None  # JSON of HotpotQA: hotpot_dev_distractor_v1.json, for qa_2

    def essay(self, size: int) -> tuple[list[str], list[int]]:
        """The first `size` words, over again where there are fewer, and their sentences' ends."""
        words, ends = self._essay
        repeats, rest = divmod(size, len(words))
        last = bisect.bisect_left(ends, rest)
        starts = [len(words) * number for number in range(repeats)]
        found = [start + end for start in starts for end in ends]
        found += [len(words) * repeats + end for end in ends[:last]]
        if found[-1:] != [size]:
            found.append(size)
        return words * repeats + words[:rest], found

    @cached_property
    def _essay(self) -> tuple[list[str], list[int]]:
        """All words, and how many of them there are up to each end of a sentence."""
        words = self._text().split()
        if not words:
            raise InvalidArgument(f"essays: {self.essays} has no words")
        following = [*words[1:], ""]
        ends = [
            number
            for number, (word, after) in enumerate(zip(words, following, strict=True), 1)
            if _ENDS_SENTENCE.search(word) and not after[:1].islower()
        ]
        if ends[-1:] != [len(words)]:
            ends.append(len(words))
        return words, ends

    def _text(self) -> str:
        if self.essays is None:
            from icecache.bench.prompts import pydoc_text

            return pydoc_text()
        return record(read_json(self.essays), str(self.essays)).text("text")


def compound(chance: random.Random) -> str:
    """A key as RULER makes them: adjective-noun."""
    return f"{chance.choice(words_of('adjective'))}-{chance.choice(words_of('noun'))}"


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs of wonderwords, sorted."""
    kinds = ("noun", "adjective", "verb")
    return tuple(sorted({word for kind in kinds for word in words_of(kind)}))


@cache
def words_of(kind: str) -> tuple[str, ...]:
    """The "noun", "verb" or "adjective" list of wonderwords. Raises Unavailable without it."""
    words = library("wonderwords").RandomWord(enhanced_prefixes=False)
    return tuple(words.filter(include_categories=[kind]))
