"""lm-evaluation-harness with IceCache: what counts is decoded within the budget."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import icecache
import pytest
import torch
from hf_models import build
from icecache.bench.ask import Asker, Limits
from icecache.bench.decoder import Decoder
from icecache.bench.methods import find_methods
from icecache.bench.tasks import gsm8k, longbench
from icecache.hf import IceCache
from icecache.hf.support import CACHE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

lm_eval = pytest.importorskip("lm_eval")
load_yaml = pytest.importorskip("lm_eval.tasks._yaml_loader").load_yaml
Instance = pytest.importorskip("lm_eval.api.instance").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
lm_eval_model: Any = importlib.import_module("icecache.bench.lm_eval_model")
IceCacheLM = lm_eval_model.IceCacheLM

END = 256  # behind a token for each byte
BUDGET = 48
TEXT = " ".join(["All cats are grey at night, and 19 of them sleep."] * 9)
CHOICES = [" yes", " no", "!", " a longer answer, of 31 tokens", "?"]
QUESTIONS = [
    {"question": "How many cats are 3 cats and 4 cats?", "answer": "3 + 4 = 7.\n#### 7"},
    {"question": "How many legs have 5 cats?", "answer": "5 * 4 = 20.\n#### 20"},
]
NEW_TOKENS = 24
TASK = """\
task: tiny_gsm8k
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
generation_kwargs:
  do_sample: false
  max_gen_toks: {new_tokens}
  until: ["Q:"]
