"""Runs samples through an asker, and keeps what came out: a run that was cut off goes on.

A folder holds a run: `run.json` says what is run, `samples.jsonl` has one record a sample, written
as soon as it is done. A record is {"task", "sample", "answers", "classes", "length", "fields"} and
what ask.Asker makes. Lines are ASCII: whatever a model writes, a line feed is what ends a record.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icecache.bench.tasks.records import read_json, read_lines
from icecache.bench.tasks.records import record as parsed
from icecache.bench.tasks.task import Sample, Task
from icecache.errors import InvalidArgument
from icecache.outputs import check_output_folder

if TYPE_CHECKING:  # takes seconds to import
    from icecache.bench.ask import Ask

Record = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Whom to tell: of the number of samples, of each step of long ones, of each that is done."""

    begin: Callable[[int], None] = lambda count: None
    tick: Callable[[], None] = lambda: None
    done: Callable[[Record], None] = lambda record: None


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


RUN, SAMPLES = "run.json", "samples.jsonl"
FILES = (RUN, SAMPLES, "results.json", "report.html")  # of a run


def read_records(folder: Path) -> list[Record]:
    """The records of the run in `folder`.

    What a killed run, or a full disk, left behind the last whole line is passed over. Raises
    InvalidArgument naming the line that is not a record.
    """
    path = folder / SAMPLES
    try:
        whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from error
    return [one.values for one in read_lines(whole.split("\n"), path)]


class RunFolder:
    """The files of a run. One process writes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Takes up the run in `folder`, or will begin one with its first record.

        `settings`: what makes its numbers. Raises InvalidArgument where the folder holds a run with
        others, files of a run without its settings, or cannot be written.
        """
        check_output_folder("--out", folder)
        self.folder = folder
        self._settings = settings
        self._run = folder / RUN
        self._samples = folder / SAMPLES
        if self._run.exists():
            self._check(settings)
            self._drop_half_a_line()
            return
        for name in FILES:
            if (folder / name).exists():
                raise InvalidArgument(
                    f"--out: {folder} has a {name}, but no {RUN}: no run can go on there, and the "
                    "file would be lost; name another folder"
                )

    def _check(self, settings: dict[str, Any]) -> None:
        held = parsed(read_json(self._run), str(self._run)).values
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
        return read_records(self.folder) if self._samples.exists() else []

    def add(self, record: Record) -> None:
        """On disk when this returns. A line that could not be written whole is taken back."""
        line = (json.dumps(record) + "\n").encode("ascii")
        if not self._run.exists():  # a run that fails before its first record leaves nothing behind
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._run, json.dumps(self._settings, indent=1) + "\n")
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
