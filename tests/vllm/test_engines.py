"""Engines of several shapes as one: places of layers, shares of memory, sequences in all."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from icecache import Config, InvalidArgument, Phase
from icecache.reference import dense_attention
from icecache.shape import CacheShape
from icecache.vllm.engines import (
    Engines,
    HostEngine,
    Layer,
    Place,
    place_layers,
    split_config,
)

DIM, KV_HEADS = 32, 2
NARROW, WIDE = CacheShape(1, 4, KV_HEADS, DIM), CacheShape(1, 8, KV_HEADS, DIM)
MIXED = [Layer("a", NARROW), Layer("b", WIDE), Layer("c", NARROW), Layer("d", WIDE)]
TOKENS = 50


def test_each_shape_of_layer_has_an_engine() -> None:
    shapes, places = place_layers(MIXED)
    assert [(shape.num_layers, shape.num_q_heads) for shape in shapes] == [(2, 4), (2, 8)]
    assert places == {"a": Place(0, 0), "b": Place(1, 0), "c": Place(0, 1), "d": Place(1, 1)}


def test_a_layer_that_shares_keys_and_values_has_its_owners_place() -> None:
    layers = [*MIXED, Layer("e", NARROW, owner="c"), Layer("f", NARROW, owner="c")]
    shapes, places = place_layers(layers)
    assert [shape.num_layers for shape in shapes] == [2, 2]
    assert [places[name] for name in "cef"] == [Place(0, 1, False), Place(0, 1, False), Place(0, 1)]


@pytest.mark.parametrize("owner", ["b", "elsewhere"])
def test_a_layer_cannot_share_in_another_shape(owner: str) -> None:
    with pytest.raises(InvalidArgument, match=f"does not serve e .*values of {owner}.*stock vLLM"):
        place_layers([*MIXED, Layer("e", NARROW, owner=owner)])


def test_memory_and_dense_layers_are_divided() -> None:
    layers = [*MIXED, Layer("e", CacheShape(1, 8, 4, DIM))]
    shapes, places = place_layers(layers)
    given = Config(host_memory=6 << 20, dense_layers="0,3,4", token_budget=77)
    configs = split_config(given, shapes, list(places.values()))
    # The last shape has a layer less, and twice the KV heads.
    assert [config.host_memory for config in configs] == [2 << 20] * 3
    assert [config.dense_layers for config in configs] == ["0", "1", "0"]
    assert {config.token_budget for config in configs} == {77}
    assert split_config(given, shapes[:1], []) == [given]


@pytest.mark.parametrize("layers", ["4", "0,9", "x"])
def test_a_dense_layer_that_does_not_exist_is_refused(layers: str) -> None:
    shapes, places = place_layers(MIXED)
    with pytest.raises(InvalidArgument, match="dense_layers must"):
        split_config(Config(dense_layers=layers), shapes, list(places.values()))


@pytest.fixture
def engines() -> Engines:
    shapes, _ = place_layers(MIXED)
    return Engines([HostEngine(**vars(shape), exact=True, host_memory="1M") for shape in shapes])


def step(engines: Engines, seq: Any, place: Place, heads: int, phase: Phase) -> None:
    """One layer of TOKENS tokens; its outputs are those of full attention."""
    queries = torch.randn(TOKENS, heads, DIM)
    keys, values = torch.randn(2, TOKENS, KV_HEADS, DIM)
    outputs, lse = torch.empty_like(queries), torch.empty(TOKENS, heads)
    engines.step_packed([seq], place, queries, keys, values, outputs, [0], [TOKENS], [phase], lse)
    heads_first = (x.transpose(0, 1) for x in (queries, keys, values))
    expected, log_weights = dense_attention(*heads_first, DIM**-0.5)
    torch.testing.assert_close(outputs, expected.transpose(0, 1))
    torch.testing.assert_close(lse, log_weights.transpose(0, 1).float())


def test_a_sequence_is_one_in_each_engine(engines: Engines) -> None:
    seq = engines.new_sequence()
    for layer, place in zip(MIXED, place_layers(MIXED)[1].values(), strict=True):
        step(engines, seq, place, layer.shape.num_q_heads, Phase.PROMPT_END)
    assert engines.token_bytes == 2 * 4 * KV_HEADS * DIM * 4
    assert engines.pool_bytes() >= TOKENS * engines.token_bytes
    assert engines.host_memory == 2 << 20 and engines.tokens == (1 << 20) // 1024
    assert len(engines.all_stats()) == 4 * KV_HEADS
    engines.check_integrity()
    fork = engines.fork(seq, 20)
    engines.truncate(fork, 10)
    engines.release(seq)
    assert engines.sequences() == 1 and engines.contains(fork) and not engines.contains(seq)
    engines.release(fork)
    assert engines.sequences() == engines.pool_bytes() == 0


def test_a_fork_is_made_in_all_engines_or_in_none(engines: Engines) -> None:
    seq = engines.new_sequence()
    engines._engines[1].release(seq[1])  # as an engine does with what it retains
    assert not engines.contains(seq)
    with pytest.raises(InvalidArgument):
        engines.fork(seq, 0)
    assert engines._engines[0].memory().sequences == 1
    engines.release(seq)
    assert engines.sequences() == 0


def test_a_prompt_ends_with_the_last_layer_that_attends_to_it() -> None:
    engine = Mock(room_step=0)
    engines = Engines([engine])
    phases = [Phase.PROMPT_END, Phase.AUTO, Phase.PREFILL]
    for is_last, expected in ((True, Phase.PROMPT_END), (False, Phase.PREFILL)):
        place = Place(0, 3, is_last)
        tensor = torch.empty(0)
        seqs = [(5,), (6,), (7,)]
        engines.step_packed(seqs, place, tensor, None, None, tensor, [0, 1, 2], [1] * 3, phases)
        given = engine.step_packed.call_args.args
        assert given[0] == [5, 6, 7] and given[1] == 3
        assert given[8] == [expected, Phase.AUTO, Phase.PREFILL]
