"""LongBench's metrics: small cases by hand, and every sample of MiniLongBench."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from icecache.bench.tasks import longbench, longbench_metrics
from icecache.bench.tasks.longbench_metrics import (
    METRICS,
    classification,
    code_sim,
    count,
    qa_f1,
    qa_f1_zh,
    retrieval,
    retrieval_zh,
    rouge,
    rouge_zh,
    score,
    total,
    totals_by_length,
)
from icecache.errors import InvalidArgument, Unavailable

# Made with LongBench's eval.py and metrics.py at commit 2e00731f8d0bff23dc4325161044d0ed8af94c1e,
# rouge 1.0.1, jieba 0.42.1, fuzzywuzzy 0.18.0 without python-Levenshtein: the score of the
# prediction that MiniLongBench ships with each sample, in the order of its numbers.
ORIGINAL = Path(__file__).parent / "data" / "longbench_scores.json"
ORIGINAL_SCORES: dict[str, list[float]] = json.loads(ORIGINAL.read_text(encoding="utf-8"))


def test_every_data_set_has_original_scores() -> None:
    assert list(ORIGINAL_SCORES) == sorted(METRICS)
    assert sum(map(len, ORIGINAL_SCORES.values())) == 237


@pytest.mark.parametrize("dataset", METRICS)
def test_shipped_predictions_score_as_in_the_original(dataset: str, shared_dir: Path) -> None:
    source = longbench.open_source(shared_dir / "data" / "longbench_mini")
    (task,) = [task for task in longbench.TASKS if task.name == f"longbench/{dataset}"]
    samples = source.samples(task)
    scores = [task.score(sample.fields["prediction"], sample) for sample in samples]
    assert scores == ORIGINAL_SCORES[dataset]


def test_qa_f1() -> None:
    assert qa_f1("The cat sat.", "a cat") == pytest.approx(2 / 3)
    assert qa_f1("No, no!", "no") == pytest.approx(2 / 3)
    assert qa_f1("well-known", "WellKnown") == 1.0
    assert qa_f1("", "x") == qa_f1("the", "the") == 0.0


def test_qa_f1_zh() -> None:
    assert qa_f1_zh("北京。", "北京") == 1.0
    assert qa_f1_zh("北京，上海", "北京") == pytest.approx(2 / 3)
    assert qa_f1_zh("", "北京") == 0.0


def f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall + 1e-8)


def test_rouge() -> None:
    assert rouge("the cat. sat", "the cat") == pytest.approx(f1(2 / 3, 1), abs=1e-15)
    assert rouge("b a", "a b c d") == pytest.approx(f1(1 / 2, 1 / 4), abs=1e-15)
    assert rouge("a a a", "a") == pytest.approx(f1(1, 1), abs=1e-15)
    assert rouge("3 5", "5 3") == pytest.approx(f1(1 / 2, 1 / 2), abs=1e-15)
    assert rouge("3.5", "5 3") == pytest.approx(f1(1, 1), abs=1e-15)
    assert rouge("one. two", "two. one") == pytest.approx(f1(1, 1), abs=1e-15)


def test_rouge_of_nothing_is_zero_and_a_blank_is_a_word() -> None:
    assert rouge("", "a") == rouge("a", "") == rouge("...", "a") == 0.0
    assert rouge(" ", " ") == pytest.approx(f1(1, 1), abs=1e-15)


def test_rouge_of_a_sentence_beyond_the_recursion_limit_is_zero() -> None:
    assert rouge("a " * 990, "a " * 990) == pytest.approx(f1(1, 1), abs=1e-15)
    assert rouge("a " * 991, "a " * 991) == 0.0
    assert rouge("a " * 991, "a " * 500 + "." + "a " * 491) == pytest.approx(f1(1, 1), abs=1e-15)
    longest = "好。" * 494 + "好"
    assert rouge_zh(longest, longest) == pytest.approx(f1(1, 1), abs=1e-15)
    assert rouge_zh(longest + "。", longest + "。") == 0.0


def test_rouge_zh() -> None:
    assert rouge_zh("我爱北京", "我爱北京") == pytest.approx(f1(1, 1), abs=1e-15)
    assert rouge_zh("北京。上海", "上海") == pytest.approx(f1(1 / 3, 1), abs=1e-15)
    assert rouge_zh("", "上海") == 0.0


def test_classification() -> None:
    classes = ("Date", "Food", "Food item")
    assert classification("Food item", "Food item", classes) == 1.0
    assert classification("A Date, or a Food item", "Food item", classes) == 0.5
    assert classification("Food", "Food item", classes) == 0.0
    assert classification("Food item", "Food", classes) == 0.5


def test_classification_passes_over_the_class_after_a_removed_one() -> None:
    assert classification("abc", "abc", ("a", "ab", "abc")) == 0.5
    assert classification("abc", "abc", ("a", "abc", "ab")) == 1.0


def test_numbers() -> None:
    assert retrieval("Paragraph 3, not 4", "Paragraph 3") == 0.5
    assert retrieval("none", "Paragraph 3") == 0.0
    assert retrieval_zh("段落5", "段落5") == 1.0
    assert count("12 of 12 or 3", "12") == pytest.approx(2 / 3)
    assert count("012", "12") == 0.0
    with pytest.raises(InvalidArgument, match=r"answer: expected 'Paragraph ' and a number"):
        retrieval("3", "3")


def test_code_sim() -> None:
    assert code_sim("\n```python\n# note\n// note\nreturn x\nmore", "return x") == 1.0
    assert code_sim("return y", "return x") == 0.88  # 87.5, rounded to the even number
    assert code_sim("abcdefgh", "a1234567") == 0.12
    assert code_sim("# nothing else", "x") == 0.0
    assert code_sim("", "") == 1.0


def test_code_sim_leaves_frequent_letters_of_long_answers_out() -> None:
    assert code_sim("y" + "x" * 150, "x" * 150 + "z") == 0.99
    assert code_sim("y" + "x" * 200, "x" * 200 + "z") == 0.0


def test_the_best_answer_counts_and_few_shot_tasks_are_judged_by_their_first_line() -> None:
    assert score("hotpotqa", "Paris", ("London", "Paris"), ()) == 1.0
    assert score("hotpotqa", "\nParis\nRome", ("Paris",), ()) == pytest.approx(2 / 3)
    assert score("triviaqa", "\n\nParis\nRome", ("Paris",), ()) == 1.0
    assert score("triviaqa", " \nParis", ("Paris",), ()) == 0.0
    assert score("trec", "Date\nFood", ("Date",), ("Food", "Date")) == 1.0
    assert score("hotpotqa", "Paris", (), ()) == 0.0


def test_totals() -> None:
    assert total([1 / 3, 1 / 3, 0.0]) == 22.22
    with pytest.raises(InvalidArgument, match="scores: expected at least one"):
        total([])
    by_length = totals_by_length([1.0, 0.0, 0.5, 1 / 3], [3999, 0, 4000, 7999])
    assert (by_length["0-4k"], by_length["4-8k"]) == (50.0, 41.67)
    assert math.isnan(by_length["8k+"])
    assert totals_by_length([1.0], [8000])["8k+"] == 100.0


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    longbench_metrics._jieba.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(Unavailable, match=r"jieba is not installed: pip install 'icecache\[bench"):
        qa_f1_zh("a", "a")
    assert qa_f1("a b", "a b") == 1.0
