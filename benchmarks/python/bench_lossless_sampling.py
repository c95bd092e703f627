"""Whether texts that are sampled by lossless decoding are distributed as full attention's.

SmolLM2-135M-Instruct in float32 through transformers' own `generate`, sampled from the `--top-k`
most likely tokens: the first three tokens after each of two prompts, `--samples` times with seeds
of their own. Stock transformers says how likely each of the possible texts is, and Pearson's
chi-square compares counts with that; texts that are expected less than five times count as one.

- p_value: how likely chance alone strays so far (below .001: another distribution)
- total_variation: half the sum of |share - probability|; total_variation_expected: of fair draws
- kept: the share of drafted tokens that were full attention's

    python benchmarks/python/bench_lossless_sampling.py --json lossless_sampling.json
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import icecache
import torch
import typer
from bench_lossless import drafts_of
from icecache.bench.report import Result, machine, write_json
from icecache.hf.draft_length import DraftLength
from icecache.hf.support import CACHE
from icecache.models.local import load_model, twin
from quality_prompts import DATA, check_data
from rich.console import Console
from rich.progress import Progress

TOKENS = 3
LEAST = 5  # texts expected less often are counted together
PROMPT = 1024  # tokens, so that most of them are in the index and not in a draft's budget
TEXTS = ("mobydick.txt", "tinyshakespeare.txt")


def sampling(top_k: int) -> dict[str, Any]:
    """How texts are sampled, with nothing else that changes probabilities."""
    return {"do_sample": True, "top_k": top_k, "top_p": 1.0, "temperature": 1.0}


@torch.inference_mode()
def probabilities(model: Any, prompt: torch.Tensor, top_k: int) -> dict[tuple[int, ...], float]:
    """Of every text of TOKENS tokens that may follow `prompt` [1, L]."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    forbidden = torch.tensor(model.generation_config.eos_token_id).view(-1)
    held = model(prompt[:, :-1], logits_to_keep=1).past_key_values
    for _ in range(TOKENS):
        texts = list(found)
        logits = torch.cat([_after(model, held, prompt, text) for text in texts])
        logits = logits.index_fill(1, forbidden, -torch.inf)
        best = logits.topk(top_k)
        shares = best.values.double().softmax(1).tolist()
        found = {
            (*text, token): found[text] * share
            for text, tokens, own in zip(texts, best.indices.tolist(), shares, strict=True)
            for token, share in zip(tokens, own, strict=True)
        }
    return found


def _after(model: Any, held: Any, prompt: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """Logits [1, V] after prompt and text; `held` has all of the prompt but its last token."""
    rows = torch.cat([prompt[:, -1:], torch.tensor([text]).long()], 1)
    logits: torch.Tensor = model(rows, **{CACHE: held}, logits_to_keep=1).logits[:, -1]
    held.crop(-rows.shape[1])
    return logits


@torch.inference_mode()
def sampled(
    model: Any, prompt: torch.Tensor, samples: int, batch: int, top_k: int
) -> Counter[tuple[int, ...]]:
    """How often each text followed `prompt` [1, L]."""
    found: Counter[tuple[int, ...]] = Counter()
    held = model(prompt[:, :-1], logits_to_keep=1).past_key_values
    with Progress(console=Console(), transient=True) as bar:
        for first in bar.track(range(0, samples, batch)):
            torch.manual_seed(first)
            rows = prompt.expand(min(batch, samples - first), -1)
            cache = held.fork()
            cache.batch_repeat_interleave(len(rows))
            output = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                pad_token_id=0,
                **{CACHE: cache},
                **sampling(top_k),
            )
            found.update(tuple(row) for row in output[:, prompt.shape[1] :].tolist())
    return found


def chi_square(
    counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], samples: int
) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom. A text that cannot be makes it infinite."""
    if counts.keys() - expected.keys():
        return float("inf"), 1
    cells: list[tuple[float, float]] = []  # seen and expected
    rare = [0.0, 0.0]
    for text, share in expected.items():
        if share * samples < LEAST:
            rare = [rare[0] + counts[text], rare[1] + share * samples]
        else:
            cells.append((counts[text], share * samples))
    if rare[1]:
        cells.append((rare[0], rare[1]))
    return sum((seen - mean) ** 2 / mean for seen, mean in cells), len(cells) - 1


def compared(
    counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], params: dict[str, Any]
) -> list[Result]:
    samples = counts.total()
    statistic, freedom = chi_square(counts, expected, samples)
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(half[0], half[1]))
    apart = sum(abs(counts[text] / samples - share) for text, share in expected.items()) / 2
    # The mean of |X - np| is sqrt(2 np (1 - p) / pi) where np is large.
    fair = sum((2 * p * (1 - p) / (torch.pi * samples)) ** 0.5 for p in expected.values()) / 2
    return [
        Result("p_value", p_value, "", {**params, "chi_square": statistic, "freedom": freedom}),
        Result("total_variation", apart, "share", params),
        Result("total_variation_expected", fair, "share", params),
    ]


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the texts.")] = DATA,
    samples: Annotated[int, typer.Option(min=100, help="Texts of each prompt.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are sampled at once.")] = 8,
    top_k: Annotated[int, typer.Option(min=2, help="Tokens that are sampled from.")] = 8,
    token_budget: Annotated[int, typer.Option(min=1, help="Of a draft.")] = 64,
) -> None:
    """Compare the distribution of sampled texts; takes about an hour."""
    check_data(data)
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    # So short a text would be sampled without drafts, which cost more than they bring.
    DraftLength.choose = lambda length: TOKENS - 1  # type: ignore[assignment, method-assign]
    enabled = icecache.enable(twin(model), token_budget, lossless=True)
    found: list[Result] = []
    for name in TEXTS:
        text = (data / "text" / name).read_text(encoding="utf-8")[200_000:210_000]
        prompt = torch.tensor(tokenizer(text).input_ids[:PROMPT])[None]
        expected = probabilities(model, prompt, top_k)
        before = drafts_of(enabled)
        counts = sampled(enabled, prompt, samples, batch, top_k)
        after = drafts_of(enabled)
        assert before is not None and after is not None
        drafted = after.drafted - before.drafted
        params = {
            "text": name,
            "samples": samples,
            "prompt": PROMPT,
            "tokens": TOKENS,
            "top_k": top_k,
            "token_budget": token_budget,
            "drafted": drafted,
        }
        found += compared(counts, expected, params)
        found.append(Result("kept", (after.kept - before.kept) / max(1, drafted), "share", params))
        if json is not None:
            write_json(json, {**machine(), "model": "SmolLM2-135M-Instruct, float32"}, found)
    for result in found:
        print(f"{result.params['text']:20} {result.name:26} {result.value:.4g}")


if __name__ == "__main__":
    typer.run(main)
