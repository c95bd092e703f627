"""RULER's tasks: reproducible, as long as asked for, and solvable from the prompt alone."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import icecache.models
import pytest
from icecache.bench.tasks import ruler, ruler_haystack
from icecache.bench.tasks.ruler import Haystack, generate, write_jsonl
from icecache.bench.tasks.task import Sample
from icecache.errors import InvalidArgument
from icecache.models.local import load_tokenizer
from ruler_pools import (
    NAMES,
    NEW_TOKENS,
    NIAH,
    count_words,
    made,
    pools,
    task_of,
    write_hotpotqa,
    write_squad,
)

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    return pools(tmp_path_factory.mktemp("pools"))


def test_the_tasks_are_rulers() -> None:
    assert {task.name: task.max_new_tokens for task in ruler.TASKS} == {
        f"ruler/{name}": tokens for name, tokens in NEW_TOKENS.items()
    }
    for task in ruler.TASKS:
        part = task.name.startswith("ruler/qa")
        assert task.metric == ("string_match_part" if part else "string_match_all")
        assert task.chat


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name: str, tmp_path: Path, haystack: Haystack) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for file, seed in zip(files, (7, 7, 8), strict=True):
        random.seed(file.name)  # of no importance
        write_jsonl(file, made(name, seed=seed, haystack=haystack))
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_no_global_chance_is_used(name: str, haystack: Haystack) -> None:
    before = random.getstate()
    made(name, count=1, haystack=haystack)
    assert random.getstate() == before


@pytest.mark.parametrize("name", NAMES)
def test_more_samples_begin_with_the_fewer(name: str, haystack: Haystack) -> None:
    assert made(name, count=3, haystack=haystack) == made(name, haystack=haystack)[:3]


def check_lengths(
    name: str, samples: list[Sample], length: int, count: Callable[[str], int]
) -> None:
    for sample in samples:
        tokens = count(sample.prompt + sample.answer_prefix) + NEW_TOKENS[name]
        assert sample.length == tokens
        assert 0.9 * length <= tokens <= length


@pytest.mark.parametrize("length", [1024, 3000, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_the_length_is_filled(name: str, length: int, haystack: Haystack) -> None:
    samples = made(name, length, haystack=haystack)
    assert len(samples) == 4
    check_lengths(name, samples, length, count_words)


@pytest.mark.model
@pytest.mark.parametrize("name", NAMES)
def test_the_length_is_filled_with_a_real_tokenizer(name: str, haystack: Haystack) -> None:
    tokenizer = load_tokenizer(icecache.models.smollm2())

    def count(text: str) -> int:
        return len(tokenizer.tokenize(text))

    for length in (1800, 4500):
        samples = list(generate(name, length, 3, 1, tokenizer, haystack))
        check_lengths(name, samples, length, count)
    assert samples == list(generate(name, length, 3, 1, count, haystack))


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_in_the_prompt(name: str, haystack: Haystack) -> None:
    for sample in made(name, haystack=haystack):
        assert sample.answers
        assert all(answer in sample.prompt for answer in sample.answers)
        assert not any(answer in sample.answer_prefix for answer in sample.answers)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "vt"])
def test_answers_lie_at_all_depths(name: str) -> None:
    samples = made(name, 1500, 40)
    depths = [one.prompt.rindex(one.answers[0]) / len(one.prompt) for one in samples]
    if name == "vt":  # the first link of five, behind the example
        assert max(depths) - min(depths) > 0.25
    else:
        assert {int(4 * depth) for depth in depths} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", NIAH)
def test_token_position_of_the_answer(name: str) -> None:
    for sample in made(name):
        position = sample.fields["token_position_answer"]
        words = sample.prompt.split()
        assert words[position].removesuffix(".") == sample.answers[0]


def test_wording_of_one_needle() -> None:
    (sample,) = made("niah_single_3", count=1)
    (key,) = (key for _, key, _ in NEEDLE.findall(sample.prompt))
    assert sample.prompt.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will"
        " quiz you about the uuid afterwards.\n"
    )
    assert sample.prompt.endswith(
        f"\nWhat is the special magic uuid for {key} mentioned in the provided text?"
    )
    assert sample.answer_prefix == (
        f" The special magic uuid for {key} mentioned in the provided text is"
    )


def test_wording_of_many_needles() -> None:
    (sample,) = made("niah_multiquery", count=1)
    by_value = {value: key for _, key, value in NEEDLE.findall(sample.prompt)}
    a, b, c, d = (by_value[answer] for answer in sample.answers)
    assert sample.prompt.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it."
        " I will quiz you about the numbers afterwards.\n"
    )
    question = f"special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text"
    assert sample.prompt.endswith(f"\nWhat are all the {question}?")
    assert sample.answer_prefix == f" The {question} are"


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_found_by_their_keys(name: str) -> None:
    for sample in made(name):
        text = sample.prompt.rpartition("\n")[0]
        needles = [(key, value) for _, key, value in NEEDLE.findall(text)]
        values: dict[str, list[str]] = {}
        for key, value in needles:
            values.setdefault(key, []).append(value)
        assert len({value for _, value in needles}) == len(needles)
        per_key = 4 if name == "niah_multivalue" else 1
        assert all(len(found) == per_key for found in values.values())
        query = re.search(r" for (.+) mentioned in the provided text", sample.answer_prefix)
        assert query is not None
        asked = re.split(", and |, ", query.group(1))
        assert len(asked) == (4 if name == "niah_multiquery" else 1)
        found = [value for key in asked for value in values[key]]
        assert sorted(found) == sorted(sample.answers)


def test_multi_key_distractors_are_distinct() -> None:
    for name, least in (("niah_multikey_1", 4), ("niah_multikey_2", 100), ("niah_multikey_3", 90)):
        for sample in made(name):
            keys = [key for _, key, _ in NEEDLE.findall(sample.prompt)]
            assert len(keys) == len(set(keys)) >= least


def variables_with(text: str, value: str) -> set[str]:
    """Solves `text` by following its assignments from top to bottom."""
    held: dict[str, str] = {}
    for name, before, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
        held[name] = number or held[before]
    return {name for name, holds in held.items() if holds == value}


def test_chains_are_resolvable() -> None:
    for sample in made("vt", 3000, 10):
        begin = "Memorize and track the chain(s) of variable assignment hidden in the following"
        nothing, example, asked = sample.prompt.split(begin)
        assert not nothing
        for text in (example, asked):
            value = re.search(r"assigned the value (\d+) in the text above", text)
            assert value is not None
            solution = variables_with(text, value.group(1))
            assert len(solution) == 5
            if text is example:
                assert set(text.split()[-5:]) == solution
            else:
                assert set(sample.answers) == solution
        assert "5 variables are assigned" in sample.answer_prefix


def test_places_of_the_solved_example_are_the_same_in_all_samples() -> None:
    examples = [sample.prompt.split("\n\nMemorize")[0] for sample in made("vt")]
    masked = [re.sub(r"VAR [A-Z]{3}|\d{5}|[A-Z]{3}", "", text) for text in examples]
    assert len(set(masked)) == 1
    assert len(set(examples)) == len(examples)


def numbered(text: str) -> list[str]:
    """The words of a text "1. word 2. word"."""
    return re.split(r"(?:^| )\d+\. ", text)[1:]


@pytest.mark.parametrize(
    ("length", "repeats", "example_repeats"), [(2048, (6, 1), (3, 1)), (4096, (30, 3), (10, 3))]
)
def test_common_words_are_right_by_counting(
    length: int, repeats: tuple[int, int], example_repeats: tuple[int, int]
) -> None:
    for sample in made("cwe", length):
        nothing, example, asked = sample.prompt.split("Below is a numbered list of words.")
        assert not nothing
        solution = example.partition("in the list are: ")[2].removesuffix("\n")
        for text, answers, (common, other) in (
            (example, numbered(solution), example_repeats),
            (asked, list(sample.answers), repeats),
        ):
            listed = text.partition("often.\n")[2].partition("\nQuestion")[0]
            counts = Counter(numbered(listed))
            assert {counts.pop(answer) for answer in answers} == {common}
            assert set(counts.values()) == {other}
            assert len(answers) == 10


def test_more_common_words_than_there_are_words() -> None:
    (sample,) = made("cwe", 60_000, 1)
    assert sample.length is not None
    assert 54_000 <= sample.length <= 60_000
    assert not any("-" in answer for answer in sample.answers)
    listed = re.split(r" \d+\. ", sample.prompt.rpartition("\nQuestion")[0].rpartition("\n")[2])
    assert len(set(listed)) > len(ruler_haystack.all_words())


@pytest.mark.parametrize("length", [400, 1024, 8192])
def test_frequent_words_are_right_by_counting(length: int) -> None:
    for sample in made("fwe", length):
        text = re.search(r"frequently appeared coded words\. (.+)\nQuestion", sample.prompt)
        assert text is not None
        counts = Counter(text.group(1).split())
        dots = counts.pop("...")
        ranked = counts.most_common()
        assert dots > ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
        assert tuple(word for word, _ in ranked[:3]) == sample.answers
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)


@pytest.mark.parametrize(("name", "least"), [("qa_1", 1), ("qa_2", 10)])
def test_documents_of_a_question_are_there(name: str, least: int, haystack: Haystack) -> None:
    for sample in made(name, haystack=haystack):
        documents = re.split(r"Document \d+:\n", sample.prompt)[1:]
        texts = [text.partition("\n\nAnswer the question")[0].strip() for text in documents]
        assert len(texts) == len(set(texts)) > least
        assert [int(n) for n in re.findall(r"Document (\d+):", sample.prompt)] == list(
            range(1, len(texts) + 1)
        )
        assert sample.prompt.count(sample.answers[0] + " ") == 2
        assert sample.answer_prefix == " Answer:"


def test_questions_come_in_the_order_of_the_file(haystack: Haystack) -> None:
    first, second = made("qa_1", count=2, haystack=haystack)
    assert first.prompt.endswith("\n\nQuestion: Which town is at number0?")
    assert second.prompt.endswith("\n\nQuestion: Which town is at number1?")
    assert first.answers == ("Place0", "Place0")


def test_documents_are_repeated_where_there_are_too_few(tmp_path: Path) -> None:
    few = Haystack(squad=write_squad(tmp_path / "squad.json", 2, 2))
    (sample,) = made("qa_1", 3000, 1, haystack=few)
    check_lengths("qa_1", [sample], 3000, count_words)
    assert {f"Place{number}" in sample.prompt for number in range(4)} == {True}


def test_questions_with_too_long_documents_are_passed_over(tmp_path: Path) -> None:
    path = write_hotpotqa(tmp_path / "hotpotqa.json")
    loaded = json.loads(path.read_text(encoding="utf-8"))
    loaded[1]["context"][0][1].append("long " * 3000)
    path.write_text(json.dumps(loaded), encoding="utf-8")
    samples = made("qa_2", 1024, 3, haystack=Haystack(hotpotqa=path))
    assert [sample.name for sample in samples] == ["0", "2", "3"]
    with pytest.raises(InvalidArgument, match=r"count: expected at most 7 .*, got 8"):
        made("qa_2", 1024, 8, haystack=Haystack(hotpotqa=path))


def essays(path: Path, text: str) -> Haystack:
    path.write_text(json.dumps({"text": text}), encoding="utf-8")
    return Haystack(essays=path)


def test_essays_are_read_and_repeated(tmp_path: Path) -> None:
    text = "Dr. Who went\nhome.  He slept! Did he? Yes, of course."
    for sample in made("niah_single_2", 1000, haystack=essays(tmp_path / "essays.json", text)):
        context = sample.prompt.partition("\n")[2].rpartition("\n")[0]
        rest = NEEDLE.sub("", context).split()
        cycle = itertools.islice(itertools.cycle(text.split()), len(rest))
        assert rest == list(cycle)
        before = context[: context.index("One of")].strip()
        after = context.partition("is: ")[2].split()
        assert not before or before[-1] in ".!?" or len(after) == 1


def test_ends_of_sentences(tmp_path: Path) -> None:
    text = 'Go. "Stay!" it said (no. 3). Then more'
    haystack, words = essays(tmp_path / "essays.json", text), text.split()
    assert haystack.essay(8) == (words, [1, 5, 6, 8])
    assert haystack.essay(3) == (words[:3], [1, 3])
    assert haystack.essay(10) == (words + words[:2], [1, 5, 6, 8, 9, 10])


SAMPLE = Sample("0", "", ("One", "two 2", "THREE", "four"))


@pytest.mark.parametrize(
    ("prediction", "all_of", "any_of"),
    [
        ("", 0.0, 0.0),
        ("five", 0.0, 0.0),
        ("one", 0.25, 1.0),
        ("It is ONE, then three.", 0.5, 1.0),
        ("fourth, threefold, TWO 2, one", 1.0, 1.0),
        ("two\x002", 0.0, 0.0),
    ],
)
def test_scores(prediction: str, all_of: float, any_of: float) -> None:
    assert task_of("cwe").score(prediction, SAMPLE) == all_of
    assert task_of("qa_1").score(prediction, SAMPLE) == any_of


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_scores_fully(name: str, haystack: Haystack) -> None:
    for sample in made(name, haystack=haystack):
        assert task_of(name).score(", ".join(sample.answers), sample) == 1
        assert task_of(name).score("I do not know.", sample) == 0
