"""LongBench v2: prompts, answers and accuracy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hf_models import build
from icecache.bench.ask import Asker, Limits, prompt_tokens
from icecache.bench.decoder import Decoder
from icecache.bench.methods import find_methods
from icecache.bench.suites import Data, find_suite
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
from icecache.bench.tasks.task import FollowUp, Sample, Task
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


class Bytes:
    """A tokenizer of bytes; token 0 ends an answer."""

    chat_template, eos_token_id = None, 0

    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[byte % 250 + 1 for byte in text.encode()])

    def decode(self, tokens: list[int], **options: object) -> str:
        return "".join(chr(64 + token % 58) for token in tokens)


def test_a_chain_of_thought_is_asked_for_its_answer(tmp_path: Path) -> None:
    asked: list[str] = []

    def second_prompt(one: Sample, reasoning: str) -> str:
        asked.append(reasoning)
        return answer_prompt(one, reasoning)

    follow_up = FollowUp(second_prompt, 12)
    task = replace(
        COT, max_new_tokens=8, follow_up=follow_up, score=lambda text, one: float(len(text))
    )
    tokenizer = Bytes()
    decoder = Decoder(build("llama", vocab_size=300, max_position_embeddings=4096, eos_token_id=0))
    methods = find_methods(["full", "icecache", "streaming"])
    ask = Asker(decoder, tokenizer, methods, [48], Limits(4096))
    one = sample(tmp_path, COT)
    made = ask(task, one)
    assert made["gold_tokens"] == 0, "its first text is no answer"
    rows = {row["method"]: row for row in made["rows"]}
    assert list(rows) == ["full", "icecache", "streaming"]
    assert asked == [row["first_text"] for row in rows.values()]
    for method in methods:
        row = rows[method.name]
        assert 0 < len(row["first_text"]) <= 8 and row["score"] == len(row["text"]) <= 12
        # The answer to the second prompt, decoded alone by the same method.
        prompt = replace(one, prompt=answer_prompt(one, row["first_text"]))
        (*_, alone) = Asker(decoder, tokenizer, [method], [48], Limits(4096))(
            replace(task, max_new_tokens=12, follow_up=None), prompt
        )["rows"]
        assert alone["text"] == row["text"]
    assert rows["full"]["first_text"] != rows["streaming"]["first_text"], "another budget, then"


def test_who_wrote_nothing_is_asked_nothing(tmp_path: Path) -> None:
    def unasked(one: Sample, reasoning: str) -> str:
        raise AssertionError(reasoning)

    class Silent(Bytes):
        def decode(self, tokens: list[int], **options: object) -> str:
            return " \n"

    task = replace(COT, max_new_tokens=4, follow_up=FollowUp(unasked, 12))
    decoder = Decoder(build("llama", vocab_size=300, max_position_embeddings=4096, eos_token_id=0))
    ask = Asker(decoder, Silent(), find_methods(["full"]), [], Limits(4096))
    (row,) = ask(task, sample(tmp_path, COT))["rows"]
    assert (row["first_text"], row["text"], row["score"]) == ("", "", 0.0)


def test_zero_shot_where_no_task_is_named(tmp_path: Path) -> None:
    sample(tmp_path, ZERO_SHOT)
    suite = find_suite("longbench-v2")
    for names, task in (((), ZERO_SHOT), (("cot",), COT)):
        (stream,) = suite.open(Data(tmp_path, tasks=names), None)
        (question,) = stream
        assert question.task == task


class Halves(Bytes):
    """Tells how often it was asked for text."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, tokens: list[int], **options: object) -> str:
        self.decoded.append(len(tokens))
        return "".join(chr(token - 1) for token in tokens)


def test_prompts_are_truncated_as_in_v2() -> None:
    tokenizer, long = Halves(), Sample("0", "a" * 60 + "b" * 60, ())
    asked = prompt_tokens(tokenizer, replace(ZERO_SHOT, max_new_tokens=10), long, Limits(50))
    assert asked.truncated and tokenizer.decoded == [40], "both halves at once"
    assert asked.tokens.tolist() == tokenizer("a" * 20 + "b" * 20).input_ids
