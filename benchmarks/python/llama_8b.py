"""The shape of Llama-3.1-8B, which benchmarks give random weights."""

from __future__ import annotations

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, MLP, WORDS = 32, 32, 8, 128, 4096, 14336, 128256
GROUP = HEADS // KV_HEADS
