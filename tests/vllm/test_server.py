"""`icecache serve` as its users have it: a process, HTTP, the openai client, Prometheus."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import icecache
import openai
import pytest
from models import manual

MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def metrics(self) -> dict[str, float]:
        """Sums over labels of every metric of ours."""
        sums: dict[str, float] = {}
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        for name, value in re.findall(r"^(icecache:\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "icecache", "serve", str(model), *options]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.3"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-6000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-6000:])
        yield Server(url, str(model), process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return Path(icecache.models.smollm2())


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--token-budget", "128", "--set", "dense_tokens=128", "--host-memory", "1G")
    with serving(smollm2, log, *options) as one:
        yield one


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_log_says_how_far_host_memory_goes(server: Server) -> None:
    line = r"IceCache: host memory holds 23,[0-9]{3} tokens, 4\.5 requests of 4,096 tokens at once"
    assert re.search(line, server.log.read_text())


def test_chat_completion_streaming_and_several_choices(server: Server) -> None:
    client = server.client()
    chat: Any = {"model": server.model, "temperature": 0, "max_tokens": 24}
    question = ask("What is the capital of France? Answer in one word.")
    whole = client.chat.completions.create(messages=question, logprobs=True, top_logprobs=2, **chat)
    answer = whole.choices[0].message.content
    assert "Paris" in answer
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in tokens)
    streamed = client.chat.completions.create(messages=question, stream=True, **chat)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == answer
    warm = {**chat, "temperature": 0.7, "seed": 1}
    both = client.chat.completions.create(messages=question, n=2, **warm)
    assert len(both.choices) == 2 and all(choice.message.content for choice in both.choices)
    text = client.completions.create(
        model=server.model, prompt="One, two, three, four,", temperature=0, max_tokens=16, stop=","
    )
    assert text.choices[0].finish_reason == "stop" and "," not in text.choices[0].text


def test_the_longest_prompt_is_served_and_a_longer_one_refused(server: Server) -> None:
    client = server.client()
    given: Any = {"model": server.model, "temperature": 0}
    done = client.completions.create(prompt=[100] * (MAX_MODEL_LEN - 1), max_tokens=1, **given)
    assert done.usage.prompt_tokens == MAX_MODEL_LEN - 1
    assert client.completions.create(prompt=[100], max_tokens=1, **given).usage.prompt_tokens == 1
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt=[100] * (MAX_MODEL_LEN + 1), max_tokens=1, **given)


def test_a_client_that_leaves_frees_its_pages(server: Server) -> None:
    client = server.client()
    stream = client.chat.completions.create(
        model=server.model, messages=ask("Tell a long story."), max_tokens=2000, stream=True
    )
    for _, _part in zip(range(5), stream, strict=False):
        pass
    stream.close()
    # The engine is looked at every second while it steps: a short question makes it step.
    for _ in range(30):
        time.sleep(1)
        client.completions.create(model=server.model, prompt="Hi", max_tokens=3)
        if server.metrics()["icecache:requests"] <= 1:
            return
    pytest.fail(f"pages are still held: {server.metrics()}")


def test_equal_prompts_with_different_salts_are_answered_alike(server: Server) -> None:
    client = server.client()
    given: Any = {"model": server.model, "prompt": manual(2000), "temperature": 0, "max_tokens": 8}
    texts = {
        client.completions.create(**given, extra_body=body).choices[0].text
        for body in ({}, {"cache_salt": "one"}, {"cache_salt": "two"})
    }
    assert len(texts) == 1


def test_a_killed_engine_leaves_nothing_behind(smollm2: Path, tmp_path: Path) -> None:
    options = ("--token-budget", "128", "--host-memory", "1G")
    shared = set(Path("/dev/shm").iterdir())
    with serving(smollm2, tmp_path / "first", *options) as server:
        client = server.client()
        stream = client.completions.create(
            model=server.model, prompt=manual(4000), max_tokens=500, stream=True
        )
        next(iter(stream))
        os.kill(engine_core(server.process.pid), signal.SIGKILL)
        with pytest.raises(openai.APIError):
            for _part in stream:
                pass
        server.process.wait(60)
    for _ in range(30):  # Python's resource tracker takes a moment
        if set(Path("/dev/shm").iterdir()) <= shared:
            break
        time.sleep(1)
    assert set(Path("/dev/shm").iterdir()) <= shared
    with serving(smollm2, tmp_path / "second", *options) as server:
        given: Any = {"model": server.model, "prompt": "Hi", "max_tokens": 3}
        assert server.client().completions.create(**given).usage.completion_tokens == 3


def engine_core(server: int) -> int:
    """The process in which the engine of a server runs."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    (found,) = (
        int(pid) for pid in children if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return found


def test_prometheus_has_our_metrics(server: Server) -> None:
    prompt = manual(6000)
    server.client().completions.create(
        model=server.model, prompt=prompt, max_tokens=64, temperature=0
    )
    metrics = server.metrics()
    steps = metrics["icecache:steps_total"]
    assert steps > 0
    assert 0.3 < metrics["icecache:attention_mass_total"] / steps <= 1.0
    assert metrics["icecache:read_bytes_total"] > 0
    assert metrics["icecache:host_capacity_bytes"] == 2**30
    assert metrics["icecache:failed_requests_total"] == 0


def needle(number: int, characters: int) -> tuple[str, str]:
    """A question over real text, and the number that answers it."""
    answer = str(7301946 + 1117 * number)
    lines = manual(characters).split("\n")
    at = len(lines) * (number + 1) // 4
    fact = f"One of the special magic numbers for amber-falcon is: {answer}."
    text = "\n".join([*lines[:at], fact, *lines[at:]])
    question = (
        "A special magic number is hidden within the following text. Memorize it.\n"
        f"{text}\nWhat is the special magic number for amber-falcon mentioned in the text?"
    )
    return question, answer


@pytest.mark.parametrize("budget", [128, 256])
def test_needles_are_answered_as_by_the_transformers_front_end(
    smollm2: Path, tmp_path: Path, budget: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    start = "The special magic number for amber-falcon mentioned in the text is"
    prompts = []
    for number in range(3):
        question, _ = needle(number, 5500)
        text = tokenizer.apply_chat_template(
            ask(question), tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(text + start).input_ids)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    icecache.enable(model, token_budget=budget)
    want = []
    for prompt in prompts:
        import torch

        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        want.append(tokenizer.decode(tokens[0, len(prompt) :]))
    del model
    options = ("--token-budget", str(budget), "--set", f"dense_tokens={budget}")
    options = (*options, "--host-memory", "1G")
    with serving(smollm2, tmp_path / "log", *options) as server:
        client = server.client()
        got = [
            client.completions.create(
                model=server.model, prompt=prompt, max_tokens=10, temperature=0
            )
            .choices[0]
            .text
            for prompt in prompts
        ]
    found = [[needle(n, 5500)[1] in text for n, text in enumerate(texts)] for texts in (want, got)]
    assert found[0] == found[1], (want, got)
    assert sum(found[0]) >= 2
