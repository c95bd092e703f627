"""LongBench: its tasks, the forms of its data, truncation, and its files of predictions."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from icecache.bench import libraries
from icecache.bench.tasks import longbench
from icecache.bench.tasks.longbench import TASKS, TASKS_E, open_source, truncate_in_the_middle
from icecache.bench.tasks.longbench_output import (
    Prediction,
    prediction_path,
    result,
    result_by_length,
    write_predictions,
    write_results,
)
from icecache.bench.tasks.task import Sample, Task, find_tasks
from icecache.errors import InvalidArgument, Unavailable

SAMPLE: dict[str, Any] = {
    "input": "Who {?}",
    "context": "Some {text}",
    "answers": ["Ann", "Bob"],
    "length": 4200,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "7a",
}


def task(name: str) -> Task:
    return next(task for task in TASKS + TASKS_E if task.name == name)


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hotpotqa.jsonl").write_text(lines(SAMPLE, {**SAMPLE, "input": "two"}))
    classes = {**SAMPLE, "all_classes": ["Ann", "Eve"], "answers": ["Eve"]}
    (folder / "trec_e.jsonl").write_text(lines(classes))
    return folder


def write_zip(folder: Path) -> Path:
    write_folder(folder / "data")
    path = folder / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (folder / "data").iterdir():
            archive.write(file, f"data/{file.name}")
            file.unlink()
    (folder / "data").rmdir()
    return path


def test_tasks() -> None:
    assert (len(TASKS), len(TASKS_E)) == (21, 13)
    assert {task.name.partition("/")[2] for task in TASKS if not task.chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "lcc",
        "repobench-p",
    }
    assert {task.name for task in TASKS + TASKS_E if task.stop} == {
        "longbench/samsum",
        "longbench_e/samsum",
    }
    assert find_tasks(["qmsum"], TASKS)[0].max_new_tokens == 512
    assert (task("longbench/lcc").metric, task("longbench/dureader").metric) == (
        "code_sim",
        "rouge_zh",
    )
    with pytest.raises(InvalidArgument, match="did you mean qmsum"):
        find_tasks(["qmsun"], TASKS)


@pytest.mark.parametrize("form", ["folder", "folder of data", "zip", "folder of zip"])
def test_every_form_of_the_data_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    path = tmp_path
    if form in ("folder", "folder of data"):
        write_folder(tmp_path / "data" if form == "folder of data" else tmp_path)
    else:
        path = write_zip(tmp_path) if form == "zip" else write_zip(tmp_path).parent
    source = open_source(path)
    first, second = source.samples(task("longbench/hotpotqa"))
    assert first.prompt.startswith("Answer the question based on the given passages.")
    assert first.prompt.endswith(
        "passages.\nSome {text}\n\nAnswer the question based on the given passages. Only give me "
        "the answer and do not output any other words.\n\nQuestion: Who {?}\nAnswer:"
    )
    assert second.prompt.endswith("Question: two\nAnswer:")
    assert (first.name, second.name, first.length) == ("0", "1", 4200)
    assert (first.answers, first.classes) == (("Ann", "Bob"), ())
    (other,) = source.samples(task("longbench_e/trec"))
    assert (other.answers, other.classes) == (("Eve",), ("Ann", "Eve"))
    assert task("longbench_e/trec").score("Ann\n", other) == 0.0
    assert task("longbench_e/trec").score("Eve Ann", other) == 0.5
    with pytest.raises(InvalidArgument, match=r"lcc\.jsonl"):
        list(source.samples(task("longbench/lcc")))


def test_hub_is_its_zip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_zip(tmp_path)
    monkeypatch.setattr(longbench, "hub_file", lambda *names: path)
    assert len(list(open_source(None).samples(task("longbench/hotpotqa")))) == 2


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def out_of_reach(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", out_of_reach)
    with pytest.raises(Unavailable, match=r"data\.zip of the data set a/b .*no network"):
        libraries.hub_file("a/b", "data.zip")


@pytest.mark.parametrize("name", ["empty", "absent", "a.txt"])
def test_unknown_data_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InvalidArgument, match=rf"data: expected .*got .*{name}"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[]", r"line 2: expected a JSON object, got list"),
        (json.dumps({"context": ""}), r"line 2: field 'input' is missing"),
        (json.dumps({**SAMPLE, "length": "9"}), r"line 2: field 'length': expected an integer"),
        (json.dumps({**SAMPLE, "answers": "A"}), r"line 2: field 'answers': expected a list of s"),
        (
            json.dumps({**SAMPLE, "context": 1}),
            r"line 2: field 'context': expected a string, got 1",
        ),
        (json.dumps({**SAMPLE, "all_classes": [1]}), r"line 2: field 'all_classes': expected a li"),
    ],
)
def test_broken_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "qmsum.jsonl").write_text(f"{lines(SAMPLE)}{line}\n")
    samples = open_source(tmp_path).samples(task("longbench/qmsum"))
    assert next(samples).name == "0"
    with pytest.raises(InvalidArgument, match=rf"qmsum\.jsonl: {message}"):
        next(samples)


def test_broken_zip_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InvalidArgument, match=r"data\.zip"):
        for name in ("longbench/hotpotqa", "longbench_e/trec"):
            list(open_source(path).samples(task(name)))


def mini(folder: Path, **values: Any) -> Path:
    whole = {"origin_prompt": "p", "prediction": "q", "gold": ["a"], "time": 1.0} | values
    whole = {name: value for name, value in whole.items() if value is not None}
    (folder / "MiniLongBench_trec.json").write_text(json.dumps({"10": whole, "9": whole}))
    return folder


@pytest.mark.parametrize("as_text", [False, True])
def test_opencompass_form(as_text: bool, tmp_path: Path) -> None:
    gold: object = {"all_classes": ["a", "b"], "answers": ["b"]}
    source = open_source(mini(tmp_path, gold=repr(gold) if as_text else gold))
    first, second = source.samples(task("longbench/trec"))
    assert (first.name, second.name) == ("9", "10")
    assert (first.prompt, first.answers, first.classes) == ("p", ("b",), ("a", "b"))
    assert (first.length, first.fields) == (None, {"prediction": "q"})
    with pytest.raises(InvalidArgument, match="has no samples of longbench_e/trec"):
        list(source.samples(task("longbench_e/trec")))
    with pytest.raises(InvalidArgument, match=r"MiniLongBench_lcc\.json"):
        list(source.samples(task("longbench/lcc")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"origin_prompt": None}, "field 'origin_prompt' is missing"),
        ({"gold": "not a literal"}, "field 'gold': expected a list or a dict"),
        ({"gold": {"all_classes": []}}, "field 'gold': field 'answers' is missing"),
        ({"gold": [1]}, "field 'gold': field 'answers': expected a list of strings"),
    ],
)
def test_broken_opencompass_samples_are_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = open_source(mini(tmp_path, **values))
    with pytest.raises(InvalidArgument, match=rf"MiniLongBench_trec\.json: number 9: {message}"):
        list(source.samples(task("longbench/trec")))


def test_shipped_prompts_are_complete(shared_dir: Path) -> None:
    source = open_source(shared_dir / "data" / "longbench_mini")
    samples = {one.name: list(source.samples(one)) for one in TASKS}
    assert sum(map(len, samples.values())) == 237
    assert samples["longbench/lcc"][0].prompt.startswith("Please complete the code given below. \n")
    assert all(sample.prompt and sample.answers for some in samples.values() for sample in some)


class Words:
    """A tokenizer of words, with a special token before each text."""

    def __call__(self, text: str, truncation: bool, verbose: bool) -> SimpleNamespace:
        assert not truncation
        return SimpleNamespace(input_ids=["<s>", *text.split()])

    def decode(self, tokens: list[str], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(token for token in tokens if token != "<s>")


def test_truncation_keeps_both_ends() -> None:
    text = "a b c d  e"
    assert truncate_in_the_middle(Words(), text, 6) == (text, False)
    assert truncate_in_the_middle(Words(), text, 5) == ("ad e", True)  # <s> a | d e
    assert truncate_in_the_middle(Words(), text, 4) == ("ad e", True)
    assert truncate_in_the_middle(Words(), text, 3) == ("e", True)
    with pytest.raises(InvalidArgument, match="max_length: expected at least 2, got 1"):
        truncate_in_the_middle(Words(), text, 1)


def test_predictions_survive_a_file(tmp_path: Path) -> None:
    path = prediction_path(tmp_path, "m", task("longbench/trec"))
    assert path == tmp_path / "pred" / "m" / "trec.jsonl"
    assert prediction_path(tmp_path, "m", task("longbench_e/trec")).parts[-3] == "pred_e"
    sample = Sample("0", "p", ("é",), classes=("é", "b"), length=5)
    some = [Prediction.of(sample, "é\n"), Prediction("x", ("y",))]
    write_predictions(path, some)
    assert path.read_text(encoding="utf-8") == (
        '{"pred": "é\\n", "answers": ["é"], "all_classes": ["é", "b"], "length": 5}\n'
        '{"pred": "x", "answers": ["y"], "all_classes": null}\n'
    )
    odd = "a\u2028b\x85\ud800<"
    write_predictions(path, [Prediction(odd, ("y",))])
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["pred"] == odd


@pytest.mark.parametrize("trouble", ["bomb", "encrypted", "broken", "text"])
def test_members_of_the_zip_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/trec.jsonl", b"\xff" * 5000)
    held = bytearray(path.read_bytes())
    if trouble == "bomb":
        monkeypatch.setattr(longbench, "_MOST_BYTES", 4999)
    elif trouble == "encrypted":
        for flags in (6, held.index(b"PK\1\2") + 8):
            held[flags] |= 1
    elif trouble == "broken":
        held[45] ^= 0xFF
    path.write_bytes(held)
    expected = {
        "bomb": "expected at most 4999 bytes, got 5000",
        "encrypted": "encrypted",
        "broken": "",
        "text": "can't decode",
    }[trouble]
    with pytest.raises(InvalidArgument, match=rf"data\.zip: trec\.jsonl: .*{expected}"):
        list(open_source(path).samples(task("longbench/trec")))


def test_results(tmp_path: Path) -> None:
    some = [Prediction("Ann", ("Ann",), length=10), Prediction("Bob", ("Ann",), length=5000)]
    assert result("hotpotqa", some) == 50.0
    by_length = result_by_length("hotpotqa", some)
    assert (by_length["0-4k"], by_length["4-8k"]) == (100.0, 0.0)
    assert math.isnan(by_length["8k+"])
    with pytest.raises(InvalidArgument, match="'length'"):
        result_by_length("hotpotqa", [Prediction("Ann", ("Ann",))])
    write_results(tmp_path / "m" / "result.json", {"hotpotqa": 50.0})
    assert (tmp_path / "m" / "result.json").read_text() == '{\n    "hotpotqa": 50.0\n}'
