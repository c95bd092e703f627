"""transformers v5 front end.

    icecache.enable(model, token_budget=256)    generate and plain forward calls use IceCache
    icecache.stats(model)                       what was attended, read and held
    icecache.disable(model)                     the model's own attention again
    IceCache(model.config, token_budget=256)    a cache of one's own, as the `cache` of an
                                                enabled model or with attn_implementation="icecache"

Served: decoder-only models on transformers' attention interface, in float32, bfloat16 or float16 on
the CPU; greedy, sampled, beam, assisted and prompt-lookup decoding, batches padded on either side,
chunked prefill, continued conversations; with lossless=True greedy and sampled texts that are full
attention's own (lossless.py); attention sinks and soft caps (softmax.py), and layers that share the
keys and values of others. Layers that do not attend to the whole context (sliding, chunked, linear)
keep transformers' own cache. A first chunk is attended in torch, chunks of more than
`decode_tokens` exactly, decode steps within the token budget; with `prefill_budget` the engine
attends to prompts, and `generate` feeds long ones in chunks (prompt_chunks.py). Everything else is
refused with InvalidArgument before the first token: see support.py.
"""

from icecache.hf.attention import register
from icecache.hf.cache import IceCache
from icecache.hf.model_stats import ModelStats
from icecache.hf.switch import disable, enable, stats

register()

__all__ = ["IceCache", "ModelStats", "disable", "enable", "stats"]
