"""A tiny random model of each architecture that people serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
import transformers
from models import VOCABULARY, random_weights

SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = 64  # tokens that a layer with a sliding window attends to

# What configurations call their sizes. Each takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Mixtures of experts.
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    # Linear attention.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    # State spaces.
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}


def _hybrid(other: str, layers: int = 4) -> dict[str, Any]:
    """Every second layer attends to everything."""
    return {"num_hidden_layers": layers, "layer_types": [other, FULL] * (layers // 2)}


_WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, **_hybrid(SLIDING)}
_LINEAR = _hybrid("linear_attention")
_TIED = {"tie_word_embeddings": True}  # where vLLM knows nothing else
# Embeddings that each layer has of its own.
_PER_LAYER: dict[str, Any] = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
_GEMMA_4 = {**_WINDOWS, **_PER_LAYER, "num_experts": None, "moe_intermediate_size": None}

# By the name in the table of docs/vllm-models.md: the configuration's class, and its fields.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "AFMoE": (
        "AfmoeConfig",
        {
            **_WINDOWS,
            "num_dense_layers": 4,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "Apertus": ("ApertusConfig", {}),
    "Arcee": ("ArceeConfig", {}),
    "Cohere": ("CohereConfig", {"use_qk_norm": True}),
    "Cohere 2": ("Cohere2Config", _WINDOWS),
    "CWM": ("CwmConfig", _WINDOWS),
    "ERNIE 4.5": ("Ernie4_5Config", {}),
    "ERNIE 4.5 MoE": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "EXAONE 4": ("Exaone4Config", {**_WINDOWS, "sliding_window_pattern": 2}),
    "EXAONE MoE": ("ExaoneMoeConfig", {**_WINDOWS, "sliding_window_pattern": 2}),
    "Falcon": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "Falcon-H1": ("FalconH1Config", {"mamba_d_ssm": 128, "mamba_chunk_size": 32}),
    "Gemma": ("GemmaConfig", {}),
    "Gemma 2": ("Gemma2Config", {**_WINDOWS, **_TIED, "attn_logit_softcapping": 5.0}),
    "Gemma 3": ("Gemma3TextConfig", _WINDOWS),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        {
            **_WINDOWS,
            **_TIED,
            **_PER_LAYER,
            **_hybrid(SLIDING, 6),
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
        },
    ),
    "Gemma 4": ("Gemma4TextConfig", _GEMMA_4),
    "Gemma 4, shared layers": (
        "Gemma4TextConfig",
        {**_GEMMA_4, **_hybrid(SLIDING, 6), "num_kv_shared_layers": 2},
    ),
    "GLM": ("GlmConfig", {}),
    "GLM 4": ("Glm4Config", {}),
    "GLM 4 MoE": (
        "Glm4MoeConfig",
        {"head_dim": 32, "first_k_dense_replace": 1, "use_qk_norm": True},
    ),
    "gpt-oss": ("GptOssConfig", _WINDOWS),
    "GPT-2": ("GPT2Config", {"n_positions": 2048, "n_embd": 64, "n_layer": 2, "n_head": 2}),
    "GPT-J": (
        "GPTJConfig",
        {"n_positions": 2048, "n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "Granite": ("GraniteConfig", {"attention_multiplier": 0.1}),
    "Granite MoE": ("GraniteMoeConfig", {}),
    "Granite MoE, shared experts": ("GraniteMoeSharedConfig", {}),
    "Granite hybrid": (
        "GraniteMoeHybridConfig",
        {**_hybrid("mamba"), "mamba_n_heads": 8, "mamba_chunk_size": 32},
    ),
    "Hunyuan dense": ("HunYuanDenseV1Config", {}),
    "Hunyuan 3": (
        "HYV3Config",
        {"first_k_dense_replace": 1, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    ),
    "Jais 2": ("Jais2Config", {}),
    "Jamba": (
        "JambaConfig",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_conv": 4,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "Laguna": (
        "LagunaConfig",
        {
            **_WINDOWS,
            "num_attention_heads_per_layer": [4, 4, 4, 8],
            "mlp_layer_types": ["dense"] * 4,  # vLLM has its experts for GPUs alone
        },
    ),
    "LFM 2": (
        "Lfm2Config",
        {
            **_hybrid("conv"),
            "conv_dim": 128,
            "block_dim": 128,
            "block_ff_dim": 128,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "LFM 2 MoE": ("Lfm2MoeConfig", {**_hybrid("conv"), "num_dense_layers": 1}),
    "Llama": ("LlamaConfig", {}),
    "Llama 4": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 128,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 1, 1, 0],
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "Mellum": ("MellumConfig", _WINDOWS),
    "MiniMax-M2": (
        "MiniMaxM2Config",
        {"rotary_dim": 32, "scoring_func": "softmax", "use_routing_bias": True},
    ),
    "Ministral 3": ("Ministral3Config", {"sliding_window": None}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Mixtral": ("MixtralConfig", {}),
    "Nemotron": ("NemotronConfig", {}),
    "Nemotron-H": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "attention"],
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", _WINDOWS),
    "OLMo hybrid": ("OlmoHybridConfig", _LINEAR),
    "OLMoE": ("OlmoeConfig", {}),
    "OPT": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "Phi": ("PhiConfig", {}),
    "Phi 3": ("Phi3Config", {"sliding_window": None}),
    "Qwen 2": ("Qwen2Config", {}),
    "Qwen 2 MoE": ("Qwen2MoeConfig", {}),
    "Qwen 3": ("Qwen3Config", {}),
    "Qwen 3 MoE": ("Qwen3MoeConfig", {}),
    "Qwen3-Next": ("Qwen3NextConfig", _LINEAR),
    "Qwen 3.5": ("Qwen3_5TextConfig", _LINEAR),
    "Qwen 3.5 MoE": ("Qwen3_5MoeTextConfig", _LINEAR),
    "Seed-OSS": ("SeedOssConfig", {}),
    "SmolLM 3": ("SmolLM3Config", {}),
    "StableLM": ("StableLmConfig", {}),
    "StarCoder 2": ("Starcoder2Config", {"sliding_window": None}),
    "VaultGemma": ("VaultGemmaConfig", {**_WINDOWS, "attn_logit_softcapping": 5.0}),
    "Zamba 2": (
        "Zamba2Config",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "chunk_size": 32,
        },
    ),
    # Refused: no keys and values a head, none that attends to everything, other attention.
    "BLOOM": ("BloomConfig", {**_TIED, "n_layer": 2, "n_head": 4}),
    "DeepSeek 3": (
        "DeepseekV3Config",
        {
            "first_k_dense_replace": 2,
            "kv_lora_rank": 512,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
    ),
    "HRM text": ("HrmTextConfig", {}),
    "Mamba 2": (
        "Mamba2Config",
        {"num_heads": 4, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    ),
    "Mistral, sliding window": ("MistralConfig", {"sliding_window": WINDOW}),
}

# vLLM's linear attention for CPUs is in bfloat16 alone.
BFLOAT16 = {"OLMo hybrid", "Qwen3-Next", "Qwen 3.5", "Qwen 3.5 MoE"}


def make(
    name: str, folder: Path, weights: Callable[[Any], Any] = random_weights, **changes: Any
) -> Path:
    """The model of this architecture, in `folder`; `changes`: other fields of its configuration."""
    torch.manual_seed(0)
    kind, fields = ARCHITECTURES[name]
    of = getattr(transformers, kind)
    known = {field.name for field in fields_of(of)}
    sizes = {size: value for size, value in SIZES.items() if size in known}
    if "head_dim" not in known and "hidden_size" in known:
        sizes["hidden_size"] = SIZES["num_attention_heads"] * SIZES["head_dim"]
    config = of(**{**sizes, **fields, **changes})
    weights(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder
