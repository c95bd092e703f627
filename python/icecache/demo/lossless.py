"""Lossless decoding beside the methods of the demo: full attention's own text, sooner."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

import icecache
from icecache.bench.decoder import Decoder
from icecache.bench.prefill import Prefill
from icecache.hf.support import CACHE
from icecache.models.local import twin


@dataclass(frozen=True)
class LosslessAnswer:
    """What `generate` wrote after one prompt."""

    tokens: torch.Tensor  # [T + 1]
    logits: torch.Tensor  # [T, V] behind each of the tokens but the last
    seconds: float  # of all tokens
    bytes_read: float  # of all tokens, all layers and heads


class LosslessModel:
    """The model with lossless decoding, on the same weights; it holds one document."""

    def __init__(
        self, decoder: Decoder, document: torch.Tensor, budget: int, end: int | None
    ) -> None:
        """`document` [L] begins every prompt. The token `end` is never written.

        Raises InvalidArgument for a model that cannot take tokens back.
        """
        self._model = icecache.enable(twin(decoder.model), token_budget=budget, lossless=True)
        self._document = document
        self._never = None if end is None else [end]
        self._cache = self._feed(document, None)

    def answer(self, prefill: Prefill) -> LosslessAnswer:
        """A text as long as the prefill's continuation."""
        prompt = prefill.tokens[None]
        cache = self._feed(prefill.tokens[len(self._document) : -1], copy.deepcopy(self._cache))
        read = icecache.stats(self._model).total("bytes_read")
        start = time.perf_counter()
        made = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=prefill.steps + 1,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=self._never,
            return_dict_in_generate=True,
            output_logits=True,
            **{CACHE: cache},
        )
        seconds = time.perf_counter() - start
        return LosslessAnswer(
            tokens=made.sequences[0, prompt.shape[1] :],
            logits=torch.cat(made.logits[1:]),
            seconds=seconds,
            bytes_read=icecache.stats(self._model).total("bytes_read") - read,
        )

    @torch.inference_mode()
    def _feed(self, tokens: torch.Tensor, cache: Any) -> Any:
        """The cache behind `tokens` [T], which follow those that it holds."""
        given = {} if cache is None else {CACHE: cache}
        return self._model(tokens[None], use_cache=True, logits_to_keep=1, **given)[CACHE]
