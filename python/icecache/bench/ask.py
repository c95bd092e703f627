"""One sample of a task: its prompt in tokens, and what every method makes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from icecache.bench.compare import Outcome, compare
from icecache.bench.decoder import Decoder
from icecache.bench.libraries import library
from icecache.bench.methods import Method
from icecache.bench.prefill import Prefill, prefill_with_answer
from icecache.bench.tasks.longbench import truncate_in_the_middle
from icecache.bench.tasks.task import Sample, Task
from icecache.errors import Error, InvalidArgument, Unavailable

GOLD_TOKENS = 64  # of the right answer, whose likelihood is measured


@dataclass(frozen=True)
class Limits:
    """`context`: tokens of prompt and answer that the model takes; others shorten a task's own."""

    context: int
    max_length: int | None = None  # tokens of a prompt
    max_new_tokens: int | None = None
    gold_tokens: int = GOLD_TOKENS

    def new_tokens(self, task: Task) -> int:
        return min(task.max_new_tokens, self.max_new_tokens or task.max_new_tokens)


@dataclass(frozen=True)
class Asked:
    """A prompt as the model gets it."""

    tokens: torch.Tensor  # [L] int64
    truncated: bool  # the middle was left out


def prompt_tokens(tokenizer: Any, task: Task, sample: Sample, limits: Limits) -> Asked:
    """Truncated in the middle as LongBench does, then in the chat template, then the answer's
    beginning. A tokenizer without a chat template gets the text alone, behind what the tokenizer
    puts in front of a text (BOS); a template has that itself."""
    chat = task.chat and bool(getattr(tokenizer, "chat_template", None))
    frame = _ids(tokenizer, _in_template(tokenizer, "")) if chat else text_start(tokenizer)
    beginning = _ids(tokenizer, sample.answer_prefix)
    room = limits.context - limits.new_tokens(task) - len(frame) - len(beginning)
    room = min(room, limits.max_length or room)
    if room < 1:
        raise InvalidArgument(
            f"max_new_tokens: expected less than the context of {limits.context:,} tokens, got "
            f"{limits.new_tokens(task):,}"
        )
    text, truncated = (task.truncate or truncate_in_the_middle)(tokenizer, sample.prompt, room)
    if chat:
        ids = _ids(tokenizer, _in_template(tokenizer, text) + sample.answer_prefix)
    else:
        ids = [*frame, *_ids(tokenizer, text + sample.answer_prefix)]
    return Asked(torch.tensor(ids), truncated)


