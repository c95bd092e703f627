"""What was not looked at: attention mass by layer, and the tokens of one step."""

import icecache
import torch

engine = icecache.Engine(
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=1,
    head_dim=64,
    dtype=torch.float32,
    token_budget=64,
    telemetry="trace",
)
sequence = engine.new_sequence()
for layer in range(engine.num_layers):
    keys, values, queries = torch.randn(3, 1, 4, 3000, 64)
    keys[:, :1, 1234] = 3 * queries[:, :1, -1]  # what the last query looks for
    engine.append([sequence], layer, keys[:, :1], values[:, :1])
    engine.observe([sequence], layer, queries)
    engine.step([sequence], layer, queries[:, :, -1:], keys[:, :1, -1:], values[:, :1, -1:])
    stats, trace = engine.stats(layer, 0), engine.trace(sequence, layer, 0)
    print(
        f"layer {layer}: {stats.mass / stats.steps:.3f} of the attention was exact, at worst "
        f"{stats.worst_mass:.3f}; {len(trace.selected)} tokens picked, 1234 "
        f"{'among them' if 1234 in trace.selected else 'not among them'}"
    )
