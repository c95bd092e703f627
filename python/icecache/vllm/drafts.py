"""Drafted tokens: where they come from, and which layers draft."""

from __future__ import annotations

import re
from typing import Any

# Methods whose drafts vLLM finds in the text.
IN_TEXT = ("ngram", "suffix")
# Methods whose drafts come from layers that have keys and values of their own.
BY_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")
_DRAFT_MODEL = "draft_model."  # begins the names of a draft model's layers


def drafts_by_layers(vllm_config: Any) -> bool:
    """True where a model is loaded beside the one that is served, to draft for it."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method in BY_LAYERS


def is_draft_layer(name: str, vllm_config: Any) -> bool:
    """True for a layer that drafts, by the name under which vLLM registers it.

    Layers of EAGLE and MTP heads are numbered on from the last layer of the model that they draft
    for, since both are registered in one place.
    """
    if not drafts_by_layers(vllm_config):
        return False
    if vllm_config.speculative_config.method == "draft_model":
        return name.startswith(_DRAFT_MODEL)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return number is not None and int(number[1]) >= int(layers)
