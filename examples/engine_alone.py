"""The cache alone, on torch tensors, beside full attention: what a budget costs and reads."""

import icecache
import torch

HEADS, KV_HEADS, DIM, PROMPT, STEPS = 8, 2, 64, 8000, 20
generator = torch.Generator().manual_seed(0)


def rows(heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(1, heads, tokens, DIM, generator=generator)


TOPICS = rows(1, 100)  # keys and queries of a model are about something, unlike random ones


def about(heads: int, tokens: int, topics: int) -> torch.Tensor:
    """[1, heads, tokens, DIM], each near one of the first `topics` topics."""
    chosen = torch.randint(topics, (heads, tokens), generator=generator)
    return 1.5 * TOPICS[0, 0, chosen][None] + 0.5 * rows(heads, tokens)


engine = icecache.Engine(
    num_layers=1,
    num_q_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    dtype=torch.float32,
    token_budget=256,
)
sequence = engine.new_sequence()
keys, values = about(KV_HEADS, PROMPT, 100), rows(KV_HEADS, PROMPT)
engine.append([sequence], 0, keys, values)
# A prompt's last queries shape its index. attend() computes a prompt's attention and shows them.
engine.observe([sequence], 0, about(HEADS, 256, 3))

error = 0.0
for _ in range(STEPS):
    query, key, value = about(HEADS, 1, 3), about(KV_HEADS, 1, 100), rows(KV_HEADS, 1)
    attended = engine.step([sequence], 0, query, key, value)
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    error += float((attended - exact).norm() / exact.norm()) / STEPS

stats = engine.stats(0, 0)
full = 2 * DIM * 4 * engine.length(sequence)
print(f"relative error of the output: {error:.3f}")
print(f"attention mass attended exactly: {stats.mass / stats.steps:.3f}")
print(f"read a step: {stats.bytes_read / stats.steps / full:.3f} of what full attention reads")
