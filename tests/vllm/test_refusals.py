"""What is refused at start, on vLLM's own configuration classes: the reason and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from icecache import Config, InvalidArgument
from icecache.shape import CacheShape
from icecache.vllm import engine_args, names, plugin, support
from icecache.vllm.connector import IceCacheConnector
from icecache.vllm.drafts import is_draft_layer
from icecache.vllm.engines import Layer, place_layers
from icecache.vllm.host_memory import slots_needed
from icecache.vllm.scheduler import IceCacheAsyncScheduler, IceCacheScheduler, make_scheduler
from icecache.vllm.settings import EIGHT_BITS, engine_config
from icecache.vllm.spec import (
    DraftingManager,
    DraftingSpec,
    HostMemoryManager,
    HostMemorySpec,
    IceCacheManager,
    IceCacheSpec,
)
from vllm import EngineArgs

SHAPE = CacheShape(1, 4, 2, 32)


def config(model: Path, **changes: Any) -> Any:
    """vLLM's configuration of a server with the plugin."""
    arguments: dict[str, Any] = {"model": str(model), "dtype": "float32", "max_model_len": 1024}
    return EngineArgs(**{**arguments, **engine_args(), **changes}).create_engine_config()


def test_the_plain_configuration_is_served(llama: Path) -> None:
    support.check_config(config(llama))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_transfer_config": None}, "no KV connector: add --kv-transfer-config.*icecache serve"),
        ({"additional_config": {}}, "no settings: add --additional-config"),
        ({"additional_config": {"icecache": {"token_budgets": 3}}}, "token_budgets"),
        ({"additional_config": {"icecache": {"sketch_bits": "x"}}}, "sketch_bits must"),
        ({"additional_config": {"icecache": 7}}, "expected .*NAME: VALUE.*got 7"),
        ({"scheduler_cls": None}, "the scheduler of vLLM alone: .*add --scheduler-cls icecache"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill: start without it"),
        ({"kv_cache_dtype": "turboquant_k8v4"}, "-dtype turboquant_k8v4: .*at auto, or set fp8"),
        ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4: leave .* at auto, or set fp8"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window", "1"]},
            "--kv-cache-dtype-skip-layers 1: .*all layers in eight bits.*name sliding_window alone",
        ),
    ],
)
def test_a_configuration_that_cannot_be_served(
    llama: Path, changes: dict[str, Any], message: str
) -> None:
    given = config(llama, **changes)
    with pytest.raises(InvalidArgument, match=message):
        support.check_config(given)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_cache_in_eight_bits_is_the_engines(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    given = config(llama, kv_cache_dtype=dtype)
    support.check_config(given)
    assert engine_config(given).kv_dtype == "int8"
    assert engine_config(config(llama)).kv_dtype == "auto"
    monkeypatch.setattr(support, "device_of", lambda _: "cuda")
    with pytest.raises(InvalidArgument, match=f"{dtype} on a CUDA device: .*leave it at auto"):
        support.check_config(given)


def test_layers_that_stay_with_vllm_in_eight_bits() -> None:
    support.check_stock_layer("a", "fp8", ["auto", "fp8"])
    support.check_stock_layer("a", "auto", ["auto"])
    with pytest.raises(InvalidArgument, match=r"which .*\(a\).*at auto and set kv_dtype=int8"):
        support.check_stock_layer("a", "int8_per_token_head", ["auto", "fp8"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decode_context_parallel_size", 2, "decode context parallelism: use --tensor"),
    ],
)
def test_a_parallelism_that_cannot_be_served(
    llama: Path, field: str, value: int, message: str
) -> None:
    given = config(llama)
    setattr(given.parallel_config, field, value)
    with pytest.raises(InvalidArgument, match=message):
        support.check_config(given)


def test_drafts_of_a_draft_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    given = config(llama, speculative_config=drafts)
    support.check_config(given)
    given.scheduler_config.async_scheduling = True
    with pytest.raises(InvalidArgument, match=r"draft_model and asynch.*add --no-async-scheduling"):
        support.check_config(given)
    given.scheduler_config.async_scheduling = False
    monkeypatch.setattr(type(given), "use_v2_model_runner", True)
    with pytest.raises(InvalidArgument, match=r"draft_model in vLLM's V2 runner: .*RUNNER=0"):
        support.check_config(given)
    given.speculative_config.method = "medusa"
    with pytest.raises(InvalidArgument, match=r"decoding by medusa: .*ngram, suffix, draft_model"):
        support.check_config(given)
    given.speculative_config.method = "draft_model"
    support.check_drafting_group(given, 0)
    with pytest.raises(InvalidArgument, match="a draft model beside layers with sliding windows"):
        support.check_drafting_group(given, 1)


def test_layers_that_draft() -> None:
    support.check_drafters(["a", "b", "c"], ["b", "c"], are_alike=True)
    with pytest.raises(InvalidArgument, match=r"several shapes \(\['c'\]\): use another draft mo"):
        support.check_drafters(["a", "b", "c"], ["c"], are_alike=False)
    with pytest.raises(InvalidArgument, match="drafts by layers without full attention"):
        support.check_drafters(["a"], [], are_alike=True)
    with pytest.raises(InvalidArgument, match="vLLM has not made them last"):
        support.check_drafters(["a", "b"], ["a"], are_alike=True)


@pytest.mark.parametrize(
    ("method", "drafting", "other"),
    [
        ("draft_model", "draft_model.layers.0.attn", "model.layers.1.self_attn.attn"),
        ("mtp", "model.layers.2.mtp_block.self_attn.attn", "model.layers.1.self_attn.attn"),
        ("eagle", "model.layers.2.self_attn.attn", "visual.blocks.1.attn"),
    ],
)
def test_layers_are_told_apart_by_name(llama: Path, method: str, drafting: str, other: str) -> None:
    drafts = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    given = config(llama, speculative_config=drafts)
    given.speculative_config.method = method
    assert is_draft_layer(drafting, given) and not is_draft_layer(other, given)
    given.speculative_config.method = "ngram"
    assert not is_draft_layer(drafting, given)


def test_drafts_of_a_pipeline(llama: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    given = config(llama, speculative_config=drafts)
    given.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(InvalidArgument, match=r"and pipeline parallelism: .*use --tensor-parallel"):
        support.check_config(given)


def test_drafts_on_a_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    given = config(llama, speculative_config=drafts)
    monkeypatch.setattr(support, "device_of", lambda _: "cuda")
    support.check_config(given)
    given.speculative_config.method = "draft_model"
    with pytest.raises(InvalidArgument, match=r"by draft_model on a CUDA device: use one of ngram"):
        support.check_config(given)
    resolved = Config(window_tokens=32, decode_tokens=64)
    support.check_draft_length(15, resolved, on_device=True)
    support.check_draft_length(16, resolved, on_device=False)
    with pytest.raises(InvalidArgument, match="at most 15 on a CUDA device, got 16"):
        support.check_draft_length(16, resolved, on_device=True)


def test_a_vllm_that_did_not_load_the_plugin(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(llama)
    monkeypatch.setattr(plugin, "_loaded", False)
    with pytest.raises(InvalidArgument, match=r"not loaded.*install icecache.*VLLM_PLUGINS"):
        support.check_config(given)


def test_another_connector(llama: Path) -> None:
    given = config(llama)
    given.kv_transfer_config.kv_connector = "OffloadingConnector"
    with pytest.raises(InvalidArgument, match="the KV connector OffloadingConnector"):
        support.check_config(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_cache_dtype": "nvfp4"}, "a KV cache in nvfp4: .*or set fp8"),
        ({"others": {"chunk_lookback": 0}}, "chunk_lookback=0"),
    ],
)
def test_attention_that_the_engine_does_not_compute(change: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {
        "alibi_slopes": None,
        "kv_cache_dtype": "auto",
        # What vLLM hands to some backends of CUDA platforms.
        "others": {"use_alibi_sqrt": False, "chunk_lookback": -1, "block_m": None},
    }
    support.check_attention(**usual)
    with pytest.raises(InvalidArgument, match=message):
        support.check_attention(**{**usual, **change})


def test_pictures_whose_tokens_attend_to_one_another(llama: Path) -> None:
    given = config(llama, hf_overrides={"is_mm_prefix_lm": True})
    with pytest.raises(InvalidArgument, match=r"attend to one another: .* --language-model-only"):
        support.check_config(given)


def test_the_text_of_a_model_with_pictures_is_served(tmp_path: Path) -> None:
    given = config(
        kinds.make("vision", tmp_path),
        hf_overrides={"is_mm_prefix_lm": True},
        language_model_only=True,
        skip_tokenizer_init=False,
    )
    support.check_config(given)


def test_attention_that_is_not_causal(llama: Path) -> None:
    given = config(llama)
    given.attention_config.use_non_causal = True
    with pytest.raises(InvalidArgument, match="not causal: serve such models with stock vLLM"):
        support.check_config(given)


def test_a_model_without_a_layer_to_serve() -> None:
    support.check_groups([1], ["SlidingWindowSpec", "IceCacheSpec"])
    with pytest.raises(InvalidArgument, match=r"tokens \(cache groups: MambaSpec\): .*stock vLLM"):
        support.check_groups([], ["MambaSpec"])


def test_values_of_another_head_dim() -> None:
    support.check_head_dims(64, 64)
    with pytest.raises(InvalidArgument, match=r"head dim 32 of values and 64 of keys: serve"):
        support.check_head_dims(64, 32)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Layer("a", SHAPE), Layer("b", replace(SHAPE, num_q_heads=8))], "layers that differ .4 q"),
        ([Layer("a", SHAPE), Layer("b", SHAPE, owner="a")], "layers that share keys and values on"),
        (
            [Layer("a", SHAPE, sinks=torch.zeros(4))],
            "learned attention sinks on cuda: .*stock vLLM",
        ),
        ([Layer("a", replace(SHAPE, logit_softcap=30.0))], "soft-capped attention logits on cuda"),
    ],
)
def test_layers_that_a_device_does_not_compute(layers: list[Layer], message: str) -> None:
    shapes, _ = place_layers(layers)
    support.check_layers(layers, shapes, None, drafts=False)
    with pytest.raises(InvalidArgument, match=message):
        support.check_layers(layers, shapes, torch.device("cuda"), drafts=False)


