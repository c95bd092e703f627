"""Lossless decoding: steps within the token budget draft, exact attention verifies.

The next token of a step within the budget is nearly always full attention's. So a fork of the cache
drafts k tokens, one exact call over them tells what full attention says behind each, and
transformers' own decoding loop chooses from that. As long as it chooses what was drafted, the
answer to its next call is at hand; where it chooses otherwise, what was drafted is taken back. So
texts, scores, stopping and streaming are those of full attention, by construction. A draft throws
the dice that the loop will throw: sampled texts agree as often as greedy ones, and are those that
full attention samples from the same seed.

Speculative decoding with the model itself as the draft model: Leviathan et al. 2023; drafts from a
sparse KV cache: MagicDec (Chen et al. 2024), TriForce (Sun et al. 2024).
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from icecache import InvalidArgument
from icecache.hf.cache import IceCache, Savepoint
from icecache.hf.draft_length import DraftLength
from icecache.hf.model_stats import LosslessStats
from icecache.hf.support import CACHE

# They change with every call, or run the model.
_STATEFUL = (
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)


class Lossless:
    """Gives `generate` of one model lossless decoding."""

    def __init__(self, draft_tokens: int) -> None:
        """At most `draft_tokens` at a time. Raises InvalidArgument for less than 1."""
        if draft_tokens < 1:
            raise InvalidArgument(f"draft_tokens: expected at least 1, got {draft_tokens}")
        self.stats = LosslessStats()
        self.length = DraftLength(draft_tokens)

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the `generate` of a model."""
        arguments = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        if arguments.get("custom_generate") is not None:
            raise InvalidArgument(
                "custom_generate: it replaces lossless decoding; leave it out, or enable the model "
                "without lossless=True"
            )

        # transformers keeps the streamer from loops of others, and gives what is named here.
        def decode(
            model: PreTrainedModel, input_ids: torch.Tensor, tokenizer: Any = None, **given: Any
        ) -> Any:
            return self._decode(
                model,
                input_ids,
                streamer=arguments.get("streamer"),
                assistant_model=arguments.get("assistant_model"),
                **given,
            )

        return generate(*args, **kwargs, custom_generate=decode)

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
        assistant_model: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' own loop of greedy or sampled decoding, its calls of the model answered."""
        mode = generation_config.get_generation_mode(assistant_model)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise InvalidArgument(
                f"generate: expected greedy decoding or sampling with lossless=True, got "
                f"{mode.value}; enable the model without lossless=True for it"
            )
        if generation_config.output_hidden_states and generation_config.return_dict_in_generate:
            raise InvalidArgument(
                "output_hidden_states: not kept with lossless=True, which computes many tokens at "
                "once; drop the argument, or enable the model without lossless=True"
            )
        cache = kwargs.get(CACHE)
        if not isinstance(cache, IceCache):
            raise InvalidArgument("use_cache: expected true with lossless=True, got false")
        cache.is_exact = True  # also one that the caller made
        loop = _Loop(model, cache, logits_processor, generation_config, self)
        loop_of: Any = type(model)
        try:
            return loop_of._sample(
                loop,
                input_ids,
                logits_processor=logits_processor,
                generation_config=generation_config,
                **kwargs,
            )
        finally:
            loop.take_back()


@dataclass
class _Verified:
    """What one exact call told, and how far the loop has gone along it."""

    ids: torch.Tensor  # [B, L] the loop's tokens, the newest included
    arguments: dict[str, Any]  # that the loop gave with them
    draft: torch.Tensor  # [B, k] what may follow
    before: Savepoint  # of the cache, without the newest
    outputs: Any  # logits [B, 1 + k, V]: of full attention behind the newest and behind the draft
    used: int = 0  # tokens of the draft that the loop has chosen

    @property
    def unused(self) -> int:
        return self.draft.shape[1] - self.used


