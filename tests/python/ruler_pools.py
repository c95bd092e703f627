"""What tests of RULER share: small pools of documents, words as tokens, samples made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icecache.bench.tasks import ruler
from icecache.bench.tasks.ruler import Haystack, generate
from icecache.bench.tasks.task import Sample, Task

NEW_TOKENS = {
    "niah_single_1": 128,
    "niah_single_2": 128,
    "niah_single_3": 128,
    "niah_multikey_1": 128,
    "niah_multikey_2": 128,
    "niah_multikey_3": 128,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
NAMES = tuple(NEW_TOKENS)
NIAH = tuple(name for name in NAMES if name.startswith("niah"))


def count_words(text: str) -> int:
    return len(text.split())


def document(number: int) -> str:
    return f"The river number{number} flows past the town of Place{number} and its old mills. " * 2


def write_squad(path: Path, articles: int = 30, paragraphs: int = 5) -> Path:
    """Every paragraph has a question with one answer said twice, and one without any."""

    def paragraph(number: int) -> dict[str, Any]:
        asked = {"question": f"Which town is at number{number}?", "is_impossible": False}
        answers = [{"text": f"Place{number}", "answer_start": 0}] * 2
        impossible = {"question": "Who?", "is_impossible": True, "answers": []}
        return {"context": document(number), "qas": [impossible, {**asked, "answers": answers}]}

    data = [
        {"paragraphs": [paragraph(article * paragraphs + one) for one in range(paragraphs)]}
        for article in range(articles)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return path


def write_hotpotqa(path: Path, questions: int = 8, documents: int = 10) -> Path:
    def question(number: int) -> dict[str, Any]:
        context = [
            [f"River {one}", [f"{document(one)}", " It is deep."]]
            for one in range(number * documents, (number + 1) * documents)
        ]
        answer = f"Place{number * documents + 3}"
        return {"question": f"Where is {number}?", "answer": answer, "context": context}

    path.write_text(json.dumps([question(number) for number in range(questions)]), encoding="utf-8")
    return path


def pools(folder: Path) -> Haystack:
    """Python's reference as essays, and small pools for the questions."""
    return Haystack(
        squad=write_squad(folder / "squad.json"),
        hotpotqa=write_hotpotqa(folder / "hotpotqa.json"),
    )


def made(
    name: str, length: int = 2048, count: int = 4, seed: int = 7, haystack: Haystack | None = None
) -> list[Sample]:
    return list(generate(name, length, count, seed, count_words, haystack or Haystack()))


def task_of(name: str) -> Task:
    (found,) = (task for task in ruler.TASKS if task.name == f"ruler/{name}")
    return found
