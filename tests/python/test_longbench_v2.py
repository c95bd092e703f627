"""LongBench v2: prompts, answers and accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from icecache.bench.tasks import longbench_v2
from icecache.bench.tasks.longbench_v2 import (
    COT,
    ZERO_SHOT,
    accuracy,
    answer_prompt,
    extract_answer,
    open_source,
    truncate_in_the_middle,
)
from icecache.bench.tasks.task import Sample, Task
from icecache.errors import InvalidArgument

ITEM: dict[str, Any] = {
    "_id": "66f",
    "domain": "Single-Document QA",
    "sub_domain": "Academic",
    "difficulty": "easy",
    "length": "short",
    "question": " Why? ",
    "choice_A": "one\n",
    "choice_B": "two",
    "choice_C": "three",
    "choice_D": "four",
    "answer": "B",
    "context": "\nThe text.\n",
}


def sample(folder: Path, task: Task, **values: Any) -> Sample:
    (folder / "data.json").write_text(json.dumps([{**ITEM, **values}]))
    (one,) = open_source(folder).samples(task)
    return one


def test_zero_shot_prompt(tmp_path: Path) -> None:
    one = sample(tmp_path, ZERO_SHOT)
    assert one.prompt == (
        "Please read the following text and answer the question below.\n\n"
        "<text>\nThe text.\n</text>\n\n"
        "What is the correct answer to this question: Why?\n"
        "Choices:\n(A) one\n(B) two\n(C) three\n(D) four\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (one.name, one.answers, one.fields["length"]) == ("66f", ("B",), "short")
    assert "context" not in one.fields


def test_chain_of_thought_prompts(tmp_path: Path) -> None:
    one = sample(tmp_path, COT)
    assert one.prompt.startswith("Please read the following text and answer the questions below.\n")
    assert one.prompt.endswith("(D) four\n\nLet’s think step by step:")
    assert answer_prompt(one, " Since $Q$.\n") == (
        "Please read the following text and answer the questions below.\n\n"
        "The text is too long and omitted here.\n\n"
        "What is the correct answer to this question: Why?\n"
        "Choices:\n(A) one\n(B) two\n(C) three\n(D) four\n\n"
        "Let’s think step by step: Since $Q$.\n\n"
        "Based on the above, what is the single, most likely answer choice? "
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The correct answer is (B).", "B"),
        ("The correct answer is A", "A"),
        ("The correct answer is A. No: The correct answer is (C)", "C"),
        ("**The correct answer is (*D*)**", "D"),
        ("the correct answer is (B)", None),
        ("B", None),
        ("", None),
    ],
)
def test_extract_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_score(tmp_path: Path) -> None:
    one = sample(tmp_path, ZERO_SHOT)
    assert ZERO_SHOT.score(" The correct answer is (B)", one) == 1.0
    assert ZERO_SHOT.score("The correct answer is (A)", one) == 0.0
    assert ZERO_SHOT.score("", one) == 0.0


def test_accuracy() -> None:
    def of(difficulty: str, length: str) -> Sample:
        return Sample("", "", ("A",), fields={"difficulty": difficulty, "length": length})

    samples = [of("easy", "short"), of("hard", "medium"), of("hard", "short")]
    got = accuracy(samples, [1.0, 1.0, 0.0])
    assert math.isnan(got.pop("long"))
    assert got == {"overall": 66.7, "easy": 100.0, "hard": 50.0, "short": 50.0, "medium": 100.0}


def test_broken_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"data\.json: number 0: field 'answer': expected on"):
        sample(tmp_path, ZERO_SHOT, answer="E")
    with pytest.raises(InvalidArgument, match=r"field 'choice_C': expected a string"):
        sample(tmp_path, ZERO_SHOT, choice_C=None)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"data\.json: expected a JSON list, got dict"):
        list(open_source(tmp_path / "data.json").samples(ZERO_SHOT))
    (tmp_path / "data.json").write_text("[")
    with pytest.raises(InvalidArgument, match=r"data\.json: not JSON"):
        list(open_source(tmp_path).samples(ZERO_SHOT))
    with pytest.raises(InvalidArgument, match=r"data: expected .*data\.json, got .*absent"):
        open_source(tmp_path / "absent")


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([ITEM]))
    monkeypatch.setattr(longbench_v2, "hub_file", lambda repository, name: tmp_path / name)
    assert len(list(open_source(None).samples(COT))) == 1


class Letters:
    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text))

    def decode(self, tokens: list[str], skip_special_tokens: bool) -> str:
        return "".join(tokens)


def test_truncation_keeps_both_ends() -> None:
    assert truncate_in_the_middle(Letters(), "abcdef", 6) == ("abcdef", False)
    assert truncate_in_the_middle(Letters(), "abcdef", 5) == ("abdef", True)
    assert truncate_in_the_middle(Letters(), "abcdef", 4) == ("abef", True)
    with pytest.raises(InvalidArgument, match="max_length: expected at least 2, got 0"):
        truncate_in_the_middle(Letters(), "abcdef", 0)