def test_drafts_of_layers_that_share_keys_and_values() -> None:
    layers = [Layer("a", SHAPE), Layer("b", SHAPE, owner="a")]
    support.check_layers(layers[:1], [SHAPE], None, drafts=True)
    with pytest.raises(InvalidArgument, match=r"share keys and values: .*--speculative-config"):
        support.check_layers(layers, [SHAPE], None, drafts=True)


def test_another_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, served in (
        ("0.28.9", False),
        ("0.29.0", True),
        ("0.33.1rc1", True),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ):
        monkeypatch.setattr(plugin, "installed_version", lambda version=version: version)
        assert plugin.is_supported_version() is served, version
    monkeypatch.setattr(support, "is_supported_version", lambda: False)
    with pytest.raises(InvalidArgument, match=r"needs vLLM 0\.29 or newer and below 0\.34, got "):
        support.check_version()


def test_host_memory_for_one_longest_request() -> None:
    support.check_memory(slots_needed(1000) * 64, 64, 1000)
    with pytest.raises(InvalidArgument, match=r"host_memory: expected at least .*1,000 tokens"):
        support.check_memory(slots_needed(1000) * 64 - 1, 64, 1000)
    with pytest.raises(InvalidArgument, match="at most this machine's"):
        support.check_memory(1 << 60, 64, 1000)


