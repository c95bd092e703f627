"""A long document with needles hidden in it, as tokens of a chat prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icecache.bench.prompts import pydoc_text
from icecache.documents import read_document
from icecache.errors import InvalidArgument

_DEPTHS = (0.3, 0.6, 0.85)
_LEAST = 400  # tokens: below, there is nothing to select from
_INTRO = (
    "Some facts are hidden within the following text. Make sure to memorize them. I will quiz you "
    "about them afterwards.\n"
)


@dataclass(frozen=True)
class _Kind:
    """A fact, the question about it, the start of the answer; {key} and {answer} are filled in."""

    fact: str
    question: str
    prefix: str
    keys: tuple[str, ...]


# Unlike each other, so that a small model does not take one for the other.
_KINDS = (
    _Kind(
        "The telephone number of the lighthouse in {key} is: {answer}.",
        "What is the telephone number of the lighthouse in {key} mentioned in the provided text?",
        "The telephone number of the lighthouse in {key} mentioned in the provided text is:",
        ("Port Salvation", "Graywater Bay", "Northwick"),
    ),
    _Kind(
        "The serial number of the {key} is: {answer}.",
        "What is the serial number of the {key} mentioned in the provided text?",
        "The serial number of the {key} mentioned in the provided text is:",
        ("golden telescope", "copper violin", "marble clock"),
    ),
    _Kind(
        "One of the special magic numbers for {key} is: {answer}.",
        "What is the special magic number for {key} mentioned in the provided text?",
        "The special magic number for {key} mentioned in the provided text is:",
        ("amber-falcon", "quiet-meadow", "crimson-lantern"),
    ),
)


@dataclass(frozen=True)
class Needle:
    """A number hidden at tokens begin..end of the prompt, and the question about it."""

    key: str
    answer: str
    begin: int
    end: int
    question: torch.Tensor  # [T] int64: question, end of the turn, start of the answer


@dataclass(frozen=True)
class Document:
    """Tokens shared by all questions, up to the end of the text."""

    name: str
    tokens: torch.Tensor  # [L] int64
    needles: list[Needle]

    @property
    def longest_question(self) -> int:
        return max(needle.question.shape[0] for needle in self.needles)


def make_document(tokenizer: Any, path: Path | None, tokens: int | None, seed: int) -> Document:
    """`path` or Python's own language reference; cut to `tokens` (None: the whole file).

    Raises Error for a file that cannot be read, InvalidArgument for a text too short to hide in.
    """
    text = pydoc_text() if path is None else read_document(path)
    limit = 3500 if path is None and tokens is None else tokens

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    if limit is not None:
        text = tokenizer.decode(encode(text[: 12 * limit])[:limit])
    chat: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": "{text}"}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = chat.partition("{text}")
    chance = random.Random(seed)
    lines = text.splitlines(keepends=True)
    places = [0, *(int(depth * len(lines)) for depth in _DEPTHS)]

    ids = encode(before + _INTRO)
    needles = []
    for kind, start, stop in zip(_KINDS, places[:-1], places[1:], strict=True):
        ids += encode("".join(lines[start:stop]))
        key, answer = chance.choice(kind.keys), str(chance.randrange(1_000_000, 10_000_000))
        begin = len(ids)
        ids += encode("\n" + kind.fact.format(key=key, answer=answer) + "\n")
        asked = "\n" + kind.question.format(key=key) + after + kind.prefix.format(key=key)
        needles.append(Needle(key, answer, begin, len(ids), torch.tensor(encode(asked))))
    ids += encode("".join(lines[places[-1] :]))
    if len(ids) < _LEAST:
        raise InvalidArgument(
            f"the document must have at least {_LEAST} tokens to hide needles in, got {len(ids)}"
        )
    name = "Python's language reference" if path is None else path.name
    return Document(name, torch.tensor(ids), needles)
