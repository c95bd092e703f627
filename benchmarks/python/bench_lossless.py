"""Lossless decoding end to end: whether the text is full attention's, and how fast it comes.

SmolLM2-135M-Instruct in float32 through transformers' own `generate`, greedy, on Python's reference
(or on the texts of --data-dir), each prompt a stretch of its own. Methods:

- dynamic: transformers' default, sdpa over a DynamicCache
- contiguous: sdpa over a preallocated cache that is written in place
- lossless_B: `icecache.enable(model, lossless=True, token_budget=B)`
- icecache_B: the same budget without verification

All live in one process on the same weights and take turns, prompt by prompt. Times are between
tokens, the prompt's left out. A token that differs from dynamic's counts as different unless
dynamic's own two best logits lie within 1e-4 there; what follows it is not compared.
`lossless_equal_*` counts prompts with the same text; `lossless_speedup_*` is the median over
prompts of a rival's time over ours; `lossless_kept_*` the share of drafts that were full
attention's.

    python benchmarks/python/bench_lossless.py --json benchmarks/results/lossless.json

`--context 4 --lengths 30000` goes past the model's 8,192 positions: they are scaled, so that texts
are worse, and no less full attention's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import icecache
import torch
import typer
from contiguous_cache import contiguous_cache
from head_tokens import text_tokens
from icecache.bench.report import Result, machine, write_json
from icecache.cli.usage import numbers
from icecache.hf.model_stats import LosslessStats
from icecache.hf.support import CACHE
from icecache.models.local import check_context, load_model, twin
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

DYNAMIC, CONTIGUOUS = "dynamic", "contiguous"
TIE = 1e-4  # between two logits, in which rounding may choose


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    seconds: float  # a token, the first left out
    gaps: list[float]  # between the two best logits of each token
    kept: float = 0.0  # of the drafted tokens
    drafted: float = 0.0  # tokens of a draft, on average


class Clock:
    """A streamer that notes when the first and the last token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer(model: Any, prompt: torch.Tensor, steps: int, cache: Any = None) -> Answer:
    """`steps` tokens behind prompt [1, L]."""
    clock = Clock()
    before = drafts_of(model)
    given = {} if cache is None else {CACHE: cache}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=True,
        **given,
    )
    took = clock.times[-1] - clock.times[1]  # the first is the prompt's
    best = [logits[0].topk(2).values for logits in output.logits]
    kept = drafted = 0.0
    if before is not None and (after := drafts_of(model)) is not None:
        count = after.drafted - before.drafted
        kept = (after.kept - before.kept) / max(1, count)
        drafted = count / max(1, after.verifications - before.verifications)
    return Answer(
        output.sequences[0, prompt.shape[1] :].tolist(),
        took / (steps - 1),
        [float(one[0] - one[1]) for one in best],
        kept,
        drafted,
    )


def drafts_of(model: Any) -> LosslessStats | None:
    """Counts since the model was enabled for lossless decoding; None where it was not."""
    try:
        return icecache.stats(model).lossless
    except icecache.InvalidArgument:  # not enabled
        return None


def with_longer_context(model: Any, factor: float) -> Any:
    """The model with `factor` times its positions, by YaRN (Peng et al. 2024, arXiv:2309.00071)."""
    config = model.config
    trained = config.max_position_embeddings
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    config.rope_parameters = {**config.rope_parameters, **scaling}
    config.max_position_embeddings = int(factor * trained)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def equal_tokens(got: Answer, expected: Answer) -> int | None:
    """Tokens up to the first that differs without a tie; None: all are equal, or tied."""
    for n, (one, other) in enumerate(zip(got.tokens, expected.tokens, strict=True)):
        if one != other:
            return None if expected.gaps[n] < TIE else n
    return None


