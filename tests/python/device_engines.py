"""A small DeviceEngine for tests."""

from __future__ import annotations

import torch
from icecache import Config
from icecache.device_engine import DeviceEngine

HEADS, KV_HEADS, DIM = 4, 2, 64


def make_engine(
    layers: int = 1, lanes: int | None = 2, host_memory: str = "1M", device_tokens: int = 0
) -> DeviceEngine:
    """On torch's default device."""
    return DeviceEngine(
        num_layers=layers,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        scale=DIM**-0.5,
        config=Config(
            host_memory=host_memory,
            token_budget=64,
            window_tokens=16,
            device_tokens=device_tokens,
        ),
        device=torch.get_default_device(),
        lanes=lanes,
        max_tokens=700,
        device_share=0.9,
    )


def random_rows(count: int) -> list[torch.Tensor]:
    """Queries, keys, values, and outputs of a packed step."""
    return [torch.randn(count, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