def test_every_name_that_the_plugin_touches_is_there() -> None:
    assert plugin.is_supported_version()
    for name in names.__all__:
        assert getattr(names, name) is not None


@pytest.mark.parametrize(
    ("ours", "methods"),
    [
        (HostMemoryManager, {"pop_blocks_for_free", "cache_blocks", "find_longest_cache_hit"}),
        (
            IceCacheManager,
            {
                "get_num_blocks_to_allocate",
                "allocate_new_blocks",
                "allocate_external_computed_blocks",
                "remove_skipped_blocks",
                "get_num_skipped_tokens",
            },
        ),
        (DraftingManager, {"get_num_blocks_to_allocate", "allocate_new_blocks"}),
        (IceCacheSpec, {"max_memory_usage_bytes"}),
        (
            IceCacheScheduler.__mro__[1],
            {"has_finished_requests", "reset_prefix_cache", "update_from_output"},
        ),
        (
            IceCacheConnector,
            {
                "get_num_new_matched_tokens",
                "update_state_after_alloc",
                "build_connector_meta",
                "request_finished",
                "request_finished_all_groups",
                "bind_connector_metadata",
                "get_block_ids_with_load_errors",
                "clear_connector_metadata",
                "get_kv_connector_stats",
                "shutdown",
                "start_load_kv",
                "wait_for_layer_load",
                "save_kv_layer",
                "wait_for_save",
                "build_kv_connector_stats",
                "build_prom_metrics",
                "requires_kv_delivery",
                "reset_cache",
                "take_events",
            },
        ),
    ],
)
def test_what_we_override_is_vllms(ours: type, methods: set[str]) -> None:
    own: Callable[[str], bool] = lambda name: not name.startswith("_")  # noqa: E731
    public = {name for name in vars(ours) if own(name) and callable(getattr(ours, name))}
    added = {"has_room", "hold", "get_num_common_prefix_blocks", "use_prefixes"}
    added |= {"supports_sleep_mode"}  # of 0.33
    assert public - added <= methods
    for name in methods:
        assert any(hasattr(base, name) for base in ours.__mro__[1:]), f"{ours.__name__}.{name}"


