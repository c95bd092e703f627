"""What the front end does not serve is refused before the first token, with what to do instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_models import Model
from icecache import InvalidArgument
from icecache.hf import IceCache
from icecache.hf.support import CACHE
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    StaticCache,
)


class UntouchedEngine(icecache.Engine):
    """Fails the test where a refused call reaches the engine."""

    def append(self, seqs: Any, layer: int, keys: Any, values: Any) -> None:
        raise AssertionError("a token was appended before the refusal")


def new_model(auto: Any, config: Any) -> Model:
    return auto.from_config(config).eval()


@pytest.fixture
def model() -> Iterator[Model]:
    made = hf_models.build("llama")
    icecache.enable(made, engine_class=UntouchedEngine)
    yield made
    icecache.disable(made)


def test_refuses_encoder_decoder_models() -> None:
    config = AutoConfig.for_model(
        "t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=16
    )
    with pytest.raises(InvalidArgument, match="encoder-decoder"):
        icecache.enable(new_model(AutoModelForSeq2SeqLM, config))


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("mllama_text_model", {"cross_attention_layers": [1]}, "cross_attention_layers"),
        ("deepseek_v3", {"kv_lora_rank": 16}, "kv_lora_rank"),
    ],
)
def test_refuses_other_kinds_of_attention(
    architecture: str, changes: dict[str, Any], named: str
) -> None:
    config = AutoConfig.for_model(architecture, **changes)
    with pytest.raises(InvalidArgument, match=f"{named} = .*without IceCache"):
        IceCache(config)


def test_refuses_models_without_full_attention() -> None:
    with pytest.raises(InvalidArgument, match="no layer attends to the whole context"):
        icecache.enable(hf_models.build("mistral", sliding_window=16))


def test_refuses_models_outside_the_attention_interface() -> None:
    bloom = hf_models.build("bloom", n_layer=1, n_head=2)
    with pytest.raises(InvalidArgument, match="attention interface"):
        icecache.enable(bloom)


def test_refuses_what_is_not_a_transformers_model() -> None:
    with pytest.raises(InvalidArgument, match="got Linear"):
        icecache.enable(torch.nn.Linear(2, 2))


def test_refuses_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        elsewhere = hf_models.build("llama")
    with pytest.raises(InvalidArgument, match="load the weights first"):
        icecache.enable(elsewhere)


@torch.inference_mode()
def test_refuses_a_model_that_moved(model: Model) -> None:
    model.to("meta")
    with pytest.raises(InvalidArgument, match="no data"):
        model(hf_models.prompt())


def test_refuses_other_dtypes() -> None:
    with pytest.raises(InvalidArgument, match=r"torch\.float64"):
        icecache.enable(hf_models.build("llama").double())


@pytest.mark.parametrize("head_dim", [12, 520])
def test_refuses_other_head_dims(head_dim: int) -> None:
    made = hf_models.build("llama", head_dim=head_dim)
    with pytest.raises(InvalidArgument, match=f"got {head_dim}. Use the model without"):
        icecache.enable(made)
    assert made.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"token_budget": 20}, "token_budget must be at least .* = 36, got 20"),
        ({"token_bugdet": 64}, 'nearest name is "token_budget"'),
        ({"index": "treee"}, 'index must be tree, .*got "treee"'),
        ({"host_memory": "64K"}, "host_memory must hold at least one sequence"),
        ({"device_tokens": 1024}, "device_tokens must be 0 on the CPU, .* got 1024"),
    ],
)
def test_refuses_settings_when_enabled(settings: dict[str, Any], named: str) -> None:
    made = hf_models.build("llama")
    with pytest.raises(InvalidArgument, match=named):
        icecache.enable(made, **settings)
    assert made.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_a_full_pool_refuses_one_request_only() -> None:
    made = icecache.enable(hf_models.build("llama"), host_memory="256K")
    for _ in range(2):
        with pytest.raises(icecache.OutOfPages, match=r"raise host_memory \(262144 bytes\)"):
            made.generate(hf_models.prompt(1, 400), max_new_tokens=2)
        assert made.generate(hf_models.prompt(), max_new_tokens=2).shape == (
            1,
            hf_models.PROMPT + 2,
        )
    cache = made(hf_models.prompt(1, 100))[CACHE]
    with pytest.raises(icecache.OutOfPages):
        made(hf_models.prompt(1, 300), **{CACHE: cache})
    assert cache.get_seq_length() == 100
    assert made(hf_models.prompt(1, 3), **{CACHE: cache}).logits.isfinite().all()


def test_refuses_dense_layers_that_stay_stock() -> None:
    with pytest.raises(InvalidArgument, match=r"dense_layers: .*\(1-2\), got '0'"):
        icecache.enable(hf_models.build("cohere2"), dense_layers="0")


def test_refuses_training_mode(model: Model) -> None:
    model.train()
    with pytest.raises(InvalidArgument, match="training mode"):
        model.generate(hf_models.prompt(), max_new_tokens=2)


def test_refuses_gradients(model: Model) -> None:
    with pytest.raises(InvalidArgument, match="no gradients"):
        model(hf_models.prompt())


@pytest.mark.parametrize("in_generate", [True, False])
def test_refuses_output_attentions(model: Model, in_generate: bool) -> None:
    with pytest.raises(InvalidArgument, match="output_attentions"), torch.inference_mode():
        if in_generate:
            model.generate(
                hf_models.prompt(),
                max_new_tokens=2,
                output_attentions=True,
                return_dict_in_generate=True,
            )
        else:
            model(hf_models.prompt(), output_attentions=True)


@torch.inference_mode()
def test_refuses_flash_attention_arguments(model: Model) -> None:
    with pytest.raises(InvalidArgument, match="cu_seq_lens_q"):
        model(hf_models.prompt(), cu_seq_lens_q=torch.tensor([0, 45]))


@torch.inference_mode()
def test_refuses_4d_masks(model: Model) -> None:
    length = hf_models.PROMPT
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises(InvalidArgument, match=r"attention_mask: .* got 4-D"):
        model(hf_models.prompt(), attention_mask=mask)


@torch.inference_mode()
def test_refuses_masks_that_are_not_causal() -> None:
    """Gemma3's image tokens see each other in both directions."""
    model = hf_models.build("gemma3_text", use_bidirectional_attention=True)
    icecache.enable(model, engine_class=UntouchedEngine)
    with pytest.raises(InvalidArgument, match="causal"):
        model(hf_models.prompt())