filter_list:
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "\\\\$", "\\\\.$"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama over bytes."""
    path = tmp_path_factory.mktemp("model")
    special = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END}
    build("llama", vocab_size=END + 1, max_position_embeddings=8192, **special).save_pretrained(
        str(path)
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(str(path))
    return str(path)


def load(folder: str, **model_args: Any) -> Any:
    return IceCacheLM(pretrained=folder, **{"token_budget": BUDGET, **model_args})


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def scored() -> list[Any]:
    pairs = [(TEXT, choice) for choice in CHOICES] + [("", TEXT[:9]), (TEXT[:280], TEXT[280:300])]
    return requests("loglikelihood", *pairs)


def one_by_one(lm: Any, context: list[int], continuation: list[int], budget: int) -> float:
    """The likelihood where each token is predicted by a decode step of its own."""
    icecache.enable(lm.model, token_budget=budget)
    cache = IceCache(lm.model.config, token_budget=budget)
    total = 0.0
    with torch.inference_mode():
        if context[:-1]:
            lm.model(torch.tensor([context[:-1]]), **{CACHE: cache})
        for before, token in zip([context[-1], *continuation], continuation, strict=False):
            logits = lm.model(torch.tensor([[before]]), **{CACHE: cache}).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
    return total


def test_exact_attention_scores_as_hflm(folder: str) -> None:
    stock = HFLM(pretrained=folder, device="cpu")
    ours = load(folder, exact=True, batch_size=3)
    expected = stock.loglikelihood(scored(), disable_tqdm=True)
    got = ours.loglikelihood(scored(), disable_tqdm=True)
    assert [one for one, _ in got] == pytest.approx([one for one, _ in expected], abs=1e-3)
    assert [one for _, one in got] == [one for _, one in expected]


def test_what_decoding_writes_is_greedy(folder: str) -> None:
    ours = load(folder)
    (written,) = ours.generate_until(
        requests("generate_until", (TEXT, {"until": [], "max_gen_toks": 6})), disable_tqdm=True
    )
    encoded = ours.tok_encode(TEXT)
    ids = ours.model.generate(torch.tensor([encoded]), max_new_tokens=7, do_sample=False)[0]
    assert ours.tok_decode(ids[len(encoded) : -1].tolist()) == written
    # The first token follows from the prefill there and from a decode step here.
    context, answer = ids[: len(encoded) + 1].tolist(), ids[len(encoded) + 1 :].tolist()
    wrong = [*answer[:-1], (answer[-1] + 1) % END]
    answers = ours._loglikelihood_tokens(
        [(None, context, answer), (None, context, wrong), (None, context, answer[:1])], True
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False, True]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_scored_token_is_predicted_within_the_budget(folder: str, batch_size: int) -> None:
    ours = load(folder, batch_size=batch_size)
    got = ours.loglikelihood(scored(), disable_tqdm=True)
    exact = load(folder, exact=True).loglikelihood(scored(), disable_tqdm=True)
    for request, (likelihood, _), (other, _) in zip(scored(), got, exact, strict=True):
        context, continuation = (ours.tok_encode(text) for text in request.args)
        context = context or [ours.prefix_token_id]
        expected = one_by_one(ours, context, continuation, BUDGET)
        assert likelihood == pytest.approx(expected, abs=1e-3)
        # Also where only one token counts; a context within the budget is attended in full.
        assert (abs(likelihood - other) > 1e-3) == (len(context) > BUDGET)


def test_a_context_that_is_too_long_loses_its_beginning(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = load(folder, max_length=100)
    pair = [(None, ours.tok_encode(TEXT[:200]), ours.tok_encode(" and so on"))]
    (answer,) = ours._loglikelihood_tokens(pair, disable_tqdm=True)
    assert "a context of 200 tokens is cut to its last 91" in caplog.text
    (short,) = ours._loglikelihood_tokens([(None, pair[0][1][-91:], pair[0][2])], True)
    assert answer == short
    with pytest.raises(icecache.InvalidArgument, match="expected 1 to 100 tokens, got 101"):
        ours._loglikelihood_tokens([(None, [1], [2] * 101)], True)


def test_rolling_goes_over_windows(folder: str) -> None:
    asked = requests("loglikelihood_rolling", (TEXT[:250],), (TEXT[:40],))
    stock = HFLM(pretrained=folder, device="cpu", max_length=100)
    exact = load(folder, max_length=100, exact=True)
    expected = stock.loglikelihood_rolling(asked, disable_tqdm=True)
    assert exact.loglikelihood_rolling(asked, True) == pytest.approx(expected, abs=1e-2)
    ours = load(folder, max_length=100)
    got = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    ids = ours.tok_encode(TEXT[:250])
    windows = [([END], ids[:100]), (ids[99:100], ids[100:200]), (ids[149:200], ids[200:])]
    sums = [one_by_one(ours, *window, BUDGET) for window in windows]
    assert got[0] == pytest.approx(sum(sums), abs=1e-2)
    assert abs(got[0] - expected[0]) > 1e-2
    assert got[1] == pytest.approx(expected[1], abs=1e-3)


def test_lm_eval_caches_answers_by_their_texts(folder: str) -> None:
    class Hook:
        def __init__(self) -> None:
            self.seen: dict[tuple[str, str], Any] = {}

        def add_partial(self, kind: str, key: tuple[str, str], answer: Any) -> None:
            self.seen[key] = answer

    ours, hook = load(folder), Hook()
    ours.set_cache_hook(hook)
    answers = ours.loglikelihood(scored(), disable_tqdm=True)
    assert [hook.seen[one.args] for one in scored()] == answers


@pytest.fixture
def no_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval does not read its thousands of tasks, which takes ten seconds: ours are files."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    made = functools.partialmethod(manager.__init__, include_defaults=False)
    monkeypatch.setattr(manager, "__init__", made)


def write_task(folder: Path) -> Path:
    """GSM8K with the prompts of `icecache bench gsm8k`."""
    rows = [{**one, "prompt": gsm8k.prompt(one["question"])} for one in QUESTIONS]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "tiny_gsm8k.yaml"
    task.write_text(TASK.format(data=data, cache=folder / "cache", new_tokens=NEW_TOKENS))
    return task


def benchmark(folder: str, data: Path) -> list[tuple[str, float]]:
    """Text and score of each sample, by our own benchmark."""
    ours = load(folder)
    icecache.disable(ours.model)
    limits = Limits(context=8192, max_new_tokens=NEW_TOKENS)
    ask = Asker(Decoder(ours.model), ours.tokenizer, find_methods(["icecache"]), [BUDGET], limits)
    samples = gsm8k.open_source(data).samples(gsm8k.TASK)
    rows = [ask(gsm8k.TASK, sample)["rows"][-1] for sample in samples]
    return [(row["text"], row["score"]) for row in rows]


@pytest.mark.usefixtures("no_catalogue")
def test_a_task_is_asked_and_scored_as_in_our_own_benchmark(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The index learns from the queries of the prompt: from all, as in generation.
    monkeypatch.setattr("icecache.bench.runs.QUERIES", 8192)
    task = write_task(tmp_path)
    results = lm_eval.simple_evaluate(
        model="icecache",
        model_args={"pretrained": folder, "token_budget": BUDGET},
        tasks=[load_yaml(str(task), resolve_func=True)],
        device="cuda:0",  # lm_eval's default
    )
    samples = results["samples"]["tiny_gsm8k"]
    expected = benchmark(folder, tmp_path / "data.jsonl")
    assert [(one["resps"][0][0], one["exact_match"]) for one in samples] == expected
    assert results["config"]["icecache"]["token_budget"] == BUDGET
    assert results["config"]["icecache_version"] == icecache.__version__


# As no_catalogue, for a process of its own.
WITHOUT_CATALOGUE = """
import functools, runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("icecache.bench.lm_eval_model", run_name="__main__")
"""


@pytest.mark.slow
def test_the_command(folder: str, tmp_path: Path) -> None:
    task, out = write_task(tmp_path), tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_CATALOGUE, "--model", "icecache"]
    command += ["--model_args", f"pretrained={folder},token_budget={BUDGET},index=tree"]
    command += ["--tasks", str(task), "--limit", "1", "--output_path", str(out)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert "tiny_gsm8k" in done.stdout
    (written,) = out.rglob("results*.json")
    assert json.loads(written.read_text())["config"]["icecache"]["token_budget"] == BUDGET


OWN_TASK = """\
include: {include}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
"""


def own_tasks(shared: Path, to: Path) -> dict[str, Path]:
    """lm_eval's own trec of LongBench and gsm8k_cot, their data from files, as the docs say."""
    rows = []
    (trec,) = (task for task in longbench.TASKS if task.name == "longbench/trec")
    for sample in longbench.MiniSource(shared / "longbench_mini").samples(trec):
        context, _, question = sample.prompt.partition("\n\n")[2].rpartition("\nQuestion:")
        judged = {"answers": sample.answers, "all_classes": sample.classes}
        rows.append({"context": context, "question": f"Question:{question}", **judged})
    questions = to / "trec.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    home = Path(lm_eval.__file__).parent / "tasks"
    made = {}
    for name, include, data in (
        ("longbench_trec_here", home / "longbench" / "trec.yaml", questions),
        ("gsm8k_cot_here", home / "gsm8k" / "gsm8k-cot.yaml", shared / "gsm8k_test.jsonl"),
    ):
        made[name] = to / f"{name}.yaml"
        text = OWN_TASK.format(include=include, name=name, data=data, cache=to / "cache")
        made[name].write_text(text)
    return made