def _in_template(tokenizer: Any, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    chat: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat


def text_start(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text: [BOS] mostly, or none."""
    marked: list[int] = tokenizer("x").input_ids
    plain = _ids(tokenizer, "x")
    starts = range(len(marked) - len(plain) + 1)
    return next((marked[:at] for at in starts if marked[at : at + len(plain)] == plain), [])


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def gold_tokens(tokenizer: Any, task: Task, sample: Sample, limits: Limits) -> list[int]:
    """The first right answer, as it continues the prompt; none where that is not asked for it."""
    if not sample.answers or not limits.gold_tokens or task.follow_up:
        return []
    before = sample.answer_prefix or ("" if task.chat else sample.prompt)
    gap = " " if before and not before[-1].isspace() else ""
    return _ids(tokenizer, gap + sample.answers[0])[: limits.gold_tokens]


class Endings:
    """Where an answer ends: the model's own end tokens, and the texts that a task names."""

    def __init__(self, tokenizer: Any, ends: set[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._stop = stop

    def is_end(self, answer: list[int]) -> bool:
        """A text that begins an answer does not end it."""
        if answer[-1] in self._ends:
            return True
        if not self._stop:
            return False
        text = self._text(answer).lstrip("\n")
        return any(stop in text for stop in self._stop)

    def text(self, answer: list[int]) -> str:
        """Of an answer, up to its end."""
        text = self._text(answer)
        begin = len(text) - len(text.lstrip("\n"))
        ends = [at for stop in self._stop if (at := text.find(stop, begin)) >= 0]
        return text[: min(ends)] if ends else text

    def _text(self, answer: list[int]) -> str:
        text: str = self._tokenizer.decode(answer, skip_special_tokens=True)
        return text


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """All that the model or its tokenizer ends an answer with."""
    given: list[Any] = [tokenizer.eos_token_id, model.config.eos_token_id]
    given.append(getattr(model.generation_config, "eos_token_id", None))
    return set(_numbers(given))


def _numbers(given: Any) -> Iterator[int]:
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _numbers(one)
    elif given is not None:
        yield int(given)


Ask = Callable[[Task, Sample], dict[str, Any]]


@dataclass(frozen=True)
class Asker:
    """Asks samples of one model under several methods. Not thread-safe."""

    decoder: Decoder
    tokenizer: Any
    methods: Sequence[Method]
    budgets: Sequence[int]
    limits: Limits

    def __call__(self, task: Task, sample: Sample) -> dict[str, Any]:
        """A record of the run: plain numbers and texts, see runner.Record."""
        asked = prompt_tokens(self.tokenizer, task, sample, self.limits)
        endings = self._endings(task)
        most = self.limits.new_tokens(task)
        start = time.perf_counter()
        made = prefill_with_answer(self.decoder, asked.tokens, most, endings.is_end)
        seconds = time.perf_counter() - start
        gold = gold_tokens(self.tokenizer, task, sample, self.limits)
        outcomes = compare(
            self.decoder, made, self.methods, self.budgets, gold, most, endings.is_end
        )
        rows = [self._row(task, sample, outcome, endings) for outcome in outcomes]
        if task.follow_up is not None:
            self._follow_up(task, sample, rows)
        return {
            "tokens": made.length,
            "truncated": asked.truncated,
            "full_s": seconds,
            "gold_tokens": len(gold),
            "rows": rows,
        }

    def _endings(self, task: Task) -> Endings:
        return Endings(self.tokenizer, end_tokens(self.decoder.model, self.tokenizer), task.stop)

    def _row(
        self, task: Task, sample: Sample, outcome: Outcome, endings: Endings
    ) -> dict[str, Any]:
        text = endings.text(outcome.answer)
        row = {**asdict(outcome), "text": text, "score": task.score(text, sample)}
        row["kl"] = [round(one, 6) for one in outcome.kl]
        row["answer_tokens"] = len(row.pop("answer"))
        return row

    def _follow_up(self, task: Task, sample: Sample, rows: Sequence[dict[str, Any]]) -> None:
        """Asks each row again about its own text, with its own method; that answer is judged.

        Rows that wrote the same share a prefill. Who wrote nothing is asked nothing.
        """
        methods = {method.label: method for method in self.methods}
        prefills: dict[str, Prefill] = {}
        for row in rows:
            first = row["first_text"] = row["text"].strip()
            row["text"] = ""
            if first:
                last, second = _second(task, sample, first)
                most, endings = self.limits.new_tokens(last), self._endings(last)
                if first not in prefills:
                    asked = prompt_tokens(self.tokenizer, last, second, self.limits)
                    prefills[first] = prefill_with_answer(
                        self.decoder, asked.tokens, most, endings.is_end
                    )
                method = [methods[row["method"]]] if row["budget"] else []
                made = prefills[first]
                outcomes = compare(
                    self.decoder, made, method, [row["budget"]], [], most, endings.is_end
                )
                row["text"] = endings.text(outcomes[-1].answer)
            row["score"] = task.score(row["text"], sample)


def _second(task: Task, sample: Sample, first: str) -> tuple[Task, Sample]:
    """What is asked about `first`, the text written so far: a task without a follow-up."""
    follow = task.follow_up
    assert follow is not None
    last = replace(task, max_new_tokens=follow.max_new_tokens, follow_up=None)
    return last, replace(sample, prompt=follow.prompt(sample, first), answer_prefix="")


def ask_endpoint(endpoint: str, model: str, limits: Limits) -> Ask:
    """Asks an OpenAI-compatible server instead; it truncates nothing.

    Asking raises Unavailable where no server answers, and Error for what the server refuses.
    """
    openai = library("openai")
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=endpoint, api_key=key, timeout=3600)

    def ask(task: Task, sample: Sample) -> dict[str, Any]:
        try:
            return complete(task, sample)
        except openai.APIConnectionError as error:
            raise Unavailable(f"--endpoint: no server answers at {endpoint}: {error}") from error
        except openai.APIError as error:
            where = f"{task.name}, sample {sample.name}"
            raise Error(f"--endpoint: {endpoint} did not answer {where}: {error}") from error

    def write(task: Task, sample: Sample) -> tuple[str, int]:
        """The answer, and the tokens of the prompt."""
        given: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "max_tokens": limits.new_tokens(task),
            "stop": list(task.stop) or None,
        }
        if task.chat and not sample.answer_prefix:
            messages = [{"role": "user", "content": sample.prompt}]
            made = client.chat.completions.create(messages=messages, **given)
            text = made.choices[0].message.content or ""
        else:
            made = client.completions.create(prompt=sample.prompt + sample.answer_prefix, **given)
            text = made.choices[0].text
        return text, made.usage.prompt_tokens if made.usage else 0

    def complete(task: Task, sample: Sample) -> dict[str, Any]:
        start = time.perf_counter()
        text, tokens = write(task, sample)
        row: dict[str, Any] = {"method": "served", "budget": 0}
        if task.follow_up is not None:
            row["first_text"] = text.strip()
            text = write(*_second(task, sample, text.strip()))[0] if text.strip() else ""
        row |= {"text": text, "score": task.score(text, sample)}
        seconds = time.perf_counter() - start
        return {"tokens": tokens, "truncated": False, "full_s": seconds, "rows": [row]}

    return ask
