"""Models that the tests serve: tiny random ones, and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
NAN_TOKEN = 7  # its embedding is NaN
IMAGE = 9  # stands for an image
SIDE = 28  # of an image, in pixels


def tiny_llama(
    folder: Path, num_q_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 32
) -> Path:
    """Two layers of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    _random(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def tiny_gemma3(folder: Path) -> Path:
    """Sliding layers between full ones."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    _random(Gemma3ForCausalLM(config)).save_pretrained(folder)
    return folder


def random_weights(model: Any) -> Any:
    """Weights large enough that the answers of different prompts differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.15)
    return model


def _random(model: Any) -> Any:
    """As random_weights(). NAN_TOKEN's embedding is NaN, and no answer has it."""
    random_weights(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = float("nan")
        model.lm_head.weight[NAN_TOKEN] = 0.0
    return model


def manual(characters: int) -> str:
    """The beginning of a long real text that every Python has."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:characters]
