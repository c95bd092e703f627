"""Suites, runs and their files."""

from __future__ import annotations

import html.parser
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from icecache import InvalidArgument
from icecache.bench import workers
from icecache.bench.ask import Endings, Limits, gold_tokens, prompt_tokens
from icecache.bench.evaluate import Plan, _check, _worker_bytes
from icecache.bench.html_report import html_report
from icecache.bench.methods import METHODS
from icecache.bench.runner import Question, RunFolder, in_turn, run, run_parallel
from icecache.bench.scores import halves, lines, results, task_scores
from icecache.bench.suites import SUITES, Data, find_suite
from icecache.bench.tasks.task import Sample, Task
from icecache.bench.workers import fitting_workers, share_of
from icecache.cli import app
from icecache.cli.bench_common import METHODS as METHOD_NAMES
from icecache.cli.bench_suites import SUITES as NAMES
from icecache.models import smollm2
from typer.testing import CliRunner

TASK = Task("some/task", "exact", 8, chat=False, score=lambda text, sample: 0.5)
SETTINGS = {"arguments": {"model": "m", "budgets": [64]}}


def question(number: int, task: Task = TASK) -> Question:
    return Question(
        task, Sample(str(number), f"prompt {number}", ("answer",), length=1000 * number)
    )


def answer(task: Task, sample: Sample) -> dict[str, Any]:
    """A made-up record: full attention, and IceCache at two budgets."""
    number = int(sample.name)

    def row(method: str, budget: int, score: float, kl: float) -> dict[str, Any]:
        return {
            "method": method,
            "budget": budget,
            "text": "x",
            "score": score,
            "kl": [kl, 2 * kl],
            "agrees": [True, budget != 64],
            "mass": 0.9,
            "bytes_read": 1000.0 * budget,
            "gold_nll": 1.0 + kl,
            "output_error": [[kl, kl]],
            "step_s": 0.01,
            "open_s": 0.1,
        }

    rows = [
        row("full", 0, 0.8, 0.0),
        row("icecache", 64, 0.4, 0.02),
        row("icecache", 256, 0.8, 0.01),
    ]
    return {"tokens": 100 * (number + 1), "truncated": number == 0, "full_s": 1.0, "rows": rows}


def test_one_of_each_task_in_turn() -> None:
    streams = [
        iter([question(n, task) for n in range(count)]) for task, count in ((TASK, 3), (TASK, 1))
    ]
    names = [one.sample.name for one in in_turn(streams, 3)]
    assert names == ["0", "0", "1"]


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(task: Task, sample: Sample) -> dict[str, Any]:
        asked.append(sample.name)
        if sample.name == "2" and len(asked) == 3:
            raise KeyboardInterrupt
        return answer(task, sample)

    questions = [question(n) for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run(questions, RunFolder(tmp_path, SETTINGS), ask)
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'{"task": "some/task", "sample": "2", "rows": [{"me')  # killed while writing
    told: list[str] = []
    records = run(
        questions, RunFolder(tmp_path, SETTINGS), ask, lambda record: told.append(record["sample"])
    )
    assert asked == ["0", "1", "2", "2", "3"]
    assert [record["sample"] for record in records] == sorted(told) == ["0", "1", "2", "3"]
    text = (tmp_path / "samples.jsonl").read_text()
    assert len(text.splitlines()) == 4 and all(json.loads(line) for line in text.splitlines())


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_bench_suites as t
def ask(task, sample):
    time.sleep(0.3)
    return t.answer(task, sample)
