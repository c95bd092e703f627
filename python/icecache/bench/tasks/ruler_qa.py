"""RULER's questions from SQuAD and HotpotQA, their documents among others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icecache.bench.tasks.records import read_json
from icecache.bench.tasks.ruler_haystack import Haystack
from icecache.bench.tasks.ruler_maker import Draft
from icecache.errors import InvalidArgument

NEW_TOKENS = 32
_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
_TEMPLATE = (
    _TASK
    + "\n\nThe following are given documents.\n\n{context}\n\n"
    + _TASK
    + "\n\nQuestion: {query}"
)
_PREFIX = " Answer:"


@dataclass(frozen=True)
class Question:
    """Documents are given by their whole text."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]  # that must be there
    related: tuple[str, ...] = ()  # preferred around them


_Reader = Callable[[Any], Iterator[Question]]


class QaMaker:
    """Size counts documents: the question's own, related ones, then any others.

    Questions are asked in the file's order.
    """

    def __init__(self, task: str, haystack: Haystack) -> None:
        pool, (name, read) = POOLS[task], _FORMS[task]
        path: Path | None = getattr(haystack, pool)
        if path is None:
            raise InvalidArgument(
                f"haystack: ruler/{task} needs {name} as a local file: Haystack({pool}=path)"
            )
        self._questions = tuple(_questions(read, name, path))
        if not self._questions:
            raise InvalidArgument(f"haystack: {path} has no question with an answer")
        asked = self._questions
        self._documents = sorted({text for one in asked for text in (*one.documents, *one.related)})

    @property
    def questions(self) -> int:
        return len(self._questions)

    def least(self, index: int) -> int:
        return len(self._questions[index].documents)

    def draft(self, index: int, chance: random.Random, size: int) -> Draft:
        asked = self._questions[index]
        own = {*asked.documents, *asked.related}
        related = chance.sample(asked.related, len(asked.related))
        others = [text for text in self._documents if text not in own]
        chance.shuffle(others)
        order = [*asked.documents, *related, *others]
        chosen = [order[number % len(order)] for number in range(size)]
        chance.shuffle(chosen)
        parts = (f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1))
        prompt = _TEMPLATE.format(context="\n\n".join(parts), query=asked.query)
        return Draft(prompt, _PREFIX, asked.answers)


def _questions(read: _Reader, name: str, path: Path) -> Iterator[Question]:
    try:
        yield from read(read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            f"haystack: expected the format of {name} in {path}, got {error!r}"
        ) from error


def _squad(loaded: Any) -> Iterator[Question]:
    """Those that have an answer; related are the other paragraphs of their article."""
    for article in loaded["data"]:
        paragraphs = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            related = tuple(text for text in paragraphs if text != context)
            for one in paragraph["qas"]:
                if not one.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in one["answers"])
                    yield Question(one["question"], answers, (context,), related)


def _hotpotqa(loaded: Any) -> Iterator[Question]:
    """A document is its title and its sentences."""
    for one in loaded:
        texts = (f"{title}\n{''.join(sentences)}" for title, sentences in one["context"])
        yield Question(one["question"], (one["answer"],), tuple(dict.fromkeys(texts)))


POOLS = {"qa_1": "squad", "qa_2": "hotpotqa"}  # the field of Haystack that a task needs
_FORMS: dict[str, tuple[str, _Reader]] = {  # what it names, its reader
    "qa_1": ("SQuAD's dev-v2.0.json", _squad),
    "qa_2": ("HotpotQA's hotpot_dev_distractor_v1.json", _hotpotqa),
}
QA = tuple(POOLS)
