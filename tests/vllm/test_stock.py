"""vLLM with this plugin installed, and not asked for, is vLLM without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from conftest import Run
from icecache.vllm import engine_args, register
from icecache.vllm.plugin import BACKENDS, stock_backend
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.model_executor.layers.attention.encoder_only_attention import (
    create_encoder_only_attention_backend,
)
from vllm.model_executor.layers.attention.static_sink_attention import (
    create_static_sink_attention_backend,
)
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

WITHOUT = {"VLLM_PLUGINS": "none"}
PROMPTS = (100, 300)


def prompts() -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.randrange(16, 500) for _ in range(size)] for size in PROMPTS]


def llm(kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4, "block_size": 32}
    if kind in ("encoder", "pooling"):
        settings |= {"runner": "pooling"}
    if kind == "pooling":
        settings |= {"convert": "embed"}
    if kind == "cross attention":
        settings |= {"max_model_len": 448}
    if kind in ("hybrid", "chunked attention"):  # as engine_args() has it
        settings |= {"disable_hybrid_kv_cache_manager": False}
    if kind in ("encoder", "pooling", "cross attention", "vision"):
        settings |= {"skip_tokenizer_init": False}
    return settings


@pytest.fixture(scope="module")
def plain(
    request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A scenario with a model of a kind, and what it gives with the plugin installed."""
    kind = request.param
    given = {
        "model": kinds.make(kind, tmp_path_factory.mktemp("model")),
        "kind": kind,
        "prompts": prompts(),
        "tokens": 8,
        "llm": llm(kind),
    }
    return given, run("everything", **given)


@pytest.mark.parametrize("plain", kinds.KINDS, indirect=True)
def test_a_model_answers_to_the_bit_as_without_the_plugin(run: Run, plain: Any) -> None:
    given, got = plain
    without = run("everything", environment=WITHOUT, **given)
    assert got["plugin"] and not without["plugin"]
    assert got["outputs"] and got["outputs"] == without["outputs"]
    assert got["ours"] == without["ours"] == []


ICECACHE = {"exact": True, "host_memory": "64M"}


@pytest.mark.parametrize(
    ("plain", "served"),
    [
        ("hybrid", ["model.layers.1.self_attn.attn", "model.layers.3.self_attn.attn"]),
        ("chunked attention", ["model.layers.3.self_attn.attn"]),
        ("vision", [f"language_model.model.decoder.layers.{n}.self_attn.attn" for n in range(2)]),
    ],
    indirect=["plain"],
)
def test_layers_that_are_not_served_stay_stock(run: Run, plain: Any, served: list[str]) -> None:
    given, stock = plain
    got = run("everything", **given, icecache=ICECACHE)
    assert got["ours"] == served
    assert [tokens for tokens, _ in got["outputs"]] == [tokens for tokens, _ in stock["outputs"]]


def test_models_with_and_without_icecache_in_one_process(run: Run, llama: Path) -> None:
    got = run(
        "in_turns", model=llama, prompts=prompts(), tokens=8, llm=llm("decoder"), icecache=ICECACHE
    )
    stock, ours, again = got["tokens"]
    assert stock == ours == again
    assert [len(layers) for layers in got["ours"]] == [0, 2, 0]


def create_config(model: Path, **changes: Any) -> Any:
    return EngineArgs(model=str(model), dtype="float32", **changes).create_engine_config()


def derived_from(backend: Any) -> dict[str, Any]:
    """What vLLM derives from a backend, by the kind of attention."""
    return {
        "chunked": create_chunked_local_attention_backend(backend, 64),
        "encoder": create_encoder_only_attention_backend(backend),
        "cross": create_cross_attention_backend(backend),
        "static sinks": create_static_sink_attention_backend(backend, 4),
        "fast prefill": create_fast_prefill_custom_backend("Fast", backend),
    }


IMPORTABLE = ["CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"]  # also where there is no CUDA device


@pytest.fixture(params=IMPORTABLE)
def stock(request: pytest.FixtureRequest) -> Any:
    """vLLM's own backend of a name that the plugin registers."""
    register()
    return stock_backend(request.param)


def test_backends_of_other_platforms_are_missing_as_in_vllm() -> None:
    register()
    for name in set(BACKENDS) - set(IMPORTABLE):
        try:
            stock = stock_backend(name)
        except ImportError as error:
            with pytest.raises(ImportError, match=str(error)):
                AttentionBackendEnum[name].get_class()
        else:
            assert AttentionBackendEnum[name].get_class() is stock


def test_backends_are_vllms_own_unless_they_are_asked_for(stock: Any, llama: Path) -> None:
    member = AttentionBackendEnum[stock.get_name()]
    assert member.is_overridden() and member.get_class() is stock
    with set_current_vllm_config(create_config(llama)):
        assert member.get_class() is stock
    with set_current_vllm_config(create_config(llama, additional_config={"other": {}})):
        assert member.get_class() is stock
    with set_current_vllm_config(create_config(llama, **engine_args())):
        ours = member.get_class()
        assert ours is not stock and issubclass(ours, stock)
        assert resolve_obj_by_qualname(".".join(ours.full_cls_name())) is ours
    assert member.get_class() is stock


def test_what_vllm_derives_from_our_backends_is_as_if_derived_from_its_own(
    stock: Any, llama: Path
) -> None:
    with set_current_vllm_config(create_config(llama, **engine_args())):
        ours = AttentionBackendEnum[stock.get_name()].get_class()
        theirs = derived_from(stock)
        for kind, backend in derived_from(ours).items():
            builder, impl = backend.get_builder_cls(), backend.get_impl_cls()
            assert issubclass(builder, stock.get_builder_cls()), kind
            assert not [of for of in builder.__mro__ if "icecache" in of.__module__], kind
            assert len(builder.__mro__) == len(theirs[kind].get_builder_cls().__mro__), kind
            if kind == "cross":
                assert issubclass(impl, stock.get_impl_cls())
                assert type(impl.__new__(impl)) is impl
                assert impl.__init__ is stock.get_impl_cls().__init__
            else:
                assert impl is stock.get_impl_cls(), kind
            spec = FullAttentionSpec(
                block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32
            )
            assert backend.customize_spec(spec) == stock.customize_spec(spec), kind
