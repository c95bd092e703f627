"""Time to the first token where prompts begin alike: vLLM with IceCache, and vLLM alone.

SmolLM2-135M-Instruct in float32 on real text, greedy, both with vLLM's prefix caching on. Each runs
in a process of its own, and takes its turn at each measurement, so that drift of the machine meets
both. Ratios are IceCache's seconds over stock's:

- ttft_ratio_turns_2_to_5: a conversation about one document, five turns
- ttft_ratio_shared_document: eight clients ask about one document at once, which nobody has read
- agent_ratio: twenty calls, each the history so far and 200 tokens more; the whole of it
- documents_kept: of three documents in turns, with memory for two, how many are never read again
- cold_ratio: requests with nothing in common, IceCache with prefix caching over IceCache without
- *_hit_rate_*: cached tokens over the most that could be (all but the last token of what was there)

    python benchmarks/python/bench_vllm_prefix.py --json benchmarks/results/vllm_prefix.json

Needs the environment of `make test-vllm`, and 12 GiB of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from vllm_results import median_result, show_and_write

OURS, STOCK, OFF = "icecache", "stock", "icecache_off"
BLOCK = 128  # tokens of a block of vLLM's pool
QUESTION, ANSWER = 40, 24  # tokens
MORE = 200  # tokens that a call of the agent adds
TOKEN_BYTES = 30 * 2 * 3 * 64 * 4  # of SmolLM2: layers, keys and values, KV heads, dims
Prompt = list[int]
Answers = dict[str, Any]


def arguments(model: str, pool: int, longest: int) -> dict[str, Any]:
    """Of vllm.LLM; `pool` tokens of KV memory."""
    return {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "seed": 0,
        "gpu_memory_utilization": 0.3,
        "skip_tokenizer_init": True,
        "block_size": BLOCK,
        "max_model_len": longest,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": pool // BLOCK + 1,  # vLLM keeps one block for itself
    }


class Text:
    """Real text, piece by piece: nobody has read the next one."""

    def __init__(self, tokens: Prompt) -> None:
        self._tokens = tokens
        self._at = 0

    def take(self, count: int) -> Prompt:
        """The next tokens; the text begins anew at its end, at another place."""
        while self._at + count > len(self._tokens):
            self._at -= len(self._tokens) - 1009
        piece = self._tokens[self._at : self._at + count]
        self._at += count
        return piece


class Comparison:
    """Engines that get the same prompts, one after the other."""

    def __init__(self, engines: dict[str, EngineProcess]) -> None:
        self.engines = engines
        self.hits: dict[str, list[int]] = {}  # tokens that were cached, and that could be at most
        self.reset()

    def ask(self, prompts: list[Prompt], known: list[int]) -> dict[str, Answers]:
        """`known`: tokens of each prompt that an engine could have, at most all but the last."""
        answers = {name: engine.answer(prompts, ANSWER) for name, engine in self.engines.items()}
        for name, answer in answers.items():
            self.hits[name][0] += sum(answer["cached"])
            self.hits[name][1] += sum(known)
        return answers

    def reset(self) -> None:
        """Counts hits from here on."""
        self.hits = {name: [0, 0] for name in self.engines}


def conversation(some: Comparison, text: Text, length: int, turns: int) -> list[dict[str, float]]:
    """Seconds to the first token of each turn but the first, by engine."""
    prompt, known, seconds = text.take(length) + text.take(QUESTION), 0, []
    for turn in range(turns):
        answers = some.ask([prompt], [known])
        if turn:
            seconds.append({name: answer["first"][0] for name, answer in answers.items()})
        known = len(prompt) + ANSWER - 1
        # The same words for both, whatever each has answered.
        prompt = prompt + answers[STOCK]["tokens"][0] + text.take(QUESTION)
    return seconds


def shared_document(some: Comparison, text: Text, length: int, clients: int) -> dict[str, float]:
    """Mean seconds to the first token of clients that ask about one document at once."""
    document = text.take(length)
    prompts = [document + text.take(QUESTION) for _ in range(clients)]
    answers = some.ask(prompts, [0] + [length] * (clients - 1))
    return {name: sum(answer["first"]) / clients for name, answer in answers.items()}


def agent(some: Comparison, text: Text, calls: int) -> dict[str, float]:
    """Seconds of the whole trace."""
    history, known = text.take(MORE), 0
    total = dict.fromkeys(some.engines, 0.0)
    for _ in range(calls):
        answers = some.ask([history], [known])
        for name, answer in answers.items():
            total[name] += answer["seconds"]
        known = len(history) + ANSWER - 1
        history = history + answers[STOCK]["tokens"][0] + text.take(MORE)
    return total


def cold(some: Comparison, text: Text, length: int, requests: int) -> dict[str, float]:
    """Seconds of requests with nothing in common."""
    prompts = [text.take(length) for _ in range(requests)]
    return {name: answer["seconds"] for name, answer in some.ask(prompts, [0] * requests).items()}


def documents_kept(engine: EngineProcess, documents: list[Prompt], text: Text) -> int:
    """Of documents that are asked about in turns, those that are read once."""
    kept = [True] * len(documents)
    for turn in range(3):
        for number, document in enumerate(documents):
            answer = engine.answer([document + text.take(QUESTION)], ANSWER)
            kept[number] &= turn == 0 or answer["cached"][0] > len(document) - BLOCK
    return sum(kept)


@dataclass
class Run:
    """One run of the benchmark."""

    length: int  # tokens of a document
    rounds: int
    token_budget: int
    folder: str  # of the model
    text: Text
    tick: Callable[[str], None]
    stack: ExitStack
    longest: int = 0  # tokens that a request may have
    results: list[Result] = field(default_factory=list)

    def params(self, **more: Any) -> dict[str, Any]:
        given = {"length": self.length, "token_budget": self.token_budget, "rounds": self.rounds}
        return {**given, **more}

    def start(self, name: str, pool: int, **options: Any) -> EngineProcess:
        """An engine with KV memory for `pool` tokens in vLLM's own pool."""
        self.tick(f"{name}: start")
        engine = EngineProcess({**arguments(self.folder, pool, self.longest), **options})
        self.stack.callback(engine.close)
        return engine

    def ours(self, tokens: int) -> dict[str, Any]:
        """Arguments of IceCache with host memory for so many tokens."""
        return engine_args(token_budget=self.token_budget, host_memory=tokens * TOKEN_BYTES)

    def measure(
        self,
        name: str,
        pair: Comparison,
        once: Callable[[], list[dict[str, float]]],
        what: str,
        **given: Any,
    ) -> None:
        """Seconds of the first engine over the other's, of all rounds."""
        pair.reset()
        seconds = []
        for _ in range(self.rounds):
            self.tick(what)
            seconds += once()
        first, second = pair.engines
        ratios = [each[first] / each[second] for each in seconds]
        params = self.params(**given)
        self.results.append(median_result(name, ratios, "ratio", params))
        for engine in pair.engines:
            took = median(one[engine] for one in seconds)
            self.results.append(Result(f"{what}_s_{engine}", took, "s", params))
            cached, most = pair.hits[engine]
            if most:
                rate = Result(f"{what}_hit_rate_{engine}", cached / most, "ratio", params)
                self.results.append(rate)


