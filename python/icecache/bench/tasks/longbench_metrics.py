"""LongBench's scores, equal to those of its eval.py to the last digit.

Each metric is `(prediction, answer, classes) -> float` from 0 to 1; only `classification` looks at
the classes. What looks odd is the original's, and named where it stands. Only jieba is needed, for
Chinese: the originals of the rouge and fuzzywuzzy packages depend on how deep their caller's stack
is and on whether python-Levenshtein happens to be installed.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icecache.bench.libraries import library
from icecache.errors import InvalidArgument

Metric = Callable[[str, str, Sequence[str]], float]

_PUNCTUATION = frozenset(string.punctuation)
_PUNCTUATION_ZH = _PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
# A longest common subsequence that takes more steps to spell out than this scores 0: the rouge
# package recurses once a step, and under eval.py meets Python's recursion limit of 1000 (which
# eval.py takes for an empty text). Chinese has one caller more.
_MOST_STEPS, _MOST_STEPS_ZH = 990, 989
_FIRST_LINE_ONLY = ("trec", "triviaqa", "samsum", "lsht")


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of words without case, punctuation and articles; a word counts as often as in both."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of jieba's words, cut before case and punctuation are dropped."""
    return _f1(_words_zh(prediction), _words_zh(answer))


def rouge(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of summaries as the rouge package has it.

    Sentences end at every full stop, also the one of a number; each word counts once; an empty text
    scores 0, and so does a very long sentence (see _MOST_STEPS).
    """
    return _rouge_l(prediction, answer, _MOST_STEPS)


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of jieba's words. The Chinese full stop is a word and ends no sentence."""
    return _rouge_l(" ".join(_cut(prediction)), " ".join(_cut(answer)), _MOST_STEPS_ZH)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes named, where the right one is among them.

    A class whose name is a part of the answer's is not counted; but the one that comes after such a
    class is not looked at, because the original shortens the list it walks over.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are N of the answer "Paragraph N"."""
    return _share_of_numbers(prediction, _number_in(answer, "Paragraph "))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are N of the answer "段落N"."""
    return _share_of_numbers(prediction, _number_in(answer, "段落"))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the answer."""
    return _share_of_numbers(prediction, answer)


def code_sim(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """difflib's ratio in whole hundredths, of the first line without `, # and //.

    That is fuzzywuzzy's ratio where python-Levenshtein is absent, as LongBench requires neither it
    nor another. From 200 characters on difflib leaves frequent ones out.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


METRICS: dict[str, Metric] = {
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "dureader": rouge_zh,
    "gov_report": rouge,
    "qmsum": rouge,
    "multi_news": rouge,
    "vcsum": rouge_zh,
    "trec": classification,
    "triviaqa": qa_f1,
    "samsum": rouge,
    "lsht": classification,
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    "passage_retrieval_zh": retrieval_zh,
    "lcc": code_sim,
    "repobench-p": code_sim,
}


def score(dataset: str, prediction: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """The best score against any answer; of few-shot tasks the first line alone is judged."""
    metric = METRICS[dataset]
    if dataset in _FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((metric(prediction, answer, classes) for answer in answers), default=0.0)


def total(scores: Sequence[float]) -> float:
    """A task's score from 0 to 100, with two decimals. Raises InvalidArgument for no scores."""
    if not scores:
        raise InvalidArgument("scores: expected at least one")
    # One by one, as the original: Python's own sum is more exact from 3.12 on.
    return round(100 * functools.reduce(operator.add, scores, 0.0) / len(scores), 2)


def totals_by_length(scores: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """A task's LongBench-E scores by the samples' lengths; NaN where there are none."""
    parts: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
    for value, length in zip(scores, lengths, strict=True):
        parts["0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"].append(value)
    # numpy's mean and rounding, which are the original's here: they may differ from `total`.
    return {
        name: float(round(100 * np.mean(values), 2)) if values else math.nan
        for name, values in parts.items()
    }


def _f1(predicted: list[str], wanted: list[str]) -> float:
    same = (Counter(predicted) & Counter(wanted)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _words_zh(text: str) -> list[str]:
    words = (
        "".join(letter for letter in word.lower() if letter not in _PUNCTUATION_ZH)
        for word in _cut(text)
    )
    return [word for word in ("".join(word.split()) for word in words) if word]


def _cut(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


@functools.cache
def _jieba() -> Any:
    jieba = library("jieba")
    jieba.setLogLevel(logging.WARNING)
    return jieba


def _number_in(answer: str, label: str) -> str:
    match = re.search(rf"{label}(\d+)", answer)
    if match is None:
        raise InvalidArgument(f"answer: expected '{label}' and a number, got {answer!r}")
    return match.group(1)


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _rouge_l(prediction: str, answer: str, most_steps: int) -> float:
    predicted, wanted = _sentences(prediction), _sentences(answer)
    if not predicted or not wanted:
        return 0.0
    common: set[str] = set()
    for sentence in wanted:
        for other in predicted:
            words, steps = _common_words(sentence, other)
            if steps > most_steps:
                return 0.0
            common |= words
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; of a blank one the empty word, which counts."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_words(wanted: list[str], predicted: list[str]) -> tuple[set[str], int]:
    """The words of a longest common subsequence, and the steps that it takes to spell it out.

    Of several such subsequences the one whose last words come latest in `wanted`.
    """
    lengths = [[0] * (len(predicted) + 1)]
    for word in wanted:
        above, row = lengths[-1], [0]
        for j, other in enumerate(predicted):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, steps = len(wanted), len(predicted), 0
    words = set()
    while i and j:
        steps += 1
        if wanted[i - 1] == predicted[j - 1]:
            words.add(wanted[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words, steps
