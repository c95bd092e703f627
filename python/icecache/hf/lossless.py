"""Lossless decoding: steps within the token budget draft, exact attention verifies.

The next token of a step within the budget is nearly always full attention's. So a fork of the cache
drafts k tokens, one exact call over them tells what full attention says behind each, and
transformers' own decoding loop chooses from that. As long as it chooses what was drafted, the
answer to its next call is at hand; where it chooses otherwise, what was drafted is taken back. So
texts, scores, stopping and streaming are those of full attention, by construction. A draft samples
with the random numbers that the loop will use: so drafts of sampled texts are kept, too, and the
text is the one that full attention samples from the same seed.

Speculative decoding with the model itself as the draft model: Leviathan et al. 2023; drafts from a
sparse KV cache: MagicDec (Chen et al. 2024), TriForce (Sun et al. 2024).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from icecache import InvalidArgument
from icecache.hf.cache import IceCache, Savepoint
from icecache.hf.decoding_loop import Decoding, DecodingLoop
from icecache.hf.draft_length import DraftLength
from icecache.hf.model_stats import LosslessStats
from icecache.hf.support import CACHE

# They change with every call, or run the model.
_STATEFUL = (
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)


class Lossless(Decoding):
    """Gives `generate` of one model lossless decoding."""

    setting = "lossless=True"

    def __init__(self, draft_tokens: int) -> None:
        """At most `draft_tokens` at a time. Raises InvalidArgument for less than 1."""
        if draft_tokens < 1:
            raise InvalidArgument(f"draft_tokens: expected at least 1, got {draft_tokens}")
        self.stats = LosslessStats()
        self.length = DraftLength(draft_tokens)

    def make_loop(
        self,
        model: PreTrainedModel,
        cache: IceCache,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
    ) -> DecodingLoop:
        cache.is_exact = True  # also one that the caller made
        return _Loop(model, cache, logits_processor, generation_config, self)


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


class _Loop(DecodingLoop):
    def __init__(
        self,
        model: PreTrainedModel,
        cache: IceCache,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
        lossless: Lossless,
    ) -> None:
        super().__init__(model, cache)
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
        self._verified: _Verified | None = None

    def __call__(self, **_: Any) -> Any:
        """Full attention's logits `[B, 1, V]` behind the newest token."""
        known, newest = self._verified, self.ids[:, -1]
        if known and known.unused and torch.equal(known.draft[:, known.used], newest):
            known.used += 1
            self._stats.kept += len(newest)
            return self._answer(known)
        self.end()
        if self._prompt is None:
            self._prompt = self.ids.shape[1] - 1
        draft = self._draft()
        before = self.cache.savepoint()
        start = time.perf_counter()
        outputs = self._verify(self.ids, self.arguments, draft)
        seconds = time.perf_counter() - start
        self._stats.verifications += 1
        self._stats.verify_seconds += seconds
        self._length.saw_verification(draft.shape[1], seconds)
        self._verified = _Verified(self.ids, self.arguments, draft, before, outputs)
        return self._answer(self._verified)

    def end(self) -> None:
        """Leaves in the cache what the loop has chosen, and no more."""
        known, self._verified = self._verified, None
        if known is None or not known.draft.shape[1]:
            return
        self._length.saw_kept(known.used, known.draft.shape[1])
        if not known.unused:
            return
        if known.before.stock:
            self.cache.restore(known.before)
            self._verify(known.ids, known.arguments, known.draft[:, : known.used])
        else:
            self.cache.crop(-known.unused)

    @staticmethod
    def _answer(known: _Verified) -> Any:
        outputs = copy.copy(known.outputs)
        outputs.logits = known.outputs.logits[:, known.used : known.used + 1]
        return outputs

    def _verify(self, ids: torch.Tensor, arguments: dict[str, Any], draft: torch.Tensor) -> Any:
        """The model's exact outputs for the newest token of `ids` and a draft that follows it."""
        count = draft.shape[1]
        if count:
            arguments = self.model._update_model_kwargs_for_generation(
                {}, dict(arguments), num_new_tokens=count
            )
        return self.feed(torch.cat([ids, draft], 1), arguments, 1 + count, logits=1 + count)

    def _draft(self) -> torch.Tensor:
        """Tokens `[B, k]` that the loop will most likely choose; k may be 0."""
        # The last token is never fed, and the one before it is chosen from what verification says.
        count = min(self._length.choose(), self._most - self.ids.shape[1] - 1)
        if count <= 0:
            return self.ids[:, :0]
        start = time.perf_counter()
        fork = copy.deepcopy(self.cache)
        fork.is_exact = False
        ids, arguments, ended = self.ids, {**self.arguments, CACHE: fork}, self._ended()
        with torch.random.fork_rng(devices=[]):
            while ids.shape[1] < self.ids.shape[1] + count and not bool(ended.all()):
                outputs = self.feed(ids, arguments, 1)
                arguments = self.model._update_model_kwargs_for_generation(outputs, arguments)
                scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
                tokens = self._choose(ids, scores)
                if self._ends is not None:
                    tokens = torch.where(ended, self._pad, tokens)
                    ended = ended | torch.isin(tokens, self._ends)
                ids = torch.cat([ids, tokens[:, None]], 1)
        draft = ids[:, self.ids.shape[1] :]
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
            return torch.zeros(len(self.ids), dtype=torch.bool)
        return torch.isin(self.ids[:, self._prompt :], self._ends).any(1)