def test_hits_are_said_to_come_from_host_memory() -> None:
    assert IceCacheConnector._cache_hit_source == "host"


def test_specs_merge_as_vllms_and_keep_what_they_say_of_memory() -> None:
    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    for kind, stock in (
        (IceCacheSpec, names.AttentionSpec),
        (DraftingSpec, names.FullAttentionSpec),
    ):
        specs = [
            kind.of(stock(**shape), host_slots=slots, slot_bytes=slots, room_step=8)
            for slots in (9, 7)
        ]
        merged = kind.merge(specs)
        assert type(merged) is kind and issubclass(kind, HostMemorySpec)
        assert (merged.host_slots, merged.slot_bytes, merged.room_step) == (7, 9, 8)
        assert merged.page_size_bytes == stock(**shape).page_size_bytes
        other = kind.of(stock(**{**shape, "head_size": 64}), host_slots=9)
        with pytest.raises(AssertionError):
            kind.merge([specs[0], other])


@pytest.mark.parametrize("ahead", [False, True])
def test_the_scheduler_is_the_one_that_vllm_would_take(
    llama: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    given = config(llama)
    given.scheduler_config.async_scheduling = ahead
    expected = IceCacheAsyncScheduler if ahead else IceCacheScheduler
    assert issubclass(expected, names.AsyncScheduler) is ahead
    monkeypatch.setattr(expected, "__init__", lambda self, **arguments: None)
    assert type(make_scheduler(given)) is expected
    assert given.scheduler_config.get_scheduler_cls() is make_scheduler


def test_vllm_is_imported_by_three_modules() -> None:
    folder = Path(names.__file__).parent
    for path in folder.glob("*.py"):
        if path.name not in ("names.py", "plugin.py", "command.py"):
            assert not re.search(r"^\s*(from|import) vllm", path.read_text(), re.MULTILINE), path
