"""LongBench v1 and LongBench-E (Bai et al., 2023): tasks, sources of samples, truncation."""

from __future__ import annotations

import ast
import functools
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from icecache.bench.libraries import hub_file
from icecache.bench.tasks.longbench_metrics import METRICS, score
from icecache.bench.tasks.longbench_prompts import PROMPTS
from icecache.bench.tasks.records import Record, read_json, read_jsonl, read_lines, record
from icecache.bench.tasks.task import Sample, Source, Task
from icecache.errors import InvalidArgument

NEW_TOKENS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "multifieldqa_zh": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "dureader": 128,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "vcsum": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "lsht": 64,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32,
    "lcc": 64,
    "repobench-p": 64,
}
_PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_NOT_IN_E = (
    "narrativeqa",
    "multifieldqa_zh",
    "musique",
    "dureader",
    "qmsum",
    "vcsum",
    "lsht",
    "passage_retrieval_zh",
)
_MOST_BYTES = 1 << 30  # of a member of data.zip: many times the largest
# RuntimeError: encrypted, or packed in a way that is not known.
_ZIP_ERRORS = (OSError, EOFError, RuntimeError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error)
_MINI = "MiniLongBench_{}.json"


def _score(dataset: str, prediction: str, sample: Sample) -> float:
    return score(dataset, prediction, sample.answers, sample.classes)


def _task(suite: str, dataset: str) -> Task:
    return Task(
        name=f"{suite}/{dataset}",
        metric=METRICS[dataset].__name__,
        max_new_tokens=NEW_TOKENS[dataset],
        chat=dataset not in _PLAIN,
        score=functools.partial(_score, dataset),
        stop=("\n",) if dataset == "samsum" else (),
    )


TASKS = tuple(_task("longbench", dataset) for dataset in NEW_TOKENS)
TASKS_E = tuple(_task("longbench_e", name) for name in NEW_TOKENS if name not in _NOT_IN_E)


def open_source(data: Path | None) -> Source:
    """Samples from the Hugging Face hub, or from `data` in any of these forms.

    A folder of <task>.jsonl and <task>_e.jsonl, or one with a folder data of them; data.zip, or a
    folder with it; a folder of MiniLongBench_<task>.json. Raises InvalidArgument for anything else.
    """
    if data is None:
        return HubSource()
    if data.is_file() and zipfile.is_zipfile(data):
        return ZipSource(data)
    for folder in (data, data / "data"):
        if any(folder.glob(_MINI.format("*"))):
            return MiniSource(folder)
        if any(folder.glob("*.jsonl")):
            return FolderSource(folder)
    if (data / "data.zip").is_file():
        return ZipSource(data / "data.zip")
    raise InvalidArgument(
        f"data: expected a folder of <task>.jsonl or {_MINI.format('<task>')}, or LongBench's "
        f"data.zip, got {data}" + ("" if data.exists() else ", which does not exist")
    )


@dataclass(frozen=True)
class FolderSource:
    """A folder of LongBench's own files."""

    folder: Path

    def samples(self, task: Task) -> Iterator[Sample]:
        return _samples(task, read_jsonl(self.folder / _file_name(task)))


@dataclass(frozen=True)
class ZipSource:
    """LongBench's data.zip."""

    path: Path

    def samples(self, task: Task) -> Iterator[Sample]:
        name = _file_name(task)
        try:
            with zipfile.ZipFile(self.path) as archive:
                inside = [one for one in archive.namelist() if PurePosixPath(one).name == name]
                if not inside:
                    raise InvalidArgument(f"{self.path}: has no {name}")
                size = archive.getinfo(inside[0]).file_size
                if size > _MOST_BYTES:
                    raise InvalidArgument(
                        f"{self.path}: {name}: expected at most {_MOST_BYTES} bytes, got {size}"
                    )
                text = archive.read(inside[0]).decode("utf-8")
        except InvalidArgument:
            raise
        except _ZIP_ERRORS as error:
            raise InvalidArgument(f"{self.path}: {name}: {error}") from error
        return _samples(task, read_lines(text.split("\n"), f"{self.path}: {inside[0]}"))


@dataclass(frozen=True)
class HubSource:
    """THUDM/LongBench on the Hugging Face hub: its data.zip.

    The library `datasets` no longer reads this data set, whose loader is a script.
    """

    def samples(self, task: Task) -> Iterator[Sample]:
        return ZipSource(hub_file("THUDM/LongBench", "data.zip")).samples(task)


@dataclass(frozen=True)
class MiniSource:
    """MiniLongBench in OpenCompass' form: prompts are complete, lengths unknown.

    A sample's fields have the prediction that comes with it.
    """

    folder: Path

    def samples(self, task: Task) -> Iterator[Sample]:
        suite, _, dataset = task.name.partition("/")
        path = self.folder / _MINI.format(dataset)
        if suite != "longbench":
            raise InvalidArgument(f"{self.folder}: MiniLongBench has no samples of {task.name}")
        whole = record(read_json(path), str(path)).values
        if not all(number.isdecimal() for number in whole):
            raise InvalidArgument(f"{path}: expected numbers as keys, got {', '.join(whole)[:60]}")
        for number in sorted(whole, key=int):
            yield _mini_sample(record(whole[number], f"{path}: number {number}"), number)


def _file_name(task: Task) -> str:
    suite, _, dataset = task.name.partition("/")
    return f"{dataset}_e.jsonl" if suite == "longbench_e" else f"{dataset}.jsonl"


def _samples(task: Task, records: Iterable[Record]) -> Iterator[Sample]:
    prompt = PROMPTS[task.name.partition("/")[2]]
    for number, one in enumerate(records):
        yield Sample(
            name=str(number),
            prompt=prompt.format(context=one.text("context"), input=one.text("input")),
            answers=one.texts("answers"),
            classes=classes_of(one),
            length=one.integer("length"),
            fields={"_id": one.values.get("_id")},
        )


def classes_of(one: Record) -> tuple[str, ...]:
    """The field all_classes, none for null."""
    return () if one.field("all_classes") is None else one.texts("all_classes")


def _mini_sample(one: Record, number: str) -> Sample:
    gold = one.field("gold")
    if isinstance(gold, str):
        try:
            gold = ast.literal_eval(gold)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise one.error("gold", "a list or a dict", gold) from None
    values = gold if isinstance(gold, dict) else {"answers": gold}
    judged = Record(f"{one.where}: field 'gold'", {"all_classes": None, **values})
    return Sample(
        name=number,
        prompt=one.text("origin_prompt"),
        answers=judged.texts("answers"),
        classes=classes_of(judged),
        fields={"prediction": one.text("prediction")},
    )


def truncate_in_the_middle(tokenizer: Any, text: str, max_length: int) -> tuple[str, bool]:
    """Text of the first and the last half of `max_length` tokens, and whether that is shorter.

    As LongBench's pred.py: special tokens count and are dropped from what is kept, the halves
    become text one by one. A text of at most `max_length` tokens is returned as it is.
    """
    if max_length < 2:
        raise InvalidArgument(f"max_length: expected at least 2, got {max_length}")
    tokens = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(tokens) <= max_length:
        return text, False
    half = max_length // 2
    first = tokenizer.decode(tokens[:half], skip_special_tokens=True)
    last = tokenizer.decode(tokens[-half:], skip_special_tokens=True)
    return f"{first}{last}", True
