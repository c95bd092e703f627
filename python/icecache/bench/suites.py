"""The suites of tasks, by name: where their samples come from and what may be asked of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icecache.bench.runner import Question
from icecache.bench.tasks import gsm8k, longbench, longbench_v2, passkey, ruler, ruler_qa
from icecache.bench.tasks.records import read_text
from icecache.bench.tasks.ruler_haystack import Haystack
from icecache.bench.tasks.ruler_maker import token_counter
from icecache.bench.tasks.task import Sample, Source, Task, find_tasks, no_score
from icecache.errors import InvalidArgument

LIKELIHOOD_TOKENS = 256  # of a text, after the prompt


@dataclass(frozen=True)
class Data:
    """What a user says of a suite's samples."""

    path: Path | None = None  # local data
    tasks: Sequence[str] = ()  # all for none
    lengths: Sequence[int] = ()  # tokens of prompts that are generated
    samples: int = 5  # of each task and length, where they are generated
    seed: int = 0


Streams = list[Iterator[Question]]


@dataclass(frozen=True)
class Suite:
    """`streams` makes the samples of each task, in turn; `generated`: they have lengths.

    `check_data` raises InvalidArgument for data that `streams` would not take.
    """

    name: str
    streams: Callable[[Data, Any], Streams]
    tasks: Sequence[Task]  # to choose from
    check_data: Callable[[Data], object]
    generated: bool = False
    gold_tokens: int | None = None  # of right answers whose likelihood is measured; None: as usual

    def check(self, data: Data) -> None:
        """Raises InvalidArgument for what this suite does not take. Loads no model."""
        if data.lengths and not self.generated:
            raise InvalidArgument(
                f"--lengths: {self.name} has prompts of its own, got {data.lengths}"
            )
        if data.tasks and not self.tasks:
            raise InvalidArgument(
                f"--task: {self.name} has no tasks to choose from, got {', '.join(data.tasks)}"
            )
        find_tasks(data.tasks, self.tasks)
        try:
            if data.path is not None:
                _check_readable(data.path)
            self.check_data(data)
        except InvalidArgument as error:
            raise InvalidArgument(f"--data-dir: {str(error).removeprefix('data: ')}") from error

    def open(self, data: Data, tokenizer: Any) -> Streams:
        """Raises InvalidArgument as check() does."""
        self.check(data)
        return self.streams(data, tokenizer)


def _check_readable(path: Path) -> None:
    """Raises InvalidArgument for anything but a file or a folder with something in it."""
    try:
        if not path.exists():
            raise InvalidArgument(f"expected a file or a folder that exists, got {path}")
        if not path.is_dir() and not path.is_file():
            raise InvalidArgument(f"expected a file or a folder, got {path}, which is neither")
        if not os.access(path, os.R_OK):
            raise InvalidArgument(f"expected what can be read, got {path}, which cannot")
        if not (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
            raise InvalidArgument(f"expected data, got {path}, which is empty")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}") from error


def find_suite(name: str) -> Suite:
    """Raises InvalidArgument for a name that none has."""
    for suite in SUITES:
        if suite.name == name:
            return suite
    known = ", ".join(suite.name for suite in SUITES)
    raise InvalidArgument(f"suite: expected {known}, got {name!r}")


def _questions(task: Task, samples: Iterator[Sample]) -> Iterator[Question]:
    for sample in samples:
        yield Question(task, sample)


def _from_source(
    tasks: Sequence[Task], open_source: Callable[[Path | None], Source], data: Data, tokenizer: Any
) -> Streams:
    source = open_source(data.path)
    return [_questions(task, source.samples(task)) for task in find_tasks(data.tasks, tasks)]


def _longbench_v2(data: Data, tokenizer: Any) -> Streams:
    """Zero-shot where nothing is said: a chain of thought takes ten times as long."""
    data = data if data.tasks else replace(data, tasks=("0shot",))
    return _from_source(longbench_v2.TASKS, longbench_v2.open_source, data, tokenizer)


def _ruler(data: Data, tokenizer: Any) -> Streams:
    haystack = _haystack(data)
    return [
        _questions(
            task,
            _named(
                length, ruler.generate(task, length, data.samples, data.seed, tokenizer, haystack)
            ),
        )
        for length in data.lengths or (4096,)
        for task in _ruler_tasks(data)
    ]


