"""GSM8K: the prompt, the number of an answer, the sources."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from icecache.bench.tasks.gsm8k import (
    EXAMPLES,
    TASK,
    flexible_extract,
    open_source,
    prompt,
    score,
)
from icecache.bench.tasks.task import Sample
from icecache.errors import InvalidArgument, Unavailable

ROW = {"question": "How many?", "answer": "2 * 9 = <<2*9=18>>18\n#### 1,018"}


def test_prompt_has_eight_examples_and_the_question() -> None:
    text = prompt("How many?")
    assert text.startswith("Q: There are 15 trees in the grove.")
    assert text.endswith("23 - 15 is 8. The answer is 8.\n\nQ: How many?\nA:")
    assert (text.count("Q: "), text.count("\nA:"), len(EXAMPLES)) == (9, 9, 8)
    assert all(number in reasoning for _, reasoning, number in EXAMPLES)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 4 = 9. The answer is 9.", "9"),
        ("So 9.\n#### 1,018", "1018"),
        ("The answer is 9. The answer is 7.", "7"),
        ("The answer is -3", "-3"),
        ("It costs $1,234.50 now", "1234.50"),
        ("The answer is $18.", "18"),
        ("18 apples...", ".."),
        ("5", "5"),
        ("none", None),
        ("", None),
    ],
)
def test_extraction(text: str, number: str | None) -> None:
    assert flexible_extract(text) == number


def test_scores() -> None:
    sample = Sample("0", "", ("1,018",))
    assert score("that makes 1018.", sample) == score("$1,018", sample) == 1.0
    assert score("1018 and 3", sample) == score("1018.0", sample) == score("", sample) == 0.0


def test_local_file(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(ROW | {"answer": "18"}) + "\n")
    samples = open_source(path).samples(TASK)
    first = next(samples)
    assert (first.name, first.prompt, first.answers) == ("0", prompt("How many?"), ("1,018",))
    assert first.fields == {"question": "How many?", "reasoning": "2 * 9 = <<2*9=18>>18"}
    with pytest.raises(
        InvalidArgument, match=r"test\.jsonl: line 3: field 'answer': expected ####"
    ):
        next(samples)
    with pytest.raises(InvalidArgument, match="data: expected a file of GSM8K"):
        open_source(tmp_path)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        assert (*names, split) == ("openai/gsm8k", "main", "test")
        return [ROW]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [sample.answers for sample in open_source(None).samples(TASK)] == [("1,018",)]

    def out_of_reach(*names: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=out_of_reach))
    with pytest.raises(Unavailable, match=r"openai/gsm8k could not be fetched \(no network\)"):
        list(open_source(None).samples(TASK))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unavailable, match=r"pip install 'icecache\[bench\]'"):
        list(open_source(None).samples(TASK))


def test_the_whole_test_set(shared_dir: Path) -> None:
    samples = list(open_source(shared_dir / "data" / "gsm8k_test.jsonl").samples(TASK))
    assert len(samples) == 1319
    for sample in samples:
        answer = f"{sample.fields['reasoning']} The answer is {sample.answers[0]}."
        assert score(answer, sample) == 1.0
