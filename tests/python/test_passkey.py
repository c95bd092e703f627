"""Pass keys: length, depth, and the same text for the same seed."""

from __future__ import annotations

import pytest
from icecache.bench.tasks.passkey import TASK, PasskeySource, make_sample, score
from icecache.bench.tasks.task import Sample
from icecache.errors import InvalidArgument


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("length", [67, 100, 1000, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_length_is_filled_and_not_exceeded(length: int, depth: float) -> None:
    sample = make_sample(words, length, depth)
    assert sample.length == words(sample.prompt + sample.answer_prefix)
    assert length - 20 < sample.length <= length  # a repetition has 20 words
    assert sample.prompt.count(sample.answers[0]) == 2


def test_depth() -> None:
    places = []
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = make_sample(words, 8192, depth)
        places.append(sample.prompt.index("The pass key is") / len(sample.prompt))
    assert places == pytest.approx([0.0, 0.25, 0.5, 1.0], abs=0.01)
    assert places[0] < places[1]


def test_characters_as_tokens() -> None:
    sample = make_sample(len, 5000, 0.5)
    assert sample.length is not None and 4900 < sample.length <= 5000


def test_the_same_seed_gives_the_same_text() -> None:
    assert make_sample(words, 500, 0.5, 3) == make_sample(words, 500, 0.5, 3)
    keys = {make_sample(words, 500, 0.5, seed).answers for seed in range(20)}
    assert len(keys) == 20
    assert all(len(key) == 5 and key.isdecimal() for (key,) in keys)


def test_source_has_every_length_at_every_depth() -> None:
    source = PasskeySource(words, (200, 400), (0.0, 1.0), repeats=2, seed=5)
    names = [sample.name for sample in source.samples(TASK)]
    assert names == [f"{n}_{d}_{s}" for n in (200, 400) for d in (0, 1) for s in (5, 6)]


def test_score() -> None:
    sample = Sample("0", "", ("12345",))
    assert score(" 12345. Remember it.", sample) == score("12345", sample) == 1.0
    assert score("123456", sample) == score("1 12345", sample) == score("", sample) == 0.0


def test_refusals() -> None:
    with pytest.raises(InvalidArgument, match=r"depth: expected 0 to 1, got 1\.5"):
        make_sample(words, 500, 1.5)
    with pytest.raises(InvalidArgument, match=r"length: expected at least \d+ tokens, got 10"):
        make_sample(words, 10, 0.5)