def _ruler_tasks(data: Data) -> list[Task]:
    return find_tasks(data.tasks or _NEEDLES, ruler.TASKS)


# What a field of Haystack names, in a folder.
_HAYSTACKS = {
    "essays": "PaulGrahamEssays.json",
    "squad": "dev-v2.0.json",
    "hotpotqa": "hotpot_dev_distractor_v1.json",
}


def _haystack(data: Data) -> Haystack:
    """Python's own reference where the user names none; else what is there, and nothing else."""
    if data.path is None:
        return Haystack()
    if data.path.is_file():
        return Haystack(essays=data.path)
    files = {field: data.path / name for field, name in _HAYSTACKS.items()}
    return Haystack(**{field: file for field, file in files.items() if file.is_file()})


def _check_haystack(data: Data) -> None:
    haystack, got = _haystack(data), data.path or "nothing"
    for task in _ruler_tasks(data):
        name = task.name.rpartition("/")[2]
        pool = ruler_qa.POOLS.get(name)
        if pool is None and data.path is not None:
            pool = "essays"
        if pool is not None and getattr(haystack, pool) is None:
            raise InvalidArgument(f"{name}: expected a folder with {_HAYSTACKS[pool]}, got {got}")
        if name in ruler_qa.POOLS:
            ruler_qa.QaMaker(name, haystack)
    if haystack.essays is not None:
        haystack.essay(1)


_NEEDLES = tuple(
    task.name.rpartition("/")[2] for task in ruler.TASKS if task.name.startswith("ruler/niah")
)


def _named(length: int, samples: Iterator[Sample]) -> Iterator[Sample]:
    """Samples whose names tell their length too."""
    for sample in samples:
        yield replace(sample, name=f"{length}/{sample.name}")


def _passkey(data: Data, tokenizer: Any) -> Streams:
    lengths = tuple(data.lengths or (4096,))
    source = passkey.PasskeySource(
        token_counter(tokenizer), lengths, repeats=data.samples, seed=data.seed
    )
    return [_questions(passkey.TASK, source.samples(passkey.TASK))]


def _no_data(data: Data) -> None:
    if data.path is not None:
        raise InvalidArgument(f"expected none, for the texts are made up, got {data.path}")


def _text(data: Data, tokenizer: Any) -> Streams:
    """Stretches of local texts: likelihood of what follows each."""
    return [
        _stretches(path, length, data.samples, tokenizer)
        for length in data.lengths or (4096,)
        for path in text_files(data)
    ]


def text_files(data: Data) -> list[Path]:
    """The file that `data` names, or the .txt files of its folder."""
    if data.path is None:
        raise InvalidArgument("expected a text file or a folder of them, got nothing")
    files = sorted(data.path.glob("*.txt")) if data.path.is_dir() else [data.path]
    if not files:
        raise InvalidArgument(f"expected a folder with .txt files, got {data.path}")
    return files


def _stretches(path: Path, length: int, count: int, tokenizer: Any) -> Iterator[Question]:
    task = Task(f"text/{path.stem}", "likelihood", 32, chat=False, score=no_score)
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False).input_ids
    step = length + LIKELIHOOD_TOKENS
    for number in range(min(count, len(ids) // step)):
        part = ids[number * step : (number + 1) * step]
        yield Question(
            task,
            Sample(
                name=f"{length}/{number}",
                prompt=tokenizer.decode(part[:length]),
                answers=(tokenizer.decode(part[length:]),),
                length=length,
            ),
        )


def _from_files(
    name: str, tasks: Sequence[Task], open_source: Callable[[Path | None], Source]
) -> Suite:
    return Suite(
        name,
        partial(_from_source, tasks, open_source),
        tasks,
        lambda data: open_source(data.path),
    )


SUITES: tuple[Suite, ...] = (
    _from_files("longbench", longbench.TASKS, longbench.open_source),
    _from_files("longbench-e", longbench.TASKS_E, longbench.open_source),
    replace(
        _from_files("longbench-v2", longbench_v2.TASKS, longbench_v2.open_source),
        streams=_longbench_v2,
    ),
    Suite("ruler", _ruler, ruler.TASKS, _check_haystack, generated=True),
    Suite("passkey", _passkey, passkey.TASKS, _no_data, generated=True),
    _from_files("gsm8k", gsm8k.TASKS, gsm8k.open_source),
    Suite("text", _text, (), text_files, generated=True, gold_tokens=LIKELIHOOD_TOKENS),
)
