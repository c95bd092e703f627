"""Tiny random models of every causal language model in transformers' mapping, made by rule.

A configuration class says which sizes it has and which types of layers; `tiny_config` makes each
size small and keeps one or two layers of each type. What no rule covers is named per model type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)  # matrices are so small that threads would only wait for each other

VOCABULARY = 96
_LAYERS = 3
# Made small where a configuration class leaves them open, too.
_ALWAYS = frozenset(
    ["num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"]
)
# Small values, by field. A field that a configuration class lacks is left out.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"),
        _LAYERS,
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    "num_decoder_layers": _LAYERS,
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"),
            *("num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "dim_head", "kv_channels", "attention_head_size"), 16
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "dff", "dim_ff", "d_inner", "decoder_ffn_dim"),
            *("encoder_ffn_dim", "feed_forward_size", "moe_intermediate_size", "ffn_hidden_size"),
            *(
                "shared_expert_intermediate_size",
                "shared_intermediate_size",
                "expert_ffn_hidden_size",
            ),
            *(
                "dense_intermediate_size",
                "intermediate_size_mlp",
                "moe_shared_expert_intermediate_size",
            ),
            *("shared_experts_intermediate_size",),
        ),
        32,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
        256,
    ),
    **dict.fromkeys(("original_max_position_embeddings", "context_length"), 256),
    **dict.fromkeys(
        (
            *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
            *("zero_expert_num",),
        ),
        4,
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "o_groups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 16),
    **dict.fromkeys(
        (
            *("sliding_window", "sliding_window_size", "window_size", "local_attention"),
            *("attention_chunk_size", "attention_window_size", "index_topk"),
        ),
        16,
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
    "encoder_hash_byte_group_vocab": VOCABULARY,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "hidden_size_per_layer_input": 8,
    "is_decoder": True,
    "initializer_range": 0.15,  # attention is sharp: a lost token changes the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 28,
    "patch_size": 14,
}


# Fields that the rules below get wrong, and the model types of which that is true.
_SAME_LAYERS = ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"]
_SAME_LAYERS += ["mvp", "pegasus", "plbart", "whisper"]
_LATENT = ["axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"]
_LATENT += ["dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash"]
_LATENT += ["minicpm3", "sarvam_mla", "youtu"]
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_MIXED = ["linear_attention", "full_attention", "full_attention"]
_SLIDING = ["sliding_attention", "full_attention", "full_attention"]
_SPARSE = ["full_attention", "minimax_m3_sparse"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
_INDEXER |= {"indexer_budget": 16, "indexer_compress_ratio": 4}
_SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"encoder_layers": _LAYERS} for name in _SAME_LAYERS},
    **{name: {"num_key_value_heads": 4, "num_experts_per_tok": 2} for name in _LATENT},
    "bamba": {"attn_layer_indices": [1, 2]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 1},
    "dots1": _EXPERTS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    **{name: {"global_head_dim": 32} for name in ("gemma4_text", "gemma4_unified_text")},
    **{name: {"text_config": {"global_head_dim": 32}} for name in ("gemma4", "gemma4_unified")},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": _MIXED, "num_hidden_layers": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mamba2": {"head_dim": 32, "hidden_size": 64, "num_heads": 4},
    "minimax_m3_vl_text": {"layer_types": _SPARSE, "num_hidden_layers": 2, "index_n_heads": 2},
    "ministral": {"layer_types": _SLIDING, "num_hidden_layers": 3},
    "mistral": {"sliding_window": None},
    "prophetnet": {"num_encoder_layers": _LAYERS},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of a small model of this type, with `changes`."""
    config_class = CONFIG_MAPPING[model_type]
    settings = _settings(config_class(), is_text=True)
    for name, value in {**_SPECIAL.get(model_type, {}), **changes}.items():
        inner = settings.get(name)
        settings[name] = inner | value if isinstance(inner, dict) else value
    return config_class(**settings)


def tiny_model(model_type: str, **changes: Any) -> Any:
    """The model in inference mode, with random weights, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()


def _is_set(default: Any, name: str) -> bool:
    try:
        return getattr(default, name, None) is not None
    except RuntimeError:  # it differs from layer to layer
        return True


def _settings(default: Any, is_text: bool) -> dict[str, Any]:
    """Small values for the fields of `default` and of the configurations within it."""
    aliases = getattr(default, "attribute_map", {})
    names = {field.name for field in dataclasses.fields(default)} | set(aliases.values())
    settings = {
        name: value
        for name, value in _SIZES.items()
        if name in names
        and (_is_set(default, name) or name in _ALWAYS)
        and (is_text or not name.endswith("token_id"))
    }
    types = getattr(default, "layer_types", None) if "layer_types" in names else None
    if types:
        kept = [kind for kind in dict.fromkeys(types) if kind != "full_attention"]
        kept += ["full_attention"] * (
            max(_LAYERS - len(kept), 1) if "full_attention" in types else 0
        )
        settings["layer_types"] = kept
        settings[aliases.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            own = _settings(part, is_text="text" in name or "decoder" in name)
            settings[name] = {"model_type": part.model_type, **own}
    return settings