t.run([t.question(n) for n in range(50)], t.RunFolder(Path({folder!r}), t.SETTINGS), ask)
"""


def test_kill_9_loses_no_finished_sample(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    samples = tmp_path / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not samples.exists() or samples.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = RunFolder(tmp_path, SETTINGS)
    done = {record["sample"] for record in folder.records()}
    assert len(done) >= 3
    asked = []

    def ask(task: Task, sample: Sample) -> dict[str, Any]:
        asked.append(sample.name)
        return answer(task, sample)

    records = run([question(n) for n in range(50)], folder, ask)
    assert len(records) == 50 and not done & set(asked)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS).add({"task": "t", "sample": "0"})
    other = {"arguments": {"model": "m", "budgets": [128]}}
    with pytest.raises(InvalidArgument, match=r"--out: .*budgets was \[64\], got \[128\]"):
        RunFolder(tmp_path, other)


def test_a_record_that_cannot_be_written_is_taken_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    folder.add({"task": "t", "sample": "0"})
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        folder.add({"task": "t", "sample": "1"})


def test_workers_give_the_records_of_one(tmp_path: Path) -> None:
    questions = [question(n) for n in range(7)]
    alone = run(questions, RunFolder(tmp_path / "one", SETTINGS), answer)
    with ThreadPoolExecutor(3) as pool:
        folder = RunFolder(tmp_path / "three", SETTINGS)
        assert run_parallel(questions, folder, pool, answer, 3) == alone


def test_a_worker_ends_with_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from icecache.bench.workers import end_with_parent\n"
        "def work():\n"
        "    print(os.getpid(), flush=True)\n"
        "    end_with_parent()\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('spawn').Process(target=work).start()\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())  # it has begun: its imports may take long
        run.kill()
    deadline = time.monotonic() + 120
    while not _ended(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _ended(worker), "it went on"


def _ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # its new parent has not asked yet


def test_workers_share_the_cores() -> None:
    assert [share_of([0, 2, 4, 6, 7], n, 2) for n in range(2)] == [[0, 4, 7], [2, 6]]
    assert [share_of([3, 5], n, 3) for n in range(3)] == [[3], [5], [3]]


def test_as_many_workers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: 8)
    monkeypatch.setattr(workers, "usable_memory", lambda: 24 << 30)
    assert [fitting_workers(gib << 30) for gib in (1, 6, 9, 100)] == [8, 3, 2, 1]


@pytest.mark.model
def test_a_workers_memory_is_what_it_was_measured_to_be() -> None:
    folder = str(smollm2())
    plan = Plan("smollm2", ["full", "icecache", "topk", "paper", "quest", "streaming"])
    measured = 6.4 * 2**30
    assert _worker_bytes(plan, folder) == pytest.approx(measured, rel=0.2)
    shorter = replace(plan, max_length=1024)
    assert _worker_bytes(shorter, folder) < measured / 2


def test_lines_and_halves() -> None:
    records = [question(n).record(answer(TASK, question(n).sample)) for n in range(5)]
    by_label = {line.label: line for line in lines(records)}
    assert list(by_label) == ["full", "icecache 64", "icecache 256"]
    ours = by_label["icecache 64"]
    assert ours.n == 5 and ours.score == pytest.approx(40) and ours.share == pytest.approx(0.5)
    assert ours.kl == pytest.approx(0.03) and ours.agreement == 0.5
    assert ours.gold_likelihood == pytest.approx(2.718281828**-0.02)
    assert ours.score_low == ours.score_high == pytest.approx(40)
    assert [len(part) for part in halves(records)] == [3, 2]
    assert task_scores(records) == {
        "some/task": {
            "full": pytest.approx(80),
            "icecache 64": pytest.approx(40),
            "icecache 256": pytest.approx(80),
        }
    }
    named = {one.name: one.value for one in results(records)}
    assert named["kl_icecache_256"] == pytest.approx(0.015)
    assert named["agreement_icecache_256_half2"] == 1.0
    assert all(isinstance(value, float) for value in named.values())


def test_the_interval_is_none_too_narrow_where_tasks_have_one_sample() -> None:
    records = []
    for number in range(6):
        task = Task(f"t/{number}", "exact", 8, chat=False, score=TASK.score)
        one = question(0, task).record(answer(task, question(0, task).sample))
        one["rows"][1]["score"] = number / 5
        records.append(one)
    (ours,) = (line for line in lines(records) if line.label == "icecache 64")
    assert ours.score == pytest.approx(50)
    assert 15 < ours.score_low < 35 and 65 < ours.score_high < 85


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.outside.append(value)


def test_the_report_needs_nothing_beside_itself() -> None:
    pytest.importorskip("matplotlib")
    records = [question(n).record(answer(TASK, question(n).sample)) for n in range(1, 5)]
    for record in records:
        record["fields"] = {"depth": 0.5}
    text = html_report("<a run>", {"machine": "some"}, records)
    page = Page(text)
    assert page.outside == [] and "script" not in page.tags
    assert page.tags.count("svg") == 3 + 2 + 3  # curves; errors; needles of full and two budgets
    assert "&lt;a run&gt;" in text and "<a run>" not in text


class Words:
    """A tokenizer of words."""

    chat_template = None

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, **options: Any) -> Any:
        ids = []
        for word in text.replace("\n", " \n ").split(" "):
            if word and word not in self.words:
                self.words.append(word)
            ids += [self.words.index(word)] if word else []
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(self.words[one] for one in ids)


def test_a_prompt_that_is_too_long_loses_its_middle() -> None:
    sample = Sample("0", " ".join(f"w{n}" for n in range(50)), ("a",), answer_prefix=" It is")
    asked = prompt_tokens(Words(), TASK, sample, Limits(context=32))
    # Where the halves meet, two words become one.
    assert asked.truncated and asked.tokens.shape[0] == 32 - TASK.max_new_tokens - 1
    whole = prompt_tokens(Words(), TASK, sample, Limits(context=100))
    assert not whole.truncated and whole.tokens.shape[0] == 52
    with pytest.raises(
        InvalidArgument, match="max_new_tokens: expected less than the context of 5"
    ):
        prompt_tokens(Words(), TASK, sample, Limits(context=5))


def test_where_answers_end() -> None:
    words = Words()
    task = Task("t", "m", 8, chat=False, score=lambda text, sample: 0.0, stop=("\n",))
    ids = words("\n one two \n three <end>").input_ids
    endings = Endings(words, {words("<end>").input_ids[0]}, task.stop)
    ends = [endings.is_end(ids[: count + 1]) for count in range(len(ids))]
    assert ends == [False, False, False, True, True, True]
    assert endings.text(ids[:4]).strip() == "one two"


def test_the_right_answer_continues_the_prompt() -> None:
    words = Words()
    sample = Sample("0", "Question: x Answer:", ("four five", "six"))
    assert words.decode(gold_tokens(words, TASK, sample, Limits(100))) == "four five"
    assert gold_tokens(words, TASK, sample, Limits(100, gold_tokens=1)) == words("four").input_ids
    assert gold_tokens(words, TASK, Sample("0", "p", ()), Limits(100)) == []


def test_bad_settings_are_refused_before_anything_runs() -> None:
    with pytest.raises(
        InvalidArgument, match="no method is called 'icecash'; did you mean icecache"
    ):
        _check(Plan("m", methods=["icecash"]))
    with pytest.raises(InvalidArgument, match="workers: expected at least 1, got 0"):
        _check(Plan("m", workers=0))
    with pytest.raises(InvalidArgument, match=r"suite: expected longbench, .*, got 'longbanch'"):
        find_suite("longbanch")
    with pytest.raises(InvalidArgument, match="did you mean qasper"):
        find_suite("longbench").open(Data(tasks=["qaspar"]), None)
    with pytest.raises(InvalidArgument, match="--lengths: gsm8k has prompts of its own"):
        find_suite("gsm8k").open(Data(lengths=[100]), None)
    assert list(NAMES) == [suite.name for suite in SUITES]
    assert list(METHOD_NAMES) == list(dict.fromkeys(method.name for method in METHODS))


def test_what_is_asked_goes_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four " * 200)
    (stream,) = find_suite("text").open(Data(tmp_path, lengths=[100]), Words())
    asked = next(stream)
    tasks = [asked.task, *(task for suite in SUITES for task in suite.tasks)]
    for task in tasks:
        copy = pickle.loads(pickle.dumps((task, asked.sample)))[0]
        assert copy.name == task.name and callable(copy.score)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.model
@pytest.mark.slow
def test_a_suite_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    given = ["passkey", "--lengths", "500", "--samples", "1", "--limit", "1", "--budget", "64"]
    given += ["--method", "full,icecache,streaming", "--workers", "1", "--out", str(out)]
    first = bench(*given, "--json", str(tmp_path / "results.json"))
    assert first.exit_code == 0, first.output
    names = {one["name"] for one in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert {"score_full", "kl_icecache_64", "gold_likelihood_streaming_64"} <= names
    assert (out / "report.html").stat().st_size > 10_000
    lines_before = (out / "samples.jsonl").read_text()
    with monkeypatch.context() as patch:
        # Nothing is left to ask: no worker gets a sample, and none loads the model.
        patch.setattr(ProcessPoolExecutor, "submit", lambda *given: pytest.fail("asked again"))
        again = bench(*given)
    assert again.exit_code == 0 and (out / "samples.jsonl").read_text() == lines_before
    other = bench(*[word if word != "64" else "128" for word in given])
    assert other.exit_code == 2 and "budgets was [64], got [128]" in " ".join(other.output.split())


@pytest.mark.model
@pytest.mark.slow
def test_longbench_files_are_longbenchs(shared_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = bench(
        "longbench",
        *("--data-dir", str(shared_dir / "data" / "longbench_mini"), "--task", "trec,lcc"),
        *("--limit", "2", "--max-length", "600", "--budget", "64", "--max-new-tokens", "4"),
        *("--workers", "1"),
        *("--method", "full,icecache", "--out", str(out)),
    )
    assert done.exit_code == 0, done.output
    folders = sorted(path.name for path in (out / "pred").iterdir())
    assert folders == ["smollm2-full", "smollm2-icecache-64"]
    line = json.loads((out / "pred" / "smollm2-full" / "trec.jsonl").read_text().splitlines()[0])
    assert set(line) == {"pred", "answers", "all_classes"}
    scores = json.loads((out / "pred" / "smollm2-full" / "result.json").read_text())
    assert set(scores) == {"trec", "lcc"}


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    done = bench(
        *("gsm8k", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--limit", "1"),
        *("--data-dir", str(_gsm8k(tmp_path)), "--out", str(tmp_path / "run")),
    )
    assert done.exit_code == 2 and "http://127.0.0.1:9/v1" in " ".join(done.output.split())


def _gsm8k(folder: Path) -> Path:
    path = folder / "test.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}) + "\n")
    return path
