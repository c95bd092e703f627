"""What this front end can serve; everything else is refused with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs
from transformers.modeling_outputs import CausalLMOutputWithPast

from icecache import InvalidArgument, Unavailable
from icecache.hf.mask import LazyMask
from icecache.hf.placement import DEVICES, compute_device

# What transformers calls a model's cache, as an argument and as an output: since 5.24 `cache`, with
# the former name accepted as well.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values")))

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Layers that keep transformers' own cache: their memory does not grow with the context.
_STOCK_LAYERS = frozenset(
    ["sliding_attention", "chunked_attention", "conv", "linear_attention", "dummy"]
)
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def check_transformers() -> None:
    """Raises Unavailable where transformers is too old for this front end."""
    if not hasattr(Cache, "get_query_offset"):
        import transformers

        raise Unavailable(
            f"transformers: icecache needs the cache interface of transformers 5.16, found "
            f"{transformers.__version__}; run pip install -U transformers"
        )


def full_attention_layers(text_config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that attend to the whole context.

    Raises InvalidArgument for layer types that are not supported, and where there is none.
    """
    layer_types, _ = get_layer_types_and_kwargs(text_config)
    for index, layer_type in enumerate(layer_types):
        if layer_type != "full_attention" and layer_type not in _STOCK_LAYERS:
            raise InvalidArgument(
                f"model: layer {index} is of type {layer_type!r}; IceCache serves full_attention "
                f"and leaves {', '.join(sorted(_STOCK_LAYERS - {'dummy'}))} to transformers. Use "
                "the model without IceCache"
            )
    layers = [i for i, layer_type in enumerate(layer_types) if layer_type == "full_attention"]
    if not layers:
        raise InvalidArgument(
            "model: no layer attends to the whole context "
            f"({', '.join(sorted(set(layer_types)))} only), so its cache is bounded already. Use "
            "the model without IceCache"
        )
    return layers


def check_prefill_budget(text_config: PreTrainedConfig) -> None:
    """Raises InvalidArgument for models whose prompts the engine attends to exactly alone."""
    if "reuse" in (getattr(text_config, "kv_sharing_modes", None) or ()):
        raise InvalidArgument(
            f"prefill_budget: expected 0 for {text_config.model_type}, whose layers share keys and "
            "values: what each of them looks for would depend on how a prompt is cut into calls. "
            "Leave it out for this model"
        )


def check_config(config: PreTrainedConfig) -> None:
    """Raises InvalidArgument for models whose attention the engine cannot compute."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidArgument(
            f"model: {name} is an encoder-decoder model; IceCache serves decoder-only models. Use "
            "the model without IceCache"
        )
    text = config.get_text_config(decoder=True)
    for field in ("add_cross_attention", "cross_attention_layers"):
        if value := _any_layer(text, field):
            raise InvalidArgument(
                f"model: {name} has cross-attention ({field} = {value}); IceCache serves "
                "self-attention only. Use the model without IceCache"
            )
    if rank := _any_layer(text, "kv_lora_rank"):
        raise InvalidArgument(
            f"model: {name} caches compressed keys and values (latent attention, kv_lora_rank = "
            f"{rank}), which the engine does not serve. Use the model without IceCache"
        )
    if not getattr(text, "is_causal", True):
        raise InvalidArgument(
            f"model: {name} attends in both directions (is_causal = False); IceCache serves causal "
            "models. Use the model without IceCache"
        )


def logit_softcap(text_config: PreTrainedConfig) -> float:
    """The soft cap of attention logits; 0: none."""
    return float(_any_layer(text_config, "attn_logit_softcapping") or 0)


def _any_layer(text_config: PreTrainedConfig, field: str) -> Any:
    """The value of `field`, or the first one that counts where it differs from layer to layer."""
    layers = getattr(text_config, "per_layer_config", None) or [text_config]
    return next((value for layer in layers if (value := getattr(layer, field, None))), None)


def check_model(model: Any) -> None:
    """Raises InvalidArgument where `icecache.enable` cannot serve `model`."""
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgument(
            f"model: expected a transformers model, got {type(model).__name__}; pass the wrapped "
            "transformers model itself"
        )
    check_config(model.config)
    supports_caches = getattr(model, "_supports_default_dynamic_cache", None)
    if supports_caches is not None and not supports_caches():
        raise InvalidArgument(
            f"model: {type(model).__name__} has a kind of cache of its own, or none, and takes no "
            "other. Use the model without IceCache"
        )
    if not model._can_set_attn_implementation():
        raise InvalidArgument(
            f"model: {type(model).__name__} does not use transformers' attention interface, so its "
            "attention cannot be replaced. Use the model without IceCache"
        )
    if model.dtype not in _DTYPES:
        raise InvalidArgument(
            f"model: expected dtype float32, bfloat16 or float16, got {model.dtype}; load it with "
            "dtype=torch.float32"
        )


def check_forward(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for forward calls of an enabled model that cannot be served."""
    if model.training:
        raise InvalidArgument(
            "model: IceCache serves inference only, but the model is in training mode; call "
            "model.eval(), or icecache.disable(model) to train"
        )
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise InvalidArgument(
            "model: IceCache computes no gradients; run under torch.inference_mode(), or call "
            "icecache.disable(model)"
        )
    if model.device.type != "cpu":  # of the first parameter: looking at all takes milliseconds
        compute_device(model)
    if arguments.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise InvalidArgument(
            "output_attentions: IceCache keeps no attention matrices; drop the argument, or call "
            "icecache.disable(model) and use eager attention"
        )
    packed = [name for name in _PACKED if arguments.get(name) is not None]
    if packed:
        raise InvalidArgument(
            f"{', '.join(packed)}: packed sequences (flash attention arguments) are not supported; "
            "pass a padded batch with attention_mask"
        )
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        form = f"{mask.ndim}-D" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InvalidArgument(
            f"attention_mask: expected a 2-D padding mask [batch, tokens], got {form}; IceCache "
            "serves causal attention with padding only"
        )