@pytest.mark.usefixtures("no_catalogue")
def test_its_own_tasks_on_local_data(
    folder: str, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("jieba", "fuzzywuzzy", "rouge"):  # of lm_eval's LongBench
        pytest.importorskip(library)
    tasks, out = own_tasks(shared_dir / "data", tmp_path), tmp_path / "out"
    command = ["lm_eval", "--model", "icecache", "--limit", "1", "--output_path", str(out)]
    command += ["--model_args", f"pretrained={folder},token_budget={BUDGET}"]
    command += ["--tasks", ",".join(map(str, tasks.values()))]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the command sets it
    monkeypatch.setattr(sys, "argv", command)
    lm_eval_model.main()
    (written,) = out.rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert {*results} == {*tasks}
    assert "exact_match,flexible-extract" in results["gsm8k_cot_here"]
    assert "classification_score,none" in results["longbench_trec_here"]


@pytest.mark.usefixtures("no_catalogue")
def test_a_mistake_ends_the_command_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "icecache", "--model_args", "pretrained=nowhere,token_bugdet=64"]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the command sets it
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command, "--tasks", str(write_task(tmp_path))])
    with pytest.raises(SystemExit) as ended:
        lm_eval_model.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: model_args: expected") and "got token_bugdet; did you" in last


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"token_bugdet": 1, "colour": 2}, r"got token_bugdet, colour; did you mean token_budget"),
        ({"load_in_4bit": True}, "expected parameters of lm_eval's HFLM and fields of icecache"),
        ({"token_budget": "many"}, "token_budget"),
        ({"parallelize": True, "peft": "x"}, "on the CPU; leave out parallelize, peft"),
        ({"device": "cuda:1"}, "device: expected cpu, got cuda:1"),
        ({"batch_size": "auto"}, "batch_size: expected a number of at least 1, got auto"),
        ({"batch_size": 0}, "batch_size: expected a number of at least 1, got 0"),
    ],
)
def test_refusals_name_what_is_wrong(model_args: dict[str, Any], message: str) -> None:
    with pytest.raises(icecache.InvalidArgument, match=message):
        IceCacheLM(pretrained="nowhere", **model_args)


def test_smollm2_is_known_by_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icecache.models.smollm2", lambda: Path(folder))
    assert IceCacheLM(pretrained="smollm2").pretrained == folder


def test_the_entry_point(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text()
    value = "icecache.bench.lm_eval_model:IceCacheLM"
    assert f'[project.entry-points."lm_eval.models"]\nicecache = "{value}"\n' in text
    assert EntryPoint("icecache", value, "lm_eval.models").load() is IceCacheLM


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "icecache.bench.lm_eval_model")
    with pytest.raises(icecache.Unavailable, match=r"pip install 'icecache\[lm-eval\]'"):
        importlib.import_module("icecache.bench.lm_eval_model")
