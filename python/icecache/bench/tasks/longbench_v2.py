"""LongBench v2 (Bai et al., 2024): 503 questions with four choices on texts of up to 2M words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icecache.bench.libraries import hub_file
from icecache.bench.tasks.records import Record, read_json, record
from icecache.bench.tasks.task import FollowUp, Sample, Source, Task
from icecache.errors import InvalidArgument

ANSWER_NEW_TOKENS = 128  # of the answer after a chain of thought

_CHOICES = ("A", "B", "C", "D")
# Filled in from left to right by plain replacement, as in LongBench's pred.py.
_QUESTION = """\

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

"""
_FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'
_TEXT = "\n<text>\n$DOC$\n</text>\n"
_ZERO_SHOT = (
    f"Please read the following text and answer the question below.\n{_TEXT}{_QUESTION}{_FORM}"
)
_COT = (
    f"Please read the following text and answer the questions below.\n{_TEXT}{_QUESTION}"
    "Let’s think step by step:"
)
_COT_ANSWER = (
    "Please read the following text and answer the questions below.\n\n"
    f"The text is too long and omitted here.\n{_QUESTION}"
    "Let’s think step by step: $COT$\n\n"
    f"Based on the above, what is the single, most likely answer choice? {_FORM}"
)


def extract_answer(response: str) -> str | None:
    """The letter of "The correct answer is (X)", else of the same without brackets, else None.

    Asterisks are passed over.
    """
    text = response.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if match := re.search(pattern, text):
            return match.group(1)
    return None


def _score(prediction: str, sample: Sample) -> float:
    return float(extract_answer(prediction.strip()) == sample.answers[0])


def answer_prompt(sample: Sample, reasoning: str) -> str:
    """The second prompt after a chain of thought; its answer has ANSWER_NEW_TOKENS."""
    return _fill(_COT_ANSWER, "", sample.fields).replace("$COT$", reasoning.strip())


def truncate_in_the_middle(tokenizer: Any, text: str, max_length: int) -> tuple[str, bool]:
    """As that of LongBench v1, but the halves become text together, as in the pred.py of v2."""
    if max_length < 2:
        raise InvalidArgument(f"max_length: expected at least 2, got {max_length}")
    tokens = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(tokens) <= max_length:
        return text, False
    kept = tokens[: max_length // 2] + tokens[-max_length // 2 :]
    return str(tokenizer.decode(kept, skip_special_tokens=True)), True


ZERO_SHOT = Task(
    "longbench_v2/0shot", "accuracy", 128, chat=True, score=_score, truncate=truncate_in_the_middle
)
# A chain of thought is no answer yet: `answer_prompt` of it is asked next, and that is scored.
COT = replace(
    ZERO_SHOT,
    name="longbench_v2/cot",
    max_new_tokens=1024,
    follow_up=FollowUp(answer_prompt, ANSWER_NEW_TOKENS),
)
TASKS = (ZERO_SHOT, COT)


def open_source(data: Path | None) -> Source:
    """Samples of THUDM/LongBench-v2 on the hub, or of its data.json at `data` or in that folder."""
    if data is not None and data.is_dir():
        data = data / "data.json"
    if data is not None and not data.is_file():
        raise InvalidArgument(f"data: expected LongBench v2's data.json, got {data}")
    return _Source(data)


@dataclass(frozen=True)
class _Source:
    path: Path | None

    def samples(self, task: Task) -> Iterator[Sample]:
        path = self.path or hub_file("THUDM/LongBench-v2", "data.json")
        whole = read_json(path)
        if not isinstance(whole, list):
            raise InvalidArgument(f"{path}: expected a JSON list, got {type(whole).__name__}")
        template = _COT if task == COT else _ZERO_SHOT
        for number, values in enumerate(whole):
            yield _sample(record(values, f"{path}: number {number}"), template)


def _sample(one: Record, template: str) -> Sample:
    answer = one.text("answer")
    if answer not in _CHOICES:
        raise one.error("answer", f"one of {', '.join(_CHOICES)}", answer)
    names = ("_id", "domain", "sub_domain", "difficulty", "length", "question")
    fields = {name: one.text(name) for name in names}
    fields |= {f"choice_{letter}": one.text(f"choice_{letter}") for letter in _CHOICES}
    prompt = _fill(template, one.text("context"), fields)
    return Sample(fields["_id"], prompt, (answer,), fields=dict(fields))


def _fill(template: str, context: str, fields: dict[str, Any]) -> str:
    text = template.replace("$DOC$", context.strip()).replace("$Q$", fields["question"].strip())
    for letter in _CHOICES:
        text = text.replace(f"$C_{letter}$", fields[f"choice_{letter}"].strip())
    return text


def accuracy(samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, float]:
    """Per cent right with one decimal: overall, by difficulty, by length. NaN where there are none.

    As LongBench's result.py; but a sample without an answer counts as wrong, where its pred.py
    leaves it out.
    """
    groups: dict[str, list[float]] = {
        name: [] for name in ("overall", "easy", "hard", "short", "medium", "long")
    }
    for sample, value in zip(samples, scores, strict=True):
        groups["overall"].append(value)
        groups["easy" if sample.fields["difficulty"] == "easy" else "hard"].append(value)
        length = sample.fields["length"]
        groups[length if length in ("short", "medium") else "long"].append(value)
    return {
        name: round(100 * sum(values) / len(values), 1) if values else math.nan
        for name, values in groups.items()
    }