def check_generation(generation_config: Any) -> None:
    """Raises InvalidArgument for `generate` settings that exclude IceCache."""
    implementation = generation_config.cache_implementation
    if implementation not in (None, "dynamic"):
        raise InvalidArgument(
            f"cache_implementation: {implementation!r} replaces IceCache; leave it out, or call "
            "icecache.disable(model)"
        )
    if getattr(generation_config, "output_attentions", False):
        raise InvalidArgument(
            "output_attentions: IceCache keeps no attention matrices; drop the argument, or call "
            "icecache.disable(model) and use eager attention"
        )


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    dropout: float,
    arguments: Mapping[str, Any],
) -> LazyMask:
    """The mask, where one attention call over cached tokens is one that the engine computes.

    Raises InvalidArgument else; the shapes are query `[B, Hq, T, D]`, key and value
    `[B, Hkv, T, D]`.
    """
    for name in ("position_bias", "sliding_window", "cache", *_PACKED):
        if arguments.get(name) is not None:
            raise InvalidArgument(
                f"{name}: the attention of a cached layer was called with it, which the engine "
                "does not compute. Use the model without IceCache"
            )
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise InvalidArgument(
            "model: IceCache computes no dropout and no gradients; call model.eval() and run under "
            "torch.inference_mode()"
        )
    if key.shape[-1] != value.shape[-1]:
        raise InvalidArgument(
            f"model: expected keys and values of one head_dim, got {key.shape[-1]} and "
            f"{value.shape[-1]}. Use the model without IceCache"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InvalidArgument(
            f"model: expected queries, keys and values of one dtype, got {query.dtype}, "
            f"{key.dtype} and {value.dtype}"
        )
    if query.device.type not in DEVICES:
        raise InvalidArgument(
            f"model: expected tensors on the CPU or a CUDA device, got {query.device}; load the "
            'model with device_map={"": "cpu"} or {"": "cuda:0"}'
        )
    if not isinstance(mask, LazyMask):
        form = "none" if mask is None else f"a {type(mask).__name__}"
        raise InvalidArgument(
            f"attention_mask: expected a 2-D padding mask or none for the model, and attention got "
            f"{form} of its own; IceCache serves causal attention with padding only"
        )
    if not mask.is_causal or arguments.get("is_causal") is False:
        raise InvalidArgument(
            "attention_mask: the model asked for a mask that is not causal with padding, as "
            "encoders do (is_decoder = False in their configuration) and models whose image "
            "tokens see each other in both directions (token_type_ids of image tokens); IceCache "
            "serves causal attention with padding only. Use the model without IceCache "
            "for such inputs"
        )
    if mask.q_length != query.shape[2]:
        raise InvalidArgument(
            f"attention_mask: expected a mask for {query.shape[2]} new tokens, got one for "
            f"{mask.q_length}"
        )
    return mask
