"""Tiny random models of current decoder architectures, and the decoding modes they are run in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from icecache.hf.support import CACHE
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

Model: TypeAlias = Any  # a PreTrainedModel; that class does not declare `generate`

VOCABULARY = 96
PROMPT = 45
# Settings whose budget is far below the prompt: what attends within it differs from full attention.
SCARCE: dict[str, Any] = {
    "token_budget": 13,
    "sink_tokens": 1,
    "window_tokens": 4,
    "page_size": 8,
    "segment_tokens": 8,
    "candidates": 13,
}

logging.set_verbosity_error()

# In matrices this small threads only wait for each other, minutes where several tests run at once.
torch.set_num_threads(1)

# Weights large enough that attention is sharp and a lost token changes the logits.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": 16}
_FULL = "full_attention"
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {
        **_WINDOW,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "gemma3_text": {
        **_WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma2": {
        **_WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    # Layers that share the keys and values of others: of layers 0 and 1 there, of 1 and 2 here.
    "gemma3n_text": {
        **_WINDOW,
        "num_hidden_layers": 5,
        "head_dim": 16,
        "num_kv_shared_layers": 3,
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        **_WINDOW,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "layer_types": ["full_attention", *["full_attention", "sliding_attention"] * 2, _FULL],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "phi3": {"original_max_position_embeddings": 512},
    "granite": {"attention_multiplier": 0.4},
    "olmo2": {"num_key_value_heads": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {
        **_WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "logit_scale": 0.25,
    },
    "gpt_oss": {
        **_WINDOW,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}
# Served as well, though not in every mode: transformers refuses to take tokens back from layers
# with a recurrent state.
_LINEAR = {
    "qwen3_next": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def build(architecture: str, *, seed: int = 0, **changes: Any) -> Model:
    """A random model in float32, in inference mode."""
    settings = {**_COMMON, **(CONFIGS | _LINEAR).get(architecture, {}), **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **settings)
    implementation = "eager" if architecture in ("gpt_oss", "gemma2", "bloom") else "sdpa"
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=implementation).eval()


@cache
def model(architecture: str) -> Model:
    """The shared model of an architecture; tests leave it disabled."""
    return build(architecture)


@cache
def assistant(architecture: str) -> Model:
    """Another model over the same vocabulary, close enough to have some drafts accepted."""
    other = build(architecture)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    return other


def prompt(rows: int = 1, length: int = PROMPT, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] with repeated n-grams, so that prompt lookup finds drafts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    third = length // 3
    ids[:, length - third :] = ids[:, :third]
    return ids


def padded(rows: int = 3, side: str = "left") -> dict[str, torch.Tensor]:
    """A batch whose row b has 6 * b padding tokens."""
    ids = prompt(rows)
    mask = torch.ones_like(ids)
    for row in range(rows):
        hidden = slice(0, 6 * row) if side == "left" else slice(ids.shape[1] - 6 * row, None)
        mask[row, hidden] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _run(m: Model, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    torch.manual_seed(7)
    defaults = {"max_new_tokens": 10, "do_sample": False}
    output = m.generate(
        **inputs,
        **{**defaults, **settings},
        return_dict_in_generate=True,
        output_logits="num_beams" not in settings,
    )
    if "num_beams" in settings:
        return torch.cat([output.sequences.float().flatten(), output.sequences_scores])
    return torch.cat([output.sequences.float().flatten(), torch.stack(output.logits).flatten()])


def _single(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, {"input_ids": prompt()})


def _batch(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, padded())


def _right(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, padded(side="right"))


def _chunked(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, padded(), prefill_chunk_size=9)


def _beams(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, padded(2), num_beams=3, num_return_sequences=2, output_scores=True)


def _lookup(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, {"input_ids": prompt()}, prompt_lookup_num_tokens=4)


def _assisted(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, {"input_ids": prompt()}, assistant_model=assistant(architecture))


def _turns(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    history, results, past = padded(), [], new_cache()
    for turn in range(3):
        output = m.generate(
            **history,
            **{CACHE: past},
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        results += [output.sequences.float().flatten(), torch.stack(output.logits).flatten()]
        ids = torch.cat([output.sequences, prompt(3, 5, seed=turn + 1)], 1)
        added = ids.shape[1] - history["attention_mask"].shape[1]
        mask = torch.nn.functional.pad(history["attention_mask"], (0, added), value=1)
        history = {"input_ids": ids, "attention_mask": mask}
    return torch.cat(results)


def _sampled(m: Model, architecture: str, new_cache: Callable[[], Any]) -> torch.Tensor:
    return _run(m, {"input_ids": prompt()}, do_sample=True, temperature=0.8, num_return_sequences=2)


# Each runs a model (stock or enabled) and returns its tokens followed by its logits, or by the
# scores of its beams. `new_cache` makes a cache for modes that bring their own.
MODES: dict[str, Callable[[Model, str, Callable[[], Any]], torch.Tensor]] = {
    "single": _single,
    "padded batch": _batch,
    "right-padded batch": _right,
    "chunked prefill": _chunked,
    "beams": _beams,
    "prompt lookup": _lookup,
    "assisted": _assisted,
    "multi-turn": _turns,
    "sampled": _sampled,
}
