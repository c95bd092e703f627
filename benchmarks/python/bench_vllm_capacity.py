"""How many long requests a vLLM server runs at once, and how fast, with IceCache and without.

SmolLM2-135M-Instruct in float32 on long real text, greedy. Three engines, a process each, taking
turns, so that drift of the machine meets all of them:

- icecache: vLLM with the plugin, and a KV pool of `--pool` tokens
- stock: vLLM itself with a KV pool of `--pool` tokens
- unlimited: vLLM itself with room for all requests in its pool

`concurrent_requests` and `preemptions` are IceCache's, with "_stock" stock's. `throughput_ratio` is
IceCache's decode throughput (tokens/s over all requests that the engine runs at once, each of its
steps decoding all of them and nothing else; the prompts are timed apart, `prefill_s_*`) over
stock's, `throughput_ratio_unlimited` the same over unlimited's. `low_load_ratio` is what remains of
unlimited's throughput with a few short requests, whole from prompt to last token, and
`low_load_decode_ratio` the same for decode steps alone. `small_pool_prompt` is the length of a
prompt that an engine with a pool of `--small-pool` tokens answered with the tokens of full
attention (IceCache's exact mode against unlimited's).

    python benchmarks/python/bench_vllm_capacity.py --json benchmarks/results/vllm_capacity.json

Needs the environment of `make test-vllm`, and 20 GiB of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import icecache
import typer
from head_tokens import text_tokens
from icecache.bench.report import Result
from icecache.vllm import engine_args
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer
from vllm_process import EngineProcess
from vllm_results import show_and_write

OURS, STOCK, UNLIMITED = "icecache", "stock", "unlimited"
BLOCK = 128  # tokens of a block of vLLM's pool
TURN = 8  # steps that an engine decodes before the next has its turn
SLACK = 512  # tokens that a request decodes at most
SMALL_TOKENS = 16  # of the answer to the long prompt


def arguments(model: str, pool: int, requests: int, longest: int) -> dict[str, Any]:
    """Of vllm.LLM, the same for all engines; `pool` tokens of KV memory."""
    return {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
        "gpu_memory_utilization": 0.3,
        "skip_tokenizer_init": True,
        "block_size": BLOCK,
        "max_model_len": longest,
        "max_num_seqs": requests,
        "max_num_batched_tokens": 2048,
        # vLLM keeps one block for itself.
        "num_gpu_blocks_override": pool // BLOCK + 1,
    }


def spread(rates: list[float]) -> dict[str, float]:
    return {"least": min(rates), "most": max(rates), "n": len(rates)}


def in_turns(engines: dict[str, EngineProcess], steps: int) -> Iterator[tuple[str, list[float]]]:
    """Decode rates (tokens/s) of each engine's turns; the first turn of each warms up."""
    for turn in range(1 + -(-steps // TURN)):
        for name, engine in engines.items():
            rates = engine.decode(TURN)["rates"]
            yield name, rates if turn else []


def main(
    requests: Annotated[int, typer.Option(min=1, help="Long requests at once.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each of their prompts.")] = 6144,
    pool: Annotated[int, typer.Option(min=1, help="KV memory of vLLM, in tokens.")] = 16384,
    small_pool: Annotated[int, typer.Option(min=1, help="The same, for one long prompt.")] = 1024,
    long_prompt: Annotated[int, typer.Option(min=1, help="Tokens of that prompt.")] = 7168,
    short_requests: Annotated[int, typer.Option(min=1, help="Short requests at once.")] = 4,
    short_length: Annotated[int, typer.Option(min=1, help="Tokens of each of them.")] = 768,
    steps: Annotated[int, typer.Option(min=8, help="Timed decode steps of each engine.")] = 48,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    host_memory: Annotated[str, typer.Option(help="Of IceCache, for pages.")] = "7G",
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Serve long requests with IceCache and without; takes about 30 minutes."""
    folder = str(icecache.models.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = text_tokens(tokenizer, max(requests * length, long_prompt)).tolist()
    longs = [text[n * length : (n + 1) * length] for n in range(requests)]
    shorts = [text[n * short_length : (n + 1) * short_length] for n in range(short_requests)]
    longest = max(length, long_prompt) + SLACK
    ours = engine_args(token_budget=token_budget, host_memory=host_memory)
    in_pool = arguments(folder, pool, requests, longest)
    room = requests * (-(-(length + SLACK) // BLOCK)) * BLOCK
    console = Console()
    prefill: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {OURS: [], STOCK: [], UNLIMITED: []}
    short_rates: dict[str, list[float]] = {OURS: [], UNLIMITED: []}
    whole: dict[str, list[float]] = {OURS: [], UNLIMITED: []}
    preemptions = {}
    with Progress(console=console, transient=True) as bar, ExitStack() as stack:
        task = bar.add_task("", total=20)

        def tick(what: str) -> None:
            bar.update(task, description=what, advance=1)

        def start(name: str, options: dict[str, Any]) -> EngineProcess:
            tick(f"{name}: start")
            engine = EngineProcess(options)
            stack.callback(engine.close)
            return engine

        engines = {
            OURS: start(OURS, {**in_pool, **ours}),
            STOCK: start(STOCK, in_pool),
            UNLIMITED: start(UNLIMITED, arguments(folder, room, requests, longest)),
        }
        few = {name: engines[name] for name in (OURS, UNLIMITED)}
        # Short requests, whole: the first round warms up.
        for turn in range(4):
            for name, engine in few.items():
                tick(f"{name}: {short_requests} short requests")
                answer = engine.answer(shorts, 128)
                if turn:
                    made = sum(len(tokens) for tokens in answer["tokens"])
                    whole[name].append(made / answer["seconds"])
        for engine in few.values():
            engine.admit(shorts, SLACK)
        for name, some in in_turns(few, steps):
            short_rates[name] += some
        for engine in few.values():
            engine.drop()
        for name, engine in engines.items():
            tick(f"{name}: {requests} prompts of {length:,} tokens")
            prefill[name] = engine.admit(longs, SLACK)
        tick("decode steps, in turns")
        for name, some in in_turns(engines, steps):
            rates[name] += some
        for name, engine in engines.items():
            preemptions[name] = engine.decode(1)["preemptions"]
            engine.drop()
        tick(f"{long_prompt:,} tokens in a pool of {small_pool:,}")
        full = engines[UNLIMITED].answer([text[:long_prompt]], SMALL_TOKENS)["tokens"]
        for engine in engines.values():
            engine.close()
        exact = engine_args(exact=True, host_memory=host_memory)
        small = start("small pool", {**arguments(folder, small_pool, 2, longest), **exact})
        through = small.answer([text[:long_prompt]], SMALL_TOKENS)["tokens"]
        if through != full:
            raise RuntimeError(f"the small pool gave {through}, full attention {full}")

    params = {
        "requests": requests,
        "length": length,
        "pool_tokens": pool,
        "token_budget": token_budget,
        "model": "SmolLM2-135M-Instruct, float32",
    }
    short_params = {**params, "requests": short_requests, "length": short_length}

    def ratio(name: str, mine: list[float], theirs: list[float], given: dict[str, Any]) -> Result:
        return Result(name, median(mine) / median(theirs), "ratio", given)

    results = [
        Result("concurrent_requests", prefill[OURS]["running"], "requests", params),
        Result("concurrent_requests_stock", prefill[STOCK]["running"], "requests", params),
        Result("preemptions", preemptions[OURS], "count", params),
        Result("small_pool_prompt", long_prompt, "tokens", {**params, "pool_tokens": small_pool}),
        ratio("throughput_ratio", rates[OURS], rates[STOCK], params),
        ratio("throughput_ratio_unlimited", rates[OURS], rates[UNLIMITED], params),
        ratio("low_load_ratio", whole[OURS], whole[UNLIMITED], short_params),
        ratio("low_load_decode_ratio", short_rates[OURS], short_rates[UNLIMITED], short_params),
    ]
    for name, each in rates.items():
        results.append(
            Result(f"decode_{name}", median(each), "tokens/s", {**params, **spread(each)})
        )
        results.append(Result(f"prefill_s_{name}", prefill[name]["seconds"], "s", params))
    for name, each in whole.items():
        results.append(
            Result(f"low_load_{name}", median(each), "tokens/s", {**short_params, **spread(each)})
        )
    for name, each in short_rates.items():
        given = {**short_params, **spread(each)}
        results.append(Result(f"low_load_decode_{name}", median(each), "tokens/s", given))
    show_and_write("SmolLM2-135M-Instruct, float32", results, json)


if __name__ == "__main__":
    typer.run(main)
