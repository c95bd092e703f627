"""LongBench's files of predictions and results, as its own eval.py reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icecache.bench.tasks.longbench_metrics import score, total, totals_by_length
from icecache.bench.tasks.task import Sample, Task
from icecache.errors import InvalidArgument


@dataclass(frozen=True)
class Prediction:
    """A line of pred/MODEL/DATASET.jsonl."""

    text: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] | None = None  # None: null, which other than classification has
    length: int | None = None

    @staticmethod
    def of(sample: Sample, text: str) -> Prediction:
        """What a model wrote on `sample`."""
        return Prediction(text, sample.answers, sample.classes or None, sample.length)

    def line(self) -> str:
        """JSON, ended by a newline. An unknown length is left out, which eval.py allows for v1."""
        values: dict[str, Any] = {"pred": self.text, "answers": self.answers}
        values["all_classes"] = self.classes
        if self.length is not None:
            values["length"] = self.length
        return json.dumps(values, ensure_ascii=False) + "\n"


def prediction_path(folder: Path, model: str, task: Task) -> Path:
    """Where eval.py looks for a task's predictions: pred/MODEL or pred_e/MODEL in `folder`."""
    suite, _, dataset = task.name.partition("/")
    return folder / ("pred_e" if suite == "longbench_e" else "pred") / model / f"{dataset}.jsonl"


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replaces the file; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which UTF-8 does not know, becomes JSON's escape of it.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(one.line() for one in predictions)


def result(dataset: str, predictions: Sequence[Prediction]) -> float:
    """The data set's score as eval.py has it. The classes are those of the last line, as there."""
    return total(_scores(dataset, predictions))


def result_by_length(dataset: str, predictions: Sequence[Prediction]) -> dict[str, float]:
    """The data set's scores as eval.py --e has them. Raises InvalidArgument without lengths."""
    lengths = [one.length for one in predictions if one.length is not None]
    if len(lengths) != len(predictions):
        raise InvalidArgument("predictions: LongBench-E wants field 'length' in every line")
    return totals_by_length(_scores(dataset, predictions), lengths)


def _scores(dataset: str, predictions: Sequence[Prediction]) -> list[float]:
    classes = (predictions[-1].classes or ()) if predictions else ()
    return [score(dataset, one.text, one.answers, classes) for one in predictions]


def write_results(path: Path, results: Mapping[str, float | Mapping[str, float]]) -> None:
    """result.json: scores by data set, and for LongBench-E by length within it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, ensure_ascii=False, indent=4), encoding="utf-8")
