"""One run of a suite: model or server, methods, budgets, the run's folder and its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icecache.bench.ask import GOLD_TOKENS, Asker, Limits, ask_endpoint
from icecache.bench.decoder import Decoder, check_served
from icecache.bench.html_report import html_report
from icecache.bench.methods import find_methods, with_settings
from icecache.bench.report import machine, write_json
from icecache.bench.runner import (
    Progress,
    Question,
    Record,
    RunFolder,
    in_turn,
    run,
    run_parallel,
    write_atomically,
)
from icecache.bench.scores import results
from icecache.bench.suites import Data, Suite
from icecache.bench.tasks import longbench, longbench_output
from icecache.bench.tasks.longbench_output import Prediction
from icecache.bench.tasks.task import Task
from icecache.bench.workers import ask_in_worker, fitting_workers, worker_processes
from icecache.config import check_budgets
from icecache.errors import InvalidArgument
from icecache.hf.support import full_attention_layers
from icecache.models.local import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
)
from icecache.outputs import check_output_folder


@dataclass(frozen=True)
class Plan:
    """What makes the numbers of a run, and how many workers make them."""

    model: str  # a folder, "smollm2", or with an endpoint the name that it serves
    methods: Sequence[str] = ()  # all for none
    budgets: Sequence[int] = (64, 128, 256)
    data: Data = field(default_factory=Data)
    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    dtype: str = "float32"
    engine: dict[str, Any] = field(default_factory=dict)  # fields of icecache.Config
    workers: int | None = None  # None: what fits this machine; one for an endpoint
    endpoint: str | None = None

    def arguments(self, suite: Suite) -> dict[str, Any]:
        """Runs with the same arguments may go on in one folder; `limit` may grow."""
        return {
            "suite": suite.name,
            "model": self.model,
            "methods": list(self.methods),
            "budgets": list(self.budgets),
            "data": str(self.data.path) if self.data.path else None,
            "lengths": list(self.data.lengths),
            "samples": self.data.samples if suite.generated else None,
            "seed": self.data.seed,
            "max_length": self.max_length,
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
            "engine": self.engine,
            "endpoint": self.endpoint,
        }


def evaluate(suite: Suite, plan: Plan, out: Path, progress: Progress) -> list[Record]:
    """Runs what is not in the folder `out` yet, and writes the run's files there.

    Raises InvalidArgument for data, tasks, methods, settings and folders that will not do, before
    anything is loaded or written, and for models that no method can run, before anything is
    written.
    """
    _check(plan)
    suite.check(plan.data)
    if plan.endpoint is None:
        check_model(plan.model)
    check_output_folder("--out", out)
    questions = [] if suite.generated else _questions(suite, plan, None)
    name = plan.model if plan.endpoint else _folder(plan.model)
    if plan.endpoint is None:
        _check_model(name)
    tokenizer = None if plan.endpoint and not suite.generated else _tokenizer(plan)
    if suite.generated:
        _check_lengths(plan, name)
        questions = _questions(suite, plan, tokenizer)
    settings = {
        "arguments": plan.arguments(suite),
        "tasks": _tasks(questions, tokenizer),
        "machine": machine(),
    }
    folder = RunFolder(out, settings)
    progress.begin(len(questions))
    records = _run(suite, plan, name, questions, folder, progress.done)
    _write_files(suite, plan, out, settings, questions, records)
    return records


def _questions(suite: Suite, plan: Plan, tokenizer: Any) -> list[Question]:
    questions = list(in_turn(suite.open(plan.data, tokenizer), plan.limit))
    if not questions:
        raise InvalidArgument("--data-dir: expected at least one sample, got none")
    return questions


def _check(plan: Plan) -> None:
    if plan.endpoint is None:
        find_methods(plan.methods)
    check_budgets(plan.budgets, plan.engine)
    if plan.workers is not None and plan.workers < 1:
        raise InvalidArgument(f"--workers: expected at least 1, got {plan.workers}")


def _check_lengths(plan: Plan, folder: str) -> None:
    """Refuses generated prompts that the model's context would cut in the middle."""
    longest = max(plan.data.lengths, default=0)
    if plan.endpoint is None and longest:
        context = _context(_config(folder).get_text_config(decoder=True))
        if longest > context:
            raise InvalidArgument(
                f"--lengths: expected at most {context}, the context of {plan.model}, got {longest}"
            )


def _check_model(folder: str) -> None:
    """By the configuration; a Decoder tries the model itself."""
    check_served(_config(folder))


def _folder(model: str) -> str:
    return str(model_folder(model))


def _tokenizer(plan: Plan) -> Any:
    return load_tokenizer(Path(_folder("smollm2" if plan.endpoint else plan.model)))


