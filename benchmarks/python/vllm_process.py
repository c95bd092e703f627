"""One vLLM engine in a process of its own, told what to do over its pipes.

vLLM keeps a process's first configuration for ever, so engines that are compared live in a process
each. They take turns: one that is not asked anything sleeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

_ANSWER = "ANSWER "  # before a line of JSON, among the lines that vLLM prints
# One process with its engine, no word beside errors; the pool is sized in blocks, see Engine.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineProcess:
    """A vLLM engine; `arguments` are those of vllm.LLM.

    Methods are those of Engine. Raises RuntimeError with the process's last words where it ends.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._answer()

    def admit(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Engine.admit() in the process."""
        return self._ask("admit", prompts=prompts, tokens=tokens)

    def decode(self, steps: int) -> dict[str, Any]:
        """Engine.decode() in the process."""
        return self._ask("decode", steps=steps)

    def drop(self) -> dict[str, Any]:
        """Engine.drop() in the process."""
        return self._ask("drop")

    def answer(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Engine.answer() in the process."""
        return self._ask("answer", prompts=prompts, tokens=tokens)

    def close(self) -> None:
        """Ends the process; its memory is free when this returns."""
        self._process.kill()
        self._process.wait()

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: list[str] = []
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return dict(json.loads(line.removeprefix(_ANSWER)))
            said.append(line)
        raise RuntimeError("a vLLM process ended:\n" + "".join(said[-40:]))


class Engine:
    """What runs in the process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine = LLM(**arguments).llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.preemptions = 0
        self.scheduled: dict[str, int] = {}  # tokens of each request in the last step
        self._count = 0
        self._admitted: list[str] = []
        self._watch()

    def _watch(self) -> None:
        """Preemptions, and what every step schedules."""
        preempt, schedule = self.scheduler._preempt_request, self.scheduler.schedule

        def preempt_counted(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        def schedule_seen(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.scheduled = dict(output.num_scheduled_tokens)
            return output

        self.scheduler._preempt_request = preempt_counted
        self.scheduler.schedule = schedule_seen

    def admit(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Adds requests for `tokens` each, and steps until those that run all decode.

        Returns `seconds`, how many are `running`, and the `preemptions` so far.
        """
        self._admitted += [self._add(prompt, tokens) for prompt in prompts]
        start = time.perf_counter()
        most = 0
        while True:
            self.engine.step()
            running = len(self.scheduler.running)
            most = max(most, running)
            if len(self.scheduled) == running and set(self.scheduled.values()) == {1}:
                break
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "running": most, "preemptions": self.preemptions}

    def decode(self, steps: int) -> dict[str, Any]:
        """Tokens per second of every step; raises for a step that does more than decode."""
        rates = []
        for _ in range(steps):
            start = time.perf_counter()
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            if set(self.scheduled.values()) != {1}:
                raise RuntimeError(f"not a step that only decodes: {self.scheduled}")
            rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
        return {"rates": rates, "preemptions": self.preemptions}

    def drop(self) -> dict[str, Any]:
        """Aborts everything."""
        self.engine.abort_request(self._admitted)
        self._admitted = []
        self.engine.step()
        return {}

    def answer(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy `tokens` of each prompt, and the `seconds` that all took together.

        Of each also the seconds to its `first` token, and how many of its tokens were `cached`.
        """
        start = time.perf_counter()
        names = [self._add(prompt, tokens) for prompt in prompts]
        made: dict[str, list[int]] = {name: [] for name in names}
        first: dict[str, float] = {}
        cached: dict[str, int] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                name = output.request_id
                made[name] += output.outputs[0].token_ids
                first.setdefault(name, time.perf_counter() - start)
                cached[name] = output.num_cached_tokens or 0
        return {
            "seconds": time.perf_counter() - start,
            "tokens": [made[name] for name in names],
            "first": [first[name] for name in names],
            "cached": [cached[name] for name in names],
        }

    def _add(self, prompt: list[int], tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._count += 1
        name = f"request-{self._count}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name


def main() -> None:
    engine = Engine(json.loads(sys.argv[1]))
    print(_ANSWER + "{}", flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(_ANSWER + json.dumps(getattr(engine, method)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