def prompts_that_begin_alike(run: Run, turns: int, clients: int, calls: int) -> EngineProcess:
    """IceCache against stock. Returns IceCache's engine."""
    pool = (clients + 4) * run.length
    ours = run.start(OURS, pool, **run.ours(2 * pool))
    both = Comparison({OURS: ours, STOCK: run.start(STOCK, pool)})
    both.ask([run.text.take(300)], [0])  # warms up
    text, length = run.text, run.length

    def talk() -> list[dict[str, float]]:
        return conversation(both, text, length, turns)

    def share() -> list[dict[str, float]]:
        return [shared_document(both, text, length, clients)]

    def act() -> list[dict[str, float]]:
        return [agent(both, text, calls)]

    run.measure("ttft_ratio_turns_2_to_5", both, talk, "turns", turns=turns)
    run.measure("ttft_ratio_shared_document", both, share, "shared", clients=clients)
    run.measure("agent_ratio", both, act, "agent", calls=calls)
    both.engines[STOCK].close()
    return ours


def prompts_with_nothing_in_common(
    run: Run, ours: EngineProcess, pool: int, length: int, requests: int
) -> None:
    """IceCache with prefix caching against IceCache without."""
    off = run.start(OFF, pool, **{**run.ours(2 * pool), "enable_prefix_caching": False})
    pair = Comparison({OURS: ours, OFF: off})
    pair.ask([run.text.take(300)], [0])

    def once() -> list[dict[str, float]]:
        return [cold(pair, run.text, length, requests)]

    given = {"length": length, "requests": requests}
    run.measure("cold_ratio", pair, once, "cold", **given)
    for engine in (ours, off):
        engine.close()


def documents_in_little_memory(run: Run) -> None:
    """The same bytes for both: two documents with their questions, and half of a third one."""
    pool = 5 * run.length // 2 // BLOCK * BLOCK
    documents = [run.text.take(run.length) for _ in range(3)]
    for name, options in ((OURS, run.ours(pool)), (STOCK, {})):
        engine = run.start(f"{name}, little memory", pool, **options)
        kept = documents_kept(engine, documents, run.text)
        params = run.params(pool_tokens=pool)
        run.results.append(Result(f"documents_kept_{name}", kept, "documents", params))
        engine.close()


def main(
    length: Annotated[int, typer.Option(min=256, help="Tokens of a document.")] = 5000,
    rounds: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 3,
    turns: Annotated[int, typer.Option(min=2, help="Of a conversation.")] = 5,
    clients: Annotated[int, typer.Option(min=2, help="That ask at once.")] = 8,
    calls: Annotated[int, typer.Option(min=2, help="Of the agent.")] = 20,
    requests: Annotated[int, typer.Option(min=1, help="With nothing in common.")] = 16,
    cold_length: Annotated[int, typer.Option(min=1, help="Tokens of each of them.")] = 600,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Ask about documents that were read before; takes about 30 minutes."""
    folder = str(icecache.models.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Text(text_tokens(tokenizer, 30 * length).tolist())
    with Progress(console=Console(), transient=True) as bar, ExitStack() as stack:
        task = bar.add_task("", total=5 + 4 * rounds)

        def tick(what: str) -> None:
            bar.update(task, description=what, advance=1)

        run = Run(length, rounds, token_budget, folder, text, tick, stack)
        run.longest = max(length + turns * (QUESTION + ANSWER), calls * (MORE + ANSWER)) + 512
        ours = prompts_that_begin_alike(run, turns, clients, calls)
        prompts_with_nothing_in_common(run, ours, (clients + 4) * length, cold_length, requests)
        documents_in_little_memory(run)
    show_and_write("SmolLM2-135M-Instruct, float32", run.results, json)


if __name__ == "__main__":
    typer.run(main)
