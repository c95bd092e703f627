"""The quality harness: what it computes on a tiny model, and what its summary makes of it."""

from __future__ import annotations

from pathlib import Path

import hf_models
import pytest
import torch
from icecache import InvalidArgument
from icecache.bench.decoder import Decoder
from icecache.bench.methods import METHODS, Method
from icecache.bench.prefill import load, prefill, save
from icecache.bench.quality import DecodeStats, Subject, decode_stats, kl_divergence
from icecache.bench.report import Result, machine, write_json
from icecache.bench.summary import BOUNDS, broken_bounds, lines, needles_missed, results

LENGTH, STEPS = 300, 5


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(hf_models.model("llama"))


def method(name: str) -> Method:
    return next(one for one in METHODS if one.name == name)


def test_prefill_is_the_models_own_and_survives_a_file(decoder: Decoder, tmp_path: Path) -> None:
    tokens = hf_models.prompt(1, LENGTH)[0]
    made = prefill(decoder, tokens, STEPS, None)
    with torch.inference_mode():
        logits = decoder.model(torch.cat([tokens, made.continuation[:-1]])[None]).logits[0]
    torch.testing.assert_close(made.logits, logits[-STEPS:], atol=1e-4, rtol=1e-4)
    assert made.continuation.tolist() == logits[-STEPS - 1 :].argmax(-1).tolist()
    save(made, tmp_path / "made.safetensors")
    again = load(tmp_path / "made.safetensors")
    assert again is not None and again.stock_layers == made.stock_layers == [None] * 3
    tensors = [name for name in vars(made) if name != "stock_layers"]
    assert all(torch.equal(getattr(made, name), getattr(again, name)) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


def test_a_budget_above_the_length_is_full_attention(decoder: Decoder) -> None:
    made = prefill(decoder, hf_models.prompt(1, LENGTH)[0], STEPS, None)
    stats = decode_stats(decoder, Subject("p", made), METHODS, 2 * LENGTH)
    assert len(stats) == len(METHODS)
    for one in stats:
        assert float(one.kl.max()) < 1e-6, one.method.label
        assert bool(one.agrees.all())
        assert one.mass == pytest.approx(1.0, abs=1e-5)
        assert one.found is None


def test_a_small_budget_costs_something(decoder: Decoder) -> None:
    made = prefill(decoder, hf_models.prompt(1, LENGTH)[0], STEPS, None)
    chosen = [method(name) for name in ("full", "icecache", "topk", "streaming")]
    by_name = {s.method.name: s for s in decode_stats(decoder, Subject("p", made), chosen, 64)}
    assert float(by_name["full"].kl.max()) < 1e-6
    for name in ("icecache", "topk", "streaming"):
        assert float(by_name[name].kl.mean()) > 1e-7
        assert 0 < by_name[name].mass < 1
    assert by_name["topk"].mass >= by_name["streaming"].mass


def test_a_budget_below_what_is_always_attended_is_refused(decoder: Decoder) -> None:
    made = prefill(decoder, hf_models.prompt(1, LENGTH)[0], 1, None)
    for name in ("topk", "streaming"):
        with pytest.raises(InvalidArgument, match=r"budget: expected at least .* got 19"):
            decode_stats(decoder, Subject("p", made), [method(name)], 19)


def test_kl_divergence_is_exact() -> None:
    truth, other = torch.tensor([[0.3, 0.7]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.3 * torch.tensor(0.6).log() + 0.7 * torch.tensor(1.4).log()
    assert kl_divergence(truth, other)[0] == pytest.approx(float(expected), rel=1e-6)
    assert kl_divergence(truth, truth + 5.0)[0] == pytest.approx(0.0, abs=1e-12)


def made_up(
    name: str, prompt: str, budget: int, kl: float, found: bool | None = None, label: str = ""
) -> DecodeStats:
    chosen = Method(name, label or name, engine_fields={})
    return DecodeStats(
        prompt, chosen, budget, torch.tensor([kl, kl]), torch.ones(2) > 0, 0.5, found
    )


def test_summary_takes_the_mean_over_prompts_and_the_best_rival() -> None:
    stats = [
        made_up("icecache", "a", 64, 0.01),
        made_up("icecache", "b", 64, 0.02),
        made_up("icecache", "c", 64, 0.06),
        made_up("paper", "a", 64, 0.3, label="paper p=.01"),
        made_up("paper", "a", 64, 0.2, label="paper p=.03"),
        made_up("topk", "a", 64, 0.1, label="exact top-B"),
    ]
    line = lines(stats)[0]
    assert (line.n, line.worst_prompt) == (3, "c")
    assert (line.kl, line.median, line.worst) == pytest.approx((0.03, 0.02, 0.06))
    numbers = {result.name: result for result in results(stats)}
    assert numbers["kl_64"].value == pytest.approx(0.03)
    assert numbers["kl_64"].params["n"] == 3
    assert numbers["kl_64_median"].value == pytest.approx(0.02)
    assert numbers["kl_64_worst"].params["prompt"] == "c"
    assert numbers["kl_ratio_to_paper_64"].value == pytest.approx(0.15)
    assert numbers["kl_ratio_to_paper_64"].params["against"] == "paper p=.03"
    assert numbers["kl_ratio_to_topk_64"].value == pytest.approx(0.3)
    assert numbers["kl_paper_p01_64"].value == pytest.approx(0.3)


def test_needles_count_only_where_full_attention_finds_them() -> None:
    stats = [
        made_up("full", "a", 64, 0.0, True),
        made_up("full", "b", 64, 0.0, False),
        made_up("full", "c", 64, 0.0, True),
        made_up("icecache", "a", 64, 0.0, False),
        made_up("icecache", "b", 64, 0.0, False),
        made_up("icecache", "c", 64, 0.0, True),
    ]
    assert needles_missed(stats, 64) == 1
    assert needles_missed(stats, 128) == 0
    assert {r.name: r.value for r in results(stats)}["needles_missed_64"] == 1
    without_full = [one for one in stats if one.method.name != "full"]
    assert "needles_missed_64" not in {r.name for r in results(without_full)}


def test_bounds_are_broken_by_large_and_by_missing_numbers() -> None:
    held = [Result(name, bound, "") for name, bound in BOUNDS.items()]
    assert broken_bounds(held) == []
    assert broken_bounds(held[1:]) == ["kl_64: not measured, must be at most 0.02"]
    for wrong in (0.0201, float("nan")):
        broken = broken_bounds([Result("kl_64", wrong, ""), *held[1:]])
        assert len(broken) == 1
        assert broken[0].startswith("kl_64: ")


def test_json_has_the_form_of_all_benchmarks(tmp_path: Path) -> None:
    import json

    path = tmp_path / "new" / "results.json"
    write_json(path, machine(), [Result("kl_64", 0.5, "nats", {"n": 3})])
    data = json.loads(path.read_text())
    assert data["results"] == [{"name": "kl_64", "value": 0.5, "unit": "nats", "params": {"n": 3}}]
    assert {"cpu", "cores", "simd", "torch", "icecache", "command", "date"} <= {*data["meta"]}
    assert "/" not in data["meta"]["command"]
