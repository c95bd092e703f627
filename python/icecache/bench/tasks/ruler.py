"""RULER's 13 synthetic tasks, generated to fill a length (Hsieh et al., 2024).

Templates, parameters and scores are RULER's. Where we differ: every sample draws its own order of
needles, words and documents, where RULER shuffles all samples of a file alike; keys and values
never occur twice; a sentence of an essay ends at its punctuation, not by a model of nltk.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from icecache.bench.tasks import records, ruler_chains, ruler_counts, ruler_niah, ruler_qa
from icecache.bench.tasks.ruler_haystack import Haystack
from icecache.bench.tasks.ruler_maker import CountTokens, Draft, Fit, Maker, fit, token_counter
from icecache.bench.tasks.task import Sample, Task, find_tasks
from icecache.errors import InvalidArgument

__all__ = [
    "TASKS",
    "Haystack",
    "generate",
    "read_jsonl",
    "string_match_all",
    "string_match_part",
    "write_jsonl",
]

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, sample: Sample) -> float:
    """The share of the answers that the prediction contains, in any case."""
    found = _contained(prediction, sample.answers)
    return sum(found) / len(found)


def string_match_part(prediction: str, sample: Sample) -> float:
    """1 where the prediction contains any of the answers, in any case."""
    return float(any(_contained(prediction, sample.answers)))


def _contained(prediction: str, answers: Iterable[str]) -> list[bool]:
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]


def _task(name: str, new_tokens: int, score: Callable[[str, Sample], float]) -> Task:
    return Task(f"ruler/{name}", score.__name__, new_tokens, chat=True, score=score)


TASKS = (
    *(_task(name, ruler_niah.NEW_TOKENS, string_match_all) for name in ruler_niah.NIAH),
    _task("vt", ruler_chains.NEW_TOKENS, string_match_all),
    _task("cwe", ruler_counts.CWE_NEW_TOKENS, string_match_all),
    _task("fwe", ruler_counts.FWE_NEW_TOKENS, string_match_all),
    *(_task(name, ruler_qa.NEW_TOKENS, string_match_part) for name in ruler_qa.QA),
)


def generate(
    task: Task | str, length: int, count: int, seed: int, tokenizer: Any, haystack: Haystack
) -> Iterator[Sample]:
    """`count` samples that fill `length` tokens: prompt, answer prefix and answer together.

    The chat template is not counted. A sample is the same for every larger `count`. `tokenizer`
    has a method encode, or is a function from text to number of tokens. Questions of qa_1 and qa_2
    whose own documents are longer than `length` are passed over. Raises InvalidArgument, at the
    call, and Unavailable where wonderwords is wanted and missing.
    """
    name = task if isinstance(task, str) else task.name
    (known,) = find_tasks([name.removeprefix("ruler/")], TASKS)
    for parameter, value in (("length", length), ("count", count)):
        if value < 1:
            raise InvalidArgument(f"{parameter}: expected at least 1, got {value}")
    counter = token_counter(tokenizer)
    maker = _maker(known.name.removeprefix("ruler/"), length, seed, counter, haystack)
    if maker.questions is not None and maker.questions < count:
        raise InvalidArgument(
            f"count: expected at most {maker.questions} (questions of {known.name}), got {count}"
        )
    samples = _samples(known, maker, length, count, seed, counter)
    return itertools.chain([next(samples)], samples)


def _maker(name: str, length: int, seed: int, count: CountTokens, haystack: Haystack) -> Maker:
    if name in ruler_niah.NIAH:
        return ruler_niah.NiahMaker(ruler_niah.NIAH[name], haystack)
    if name in ruler_qa.QA:
        return ruler_qa.QaMaker(name, haystack)
    if name == "vt":
        return ruler_chains.ChainMaker(seed, count)
    if name == "cwe":
        return ruler_counts.CommonWordsMaker(length)
    return ruler_counts.FrequentWordsMaker(length)


def _samples(
    task: Task, maker: Maker, length: int, count: int, seed: int, counter: CountTokens
) -> Iterator[Sample]:
    room, guess, made = length - task.max_new_tokens, 0, 0
    for index in range(maker.questions or count):
        draft = partial(_draft, task, maker, seed, index)
        found = fit(draft, counter, maker.least(index), guess, room)
        if found is not None:
            yield _sample(task, index, found, counter)
            guess, made = found.size, made + 1
            if made == count:
                return
        elif maker.questions is None:
            break
    if made:
        raise InvalidArgument(
            f"count: expected at most {made} (questions of {task.name} that fit {length} tokens), "
            f"got {count}"
        )
    smallest = _draft(task, maker, seed, 0, maker.least(0))
    needed = counter(smallest.prompt + smallest.answer_prefix) + task.max_new_tokens
    raise InvalidArgument(
        f"length: expected at least {needed} tokens for {task.name}, got {length}"
    )


def _draft(task: Task, maker: Maker, seed: int, index: int, size: int) -> Draft:
    """Drawn anew from the same chance for every size that is tried."""
    return maker.draft(index, random.Random(f"{task.name}/{seed}/{index}"), size)


def _sample(task: Task, index: int, found: Fit, counter: CountTokens) -> Sample:
    draft, length = found.draft, found.tokens + task.max_new_tokens
    fields: dict[str, Any] = {"index": index, "length_w_model_temp": length}
    if task.name.startswith("ruler/niah"):
        before = draft.prompt[: draft.prompt.index(draft.answers[0])]
        fields["token_position_answer"] = counter(before)
    return Sample(
        name=str(index),
        prompt=draft.prompt,
        answers=draft.answers,
        answer_prefix=draft.answer_prefix,
        length=length,
        fields=fields,
    )


def write_jsonl(path: Path, samples: Iterable[Sample]) -> None:
    """A file in RULER's form: one JSON object a line, ASCII only."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for number, sample in enumerate(samples):
            line = {
                "index": number,
                "input": sample.prompt,
                "outputs": list(sample.answers),
                "length": sample.length,
                "answer_prefix": sample.answer_prefix,
                **sample.fields,
            }
            file.write(json.dumps(line) + "\n")


def read_jsonl(path: Path) -> Iterator[Sample]:
    """The samples of such a file. Raises InvalidArgument naming file and line of a broken one."""
    for number, line in enumerate(records.read_jsonl(path)):
        answers = line.texts("outputs")
        if not answers:
            raise line.error("outputs", "at least one text", [])
        own = {"input", "outputs", "length", "answer_prefix"}
        fields = {name: value for name, value in line.values.items() if name not in own}
        yield Sample(
            name=str(fields.get("index", number)),
            prompt=line.text("input"),
            answers=answers,
            answer_prefix=line.text("answer_prefix") if "answer_prefix" in line.values else "",
            length=line.integer("length") if "length" in line.values else None,
            fields=fields,
        )
