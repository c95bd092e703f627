"""One RULER question of a chosen size, and the size that fills a length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from icecache.errors import InvalidArgument

CountTokens = Callable[[str], int]
_SLACK = 256  # the search ends where less than 1/256 of the room is left


@dataclass(frozen=True)
class Draft:
    """A question before its length is known to fit."""

    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]


class Maker(Protocol):
    """How the questions of one task are made."""

    @property
    def questions(self) -> int | None:
        """How many there are; None where they are made up without end."""
        ...

    def least(self, index: int) -> int:
        """The smallest haystack that question `index` can be hidden in."""
        ...

    def draft(self, index: int, chance: random.Random, size: int) -> Draft:
        """Question `index` in a haystack of `size` pieces, drawn from `chance` alone."""
        ...


class Fit(NamedTuple):
    """A draft, the size of its haystack, and tokens of its prompt and answer prefix."""

    draft: Draft
    size: int
    tokens: int


def fit(
    make: Callable[[int], Draft], count: CountTokens, least: int, guess: int, room: int
) -> Fit | None:
    """The largest draft of at most `room` tokens; None where that of size `least` has more.

    Steps that double lead from `guess` to a bracket, which is then halved.
    """
    best: Fit | None = None
    low, high = least - 1, None  # the largest size known to fit, the smallest known not to
    size = max(guess, least)
    step = max(1, size // _SLACK)
    while high is None or high - low > 1:
        draft = make(size)
        tokens = count(draft.prompt + draft.answer_prefix)
        if tokens > room:
            high = size
        else:
            best, low = Fit(draft, size, tokens), size
            if room - tokens < room // _SLACK:
                break
        if high is None:
            size = low + step
        elif best is None:
            size = max(least, high - step)
        else:
            size = (low + high) // 2
        step *= 2
    return best


def distinct(draw: Callable[[], str], count: int, taken: set[str]) -> list[str]:
    """`count` draws, none of them in `taken`, to which they are added."""
    drawn: list[str] = []
    while len(drawn) < count:
        text = draw()
        if text not in taken:
            taken.add(text)
            drawn.append(text)
    return drawn


def token_counter(tokenizer: Any) -> CountTokens:
    """Number of tokens of a text without special tokens.

    `tokenizer` has a method encode, or is called with a text and returns the number.
    """
    encode = getattr(tokenizer, "encode", None)
    if encode is not None and not isinstance(tokenizer, str):
        options = _encode_options(encode)
        return lambda text: len(encode(text, **options))
    if callable(tokenizer) and isinstance(tokenizer("a"), int):
        counter: CountTokens = tokenizer
        return counter
    raise InvalidArgument(
        "tokenizer: expected a method encode, or a function from text to number of tokens, got "
        f"{type(tokenizer).__name__}"
    )


def _encode_options(encode: Callable[..., Any]) -> dict[str, bool]:
    """What this kind of tokenizer understands: of transformers, of tokenizers, any other."""
    plain = {"add_special_tokens": False}
    for options in ({**plain, "verbose": False}, plain):
        try:
            encode("a", **options)
        except TypeError:
            continue
        return options
    return {}
