"""The suites of tasks, by name: where their samples come from and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icecache.bench.runner import Question
from icecache.bench.tasks import gsm8k, longbench, longbench_v2, passkey, ruler
from icecache.bench.tasks.records import read_text
from icecache.bench.tasks.ruler_haystack import Haystack
from icecache.bench.tasks.ruler_maker import token_counter
from icecache.bench.tasks.task import Sample, Source, Task, find_tasks
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
    """`streams` makes the samples of each task, in turn; `generated`: they have lengths."""

    name: str
    streams: Callable[[Data, Any], Streams]
    generated: bool = False
    gold_tokens: int | None = None  # of right answers whose likelihood is measured; None: as usual

    def open(self, data: Data, tokenizer: Any) -> Streams:
        """Raises InvalidArgument for what this suite does not take."""
        if data.lengths and not self.generated:
            raise InvalidArgument(
                f"--lengths: {self.name} has prompts of its own, got {data.lengths}"
            )
        return self.streams(data, tokenizer)


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
    path = data.path
    essays = path / "PaulGrahamEssays.json" if path is not None and path.is_dir() else path
    haystack = Haystack(essays if essays is not None and essays.is_file() else None)
    tasks = find_tasks(data.tasks or _NEEDLES, ruler.TASKS)
    return [
        _questions(
            task,
            _named(
                length, ruler.generate(task, length, data.samples, data.seed, tokenizer, haystack)
            ),
        )
        for length in data.lengths or (4096,)
        for task in tasks
    ]


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
    (task,) = find_tasks(data.tasks, passkey.TASKS)
    return [_questions(task, source.samples(task))]


def _text(data: Data, tokenizer: Any) -> Streams:
    """Stretches of local texts: likelihood of what follows each."""
    if data.path is None:
        raise InvalidArgument("--data-dir: expected a text file or a folder of them, got nothing")
    files = sorted(data.path.glob("*.txt")) if data.path.is_dir() else [data.path]
    if not files:
        raise InvalidArgument(f"--data-dir: expected a folder with .txt files, got {data.path}")
    return [
        _stretches(path, length, data.samples, tokenizer)
        for length in data.lengths or (4096,)
        for path in files
    ]


def _stretches(path: Path, length: int, count: int, tokenizer: Any) -> Iterator[Question]:
    task = Task(f"text/{path.stem}", "likelihood", 32, chat=False, score=lambda text, sample: 0.0)
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


SUITES: tuple[Suite, ...] = (
    Suite("longbench", partial(_from_source, longbench.TASKS, longbench.open_source)),
    Suite("longbench-e", partial(_from_source, longbench.TASKS_E, longbench.open_source)),
    Suite("longbench-v2", _longbench_v2),
    Suite("ruler", _ruler, generated=True),
    Suite("passkey", _passkey, generated=True),
    Suite("gsm8k", partial(_from_source, gsm8k.TASKS, gsm8k.open_source)),
    Suite("text", _text, generated=True, gold_tokens=LIKELIHOOD_TOKENS),
)
