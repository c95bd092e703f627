"""What a shared prefix costs in quality: KL to full attention, behind a fork and a cold prompt.

SmolLM2-135M-Instruct, all 30 layers sparse. Documents are samples of LongBench without their last
64 tokens; the last 64 tokens of samples are suffixes. A first sequence reads a document and another
suffix, and writes 24 tokens; what is asked about forks it at the document's end and reads a suffix
of its own. The cold run reads document and suffix at once. Both are fed the 24 tokens that full
attention writes. KL(full || run) is the mean over these steps and all suffixes, `ratio` the fork's
over the cold run's.

    python benchmarks/python/bench_prefix_quality.py --json benchmarks/results/prefix_quality.json
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import icecache
import torch
import typer
from icecache.bench.quality import kl_divergence
from icecache.bench.report import Result, machine, write_json
from icecache.hf import IceCache
from icecache.hf.support import CACHE
from icecache.models.local import load_model
from quality_prompts import DATA, check_data, quality_prompts
from rich.console import Console
from rich.progress import Progress

SUFFIX, STEPS = 64, 24  # tokens

Ids = torch.Tensor  # [1, T]


def feed(model: Any, cache: IceCache, ids: Ids) -> torch.Tensor:
    """Logits behind the last token, [V]."""
    logits: torch.Tensor = model(ids, **{CACHE: cache}, logits_to_keep=1).logits[0, -1]
    return logits.float()


def follow(model: Any, cache: IceCache, ids: Ids, answer: Ids) -> torch.Tensor:
    """Logits at each token of the answer behind `ids`, [STEPS, V]."""
    rows = [feed(model, cache, ids)]
    rows += [feed(model, cache, answer[:, at : at + 1]) for at in range(answer.shape[1] - 1)]
    return torch.stack(rows)


def write(model: Any, cache: IceCache, ids: Ids) -> tuple[Ids, torch.Tensor]:
    """The most likely tokens behind `ids`, and the logits that they come from."""
    rows = [feed(model, cache, ids)]
    for _ in range(STEPS - 1):
        rows.append(feed(model, cache, rows[-1].argmax()[None, None]))
    logits = torch.stack(rows)
    return logits.argmax(1)[None], logits


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with longbench_mini/ and text/.")] = DATA,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 6,
    suffixes: Annotated[int, typer.Option(min=1, help="Of each document.")] = 3,
    budgets: Annotated[str, typer.Option(help="Tokens attended exactly.")] = "64,256",
) -> None:
    """Compare forks with cold prompts; takes about 10 minutes."""
    check_data(data)
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    some = quality_prompts(tokenizer, data, max(documents, suffixes + 1))
    texts = [prompt.tokens[None] for prompt in some]
    endings = [ids[:, -SUFFIX:] for ids in texts]
    icecache.enable(model)
    found: dict[int, list[tuple[float, float]]] = {int(b): [] for b in budgets.split(",")}
    with Progress(console=Console(), transient=True) as bar, torch.inference_mode():
        task = bar.add_task("", total=documents)
        for number, ids in enumerate(texts[:documents]):
            document = ids[:, :-SUFFIX]
            asked = [endings[(number + i) % len(endings)] for i in range(suffixes + 1)]
            other = asked.pop()  # what the first sequence is asked
            whole = IceCache(model.config, exact=True)
            feed(model, whole, document)
            truths = [write(model, whole.fork(), suffix) for suffix in asked]
            for budget, pairs in found.items():
                first = IceCache(model.config, token_budget=budget)
                write(model, first, torch.cat([document, other], 1))
                for suffix, (answer, truth) in zip(asked, truths, strict=True):
                    fork = first.fork(document.shape[1])
                    cold = IceCache(model.config, token_budget=budget)
                    whole_prompt = torch.cat([document, suffix], 1)
                    runs = (
                        follow(model, fork, suffix, answer),
                        follow(model, cold, whole_prompt, answer),
                    )
                    one, two = (float(kl_divergence(truth, run).mean()) for run in runs)
                    pairs.append((one, two))
            bar.advance(task)
    results = []
    for budget, pairs in found.items():
        params = {"token_budget": budget, "n": len(pairs), "steps": STEPS}
        forks, colds = [one for one, _ in pairs], [one for _, one in pairs]
        results += [
            Result("kl_fork", mean(forks), "nats", {**params, "median": median(forks)}),
            Result("kl_cold", mean(colds), "nats", {**params, "median": median(colds)}),
            Result("ratio", mean(forks) / mean(colds), "ratio", params),
        ]
    for result in results:
        print(f"{result.params['token_budget']:5} {result.name:8} {result.value:.4g}")
    if json is not None:
        write_json(json, machine(), results)


if __name__ == "__main__":
    typer.run(main)
