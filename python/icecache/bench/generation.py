"""`icecache bench generation`: methods where most of the context was decoded token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from icecache.bench.ask import end_tokens, text_start
from icecache.bench.decoder import Decoder
from icecache.bench.free_text import own_text, write_freely
from icecache.bench.generation_plan import TASK, GenerationPlan
from icecache.bench.generation_report import html_report, results
from icecache.bench.growth import FullLogits, Text, grow
from icecache.bench.methods import Method, find_methods, with_settings
from icecache.bench.prefill import Prefill, finish
from icecache.bench.prompts import pydoc_text
from icecache.bench.report import machine, write_json
from icecache.bench.runner import Progress, Question, Record, RunFolder, run, write_atomically
from icecache.bench.runs import OwnRun
from icecache.bench.suites import Data, text_files
from icecache.bench.tasks.records import read_text
from icecache.bench.tasks.task import Sample, Task, no_score
from icecache.bench.writing import Manner, sampled
from icecache.errors import InvalidArgument
from icecache.models.local import load_model, model_folder

_NO_SCORE = Task(TASK, "kl", 0, chat=False, score=no_score)


def measure(plan: GenerationPlan, out: Path, progress: Progress) -> list[Record]:
    """Runs what is not in the folder `out` yet, and writes the run's files there.

    Raises InvalidArgument for settings, texts and folders that will not do, and for a model that no
    method can run, before anything is written.
    """
    plan.check()
    methods = with_settings(find_methods(plan.methods), plan.engine)
    settings = {"arguments": plan.arguments(), "machine": machine()}
    folder = RunFolder(out, settings)
    model, tokenizer = load_model(model_folder(plan.model), plan.dtype)
    _check_context(plan, model.config)
    questions = [Question(_NO_SCORE, sample) for sample in _samples(plan, tokenizer)]
    progress.begin(len(questions))
    asker = _Asker(Decoder(model), tokenizer, methods, plan, progress.tick)
    records = run(questions, folder, asker, progress.done)
    write_atomically(out / "report.html", html_report(settings, records))
    write_json(out / "results.json", settings, list(results(records)))
    return records


def _check_context(plan: GenerationPlan, config: Any) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(plan.length, plan.prompt + plan.free)
    if limit is not None and longest > limit:
        raise InvalidArgument(
            f"--length, or --prompt and --free together: expected at most {limit}, the context of "
            f"{plan.model}, got {longest}"
        )


def _samples(plan: GenerationPlan, tokenizer: Any) -> list[Sample]:
    """Stretches of the texts, one of each in turn. Tokens are in the field "ids"."""
    files = [] if plan.data is None else text_files(Data(plan.data))
    texts = {path.stem: read_text(path) for path in files} or {"pydoc": pydoc_text()}
    start = text_start(tokenizer)
    room = (plan.prompt if plan.is_own else plan.length) - len(start)
    names, parts = [], []
    for number in range(plan.samples):
        for name, text in texts.items():
            letters = text[: 16 * plan.samples * room]  # more than so many tokens have
            ids = tokenizer(letters, add_special_tokens=False, verbose=False).input_ids
            parts.append(ids[number * room : (number + 1) * room])
            names.append(f"{name}/{number}")
            if len(parts[-1]) < room:
                most = len(ids) // plan.samples + len(start)
                option, got = ("prompt", plan.prompt) if plan.is_own else ("length", plan.length)
                raise InvalidArgument(
                    f"--{option}: expected at most {most:,}, the tokens of {name} for each of "
                    f"--samples {plan.samples}, got {got:,}"
                )
    if plan.switch_at is not None:
        if len(parts) == 1:
            raise InvalidArgument(
                "--switch-at: expected two texts or more, or --samples 2, got one text"
            )
        kept = plan.switch_at - len(start)
        others = [*parts[1:], parts[0]]
        parts = [
            [*one[:kept], *other[: room - kept]] for one, other in zip(parts, others, strict=True)
        ]
    return [
        Sample(name, "", (), length=plan.length, fields={"ids": [*start, *part]})
        for name, part in zip(names, parts, strict=True)
    ]


@dataclass(frozen=True)
class _Asker:
    """What methods make of one stretch: the record of a run. Not thread-safe."""

    decoder: Decoder
    tokenizer: Any
    methods: Sequence[Method]
    plan: GenerationPlan
    tick: Callable[[], None]

    def __call__(self, task: Task, sample: Sample) -> dict[str, Any]:
        plan, tokens = self.plan, torch.tensor(sample.fields["ids"])
        run = OwnRun(self.decoder)
        prompt = tokens[: plan.prompt]
        first = run.run(prompt)
        made = finish(self.decoder, run, prompt, first, lambda answer: True, None)
        free = self._free(made, run) if plan.free else []
        if plan.is_own:
            tokens = torch.cat([prompt, self._own(run.fork(), first)])
        text = Text(tokens, made, FullLogits(run, tokens))
        rows = grow(self.decoder, text, self.methods, plan.budgets, plan.checkpoints, self.tick)
        return {
            "tokens": len(tokens),
            "prompt": plan.prompt,
            "rows": [asdict(row) for row in rows],
            "free": free,
        }

    def _own(self, run: OwnRun, first: torch.Tensor) -> torch.Tensor:
        count = self.plan.length - self.plan.prompt
        choose = sampled(self.plan.temperature, self.plan.seed)
        return torch.tensor(own_text(run, first, count, self._ends(), choose))

    def _free(self, made: Prefill, run: OwnRun) -> list[dict[str, Any]]:
        ends, plan = self._ends(), self.plan
        choose = sampled(plan.temperature, plan.seed)
        manner = Manner(plan.free, lambda written: written[-1] in ends, choose)
        texts = write_freely(self.decoder, made, run, self.methods, plan.budgets, manner)
        rows = []
        for text in texts:
            row = asdict(text)
            row["text"] = self.tokenizer.decode(text.written)
            rows.append(row)
        return rows

    def _ends(self) -> list[int]:
        return sorted(end_tokens(self.decoder.model, self.tokenizer))
