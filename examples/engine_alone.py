"""The cache alone, on torch tensors, beside full attention: what a budget costs and reads."""

import icecache
import torch

HEADS, KV_HEADS, DIM, PROMPT, STEPS = 8, 2, 64, 8000, 20
generator = torch.Generator().manual_seed(0)


def rows(heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(1, heads, tokens, DIM, generator=generator)


engine = icecache.Engine(
    num_layers=1,
    num_q_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    dtype=torch.float32,
    token_budget=256,
)
sequence = engine.new_sequence()
keys, values = rows(KV_HEADS, PROMPT), rows(KV_HEADS, PROMPT)
engine.append([sequence], 0, keys, values)
engine.observe([sequence], 0, rows(HEADS, 256))  # or attend(), which computes a prompt's attention

error = 0.0
for _ in range(STEPS):
    query, key, value = 2 * rows(HEADS, 1), rows(KV_HEADS, 1), rows(KV_HEADS, 1)
    attended = engine.step([sequence], 0, query, key, value)
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    error += float((attended - exact).norm() / exact.norm()) / STEPS

stats = engine.stats(0, 0)
full = 2 * DIM * 4 * engine.length(sequence)
print(f"relative error of the output: {error:.3f}")  # of random keys, the worst there are
print(f"attention mass attended exactly: {stats.mass / stats.steps:.3f}")
print(f"read a step: {stats.bytes_read / stats.steps / full:.3f} of what full attention reads")
