"""What drafts found in the text bring: decoding with and without, IceCache and vLLM alone.

SmolLM2-135M-Instruct in float32, greedy, one request at a time: prompts are stretches of Python's
reference, whose words come again. Engines run in processes of their own and take turns, prompt by
prompt, so that drift of the machine meets all.

- draft_speedup_*: time of the tokens behind the first without drafts over that with them
- same_text_*: prompts whose text is the same with drafts and without
- speedup_*: stock's time without drafts over IceCache's with them

    python benchmarks/python/bench_vllm_drafts.py --json benchmarks/results/vllm_drafts.json

Needs the environment of `make test-vllm`, and 12 GiB of memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import icecache
import typer
from bench_vllm_prefix import BLOCK, TOKEN_BYTES, arguments
from head_tokens import text_tokens
from icecache.bench.report import Result
from icecache.vllm import engine_args
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer
from vllm_process import EngineProcess
from vllm_results import median_result, show_and_write

OURS, STOCK = "icecache", "stock"
DRAFTED = "_drafts"  # ends the names of engines with drafts


def seconds_of(answer: dict[str, Any]) -> float:
    """Of the tokens behind the first."""
    return float(answer["seconds"] - answer["first"][0])


def results(answers: dict[str, list[dict[str, Any]]], params: dict[str, Any]) -> list[Result]:
    count = params["answer_tokens"] - 1
    found = [
        median_result(
            f"tpot_ms_{name}", [1e3 * seconds_of(one) / count for one in own], "ms", params
        )
        for name, own in answers.items()
    ]
    for name in (OURS, STOCK):
        pairs = list(zip(answers[name], answers[name + DRAFTED], strict=True))
        found.append(_ratio(f"draft_speedup_{name}", pairs, params))
        same = sum(one["tokens"] == other["tokens"] for one, other in pairs)
        found.append(Result(f"same_text_{name}", same, "prompts", params))
    pairs = list(zip(answers[STOCK], answers[OURS + DRAFTED], strict=True))
    return [*found, _ratio("speedup_icecache_drafts_over_stock", pairs, params)]


def _ratio(
    name: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]], params: dict[str, Any]
) -> Result:
    ratios = [seconds_of(one) / seconds_of(other) for one, other in pairs]
    return median_result(name, ratios, "ratio", params)


def main(
    length: Annotated[int, typer.Option(min=64, help="Tokens of a prompt.")] = 3000,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 4,
    drafts: Annotated[int, typer.Option(min=1, help="Tokens of a draft.")] = 4,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Decode with drafts by n-grams and without; takes about ten minutes."""
    folder = str(icecache.models.smollm2())
    tokens = text_tokens(AutoTokenizer.from_pretrained(folder), prompts * length).tolist()
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    longest = length + answer_tokens + BLOCK
    base = {**arguments(folder, 2 * longest, longest), "enable_prefix_caching": False}
    ours = engine_args(token_budget=token_budget, host_memory=4 * longest * TOKEN_BYTES)
    with Progress(console=Console(), transient=True) as bar, ExitStack() as stack:
        task = bar.add_task("start", total=4 * (1 + prompts))
        engines = {}
        for name, options in ((OURS, ours), (STOCK, {})):
            for tail, more in (("", {}), (DRAFTED, {"speculative_config": speculative})):
                engines[name + tail] = EngineProcess({**base, **options, **more})
                stack.callback(engines[name + tail].close)
                bar.advance(task)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for number in range(prompts):
            prompt = tokens[number * length : (number + 1) * length]
            for name, engine in engines.items():
                bar.update(task, description=name)
                answers[name].append(engine.answer([prompt], answer_tokens))
                bar.advance(task)
    params = {
        "length": length,
        "answer_tokens": answer_tokens,
        "n": prompts,
        "drafts": drafts,
        "token_budget": token_budget,
    }
    show_and_write("SmolLM2-135M-Instruct, float32", results(answers, params), json)


if __name__ == "__main__":
    typer.run(main)
