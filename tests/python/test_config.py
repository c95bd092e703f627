"""icecache.Config: fields by name, text, copies, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import icecache
import pytest
import torch
from icecache import Config, Engine, InvalidArgument


def engine(**fields: Any) -> Engine:
    shape = {"num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    return Engine(**{**shape, "dtype": torch.float32, **fields})


def test_every_field_has_its_default_and_type() -> None:
    config = Config()
    types = {"int": int, "real": float, "text": str, "flag": bool}
    for field in icecache.config_fields():
        value = getattr(config, field.name)
        assert type(value) is types[field.type]
        assert Config(**{field.name: field.default}) == config
        assert field.name in dir(config)
        assert field.name in (Config.__doc__ or "")


def test_values_are_kept_and_compared() -> None:
    config = Config(token_budget=128, index="dci", mass_target=0.9, exact=True)
    assert (config.token_budget, config.index, config.mass_target) == (128, "dci", 0.9)
    assert config.exact is True
    assert config != Config()
    assert Config(**config.to_dict()) == config
    assert repr(config) == "Config(token_budget=128, index='dci', mass_target=0.9, exact=True)"
    config.token_budget = 64
    assert dict(config)["token_budget"] == 64


def test_text_is_accepted_for_every_field() -> None:
    config = Config(host_memory="3G", token_budget="512", exact="yes")
    assert config.host_memory == 3 * 2**30
    assert config.token_budget == 512
    assert config.exact is True


def pickled(config: Config) -> Any:
    return pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_are_equal_and_independent(copied: Any) -> None:
    config = Config(token_budget=99)
    twin = copied(config)
    assert twin == config
    twin.token_budget = 100
    assert config.token_budget == 99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_budgets": 64}, "token_budget"),
        ({"token_budget": "many"}, "token_budget.*many"),
        ({"token_budget": 2.5}, "token_budget.*2.5"),
        ({"token_budget": None}, "token_budget must be a number, a text or a bool, got None"),
        ({"index": "trie"}, "index must be tree, dci, positional or faiss, got .?trie"),
        ({"exact": "perhaps"}, "exact.*perhaps"),
        ({"host_memory": "3X"}, "host_memory.*3X"),
    ],
)
def test_wrong_names_and_forms_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Config(**fields)


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tokens'"):
        _ = Config().tokens


def test_the_engine_fills_in_what_is_derived() -> None:
    config = engine(token_budget=64).config
    assert config.window_tokens == 16
    assert config.candidates == 320
    assert config.host_memory > 0
    assert config.num_threads > 0


def test_fields_take_precedence_over_a_config() -> None:
    given = Config(token_budget=200, sink_tokens=8)
    made = engine(config=given, token_budget=100).config
    assert (made.token_budget, made.sink_tokens) == (100, 8)
    assert given.token_budget == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_budget": 35}, r"token_budget must be at least sink_tokens \+ .* = 36, got 35"),
        ({"page_size": 12}, "page_size must be 8, 16 or 32, got 12"),
        ({"head_dim": 36}, "head_dim must be .*multiple of 8.*, got 36"),
        ({"head_dim": 520}, "head_dim must be .*512.*, got 520"),
        ({"num_q_heads": 5}, "num_q_heads.*5"),
        ({"num_q_heads": 258}, "num_q_heads.* at most 128, got 258 / 2 = 129"),
        ({"num_layers": 0}, "num_layers.*0"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"scale": 0.0}, "scale must be above 0, got 0.0"),
        ({"host_memory": "36K"}, "host_memory must hold at least one sequence.*got 36864"),
        ({"far_node_tokens": 4096}, "far_node_tokens must be .* from 16 to 128, got 4096"),
        ({"dense_layers": "0,2"}, "dense_layers must name layers from 0 to 1, got 2"),
        ({"mass_target": 1.0}, "mass_target must be from 0 .*, got 1"),
    ],
)
def test_contradictions_are_refused_with_the_numbers(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        engine(**{"token_budget": 64, **fields})


def test_what_the_build_lacks_is_unavailable() -> None:
    if icecache.build_info().faiss:
        assert engine(index="faiss").config.index == "faiss"
    else:
        with pytest.raises(icecache.Unavailable, match=r"index=faiss.*ICECACHE_FAISS=ON"):
            engine(index="faiss")
