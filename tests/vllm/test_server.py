"""`icecache serve` as its users have it: a process, HTTP, the openai client, Prometheus."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from models import manual
from serving import MAX_MODEL_LEN, Server, ask, serving


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--token-budget", "128", "--set", "dense_tokens=128", "--host-memory", "1G")
    with serving(smollm2, log, *options) as one:
        yield one


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
