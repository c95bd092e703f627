"""Reads a checkpoint and tokenizer in llama2.c's format into a transformers LlamaForCausalLM."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 1
_CONTROL = 3  # tokens in front of those that stand for single bytes
_HEADER = struct.Struct("<7i")


class _Weights:
    """The float32 tensors of a checkpoint, in the order in which they are asked for."""

    def __init__(self, data: bytes) -> None:
        self._left = torch.frombuffer(bytearray(data), dtype=torch.float32)

    def take(self, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        taken, self._left = self._left[:size], self._left[size:]
        return taken.reshape(shape)

    @property
    def left(self) -> int:
        return self._left.numel()


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of `[H * D, dim]` for rotary pairs (i, i + D / 2); llama2.c pairs (2 i, 2 i + 1)."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def load_model(path: Path) -> LlamaForCausalLM:
    """The model in float32, in inference mode. Raises ValueError where sizes do not fit."""
    data = path.read_bytes()
    header = _HEADER.unpack_from(data)
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = header
    if vocabulary < 0:
        raise ValueError(f"{path}: a classifier of its own is not supported, got {vocabulary}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    weights = _Weights(data[_HEADER.size :])
    kv_rows, head_dim = dim * kv_heads // heads, dim // heads
    state = {"model.embed_tokens.weight": weights.take(vocabulary, dim)}
    stacks: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_rows, dim)),
        ("self_attn.v_proj", (kv_rows, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    rotary_heads = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}
    for name, shape in stacks:
        for layer, weight in enumerate(weights.take(layers, *shape)):
            if name in rotary_heads:
                weight = _half_split(weight, rotary_heads[name])
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = weights.take(dim)
    weights.take(2, positions, head_dim // 2)  # cosines and sines, which transformers computes
    if weights.left:
        raise ValueError(f"{path}: {weights.left} numbers more than the header {header} promises")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.eval()
    return model


def load_pieces(path: Path, vocabulary: int) -> list[bytes]:
    """The text of every token of a tokenizer file; empty for the three that control."""
    data = path.read_bytes()
    pieces, offset = [], 4  # behind the length of the longest piece
    for token in range(vocabulary):
        _, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        pieces.append(data[offset : offset + length])
        offset += length
        if token < _CONTROL:
            pieces[token] = b""
        elif token < _CONTROL + 256:  # spelled "<0x0A>"
            pieces[token] = bytes([token - _CONTROL])
    return pieces
