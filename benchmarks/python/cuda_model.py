"""Steps of a whole model on this GPU, over DeviceCache and over a full cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icecache
import torch
import torch.nn.functional as F
from cuda_cache import DTYPE, ROOM, Tokens, fill, make_cache, seconds, spread
from llama_8b import DIM, GROUP, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, WORDS
from torch.nn.attention import SDPBackend, sdpa_kernel

DRIFT = 0.95  # of a query from one step to the next


class Model:
    """A decoder of Llama-3.1-8B's shape with random weights, one token at a time."""

    def __init__(self) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.randn(rows, columns, device="cuda", dtype=DTYPE)
            return made.mul_(columns**-0.5)

        self.embedding = weight(WORDS, HIDDEN)
        self.head = weight(WORDS, HIDDEN)
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
        self.layers = [
            (
                weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
                weight(HIDDEN, HEADS * DIM),
                weight(2 * MLP, HIDDEN),
                weight(HIDDEN, MLP),
            )
            for _ in range(LAYERS)
        ]

    def step(
        self, words: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: Any
    ) -> torch.Tensor:
        """Words [B]; attend(layer, q [B, Hq, 1, D], k, v [B, Hkv, 1, D]) -> [B, Hq, 1, D]."""
        x = F.embedding(words, self.embedding)
        batch = words.shape[0]
        for number, (qkv, out, up, down) in enumerate(self.layers):
            y = F.rms_norm(x, (HIDDEN,), self.norm)
            q, k, v = (
                F.linear(y, qkv)
                .view(batch, HEADS + 2 * KV_HEADS, 1, DIM)
                .split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            )
            q, k = rotate(q, *rotation), rotate(k, *rotation)
            x = x + F.linear(attend(number, q, k, v).reshape(batch, HEADS * DIM), out)
            gate, value = F.linear(F.rms_norm(x, (HIDDEN,), self.norm), up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * value, down)
        logits: torch.Tensor = F.linear(F.rms_norm(x, (HIDDEN,), self.norm), self.head)
        return logits.argmax(-1)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


class DriftingQueries:
    """Stand in for the model's queries, which with random weights would look for nothing."""

    def __init__(self, batch: int) -> None:
        self.now = torch.stack([Tokens(i).queries(batch)[:, :, None] for i in range(LAYERS)])
        self.bank = torch.randn(16, *self.now.shape, device="cuda", dtype=DTYPE) * (
            0.8 * (1 - DRIFT**2) ** 0.5
        )
        self.at = torch.zeros(1, dtype=torch.long, device="cuda")

    def advance(self) -> None:
        self.now.mul_(DRIFT).add_(self.bank.index_select(0, self.at)[0])
        self.at.add_(1).remainder_(16)


def graph_of(step: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_steps(model: Model, batch: int, attend: Any) -> dict[str, float]:
    """Milliseconds of a step of the whole model, as a CUDA graph."""
    queries = DriftingQueries(batch)
    words = torch.zeros(batch, dtype=torch.long, device="cuda")
    angle = torch.rand(DIM // 2, device="cuda").repeat(2)
    rotation = angle.cos().to(DTYPE), angle.sin().to(DTYPE)

    def step() -> torch.Tensor:
        queries.advance()
        return model.step(
            words, rotation, lambda n, q, k, v: attend(n, queries.now[n] + 1e-3 * q, k, v)
        )

    graph = graph_of(step)
    return spread(seconds(graph.replay, repeats=40, warm=20))


def with_icecache(model: Model, batch: int, tokens: int, resident: bool = False) -> dict[str, Any]:
    """`resident`: all sequences stay on the device whole."""
    cache = make_cache(batch, tokens, LAYERS, resident)
    took = fill(cache, tokens)
    times = time_steps(model, batch, cache.step)
    stats = [cache.stats(layer) for layer in range(LAYERS)]
    held = cache.memory()
    asked = sum(s.hits + s.misses for s in stats)
    return {
        "tpot_ms": times,
        "device_gb": held.device_bytes / 1e9,
        "host_gb": held.host_bytes / 1e9,
        "index_s": took,
        "hit_share": sum(s.hits for s in stats) / max(1, asked),
        "bytes_moved_per_step": sum(s.bytes_moved for s in stats)
        / max(1, sum(s.steps for s in stats) / (LAYERS * batch * KV_HEADS)),
    }


def with_full_cache(model: Model, batch: int, tokens: int) -> dict[str, Any]:
    shape = (LAYERS, batch, KV_HEADS, tokens, DIM)
    bytes_needed = 2 * 2 * LAYERS * batch * KV_HEADS * tokens * DIM
    if bytes_needed > 0.95 * torch.cuda.mem_get_info()[0]:
        return {"fits": False, "device_gb": bytes_needed / 1e9}
    keys = torch.randn(shape, device="cuda", dtype=DTYPE)
    values = torch.randn(shape, device="cuda", dtype=DTYPE)

    def attend(n: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys[n, :, :, -1:] = k
        values[n, :, :, -1:] = v
        packed = q.view(batch, KV_HEADS, GROUP, DIM)
        out: torch.Tensor = F.scaled_dot_product_attention(packed, keys[n], values[n])
        return out.view(batch, HEADS, 1, DIM)

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        times = time_steps(model, batch, attend)
    return {"fits": True, "tpot_ms": times, "device_gb": bytes_needed / 1e9}


def largest_batch(tokens: int) -> dict[str, Any]:
    """Sequences of `tokens` whose caches fit beside the model, by trying."""
    fits, fails, device_bytes = 0, 4097, 0
    tried = 1
    while fails - fits > max(1, fits // 32):
        try:
            cache = make_cache(tried, tokens, LAYERS)
            cache.limit_tokens(tried * (tokens + ROOM))
            device_bytes = cache.memory().device_bytes
        except icecache.OutOfPages:
            fails = tried
        else:
            fits = tried
        tried = min(2 * fits, (fits + fails) // 2) if fits else 1
    return {"tokens": tokens, "batch": fits, "device_gb": device_bytes / 1e9}
