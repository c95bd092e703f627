"""Runs the demo: full attention first, then every method along full attention's own answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from icecache import InvalidArgument
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.prefill import Prefill, finish
from icecache.bench.quality import decode_freely, kl_divergence, teacher_forced
from icecache.bench.runs import OwnRun
from icecache.demo.document import Document, Needle
from icecache.demo.methods import Method

STEPS = 24  # decoded tokens per question

# Called with what is being done, steps done and steps in all.
Progress = Callable[[str, int, int], None]


@dataclass
class Row:
    """One method over all questions."""

    name: str
    budget: int | None  # None: full attention
    note: str
    answers: list[str] = field(default_factory=list)  # decoded freely
    found: list[bool] = field(default_factory=list)
    agreement: float = 1.0  # share of steps with full attention's most likely token
    kl: float = 0.0  # KL(full || method), mean over steps, nats
    tokens_per_second: float = 0.0  # batch 1, the whole model
    bytes_per_step: float = 0.0  # of keys, values, sketches and summaries
    device_bytes: float = 0.0  # held where attention runs
    mass: float | None = None  # share of attention attended exactly; None where nobody estimates it


@dataclass
class Question:
    """Full attention's answer: what the other methods are measured against."""

    needle: Needle
    prefill: Prefill
    seconds: float


def answer_in_full(
    decoder: Decoder, document: OwnRun, needle: Needle, shared: torch.Tensor, end: int | None
) -> Question:
    """Asks one question after the shared document, whose run is `document`, with full attention."""
    run = document.fork()
    first = run.run(needle.question)
    tokens = torch.cat([shared, needle.question])
    prefill = finish(decoder, run, tokens, first, lambda made: len(made) > STEPS, end)
    return Question(needle, prefill, run.step_s)


def run_demo(
    decoder: Decoder,
    tokenizer: Any,
    document: Document,
    methods: list[Method],
    progress: Progress,
    on_question: Callable[[int, Question], None] | None = None,
) -> list[Row]:
    """One row for full attention and one for each method. `on_question` sees each question."""
    if decoder.sinks:
        raise InvalidArgument(
            "model: its attention has learned sinks, which the report of the demo does not show; "
            "expected a model without"
        )
    total = 1 + len(document.needles) * (1 + len(methods))
    progress("prefill with full attention", 0, total)
    full = OwnRun(decoder)
    full.run(document.tokens)
    end = tokenizer.eos_token_id
    rows = [Row("full attention", None, "every token", mass=1.0)]
    rows += [Row(method.name, method.budget, method.note) for method in methods]
    done = 1
    seconds = [0.0] * len(rows)
    for number, needle in enumerate(document.needles):
        progress(f"question {number + 1}: full attention", done, total)
        question = answer_in_full(decoder, full, needle, document.tokens, end)
        text = tokenizer.decode(question.prefill.continuation, skip_special_tokens=True)
        _note_answer(rows[0], text, needle)
        seconds[0] += question.seconds
        done += 1
        for index, method in enumerate(methods, 1):
            label = f"question {number + 1}: {method.name} at {method.budget}"
            progress(label, done, total)
            seconds[index] += _run_method(decoder, tokenizer, question, method, rows[index])
            done += 1
        if on_question is not None:
            on_question(number, question)
    progress("done", total, total)

    questions = len(document.needles)
    cell = 2 * decoder.head_dim * decoder.dtype.itemsize * decoder.num_kv_heads * decoder.num_layers
    length = document.tokens.shape[0] + document.longest_question
    rows[0].bytes_per_step = rows[0].device_bytes = float(cell * length)
    for row, spent in zip(rows, seconds, strict=True):
        row.tokens_per_second = questions * STEPS / spent
    for row, method in zip(rows[1:], methods, strict=True):
        row.agreement /= questions
        row.kl /= questions
        row.bytes_per_step /= questions
        if row.mass is not None:
            row.mass /= questions
        if method.engine is None:
            row.bytes_per_step = row.device_bytes = float(cell * method.budget)
    return rows


def _run_method(
    decoder: Decoder, tokenizer: Any, question: Question, method: Method, row: Row
) -> float:
    """Adds one question to `row`; returns the seconds of its decode steps."""
    if not row.found:
        row.agreement = 0.0
    session = method.open(decoder, question.prefill)
    free = session.fork()
    start = time.perf_counter()
    logits = teacher_forced(decoder, question.prefill, [session])[0]
    seconds = time.perf_counter() - start
    expected, chosen = question.prefill.logits.argmax(-1), logits.argmax(-1)
    row.kl += float(kl_divergence(question.prefill.logits, logits).mean())
    row.agreement += float((expected == chosen).float().mean())
    if isinstance(session, EngineSession):
        # Without a far field an index estimates only what it has searched.
        if session.engine.config.tail == "on":
            row.mass = (row.mass or 0.0) + session.mass()
        row.bytes_per_step += session.bytes_read() / question.prefill.steps
    if torch.equal(expected[:-1], chosen[:-1]):  # its own answer is the one it was led along
        tokens = torch.cat([question.prefill.continuation[:1], chosen])
    else:
        tokens = decode_freely(decoder, question.prefill, [free])[0]
    _note_answer(row, tokenizer.decode(tokens, skip_special_tokens=True), question.needle)
    free.close()
    if isinstance(session, EngineSession):
        row.device_bytes = max(row.device_bytes, float(session.engine.memory().device_bytes))
    session.close()
    return seconds


def _note_answer(row: Row, text: str, needle: Needle) -> None:
    row.answers.append(text.strip())
    row.found.append(needle.answer in text)
