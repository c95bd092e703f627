"""What a server would refuse when it has started, found before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from icecache.cli.server_command import SMOLLM2, Flags
from icecache.errors import InvalidArgument
from icecache.machine import usable_memory
from icecache.shape import CacheShape

_DTYPES = {"float32": "float32", "float": "float32", "bfloat16": "bfloat16"}
_DTYPES |= {"float16": "float16", "half": "float16"}


def is_on_cpu() -> bool:
    """Whether vLLM runs on the CPU here: its torch has no CUDA, or there is no device."""
    import torch

    return torch.version.cuda is None or not torch.cuda.is_available()


@dataclass(frozen=True)
class ModelShape:
    """What the engine serves of a model, as far as its configuration tells."""

    cache: CacheShape  # of layers with full attention, in whatever dtype
    longest: int  # tokens of the model's context; 0: not known
    all_full: bool  # no layer but those takes blocks of vLLM


# Where the model is not known here: nothing that some model would take is refused.
_ANY = ModelShape(CacheShape(1024, 1, 1, 64), longest=0, all_full=False)


def model_shape(folder: str) -> ModelShape:
    """Of a folder, or of a name that transformers can find."""
    from transformers import AutoConfig
    from transformers.cache_utils import get_layer_types_and_kwargs

    try:
        config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
        q_heads = int(config.num_attention_heads)
        types, _ = get_layer_types_and_kwargs(config)
        return ModelShape(
            CacheShape(
                num_layers=max(1, types.count("full_attention")),
                num_q_heads=q_heads,
                num_kv_heads=getattr(config, "num_key_value_heads", None) or q_heads,
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // q_heads,
            ),
            longest=int(getattr(config, "max_position_embeddings", 0) or 0),
            all_full={*types} - {"dummy"} == {"full_attention"},  # "dummy": without a cache
        )
    except (OSError, ValueError, AttributeError, TypeError):  # vLLM will tell, or knows the model
        return _ANY


def check_settings(
    fields: dict[str, Any], model: str, shape: ModelShape, flags: Flags, *, on_cpu: bool
) -> None:
    """Raises InvalidArgument for settings that the engine would refuse with this model."""
    import torch

    from icecache import Config, Engine
    from icecache.vllm.host_memory import room_of, slots_needed
    from icecache.vllm.settings import EIGHT_BITS

    dtype = _DTYPES.get(flags.value("--dtype") or ("float32" if model == SMOLLM2 else ""))
    # Made and thrown away: it checks all parameters, and takes no memory for tokens yet.
    cache_shape = replace(shape.cache, dtype=getattr(torch, dtype or "bfloat16"))
    eight_bits = {"kv_dtype": "int8"} if flags.value("--kv-cache-dtype") in EIGHT_BITS else {}
    engine = Engine(**vars(cache_shape), config=Config(**{**fields, **eight_bits}))
    host_memory = int(engine.config.host_memory)
    if host_memory > usable_memory():
        raise InvalidArgument(
            f"host_memory: expected at most this machine's {usable_memory() / 2**30:.1f} GiB, got "
            f"{host_memory / 2**30:.1f} GiB"
        )
    given = flags.value("--max-model-len")
    longest = int(given) if given is not None and given.isdigit() else shape.longest
    if given is not None and not given.isdigit():
        longest = 0  # vLLM has more ways of writing it
    if not (on_cpu and dtype and longest and shape.all_full) or flags.is_parallel():
        return
    room = room_of(engine.config, [cache_shape])
    stored = cache_shape.stored_bytes(engine.config.kv_dtype)
    needed = slots_needed(longest, room=room) * stored
    if host_memory < needed:
        raise InvalidArgument(
            f"host_memory: expected at least {needed / 2**30:.3f} GiB, room for one request of "
            f"{longest:,} tokens (--max-model-len), got {host_memory / 2**30:.3f} GiB; raise "
            "host_memory or lower --max-model-len"
        )
