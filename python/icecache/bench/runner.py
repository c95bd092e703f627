"""Runs samples through an asker, and keeps what came out: a run that was cut off goes on.

A folder holds a run: `run.json` says what is run, `samples.jsonl` has one record a sample, written
as soon as it is done. A record is {"task", "sample", "answers", "classes", "length", "fields"} and
what ask.Asker makes.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icecache.bench.ask import Ask
from icecache.bench.tasks.task import Sample, Task
from icecache.errors import InvalidArgument

Record = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A sample and the task that it is of."""

    task: Task
    sample: Sample

    @property
    def key(self) -> tuple[str, str]:
        return self.task.name, self.sample.name

    def record(self, made: dict[str, Any]) -> Record:
        sample = self.sample
        return {
            "task": self.task.name,
            "sample": sample.name,
            "answers": list(sample.answers),
            "classes": list(sample.classes),
            "length": sample.length,
            "fields": {k: v for k, v in sample.fields.items() if isinstance(v, (int, float, str))},
            **made,
        }


def in_turn(streams: Iterable[Iterator[Question]], limit: int | None) -> Iterator[Question]:
    """One of each stream after the other; at most `limit` in all."""
    rounds = itertools.zip_longest(*streams)
    every = (one for round_ in rounds for one in round_ if one is not None)
    return itertools.islice(every, limit)


class RunFolder:
    """The files of a run. One process writes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Takes up the run in `folder`, or begins one.

        `settings`: what makes its numbers. Raises InvalidArgument where the folder holds a run with
        others.
        """
        self.folder = folder
        self._settings = folder / "run.json"
        self._samples = folder / "samples.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self._settings.exists():
            self._check(settings)
        else:
            write_atomically(self._settings, json.dumps(settings, indent=1) + "\n")
        self._drop_half_a_line()

    def _check(self, settings: dict[str, Any]) -> None:
        held = json.loads(self._settings.read_text(encoding="utf-8"))
        here = json.loads(json.dumps(settings))["arguments"]
        there = held.get("arguments", {})
        other = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if other:
            changes = "; ".join(
                f"{name} was {there.get(name)!r}, got {here.get(name)!r}" for name in sorted(other)
            )
            raise InvalidArgument(
                f"--out: {self.folder} holds a run with other settings ({changes}); name another "
                "folder, or the same settings"
            )

    def _drop_half_a_line(self) -> None:
        """What a killed run, or a full disk, left behind its last whole record."""
        if not self._samples.exists():
            return
        held = self._samples.read_bytes()
        whole = held.rfind(b"\n") + 1
        if whole < len(held):
            with self._samples.open("r+b") as file:
                file.truncate(whole)

    def records(self) -> list[Record]:
        """Of all samples that are done."""
        if not self._samples.exists():
            return []
        lines = self._samples.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def add(self, record: Record) -> None:
        """On disk when this returns. A line that could not be written whole is taken back."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._samples.open("ab") as file:
            start = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise


def write_atomically(path: Path, text: str) -> None:
    """A reader, and a run that is taken up, never see a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run(
    questions: Sequence[Question],
    folder: RunFolder,
    ask: Ask,
    done: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """All records of `questions`, of which those in the folder are not asked again.

    `done` is called for every record, those of the folder first.
    """
    for question, record in _held(questions, folder, done):
        if record is None:
            record = question.record(ask(question.task, question.sample))
            folder.add(record)
            done(record)
    return _in_order(questions, folder)


def run_parallel(
    questions: Sequence[Question],
    folder: RunFolder,
    executor: Executor,
    ask: Ask,
    workers: int,
    done: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """As run(), with up to `workers` samples under way in `executor`."""
    left = [question for question, record in _held(questions, folder, done) if record is None]
    under_way: dict[Future[dict[str, Any]], Question] = {}
    waiting = iter(left)
    try:
        while True:
            for question in itertools.islice(waiting, workers - len(under_way)):
                under_way[executor.submit(ask, question.task, question.sample)] = question
            if not under_way:
                break
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                record = under_way.pop(future).record(future.result())
                folder.add(record)
                done(record)
    finally:
        for future in under_way:
            future.cancel()
    return _in_order(questions, folder)


def _held(
    questions: Sequence[Question], folder: RunFolder, done: Callable[[Record], None]
) -> list[tuple[Question, Record | None]]:
    held = {(record["task"], record["sample"]): record for record in folder.records()}
    pairs = [(question, held.get(question.key)) for question in questions]
    for _, record in pairs:
        if record is not None:
            done(record)
    return pairs


def _in_order(questions: Sequence[Question], folder: RunFolder) -> list[Record]:
    held = {(record["task"], record["sample"]): record for record in folder.records()}
    return [held[question.key] for question in questions]
