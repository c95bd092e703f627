"""icecache bench generation: texts fed token by token, and what methods write by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.free_text import own_text, repetition, write_freely
from icecache.bench.generation_plan import BLOCK, Checkpoints, GenerationPlan
from icecache.bench.generation_report import _parts, html_report, lines, results
from icecache.bench.growth import FullLogits, Growth, Text, grow
from icecache.bench.methods import find_methods
from icecache.bench.prefill import Prefill, finish
from icecache.bench.runs import OwnRun
from icecache.bench.writing import Manner, greedy, sampled
from icecache.cli import app
from icecache.errors import InvalidArgument
from test_cli import save_tokenizer
from typer.testing import CliRunner

PROMPT, LENGTH, STEPS = 40, 330, 8
NAMES = {
    "llama": ("full", "icecache", "topk", "paper", "quest", "streaming"),
    "gemma3_text": ("full", "icecache", "streaming"),
}


@cache
def decoder(architecture: str) -> Decoder:
    return Decoder(hf_models.model(architecture))


def begun(architecture: str) -> tuple[Decoder, torch.Tensor, OwnRun, Prefill]:
    """A text [L], and its prompt by the model itself."""
    made, tokens = decoder(architecture), hf_models.prompt(1, LENGTH)[0]
    run = OwnRun(made)
    first = run.run(tokens[:PROMPT])
    return made, tokens, run, finish(made, run, tokens[:PROMPT], first, lambda _: True, None)


@cache
def grown(architecture: str) -> dict[tuple[str, int], Growth]:
    made, tokens, run, prompt = begun(architecture)
    text, checkpoints = Text(tokens, prompt, FullLogits(run, tokens)), Checkpoints(150, STEPS)
    # Tokens that wait to be sealed are attended exactly: few of so short a text.
    methods = [m.with_fields({"segment_tokens": 32}) for m in find_methods(NAMES[architecture])]
    found = grow(made, text, methods, [64, 2 * LENGTH], checkpoints)
    return {(one.method, one.budget): one for one in found}


@torch.inference_mode()
def test_full_attention_in_chunks_is_the_models_own() -> None:
    made, tokens, run, _ = begun("gemma3_text")
    expected = made.model(tokens[None]).logits[0]
    full = FullLogits(run, tokens)
    for position in (PROMPT, PROMPT + BLOCK + 20, PROMPT + BLOCK - 1, LENGTH - 1):
        torch.testing.assert_close(full.after(position), expected[position], atol=1e-4, rtol=0)
    of_text = torch.log_softmax(expected[PROMPT:-1], -1)
    nll = -of_text.gather(1, tokens[PROMPT + 1 :, None]).mean()
    assert grown("gemma3_text")["full", 0].nll == pytest.approx(float(nll), rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_budget_above_the_length_costs_nothing(architecture: str) -> None:
    for (method, budget), one in grown(architecture).items():
        assert len(one.kl) == len(one.agrees) == LENGTH - PROMPT
        if budget == 64:
            assert sum(one.kl) > 1e-3, method
            assert 0 < one.mass < 1 and one.bytes_read > 0
            # What does not fit into the budget begins to be left out some steps later.
            assert max(one.kl[: 64 - PROMPT]) < 1e-6
        else:
            assert max(one.kl) < 1e-6 and all(one.agrees), method
            assert one.mass == pytest.approx(1.0, abs=1e-5)


def test_indexes_that_are_built_anew() -> None:
    for (method, budget), one in grown("llama").items():
        if method not in ("icecache", "paper", "quest"):
            assert one.checkpoints == []
            continue
        assert [place.at for place in one.checkpoints] == [150, 300]
        for place in one.checkpoints:
            first = place.at - PROMPT
            mean = sum(one.kl[first : first + STEPS]) / STEPS
            assert place.grown == pytest.approx(mean)
            if budget > LENGTH:
                assert place.rebuilt < 1e-6 and place.exact < 1e-6
            else:
                assert 0 < place.exact < place.rebuilt
            if method == "quest":  # its pages are of consecutive tokens, however they came
                assert place.rebuilt == pytest.approx(place.grown, rel=1e-3, abs=1e-6)
            if method == "paper" and budget == 64:
                assert place.rebuilt != pytest.approx(place.grown, rel=1e-3)


def test_checkpoints_end_with_the_text() -> None:
    assert Checkpoints(100, 20).places(100, 350) == [200, 300]
    assert Checkpoints(100, 20).places(150, 300) == [200, 280]
    assert Checkpoints(100, 20).places(50, 99) == []
    assert Checkpoints().places(50, 500) == []


def test_what_an_engine_counts_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokens, run, prompt = begun("llama")
    session = find_methods(["icecache"])[0].open(made, prompt, 64)
    assert isinstance(session, EngineSession)
    heads = made.num_layers * made.num_kv_heads
    with monkeypatch.context() as patched:
        counts = SimpleNamespace(seals=2, merges=1)
        patched.setattr(session.engine, "stats", lambda layer, head: counts)
        assert session.changes() == [2 * heads, heads]
    session.close()

    def changes(self: EngineSession) -> list[int]:
        held = self.engine.length(self.sequence)
        return [held // 100, held // 200]

    monkeypatch.setattr(EngineSession, "changes", changes)
    text = Text(tokens[:230], prompt, FullLogits(run, tokens[:230]))
    found = grow(made, text, find_methods(["icecache"]), [64], Checkpoints())
    assert [(seals, merges) for _, seals, merges in found[1].changes] == [(1, 0), (1, 1)]
    places = [position for position, _, _ in found[1].changes]
    assert all(0 <= at - 100 * (n + 1) < 16 for n, at in enumerate(places))
    record = {"prompt": PROMPT, "tokens": 230, "rows": [asdict(one) for one in found]}
    assert "sealed" in html_report({}, [{**record, "free": []}])
    found[1].changes = []
    record["rows"] = [asdict(one) for one in found]
    assert "sealed" not in html_report({}, [{**record, "free": []}])


def ends_at(token: int) -> Callable[[list[int]], bool]:
    return lambda written: written[-1] == token


def test_what_full_attention_writes() -> None:
    made, _, run, prompt = begun("llama")
    own = own_text(run.fork(), prompt.first_logits, 12, [], greedy)
    with torch.inference_mode():
        logits = made.model(torch.cat([prompt.tokens, torch.tensor(own)])[None]).logits[0]
    assert own == logits[PROMPT - 1 : -1].argmax(-1).tolist()
    other = own_text(run.fork(), prompt.first_logits, 12, [own[3]], greedy)
    assert other[:3] == own[:3] and own[3] not in other

    methods = find_methods(["full", "icecache", "streaming"])
    given = (made, prompt, run, methods, [64, 400])
    for choose in (greedy, sampled(0.7, 1)):
        texts = write_freely(*given, Manner(30, lambda _: False, choose))
        labels = [(one.method, one.budget) for one in texts]
        assert labels[:3] == [("full", 0), ("icecache", 64), ("streaming", 64)]
        by_name = dict(zip(labels, texts, strict=True))
        assert by_name["icecache", 400].written == texts[0].written
        assert by_name["streaming", 64].written != texts[0].written
        assert all(len(one.written) == 30 and not one.ended for one in texts)
        tokens = torch.cat([prompt.tokens, torch.tensor(by_name["streaming", 64].written)])
        with torch.inference_mode():
            right = torch.log_softmax(made.model(tokens[None]).logits[0, PROMPT - 1 : -1], -1)
        nll = -right.gather(1, tokens[PROMPT:, None]).mean()
        assert by_name["streaming", 64].nll == pytest.approx(float(nll), rel=1e-3)
        assert run.length == PROMPT
        ended = write_freely(*given, Manner(30, ends_at(texts[0].written[5]), choose))[0]
        assert ended.ended and ended.written == texts[0].written[: len(ended.written)]
        assert len(ended.written) <= 6


def test_chance_is_of_the_seed_and_the_place_alone() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    rows = logits.expand(4, -1)
    first = sampled(1.0, 3)(rows, [0, 1, 2, 0])
    assert first[0] == first[3] and len({*first}) == 3
    assert sampled(1.0, 3)(rows[:1], [2]) == [first[2]]
    assert sampled(1.0, 4)(rows, [0, 1, 2, 0]) != first
    shares = torch.softmax(logits[0] / 0.7, -1)
    drawn = torch.tensor(sampled(0.7, 0)(logits.expand(4000, -1), range(4000)))
    found = torch.bincount(drawn, minlength=500) / 4000
    assert float((found - shares).abs().sum()) < 0.35


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == repetition(range(50)) == 0
    assert repetition([7] * 23) == pytest.approx(19 / 20)
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("start, count", [(1, 1), (255, 1), (256, 256), (40, 600), (256, 1792)])
def test_blocks_hold_every_step_once(start: int, count: int) -> None:
    parts = list(_parts(start, count))
    steps = list(range(count))
    assert [step for _, part in parts for step in steps[part]] == steps
    assert parts[0][0] == start
    assert all(first % BLOCK == 0 for first, _ in parts[1:])
    if count >= BLOCK:
        assert all(BLOCK // 2 <= part.stop - part.start < 2 * BLOCK for _, part in parts)


def made_up(kl: list[float], places: list[tuple[float, float]]) -> dict[str, Any]:
    row = Growth("icecache", 64, kl, [True] * len(kl), nll=0.0, mass=0.9, bytes_read=1.0)
    checkpoints = [
        {"at": 512 + at, "grown": grown, "rebuilt": rebuilt, "exact": rebuilt / 2}
        for at, (grown, rebuilt) in enumerate(places)
    ]
    rows = [{**asdict(row), "checkpoints": checkpoints}]
    return {"prompt": 256, "tokens": 256 + len(kl), "rows": rows, "free": []}


def test_numbers_of_a_run() -> None:
    flat = [0.01] * 768
    one = made_up([0.01] * 256 + [0.02] * 256 + [0.06] * 256, [(0.02, 0.01), (0.06, 0.02)])
    line = lines([made_up(flat, [(0.01, 0.01), (0.01, 0.01)]), one])[0]
    assert line.n == 2 and line.worst == 0.06
    assert [(block.start, round(block.kl, 6)) for block in line.blocks] == [
        (256, 0.01),
        (512, 0.015),
        (768, 0.035),
    ]
    assert line.late == pytest.approx((0.015 + 0.035) / 2)  # positions from 512 on
    assert line.spread == pytest.approx(3)
    assert line.ratio == pytest.approx((0.015 + 0.035) / (0.01 + 0.015))
    assert line.last_ratio == pytest.approx(0.035 / 0.015)
    assert line.exact == pytest.approx(0.015 / 2)
    found = {one.name: one for one in results([one])}
    assert found["kl_icecache_64_at_768"].value == pytest.approx(0.06)
    assert found["grown_icecache_64_at_513"].params["rebuilt"] == 0.02
    assert found["last_ratio_icecache_64"].value == pytest.approx(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of bytes, and two texts."""
    made = tmp_path_factory.mktemp("model")
    model: Any = hf_models.build("llama", max_position_embeddings=400, vocab_size=256)
    model.save_pretrained(str(made))
    save_tokenizer(made)
    (made / "texts").mkdir()
    (made / "texts" / "a.txt").write_text("All cats are grey at night. " * 20)
    (made / "texts" / "b.txt").write_text("One 1 two 2 three 3 four 4. " * 20)
    return made