class _Loop:
    """Stands for the model in transformers' decoding loop: the model, but for its calls."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: IceCache,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
        lossless: Lossless,
    ) -> None:
        self._model: Any = model
        self._cache = cache
        self._stats, self._length = lossless.stats, lossless.length
        self._samples = bool(generation_config.do_sample)
        self._processors: Any = LogitsProcessorList(
            one
            for one in logits_processor
            if type(one).__module__.startswith("transformers.")
            and type(one).__name__ not in _STATEFUL
        )
        self._pad: Any = getattr(generation_config, "_pad_token_tensor", None)
        self._ends = getattr(generation_config, "_eos_token_tensor", None)
        self._most = int(generation_config.max_length)
        self._prompt: int | None = None  # its tokens
        self._ids = torch.empty(0)  # [B, L] the loop's tokens
        self._arguments: dict[str, Any] = {}  # that it gave with them
        self._verified: _Verified | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **arguments: Any
    ) -> dict[str, Any]:
        self._ids, self._arguments = input_ids, arguments
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1
        return {}

    def __call__(self, **_: Any) -> Any:
        """Full attention's logits `[B, 1, V]` behind the newest token."""
        known, newest = self._verified, self._ids[:, -1]
        if known and known.unused and torch.equal(known.draft[:, known.used], newest):
            known.used += 1
            self._stats.kept += len(newest)
            return self._answer(known)
        self.take_back()
        draft = self._draft()
        before = self._cache.savepoint()
        start = time.perf_counter()
        outputs = self._feed(self._ids, self._arguments, draft)
        seconds = time.perf_counter() - start
        self._stats.verifications += 1
        self._stats.verify_seconds += seconds
        self._length.saw_verification(draft.shape[1], seconds)
        self._verified = _Verified(self._ids, self._arguments, draft, before, outputs)
        return self._answer(self._verified)

    def take_back(self) -> None:
        """Leaves in the cache what the loop has chosen, and no more."""
        known, self._verified = self._verified, None
        if known is None or not known.draft.shape[1]:
            return
        self._length.saw_kept(known.used, known.draft.shape[1])
        if not known.unused:
            return
        if known.before.stock:
            self._cache.restore(known.before)
            self._feed(known.ids, known.arguments, known.draft[:, : known.used])
        else:
            self._cache.crop(-known.unused)

    @staticmethod
    def _answer(known: _Verified) -> Any:
        outputs = copy.copy(known.outputs)
        outputs.logits = known.outputs.logits[:, known.used : known.used + 1]
        return outputs

    def _feed(self, ids: torch.Tensor, arguments: dict[str, Any], draft: torch.Tensor) -> Any:
        """The model's exact outputs for the newest token of `ids` and a draft that follows it."""
        count = draft.shape[1]
        if count:
            arguments = self._model._update_model_kwargs_for_generation(
                {}, dict(arguments), num_new_tokens=count
            )
        inputs = self._model.prepare_inputs_for_generation(
            torch.cat([ids, draft], 1), next_sequence_length=1 + count, **arguments
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1 + count
        return self._model(**inputs, return_dict=True)

    def _draft(self) -> torch.Tensor:
        """Tokens `[B, k]` that the loop will most likely choose; k may be 0."""
        # The last token is never fed, and the one before it is chosen from what verification says.
        count = min(self._length.choose(), self._most - self._ids.shape[1] - 1)
        if count <= 0:
            return self._ids[:, :0]
        start = time.perf_counter()
        fork = copy.deepcopy(self._cache)
        fork.is_exact = False
        ids, arguments, ended = self._ids, {**self._arguments, CACHE: fork}, self._ended()
        with torch.random.fork_rng(devices=[]):
            while ids.shape[1] < self._ids.shape[1] + count and not bool(ended.all()):
                inputs = self._model.prepare_inputs_for_generation(
                    ids, next_sequence_length=1, **arguments
                )
                outputs = self._model(**inputs, return_dict=True)
                arguments = self._model._update_model_kwargs_for_generation(outputs, arguments)
                scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
                tokens = self._choose(ids, scores)
                if self._ends is not None:
                    tokens = torch.where(ended, self._pad, tokens)
                    ended = ended | torch.isin(tokens, self._ends)
                ids = torch.cat([ids, tokens[:, None]], 1)
        draft = ids[:, self._ids.shape[1] :]
        seconds = time.perf_counter() - start
        self._stats.drafted += draft.numel()
        self._stats.draft_seconds += seconds
        self._length.saw_draft(draft.shape[1], seconds)
        return draft

    def _choose(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As transformers' loop chooses, with the random numbers that it will use."""
        scores = self._processors(ids, scores)
        if not self._samples:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)

    def _ended(self) -> torch.Tensor:
        """Rows `[B]` that are over, which the loop pads."""
        if self._ends is None:
            return torch.zeros(len(self._ids), dtype=torch.bool)
        return torch.isin(self._ids[:, self._prompt :], self._ends).any(1)
