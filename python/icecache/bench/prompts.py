"""Long prompts of different kinds: real LongBench samples, and needles hidden in real text."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch

# Tasks whose form is a text to continue; LongBench puts no chat template around them.
_PLAIN_TASKS = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
# Different kinds first: question answering, summaries, few-shot, retrieval, code.
_TASKS = (
    "qasper",
    "gov_report",
    "repobench-p",
    "hotpotqa",
    "samsum",
    "qmsum",
    "passage_retrieval_en",
    "triviaqa",
    "narrativeqa",
    "trec",
    "musique",
    "lcc",
    "multifieldqa_en",
    "2wikimqa",
    "multi_news",
    "passage_count",
)
_LENGTHS = (4096, 3584, 4608, 3072, 5000)  # most tokens of a prompt, in turn
_LEAST = 2900  # shorter samples are passed over


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, ready for the model. `answer` is None where there is no needle."""

    name: str
    tokens: torch.Tensor  # [L] int64
    answer: str | None = None


def default_prompts(tokenizer: Any, longbench: Path, essays: Path) -> Iterator[Prompt]:
    """LongBench samples, a needle after every second until there were six, then samples only.

    `longbench` is a folder of MiniLongBench_<task>.json files, `essays` a JSON file {"text": ...}.
    The order is fixed: the first N are the same for every N.
    """
    needles = iter(
        [
            ("needle_essays", essays_text(essays), 3900, 0.35),
            ("needle_pydoc", pydoc_text(), 3600, 0.6),
            ("needle_essays_far", essays_text(essays)[200_000:], 4600, 0.12),
            ("needle_pydoc_late", pydoc_text()[60_000:], 3300, 0.85),
            ("needle_essays_mid", essays_text(essays)[400_000:], 4300, 0.5),
            ("needle_pydoc_early", pydoc_text()[120_000:], 4000, 0.25),
        ]
    )
    for index, sample in enumerate(longbench_prompts(tokenizer, longbench)):
        yield sample
        if index % 2 == 1:
            for name, text, length, depth in itertools.islice(needles, 1):
                yield needle_prompt(tokenizer, name, text, length, depth)


def longbench_prompts(tokenizer: Any, folder: Path) -> Iterator[Prompt]:
    """One sample of each task in turn, then the next of each; short samples are left out."""
    lengths = itertools.cycle(_LENGTHS)
    samples = {task: list(_read_task(folder, task)) for task in _TASKS}
    for number in range(max(len(texts) for texts in samples.values())):
        for task, texts in samples.items():
            if number >= len(texts):
                continue
            tokens = cut_in_the_middle(tokenizer, texts[number], next(lengths))
            if tokens.shape[0] < _LEAST:
                continue
            if task not in _PLAIN_TASKS:
                tokens = as_chat(tokenizer, tokenizer.decode(tokens))
            yield Prompt(f"{task}_{number}", tokens)


def _read_task(folder: Path, task: str) -> Iterator[str]:
    path = folder / f"MiniLongBench_{task}.json"
    samples = json.loads(path.read_text(encoding="utf-8"))
    for number in sorted(samples, key=int):
        yield samples[number]["origin_prompt"]


def cut_in_the_middle(tokenizer: Any, text: str, most: int) -> torch.Tensor:
    """Token ids of `text`; of more than `most` the first and the last half are kept."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if tokens.shape[0] <= most:
        return tokens
    half = most // 2
    return torch.cat([tokens[:half], tokens[-half:]])


def as_chat(tokenizer: Any, text: str, answer_prefix: str = "") -> torch.Tensor:
    """Token ids of one user turn and the start of the answer."""
    messages = [{"role": "user", "content": text}]
    chat: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat + answer_prefix, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids)


def needle_prompt(tokenizer: Any, name: str, text: str, length: int, depth: float) -> Prompt:
    """A RULER-style number hidden at `depth` (0 to 1) of about `length` tokens of `text`."""
    chance = random.Random(name)
    key = chance.choice(["amber-falcon", "silver-harbor", "quiet-meadow", "crimson-lantern"])
    answer = str(chance.randrange(1_000_000, 10_000_000))
    ids = tokenizer(text[: 8 * length], add_special_tokens=False, verbose=False).input_ids[:length]
    sentences = tokenizer.decode(ids).split(". ")
    needle = f"One of the special magic numbers for {key} is: {answer}"
    sentences.insert(int(depth * len(sentences)), needle)
    content = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "them. I will quiz you about the numbers afterwards.\n"
        + ". ".join(sentences)
        + f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    )
    prefix = f"The special magic number for {key} mentioned in the provided text is"
    return Prompt(name, as_chat(tokenizer, content, prefix), answer)


def essays_text(path: Path) -> str:
    text: str = json.loads(path.read_text(encoding="utf-8"))["text"]
    return text


def pydoc_text() -> str:
    """Python's own language reference, which every installation has."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
