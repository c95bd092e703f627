"""Contexts of up to 30,000 tokens for bench_quality: texts at several lengths, and ten needles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from icecache import InvalidArgument
from icecache.bench.ask import text_start
from icecache.bench.decoder import Decoder
from icecache.bench.prefill import Prefill, followed, run_in_chunks
from icecache.bench.prompts import essays_text, pydoc_text
from icecache.bench.quality import DecodeStats
from icecache.bench.report import Result
from icecache.bench.runs import OwnRun
from icecache.bench.summary import results
from lengths import size

STEPS = 32
NEEDLES = "needles"
_WORDS = ("amber falcon", "silver harbor", "quiet meadow", "crimson lantern", "golden orchard")
_MORE = ("frozen river", "hollow mountain", "velvet curtain", "broken compass", "distant thunder")
KEYS = (*_WORDS, *_MORE)

MOST_STEP = 0.3  # nats; of a step at the largest budget
MOST_GROWTH = 4.0  # of the mean KL, from the shortest length to the longest
LARGEST = 256  # the budget that is bounded


@dataclass(frozen=True)
class Context:
    """A prefill, and the tokens that follow; `is_needle`: one token and a number to be found."""

    group: str  # "4k", or NEEDLES
    name: str
    made: Prefill
    is_needle: bool = False


def texts(data: Path) -> dict[str, str]:
    """Four kinds: essays, a novel, articles, and Python's reference with its code."""
    folder = data / "text"
    return {
        "essays": essays_text(folder / "PaulGrahamEssays.json"),
        "novel": (folder / "mobydick.txt").read_text(encoding="utf-8"),
        "articles": (folder / "wikitext2_test.txt").read_text(encoding="utf-8"),
        "reference": pydoc_text(),
    }


def text_contexts(
    decoder: Decoder, tokenizer: Any, data: Path, lengths: Sequence[int], steps: int = STEPS
) -> Iterator[Context]:
    """Each text at each of `lengths`, which ascend; it runs once. Texts go on as they do."""
    for name, text in texts(data).items():
        tokens = text_tokens(tokenizer, text, lengths[-1] + steps + 1)
        run = OwnRun(decoder)
        for length in lengths:
            prompt, following = tokens[:length], tokens[length : length + steps + 1]
            first = run_in_chunks(run, prompt)
            made = followed(decoder, run.fork(), prompt, first, following)
            yield Context(size(length), f"{name}_{size(length)}", made)


def text_tokens(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """The first `count` tokens of a text, what the tokenizer puts in front among them."""
    letters = text[: 16 * count]
    ids = tokenizer(letters, add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor([*text_start(tokenizer), *ids][:count])
    if len(tokens) < count:
        raise InvalidArgument(f"--lengths: expected at most the {len(tokens):,} tokens of a text")
    return tokens


def needle_contexts(
    decoder: Decoder, tokenizer: Any, data: Path, length: int, seed: int = 0
) -> Iterator[Context]:
    """Ten numbers hidden in `length` tokens of essays, each asked for: the haystack runs once.

    The context ends before the last token of the question, from which every method decodes.
    """
    chance = random.Random(seed)
    numbers = [str(chance.randrange(1_000_000, 10_000_000)) for _ in KEYS]
    haystack = _haystack(tokenizer, texts(data)["essays"], length, numbers)
    run = OwnRun(decoder)
    run_in_chunks(run, haystack)
    for key, number in zip(KEYS, numbers, strict=True):
        asked = _ids(tokenizer, f"\n\nOne of the special magic numbers for {key} is:")
        answer = _ids(tokenizer, f" {number}")
        prompt = torch.cat([haystack, torch.tensor(asked[:-1])])
        fork = run.fork()
        first = run_in_chunks(fork, prompt)
        following = torch.tensor([asked[-1], *answer])
        made = followed(decoder, fork, prompt, first, following)
        yield Context(NEEDLES, key, made, is_needle=True)


def _haystack(tokenizer: Any, text: str, length: int, numbers: Sequence[str]) -> torch.Tensor:
    """Essays with a sentence for each of KEYS, evenly spread."""
    needles = [
        _ids(tokenizer, f" One of the special magic numbers for {key} is: {number}.")
        for key, number in zip(KEYS, numbers, strict=True)
    ]
    hidden = sum(len(needle) for needle in needles)
    around = text_tokens(tokenizer, text, length - hidden)
    share = len(around) // (len(KEYS) + 1)
    parts = [around[:share]]
    for at, needle in enumerate(needles, 1):
        end = (at + 1) * share if at < len(needles) else len(around)
        parts += [torch.tensor(needle), around[at * share : end]]
    return torch.cat(parts)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def grouped_results(stats: dict[str, list[DecodeStats]]) -> list[Result]:
    """Numbers of each group: those of icecache.bench.summary, with the group behind the name."""
    return [
        Result(f"{one.name}_{group}", one.value, one.unit, {**one.params, "group": group})
        for group, made in stats.items()
        for one in results(made)
    ]


def long_bounds(made: Sequence[Result], groups: Sequence[str]) -> dict[str, float]:
    """Largest values by name, for summary.broken_bounds; some follow from other numbers.

    At the largest budget: below exact top-B's mean at every length, no step beyond MOST_STEP, and
    from the shortest to the longest length at most MOST_GROWTH times. At every budget: no needle
    less than full attention finds.
    """
    values = {one.name: one.value for one in made}
    lengths = [group for group in groups if group != NEEDLES]
    bounds: dict[str, float] = {}
    for group in lengths:
        bounds[f"kl_ratio_to_topk_{LARGEST}_{group}"] = 1.0
        bounds[f"kl_{LARGEST}_worst_step_{group}"] = MOST_STEP
    if len(lengths) > 1:
        shortest = values.get(f"kl_{LARGEST}_{lengths[0]}", 0.0)
        bounds[f"kl_{LARGEST}_{lengths[-1]}"] = MOST_GROWTH * shortest
    if NEEDLES in groups:
        missed = [name for name in values if name.startswith("needles_missed_")]
        bounds |= {name: 0.0 for name in missed if name.endswith(f"_{NEEDLES}")}
    return bounds
