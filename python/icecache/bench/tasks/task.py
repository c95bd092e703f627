"""What a benchmark asks, and how an answer to it is judged: the form that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from icecache.bench.names import unknown


@dataclass(frozen=True)
class Sample:
    """One question. `prompt` is the text before any chat template and any truncation."""

    name: str  # unique within its task, stable between runs
    prompt: str
    answers: tuple[str, ...]  # any of them is right, or all are wanted: as the metric has it
    answer_prefix: str = ""  # begins the answer, after the chat template (RULER)
    classes: tuple[str, ...] = ()  # LongBench's all_classes
    length: int | None = None  # as the data set counts it (LongBench-E's thirds)
    fields: dict[str, Any] = field(default_factory=dict)  # kept for the output files


@dataclass(frozen=True)
class FollowUp:
    """A second prompt, about what was written after the first; its answer is judged."""

    prompt: Callable[[Sample, str], str]  # of a sample and that text, without white space around it
    max_new_tokens: int


# Tokenizer, text, most tokens -> what is left of the text, and whether that is less.
Truncate = Callable[[Any, str, int], tuple[str, bool]]


@dataclass(frozen=True)
class Task:
    """How a task's samples are asked and judged."""

    name: str  # e.g. "longbench/qasper", "ruler/niah_single_1"
    metric: str  # name of the score, e.g. "qa_f1"
    max_new_tokens: int
    chat: bool  # the prompt is one user turn; False: a text to continue
    score: Callable[[str, Sample], float]  # of one prediction, from 0 to 1
    stop: tuple[str, ...] = ()  # texts that end an answer, besides the model's own end
    follow_up: FollowUp | None = None  # asked next, where an answer comes in two steps
    truncate: Truncate | None = None  # of long prompts; None: LongBench v1's


def no_score(text: str, sample: Sample) -> float:
    """The score of tasks that are judged by likelihood and KL alone."""
    return 0.0


class Source(Protocol):
    """Where a task's samples come from."""

    def samples(self, task: Task) -> Iterator[Sample]:
        """In the data set's order. Raises InvalidArgument naming file and line of a broken one."""
        ...


def find_tasks(names: Sequence[str], known: Sequence[Task]) -> list[Task]:
    """The tasks of these names, each once, in their order; all for none.

    Raises InvalidArgument for an unknown name, with the nearest known ones.
    """
    by_name = {task.name.rpartition("/")[2]: task for task in known}
    for name in names:
        if name not in by_name:
            raise unknown("task", name, by_name)
    return [by_name[name] for name in dict.fromkeys(names)] if names else list(known)
