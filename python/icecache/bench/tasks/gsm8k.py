"""GSM8K (Cobbe et al., 2021): grade-school problems after eight worked examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from icecache.bench.libraries import library
from icecache.bench.tasks.records import Record, read_jsonl, record
from icecache.bench.tasks.task import Sample, Source, Task
from icecache.errors import InvalidArgument, Unavailable

# The chain-of-thought examples of Wei et al., 2022: question, reasoning, answer.
EXAMPLES = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After "
        "they are done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So "
        "there must have been 21 - 15 = 6.",
        "6",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the "
        "parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5.",
        "5",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they "
        "have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. "
        "After eating 35, they had 74 - 35 = 39.",
        "39",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How "
        "many lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave "
        "Denny 20 - 12 = 8.",
        "8",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many "
        "toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 "
        "more toys. 5 + 4 = 9.",
        "9",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each "
        "day, from monday to thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So "
        "5 * 4 = 20 computers were added. 9 + 20 is 29.",
        "29",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 "
        "more. How many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. "
        "After losing 2 more, he had 35 - 2 = 33 golf balls.",
        "33",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has "
        "23 - 15 dollars left. 23 - 15 is 8.",
        "8",
    ),
)
_SHOTS = "".join(f"Q: {ask}\nA: {why} The answer is {number}.\n\n" for ask, why, number in EXAMPLES)

_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def prompt(question: str) -> str:
    """The eight examples, then `question` and the start of its answer."""
    return f"{_SHOTS}Q: {question}\nA:"


def flexible_extract(text: str) -> str | None:
    """The last number, wherever it is; None without.

    As lm-evaluation-harness: two or more of $ . , and digits are taken for a number too.
    """
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def score(prediction: str, sample: Sample) -> float:
    """1 where the last number is the answer."""
    return float(flexible_extract(prediction) == _plain(sample.answers[0]))


def _plain(number: str) -> str:
    """Without thousands' separators, dollars and a full stop."""
    return re.sub(r"[,$]|\.$", "", number)


TASK = Task("gsm8k", "flexible_extract", 256, chat=False, score=score, stop=("Q:",))
TASKS = (TASK,)


def open_source(data: Path | None) -> Source:
    """The test set from the Hugging Face hub, or a file of JSON Lines with question and answer."""
    if data is not None and not data.is_file():
        raise InvalidArgument(f"data: expected a file of GSM8K's JSON Lines, got {data}")
    return _Source(data)


@dataclass(frozen=True)
class _Source:
    path: Path | None

    def samples(self, task: Task) -> Iterator[Sample]:
        records = _hub_records() if self.path is None else read_jsonl(self.path)
        for number, one in enumerate(records):
            yield _sample(one, number)


def _sample(one: Record, number: int) -> Sample:
    reasoning, mark, answer = one.text("answer").rpartition("####")
    if not mark:
        raise one.error("answer", "#### and a number at the end", answer)
    question = one.text("question")
    fields = {"question": question, "reasoning": reasoning.strip()}
    return Sample(str(number), prompt(question), (answer.strip(),), fields=fields)


def _hub_records() -> Iterator[Record]:
    datasets = library("datasets")
    try:
        rows = datasets.load_dataset("openai/gsm8k", "main", split="test")
    except OSError as error:
        raise Unavailable(
            f"the data set openai/gsm8k could not be fetched ({error}); "
            "name a local file as the data"
        ) from error
    for number, row in enumerate(rows):
        yield record(row, f"openai/gsm8k: number {number}")