def stretches(tokenizer: Any, data: Path | None, count: int, length: int) -> list[torch.Tensor]:
    """`count` prompts [1, length]: from the texts of a folder in turn, or of Python's reference."""
    if data is None:
        return list(text_tokens(tokenizer, count * length).view(count, 1, length))
    texts = []
    for path in sorted(data.glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")[: 8 * count * length]
        ids: Any = tokenizer(text, verbose=False).input_ids
        texts.append(torch.tensor(ids))
    made = []
    for n in range(count):
        ids = texts[n % len(texts)]
        start = (n // len(texts)) * length
        made.append(ids[start : start + length][None])
    return [one for one in made if one.shape[1] == length]


def results(
    length: int, budgets: list[int], steps: int, answers: dict[str, list[Answer]]
) -> Iterator[Result]:
    tail = size(length)
    for method, own in answers.items():
        seconds = sorted(one.seconds for one in own)
        params: dict[str, Any] = {
            "length": length,
            "steps": steps,
            "n": len(own),
            "threads": torch.get_num_threads(),
        }
        spread = {"least": 1e3 * seconds[0], "most": 1e3 * seconds[-1]}
        yield Result(f"tpot_ms_{method}_{tail}", 1e3 * median(seconds), "ms", {**params, **spread})
    for budget in budgets:
        params["token_budget"] = budget
        for kind in ("lossless", "icecache"):
            own = answers[f"{kind}_{budget}"]
            differ = [equal_tokens(*pair) for pair in zip(own, answers[DYNAMIC], strict=True)]
            name = f"{kind}_equal_{budget}_{tail}"
            yield Result(name, sum(one is None for one in differ), "prompts", params)
        own = answers[f"lossless_{budget}"]
        tail_of = f"{budget}_{tail}"
        yield Result(f"lossless_kept_{tail_of}", median(one.kept for one in own), "share", params)
        drafted = median(one.drafted for one in own)
        yield Result(f"lossless_drafted_{tail_of}", drafted, "tokens", params)
        for rival in (DYNAMIC, CONTIGUOUS):
            pairs = zip(answers[rival], own, strict=True)
            each = sorted(theirs.seconds / ours.seconds for theirs, ours in pairs)
            found = {"rival": rival, "least": each[0], "most": each[-1]}
            name = f"lossless_speedup_{rival}_{tail_of}"
            yield Result(name, median(each), "ratio", {**params, **found})


def show(console: Console, length: int, answers: dict[str, list[Answer]]) -> None:
    table = Table("method", title=f"SmolLM2-135M-Instruct, float32, prompts of {length:,} tokens")
    for title in ("same text", "ms a token", "speed-up", "drafts kept", "tokens a draft"):
        table.add_column(title, justify="right")
    for method, own in answers.items():
        pairs = list(zip(own, answers[DYNAMIC], strict=True))
        same = sum(equal_tokens(*pair) is None for pair in pairs)
        table.add_row(
            method,
            f"{same} of {len(own)}",
            f"{1e3 * median(one.seconds for one in own):.0f}",
            f"{median(theirs.seconds / ours.seconds for ours, theirs in pairs):.2f}",
            f"{median(one.kept for one in own):.2f}" if method.startswith("lossless") else "",
            f"{median(one.drafted for one in own):.1f}" if method.startswith("lossless") else "",
        )
    console.print(table)


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens of a prompt, comma-separated.")
    ] = "2048,7168",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 3,
    steps: Annotated[int, typer.Option(min=8, help="Tokens of an answer.")] = 128,
    budgets: Annotated[str, typer.Option(help="Token budgets, comma-separated.")] = "64,256",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of texts (.txt).")] = None,
    context: Annotated[
        float, typer.Option(min=1, help="Times the model's context, by scaled positions.")
    ] = 1,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Compare lossless decoding with full attention; takes about 10 minutes."""
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    if context > 1:
        model = with_longer_context(model, context)
    sizes = parse_lengths(lengths)
    for length in sizes:
        check_context(model.config, length, steps)
    chosen = numbers("--budgets", budgets, 1, 1_000_000)
    console = Console()
    found: list[Result] = []
    for length in sizes:
        answers: dict[str, list[Answer]] = defaultdict(list)
        texts = stretches(tokenizer, data_dir, prompts, length)
        enabled = {}
        for budget in chosen:
            for kind in ("lossless", "icecache"):
                made = icecache.enable(twin(model), budget, lossless=kind == "lossless")
                enabled[f"{kind}_{budget}"] = made
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("", total=len(texts) * (2 + len(enabled)))
            for text in texts:
                for name, one in {DYNAMIC: model, CONTIGUOUS: model, **enabled}.items():
                    cache = None
                    if name == CONTIGUOUS:
                        cache = contiguous_cache(model.config.num_hidden_layers, length + steps)
                    bar.update(task, description=name)
                    answers[name].append(answer(one, text, steps, cache))
                    bar.advance(task)
        for one in enabled.values():
            icecache.disable(one)
        show(console, length, answers)
        found += results(length, chosen, steps, answers)
    if json is not None:
        meta = {**machine(), "model": "SmolLM2-135M-Instruct, float32", "context": context}
        write_json(json, meta, found)


if __name__ == "__main__":
    typer.run(main)
