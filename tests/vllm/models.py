"""Models that the tests serve: tiny random ones, and SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 512
NAN_TOKEN = 7  # its embedding is NaN
IMAGE = 9  # stands for an image
SIDE = 28  # of an image, in pixels


def tiny_llama(
    folder: Path,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    num_layers: int = 2,
    seed: int = 0,
) -> Path:
    """Few layers of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    with_nan_token(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def mtp_model(folder: Path) -> Path:
    """The configuration of a tiny model with a layer that drafts; it has no weights."""
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=2048,
        num_nextn_predict_layers=1,
        architectures=["Glm4MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def eagle_head(folder: Path, model: Path) -> Path:
    """In EAGLE's form a layer of random weights, which drafts for a tiny Llama from its states."""
    config = LlamaConfig.from_pretrained(model)
    config.num_hidden_layers = 1
    torch.manual_seed(1)
    head = random_weights(LlamaForCausalLM(config)).model
    weights = {
        f"layers.0.{name}": weight.detach()
        for name, weight in head.layers[0].named_parameters()
        if name != "input_layernorm.weight"  # a head has none
    }
    # The head passes on what it gets, and adds little to it.
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{name}.weight"] *= 0.1
    size = config.hidden_size
    weights["fc.weight"] = torch.cat([0.1 * torch.eye(size), torch.eye(size)], dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def random_adapter(folder: Path, model: Path, seed: int, rank: int = 8) -> Path:
    """A LoRA adapter of random weights for the attention layers of a tiny Llama, in peft's form."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in LlamaForCausalLM.from_pretrained(model).named_parameters():
        layer = name.removesuffix(".weight")
        if layer.endswith(parts):
            rows, columns = weight.shape
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = 0.15 * torch.randn(*shape, generator=generator)
                weights[f"base_model.model.{layer}.lora_{part}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": parts, "bias": "none", "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
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
    with_nan_token(Gemma3ForCausalLM(config)).save_pretrained(folder)
    return folder


def random_weights(model: Any) -> Any:
    """Weights large enough that the answers of different prompts differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.15)
    return model


def with_nan_token(model: Any) -> Any:
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