def generation(folder: Path, *arguments: str) -> Any:
    given = ["bench", "generation", "--model", str(folder), "--data-dir", str(folder / "texts")]
    shape = ["--prompt", "60", "--length", "200", "--budget", "64"]
    return CliRunner().invoke(app, [*given, *shape, *arguments])


def test_a_run_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "run", tmp_path / "results.json"
    given = ["--method", "full,icecache,streaming", "--out", str(out), "--switch-at", "120"]
    given += ["--rebuilt-every", "100", "--rebuilt-steps", "4", "--free", "20"]
    done = generation(folder, *given, "--json", str(path))
    assert done.exit_code == 0, done.output
    names = {one["name"] for one in json.loads(path.read_text())["results"]}
    assert {"kl_icecache_64", "late_streaming_64", "kl_icecache_64_at_60"} <= names
    assert {"ratio_icecache_64", "free_written_full", "free_repetition_icecache_64"} <= names
    page = (out / "report.html").read_text()
    assert "<svg" in page and "Written freely" in page and "built anew" in page
    held = (out / "samples.jsonl").read_text()
    records = [json.loads(line) for line in held.splitlines()]
    assert [one["sample"] for one in records] == ["a/0", "b/0"]
    assert {len(row["kl"]) for one in records for row in one["rows"]} == {140}
    again = generation(folder, *given)
    assert again.exit_code == 0 and (out / "samples.jsonl").read_text() == held
    other = generation(folder, *given, "--seed", "5")
    assert other.exit_code == 2 and "seed was 0, got 5" in " ".join(other.output.split())


def test_a_models_own_text(folder: Path, tmp_path: Path) -> None:
    shape = ("--own", "--method", "full", "--length", "100", "--out", str(tmp_path))
    done = generation(folder, *shape)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    # What was drawn from the model's own probabilities at .7 is likelier than by chance.
    assert all(0 < one["rows"][0]["nll"] < 5 for one in records)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "401"], "at most 400, the context of"),
        (["--free", "341"], "at most 400, the context of"),
        (["--length", "400", "--samples", "2"], "at most 280, the tokens of a"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = generation(folder, *arguments, "--out", str(tmp_path / "run"))
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()


def test_a_text_that_goes_on_with_itself_is_refused() -> None:
    plan = GenerationPlan("m", switch_at=300, is_own=True)
    with pytest.raises(InvalidArgument, match="--switch-at"):
        plan.check()
