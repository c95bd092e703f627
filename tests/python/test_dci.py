"""index="dci" against a plain Python implementation of the paper's structure."""

from __future__ import annotations

import icecache
import numpy as np
import pytest
import torch
from dci_reference import DciReference
from icecache import Engine
from icecache.bench.decoder import Decoder
from icecache.bench.prefill import prefill
from icecache.demo.document import make_document
from icecache.models.local import load_model

# Gaps below this are within the rounding of the engine's float32 dot products.
NEAR_TIE = 2e-6
STEPS = 60


def compare(
    keys: torch.Tensor, queries: torch.Tensor, *, budget: int, beam: int, promotion: float
) -> None:
    """Feeds keys [Hkv, L, D] and queries [Hq, STEPS, D] to both, and compares every step.

    Where the reference met a near tie, the head (or the step) is left out; most must remain.
    """
    heads, length, dim = keys.shape
    group = queries.shape[0] // heads
    engine = Engine(
        num_layers=1,
        num_q_heads=queries.shape[0],
        num_kv_heads=heads,
        head_dim=dim,
        dtype=torch.float32,
        index="dci",
        select="page",
        tail="off",
        token_budget=budget,
        window_tokens=16,
        dci_beam=beam,
        dci_promotion=promotion,
        dci_upper_promotion=0.25,
        telemetry="trace",
    )
    sinks = engine.config.sink_tokens
    sequence = engine.new_sequence()
    references = [
        DciReference(dim, engine.config.page_size, promotion, 0.25, beam) for _ in range(heads)
    ]
    known = [0] * heads  # tokens that each reference has
    prompt = length - STEPS
    engine.append([sequence], 0, keys[None, :, :prompt], keys[None, :, :prompt])
    engine.observe([sequence], 0, queries[None, :, :1])
    engine.synchronize()
    compared = 0
    for step in range(STEPS):
        end = prompt + step + 1
        new = keys[None, :, end - 1 : end]
        engine.append([sequence], 0, new, new)
        engine.attend([sequence], 0, queries[None, :, step : step + 1])
        for head, reference in enumerate(references):
            trace = engine.trace(sequence, 0, head)
            first_of_window = trace.window[0]
            float_keys = keys[head, sinks:first_of_window].double().numpy()
            if known[head] == 0:
                reference.build(float_keys)
            else:
                for key in float_keys[known[head] :]:
                    reference.insert(key)
            known[head] = len(float_keys)
            near = len(trace.sink) + len(trace.window)
            scaled = queries[head * group : (head + 1) * group, step].double().numpy()
            selected = reference.select(scaled * engine.scale, budget - near)
            if min(reference.margin, reference.select_margin) < NEAR_TIE:
                continue
            pages = {frozenset(p - sinks for p in page.positions) for page in trace.pages}
            assert pages == reference.pages()
            assert {p - sinks for p in trace.selected} == selected
            compared += 1
    assert compared >= heads * STEPS / 3, f"near ties in all but {compared} steps"
    assert max(len(reference.levels) for reference in references) > 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [1, 3])
def test_random_keys(seed: int, group: int) -> None:
    """Clustered keys of uneven norms, enough cells for levels above the first."""
    rng = np.random.default_rng(seed)
    heads, length, dim = 4, 700, 32
    centers = rng.normal(size=(heads, 12, dim))
    chosen = rng.integers(0, 12, size=(heads, length))
    keys = np.take_along_axis(centers, chosen[:, :, None], axis=1) * rng.uniform(
        0.5, 2.0, size=(heads, length, 1)
    ) + 0.5 * rng.normal(size=(heads, length, dim))
    queries = rng.normal(size=(heads * group, STEPS, dim)) * 4
    compare(
        torch.tensor(keys, dtype=torch.float32),
        torch.tensor(queries, dtype=torch.float32),
        budget=128,
        beam=8,
        promotion=1 / 12,
    )


@pytest.mark.model
@pytest.mark.parametrize("layer", [2, 11, 25])
def test_keys_of_a_real_model(layer: int, real_keys: tuple[torch.Tensor, torch.Tensor]) -> None:
    keys, queries = real_keys
    compare(keys[layer], queries[layer, :, -STEPS:], budget=128, beam=10, promotion=1 / 16)


@pytest.fixture(scope="module")
def real_keys() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [layers, Hkv, L, D] and queries [layers, Hq, 256, D] of SmolLM2 on a real document."""
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    document = make_document(tokenizer, None, 1200, 0)
    made = prefill(Decoder(model), document.tokens, 1, None)
    return made.keys, made.queries