def _tasks(questions: Sequence[Question], tokenizer: Any) -> dict[str, Any]:
    tasks: dict[str, Task] = {question.task.name: question.task for question in questions}
    template = bool(getattr(tokenizer, "chat_template", None))
    return {
        name: {
            "metric": task.metric,
            "max_new_tokens": task.max_new_tokens,
            "chat_template": task.chat and template,
            "stop": list(task.stop),
        }
        for name, task in tasks.items()
    }


def _run(
    suite: Suite,
    plan: Plan,
    name: str,
    questions: Sequence[Question],
    folder: RunFolder,
    done: Callable[[Record], None],
) -> list[Record]:
    gold = GOLD_TOKENS if suite.gold_tokens is None else suite.gold_tokens
    if plan.endpoint is not None:
        workers = plan.workers or 1
        ask = ask_endpoint(plan.endpoint, name, _limits(plan, 1 << 30, gold))
        with ThreadPoolExecutor(workers) as threads:
            return run_parallel(questions, folder, threads, ask, workers, done)
    workers = min(plan.workers or fitting_workers(_worker_bytes(plan, name)), len(questions))
    if workers == 1:
        return run(questions, folder, _asker(plan, name, gold), done)
    with worker_processes(workers, _asker, plan, name, gold) as processes:
        return run_parallel(questions, folder, processes, ask_in_worker, workers, done)


def _worker_bytes(plan: Plan, folder: str) -> int:
    """About what a worker holds at its largest prompt: the model as it loads and as it is, the
    prefill's cache twice, and one in each engine."""
    config = _config(folder).get_text_config(decoder=True)
    element = 4 if plan.dtype == "float32" else 2
    files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = min(_context(config), plan.max_length or 1 << 30)
    cache = 2 * element * tokens * len(full_attention_layers(config)) * heads * head_dim
    engines = sum(method.session is None for method in find_methods(plan.methods))
    stored = getattr(config.dtype, "itemsize", 2)
    model = files + files * element // stored
    return (1 << 30) + model + (2 + engines * len(plan.budgets)) * int(cache)


def _config(folder: str) -> Any:
    return load_config(Path(folder))


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _limits(plan: Plan, context: int, gold: int) -> Limits:
    return Limits(context, plan.max_length, plan.max_new_tokens, gold)


def _asker(plan: Plan, folder: str, gold: int) -> Asker:
    model, tokenizer = load_model(Path(folder), plan.dtype)
    config = model.config.get_text_config(decoder=True)
    methods = with_settings(find_methods(plan.methods), plan.engine)
    limits = _limits(plan, _context(config), gold)
    return Asker(Decoder(model), tokenizer, methods, plan.budgets, limits)


def _write_files(
    suite: Suite,
    plan: Plan,
    out: Path,
    settings: dict[str, Any],
    questions: Sequence[Question],
    records: Sequence[Record],
) -> None:
    """report.html, results.json, and for LongBench its own pred/ and result.json."""
    title = f"{suite.name}: {Path(plan.model).name}"
    shown = {**settings, "truncated": sum(record["truncated"] for record in records)}
    write_atomically(out / "report.html", html_report(title, shown, records))
    write_json(out / "results.json", shown, list(results(records)))
    if suite.name in ("longbench", "longbench-e"):
        _write_longbench(plan, out, questions, records)


def _write_longbench(
    plan: Plan, out: Path, questions: Sequence[Question], records: Sequence[Record]
) -> None:
    """pred/MODEL-METHOD-BUDGET/DATASET.jsonl and result.json beside them."""
    made: dict[str, dict[str, list[Prediction]]] = {}
    tasks = {question.task.name: question.task for question in questions}
    samples = {question.key: question.sample for question in questions}
    for record in records:
        sample = samples[record["task"], record["sample"]]
        for row in record["rows"]:
            label = f"{row['method']}-{row['budget']}" if row["budget"] else row["method"]
            model = f"{Path(plan.model).name}-{label.replace(' ', '_')}"
            of_model = made.setdefault(model, {})
            of_model.setdefault(record["task"], []).append(Prediction.of(sample, row["text"]))
    for model, by_task in made.items():
        totals: dict[str, Any] = {}
        folder = out
        for name, predictions in by_task.items():
            path = longbench_output.prediction_path(out, model, tasks[name])
            longbench_output.write_predictions(path, predictions)
            dataset, folder = name.rpartition("/")[2], path.parent
            extended = tasks[name] in longbench.TASKS_E
            judge = longbench_output.result_by_length if extended else longbench_output.result
            totals[dataset] = judge(dataset, predictions)
        longbench_output.write_results(folder / "result.json", totals)
