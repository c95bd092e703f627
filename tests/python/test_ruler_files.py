"""RULER's files and pools, what is refused, and how the size of a sample is found."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from icecache.bench.tasks import ruler_haystack
from icecache.bench.tasks.ruler import Haystack, generate, read_jsonl, write_jsonl
from icecache.bench.tasks.ruler_maker import Draft, fit, token_counter
from icecache.bench.tasks.task import Sample, Task
from icecache.errors import InvalidArgument, Unavailable
from ruler_pools import NAMES, count_words, made, pools, task_of


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    return pools(tmp_path_factory.mktemp("pools"))


@pytest.mark.parametrize("name", NAMES)
def test_files_give_back_what_was_written(name: str, tmp_path: Path, haystack: Haystack) -> None:
    path = tmp_path / "validation.jsonl"
    samples = made(name, haystack=haystack)
    write_jsonl(path, iter(samples))
    assert list(read_jsonl(path)) == samples
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert {"input", "outputs", "length", "length_w_model_temp", "answer_prefix"} < set(lines[0])


def test_a_file_of_other_origin(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text('{"index": 5, "input": "a", "outputs": ["b"], "more": 1}\n', encoding="utf-8")
    assert list(read_jsonl(path)) == [Sample("5", "a", ("b",), fields={"index": 5, "more": 1})]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"input": "a"}',
        '{"outputs": ["a"]}',
        '{"input": 1, "outputs": ["a"]}',
        '{"input": "a", "outputs": []}',
        '{"input": "a", "outputs": "b"}',
        '{"input": "a", "outputs": ["b"], "length": "c"}',
        '{"input": "a", "outputs": ["b"], "answer_prefix": 1}',
    ],
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"index": 0, "input": "a", "outputs": ["b"]}\n' + line, encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"broken\.jsonl.*line 2"):
        list(read_jsonl(path))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    with pytest.raises(InvalidArgument, match=r"absent\.json"):
        list(read_jsonl(absent))
    for name, haystack in (
        ("niah_single_2", Haystack(essays=absent)),
        ("qa_1", Haystack(squad=absent)),
        ("qa_2", Haystack(hotpotqa=absent)),
    ):
        with pytest.raises(InvalidArgument, match=r"absent\.json"):
            made(name, haystack=haystack)


@pytest.mark.parametrize("content", ["{}", "[{}]", '{"text": 1}', '{"text": " "}', "[]", "3", "{"])
def test_a_file_in_another_format_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    for name, haystack in (
        ("niah_single_2", Haystack(essays=path)),
        ("qa_1", Haystack(squad=path)),
        ("qa_2", Haystack(hotpotqa=path)),
    ):
        with pytest.raises(InvalidArgument, match=r"other\.json"):
            made(name, haystack=haystack)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"task: .*'niah_single_4'; did you mean niah_"):
        made("niah_single_4")
    other = Task("longbench/qasper", "qa_f1", 128, True, lambda prediction, sample: 0.0)
    with pytest.raises(InvalidArgument, match=r"task: .*'longbench/qasper'"):
        generate(other, 2048, 1, 0, count_words, Haystack())


def test_a_task_has_three_names() -> None:
    task = task_of("vt")
    one, two, three = (
        list(generate(name, 2048, 2, 0, count_words, Haystack()))
        for name in (task, "ruler/vt", "vt")
    )
    assert one == two == three


@pytest.mark.parametrize("count", [0, -1])
def test_no_samples_are_refused(count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"count: expected at least 1, got {count}"):
        generate("vt", 2048, count, 0, count_words, Haystack())


def test_more_questions_than_the_pool_has(haystack: Haystack) -> None:
    with pytest.raises(InvalidArgument, match=r"count: .* most 150 .*ruler/qa_1.*, got 151"):
        generate("qa_1", 2048, 151, 0, count_words, haystack)


@pytest.mark.parametrize("name", NAMES)
def test_the_least_length_is_named(name: str, haystack: Haystack) -> None:
    """At the call, not at the first sample; and with that length it works."""
    for length in (-1, 0):
        with pytest.raises(InvalidArgument, match=f"length: expected at least 1, got {length}"):
            generate(name, length, 1, 0, count_words, haystack)
    with pytest.raises(InvalidArgument, match=rf"length: .*ruler/{name}, got 64") as refused:
        generate(name, 64, 1, 0, count_words, haystack)
    (least,) = re.findall(r"at least (\d+) tokens", str(refused.value))
    (sample,) = generate(name, int(least), 1, 0, count_words, haystack)
    assert sample.length == int(least)


@pytest.mark.parametrize(("name", "pool"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_a_missing_pool_says_what_to_give(name: str, pool: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"haystack: ruler/{name} needs .*\({pool}=path\)"):
        made(name)


@pytest.fixture
def no_wonderwords(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (ruler_haystack.words_of, ruler_haystack.all_words)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_wonderwords")
def test_missing_words_say_what_to_install() -> None:
    for name in ("niah_single_1", "cwe"):
        with pytest.raises(Unavailable, match=r"wonderwords.*pip install 'icecache\[bench\]'"):
            made(name)
    for name in ("niah_multikey_3", "vt", "fwe"):
        assert made(name, count=1)


class Encoder:
    """A tokenizer whose encode takes the options named; it begins texts with a special token."""

    def __init__(self, *known: str) -> None:
        self._known = known

    def encode(self, text: str, **options: bool) -> list[int]:
        if not set(options) <= set(self._known):
            raise TypeError(f"unknown: {options}")
        return [0] * (len(text) + options.get("add_special_tokens", True))


def test_kinds_of_tokenizers() -> None:
    assert token_counter(Encoder("add_special_tokens", "verbose"))("text") == 4
    assert token_counter(Encoder("add_special_tokens"))("text") == 4
    assert token_counter(Encoder())("text") == 5
    assert token_counter(len)("text") == 4
    for wrong in (None, "text", str.split):
        with pytest.raises(InvalidArgument, match="tokenizer: expected"):
            token_counter(wrong)


@pytest.mark.parametrize("least", [1, 7])
@pytest.mark.parametrize("per_piece", [1, 3, 50])
def test_the_largest_size_that_fits(least: int, per_piece: int) -> None:
    def make(size: int) -> Draft:
        assert size >= least
        return Draft("x" * per_piece * size, "yy", ())

    for room, guess in itertools.product((0, 5, 60, 500, 999), (0, least, 8, 100, 4000)):
        found = fit(make, len, least, guess, room)
        largest = (room - 2) // per_piece
        if largest < least:
            assert found is None
        else:
            assert found is not None
            assert found.tokens == per_piece * found.size + 2 <= room
            assert found.size == largest or room - found.tokens < room // 256
