"""`icecache serve` as its users have it: a process, HTTP, the openai client, Prometheus."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icecache
import openai
import pytest
import torch
from models import manual
from serving import MAX_MODEL_LEN, Server, ask, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

BUDGET = 128
OPTIONS: tuple[str, ...] = ("--enable-prompt-tokens-details",)
OPTIONS += ("--token-budget", str(BUDGET), "--set", f"dense_tokens={BUDGET}", "--host-memory", "1G")
SHARED_MEMORY = Path("/dev/shm")
DOCS = Path(__file__).resolve().parents[2] / "docs"
CHARACTERS = 5000  # of a text with a needle


@pytest.fixture(scope="module")
def shared_before() -> set[Path]:
    """Shared memory that is there ahead of the server."""
    return set(SHARED_MEMORY.iterdir())


@pytest.fixture(scope="module")
def server(
    smollm2: Path, shared_before: set[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One for all tests, for a start takes long; the last test kills it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(smollm2, log, *OPTIONS) as one:
        yield one


def test_the_log_says_how_far_host_memory_goes(server: Server) -> None:
    line = r"IceCache: host memory holds 23,[0-9]{3} tokens, 8\.9 requests of 2,048 tokens at once"
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
        model=server.model, messages=ask("Tell a long story."), max_tokens=1900, stream=True
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


def test_a_second_question_about_a_text_reads_only_itself(server: Server) -> None:
    client = server.client()
    given: Any = {"model": server.model, "temperature": 0, "max_tokens": 8}
    # `manual` texts begin alike: this one is of a user that asks for nothing else.
    given["extra_body"] = {"cache_salt": "a second question"}
    text = manual(2500)
    first = client.completions.create(prompt=f"{text}\nIn short:", **given)
    again = client.completions.create(prompt=f"{text}\nIn one word:", **given)
    details = first.usage.prompt_tokens_details
    assert details is None or not details.cached_tokens
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert again.usage.prompt_tokens - 8 < cached < again.usage.prompt_tokens


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
    assert metrics["icecache:prefixes"] > 0 and metrics["icecache:prefix_bytes"] > 0
    named = re.compile(r"(?:icecache|vllm):\w+")
    for page in ("vllm-grafana.json", "vllm-metrics.md", "vllm.md"):
        told = set(named.findall((DOCS / page).read_text()))
        assert {"icecache:host_bytes"} <= told <= set(metrics), page
    listed = set(named.findall((DOCS / "vllm-metrics.md").read_text()))
    made = {name for name in metrics if name.startswith("icecache:")}
    assert {name for name in made if not name.endswith("_created")} <= listed


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


def test_needles_are_answered_as_by_the_transformers_front_end(
    server: Server, smollm2: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    start = "The special magic number for amber-falcon mentioned in the text is"
    prompts = []
    for number in range(2):
        question, _ = needle(number, CHARACTERS)
        text = tokenizer.apply_chat_template(
            ask(question), tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(text + start).input_ids)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    icecache.enable(model, token_budget=BUDGET)
    want, got = [], []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        want.append(tokenizer.decode(tokens[0, len(prompt) :]))
        given: Any = {"model": server.model, "max_tokens": 10, "temperature": 0}
        got.append(server.client().completions.create(prompt=prompt, **given).choices[0].text)
    found = [
        [needle(n, CHARACTERS)[1] in text for n, text in enumerate(texts)] for texts in (want, got)
    ]
    assert found[0] == found[1], (want, got)
    assert all(found[0])


def test_a_killed_engine_leaves_nothing_behind(server: Server, shared_before: set[Path]) -> None:
    """The last test: the server is gone behind it."""
    stream = server.client().completions.create(
        model=server.model, prompt=manual(4000), max_tokens=500, stream=True
    )
    next(iter(stream))
    os.kill(engine_core(server.process.pid), signal.SIGKILL)
    with pytest.raises(openai.APIError):
        for _part in stream:
            pass
    server.process.wait(60)
    for _ in range(30):  # Python's resource tracker takes a moment
        if not (left := set(SHARED_MEMORY.iterdir()) - shared_before - in_use()):
            break
        time.sleep(1)
    assert not left
    with socket.socket() as again:  # a second server could listen there at once
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((server.host, server.port))


def in_use() -> set[Path]:
    """Shared memory of processes that run: tests beside this one have some."""
    found: set[Path] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        found |= {Path(line.split(maxsplit=5)[5]) for line in lines if str(SHARED_MEMORY) in line}
    return found


def engine_core(server: int) -> int:
    """The process in which the engine of a server runs, below `icecache serve`."""
    below = [int(pid) for pid in children(server)]
    below += [int(pid) for process in below for pid in children(process)]
    (found,) = (pid for pid in below if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()
