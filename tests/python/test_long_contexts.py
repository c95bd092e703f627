"""bench_quality on long contexts: prompts in chunks, needles, numbers by length."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_quality
import gemma3
import hf_models
import long_contexts
import pytest
import torch
import typer
from icecache.bench import prefill
from icecache.bench.decoder import Decoder
from icecache.bench.methods import Method, find_methods
from icecache.bench.quality import DecodeStats, Subject, decode_stats
from icecache.bench.runs import OwnRun
from icecache.bench.summary import broken_bounds
from test_cli import save_tokenizer
from typer.testing import CliRunner

BOS = 2


class Letters:
    """A token for each letter, behind a BOS."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        ids = [3 + ord(letter) % (hf_models.VOCABULARY - 3) for letter in text]
        return SimpleNamespace(input_ids=[BOS, *ids] if add_special_tokens else ids)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(hf_models.model("gemma3_text"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "longbench_mini").mkdir()
    essays = {"text": "Most good ideas look bad. " * 100}
    (folder / "PaulGrahamEssays.json").write_text(json.dumps(essays))
    (folder / "mobydick.txt").write_text("Call me Ishmael, some years ago. " * 60)
    (folder / "wikitext2_test.txt").write_text("The game began in 2010 as a port. " * 60)
    return tmp_path / "data"


@torch.inference_mode()
def test_a_text_runs_once_for_all_lengths(
    decoder: Decoder, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 24)  # of a model whose window is 16
    made = list(long_contexts.text_contexts(decoder, Letters(), data, [60, 110], steps=4))
    assert [one.group for one in made] == ["60", "110"] * 4
    assert [one.name for one in made[:3]] == ["essays_60", "essays_110", "novel_60"]
    for one in made[:4]:
        held = one.made
        whole = torch.cat([held.tokens, held.continuation])
        assert whole[0] == BOS and len(whole) == int(one.group) + 5
        logits = decoder.model(whole[None]).logits[0, -6:]
        torch.testing.assert_close(held.first_logits, logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(held.logits, logits[1:5], atol=1e-4, rtol=0)
        assert held.queries.shape[2] == int(one.group)
    exact = Method("icecache", "exact", engine_fields={"exact": True})
    (stats,) = decode_stats(decoder, Subject("p", made[1].made), [exact], 64)
    assert float(stats.kl.max()) < 1e-6 and stats.found is None


def test_ten_needles_in_one_haystack(decoder: Decoder, data: Path) -> None:
    letters, length = Letters(), 1000
    made = list(long_contexts.needle_contexts(decoder, letters, data, length))
    assert [one.name for one in made] == list(long_contexts.KEYS) and len(made) == 10
    haystack = made[0].made.tokens[:length].tolist()
    places = []
    for one in made:
        held = one.made
        assert one.is_needle and held.tokens[:length].tolist() == haystack
        question = [*held.tokens[length:].tolist(), int(held.continuation[0])]
        asked = f"\n\nOne of the special magic numbers for {one.name} is:"
        assert question == letters(asked, add_special_tokens=False).input_ids
        answer = held.continuation[1:].tolist()
        assert len(answer) == 8 and held.steps == 8
        hidden = [*question[2:], *answer]
        found = [at for at in range(length) if haystack[at : at + len(hidden)] == hidden]
        assert len(found) == 1
        places += found
    assert places == sorted(places)
    assert places[0] > 20 and places[-1] < length - 60


def test_a_needle_is_found_where_every_token_is_the_likeliest(decoder: Decoder) -> None:
    tokens = hf_models.prompt(1, 80)[0]
    own = prefill.prefill(decoder, tokens, 3, None)
    full = find_methods(["full"])
    for changed, expected in ((None, True), (3, False)):
        following = own.continuation.clone()
        if changed is not None:
            following[changed] = (following[changed] + 1) % hf_models.VOCABULARY
        run = OwnRun(decoder)
        made = prefill.followed(decoder, run, tokens, run.run(tokens), following)
        (stats,) = decode_stats(decoder, Subject("p", made, is_answer=True), full, 64)
        assert stats.found is expected


def made_up(method: str, budget: int, kl: float, found: bool | None = None) -> DecodeStats:
    chosen = find_methods([method])[0]
    values = torch.tensor([kl / 2, 3 * kl / 2], dtype=torch.float64)
    return DecodeStats("p", chosen, budget, values, torch.ones(2) > 0, 0.5, found)


def test_bounds_by_length() -> None:
    def stats(kl_30k: float, found: bool) -> dict[str, list[DecodeStats]]:
        return {
            "4k": [made_up("icecache", 256, 0.01), made_up("topk", 256, 0.02)],
            "30k": [made_up("icecache", 256, kl_30k), made_up("topk", 256, 0.2)],
            "needles": [
                *(made_up("full", size, 0.0, True) for size in (64, 256)),
                *(made_up("icecache", size, 0.0, found) for size in (64, 256)),
            ],
        }

    def broken(made: dict[str, list[DecodeStats]]) -> list[str]:
        numbers = long_contexts.grouped_results(made)
        bounds = long_contexts.long_bounds(numbers, list(made))
        return [line.split(":")[0] for line in broken_bounds(numbers, bounds)]

    numbers = {one.name: one for one in long_contexts.grouped_results(stats(0.04, True))}
    assert numbers["kl_256_worst_step_30k"].value == pytest.approx(0.06)
    assert numbers["kl_256_4k"].params["group"] == "4k"
    assert broken(stats(0.0399, True)) == []
    assert broken(stats(0.041, True)) == ["kl_256_30k"]
    assert broken(stats(0.25, True)) == [
        "kl_ratio_to_topk_256_30k",
        "kl_256_worst_step_30k",
        "kl_256_30k",
    ]
    missed = broken(stats(0.03, False))
    assert missed == ["needles_missed_64_needles", "needles_missed_256_needles"]
    without = stats(0.03, True)
    del without["30k"][1]
    assert broken(without) == ["kl_ratio_to_topk_256_30k"]


def quality(*arguments: str) -> Any:
    command = typer.Typer()
    command.command()(bench_quality.main)
    return CliRunner().invoke(command, ["--model", "gemma3", *arguments])


def test_a_model_that_is_absent_is_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gemma3.VARIABLE, str(tmp_path / "absent"))
    done = quality("--data", str(data), "--json", str(tmp_path / "q.json"))
    assert done.exit_code == 0
    assert f"{tmp_path}/absent" in done.output.replace("\n", "") and "skipped" in done.output
    assert not (tmp_path / "q.json").exists()


def test_a_model_from_end_to_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = tmp_path / "model", tmp_path / "q.json"
    hf_models.build("gemma3_text", vocab_size=256, max_position_embeddings=1200).save_pretrained(
        str(folder)
    )
    save_tokenizer(folder)
    monkeypatch.setenv(gemma3.VARIABLE, str(folder))
    monkeypatch.setattr(long_contexts, "KEYS", long_contexts.KEYS[:2])
    given = ["--lengths", "512", "--needle-length", "600", "--budgets", "64", "--data", str(data)]
    done = quality(*given, "--methods", "full,icecache,topk", "--json", str(path))
    assert done.exit_code == 0, done.output
    written = json.loads(path.read_text())
    found = {one["name"]: one for one in written["results"]}
    assert found["kl_64_512"]["params"]["n"] == 4
    assert found["kl_64_worst_step_512"]["value"] >= found["kl_64_worst_512"]["value"] > 0
    assert found["needles_topk_64_needles"]["params"]["of"] == 2
    assert written["meta"]["steps"] == 32