def gemma3_with_images() -> Model:
    text = hf_models.build("gemma3_text").config.to_dict()
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"intermediate_size": 16, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**vision, **sizes},
        image_token_index=90,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return new_model(AutoModelForImageTextToText, config)


def test_refuses_image_tokens_that_see_each_other() -> None:
    model = icecache.enable(gemma3_with_images(), engine_class=UntouchedEngine)
    ids = hf_models.prompt()
    token_types = torch.zeros_like(ids)
    token_types[:, 5:9] = 1
    with pytest.raises(InvalidArgument, match="token_type_ids of image tokens"):
        model.generate(ids, token_type_ids=token_types, max_new_tokens=2)


def test_serves_text_with_token_types() -> None:
    """Gemma 3's processor adds them to text without images too."""
    model, ids = gemma3_with_images(), hf_models.prompt().clamp(max=80)
    settings = {"token_type_ids": torch.zeros_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    icecache.enable(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert icecache.stats(model).total("dense_steps") > 0


@torch.inference_mode()
def test_refuses_a_changed_past_mask() -> None:
    model = hf_models.build("llama")
    icecache.enable(model)
    batch = hf_models.padded()
    cache = model(**batch)[CACHE]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    mask[0, 3] = 0
    token = hf_models.prompt(3, 1)
    for wrong in (mask, None):
        with pytest.raises(InvalidArgument, match="earlier tokens differ"):
            model(token, attention_mask=wrong, **{CACHE: cache})
    mask[0, 3] = 1
    model(token, attention_mask=mask, **{CACHE: cache})


@torch.inference_mode()
def test_refuses_another_batch_size() -> None:
    model = hf_models.build("llama")
    icecache.enable(model)
    cache = model(hf_models.prompt(2))[CACHE]
    with pytest.raises(InvalidArgument, match="holds 2 rows, got a batch of 3"):
        model(hf_models.prompt(3, 1), **{CACHE: cache})


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_refuses_icecache_in_stock_attention(attention: str) -> None:
    model = hf_models.build("llama")
    model.set_attn_implementation(attention)
    cache = IceCache(model.config, engine_class=UntouchedEngine)
    with pytest.raises(InvalidArgument, match=r"icecache\.enable\(model\)"):
        model(hf_models.prompt(), **{CACHE: cache})


@torch.inference_mode()
def test_refuses_attention_changed_after_enable(model: Model) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(InvalidArgument, match=r"call icecache\.enable again"):
        model(hf_models.prompt())


@torch.inference_mode()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_refuses_other_caches(model: Model, kind: type) -> None:
    sizes = {"max_cache_len": 64} if kind is StaticCache else {}
    cache = kind(config=model.config, **sizes)
    with pytest.raises(InvalidArgument, match=f"got {kind.__name__}"):
        model(hf_models.prompt(), **{CACHE: cache})
    with pytest.raises(InvalidArgument, match=f"got {kind.__name__}"):
        model.generate(hf_models.prompt(), **{CACHE: cache}, max_new_tokens=2)


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_refuses_cache_implementations(model: Model, implementation: str) -> None:
    with pytest.raises(InvalidArgument, match=f"cache_implementation: '{implementation}'"):
        model.generate(hf_models.prompt(), cache_implementation=implementation, max_new_tokens=2)


def test_refuses_continuous_batching(model: Model) -> None:
    with pytest.raises(InvalidArgument, match="continuous batching"):
        model.generate_batch(inputs=hf_models.prompt(2).tolist())
    with pytest.raises(InvalidArgument, match="continuous batching"):
        model.generate(hf_models.prompt(), cache_implementation="paged", max_new_tokens=2)


@torch.inference_mode()
def test_refuses_fullgraph_compilation(model: Model) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="compile without fullgraph"):
        compiled(hf_models.prompt())


@torch.inference_mode()
def test_compiles_with_graph_breaks() -> None:
    model = hf_models.build("llama", num_hidden_layers=1)
    ids = hf_models.prompt()
    expected = model(ids).logits
    icecache.enable(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert icecache.stats(model).memory is not None


@torch.inference_mode()
def test_refuses_nan_keys_and_stays_usable() -> None:
    model = hf_models.build("llama")
    icecache.enable(model)
    cache = model(hf_models.prompt())[CACHE]
    embeddings = torch.full((1, 1, 64), torch.nan)
    with pytest.raises(InvalidArgument, match="NaN or Inf"):
        model(inputs_embeds=embeddings, **{CACHE: cache})
    assert cache.get_seq_length() == hf_models.PROMPT
    model(hf_models.prompt(1, 1), **{CACHE: cache})


def test_refuses_stats_of_other_models() -> None:
    with pytest.raises(InvalidArgument, match="not enabled"):
        icecache.stats(hf_models.model("llama"))


def test_refuses_copies_of_enabled_models(model: Model) -> None:
    with pytest.raises(InvalidArgument, match=r"icecache\.disable\(model\) first, copy"):
        copy.deepcopy(model)
    with pytest.raises(InvalidArgument, match="pickled"):
        pickle.dumps(model)
    icecache.disable(model)
    icecache.enable(copy.deepcopy(model), engine_class=UntouchedEngine)


def test_refuses_pickling() -> None:
    cache = IceCache(hf_models.model("llama").config, engine_class=UntouchedEngine)
    with pytest.raises(InvalidArgument, match="pickled"):
        pickle.dumps(cache)
