"""Generated tokens are computed once more, exactly: what the budget cost them does not add up.

Keys and values of tokens that were generated within the budget carry its errors, and all later
tokens read them. After every n tokens, one exact call over these n writes them anew. The text stays
as it is.
"""

from __future__ import annotations

from typing import Any

from transformers import LogitsProcessorList, PreTrainedModel

from icecache import InvalidArgument
from icecache.hf.cache import IceCache, Savepoint
from icecache.hf.decoding_loop import Decoding, DecodingLoop


class Refresh(Decoding):
    """Gives `generate` of one model a refresh after every `every` tokens."""

    setting = "refresh_every"

    def __init__(self, every: int) -> None:
        """Raises InvalidArgument for less than 2."""
        if every < 2:
            raise InvalidArgument(
                f"refresh_every: expected at least 2, or 0 for never, got {every}"
            )
        self.every = every

    def make_loop(
        self,
        model: PreTrainedModel,
        cache: IceCache,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
    ) -> DecodingLoop:
        return _Loop(model, cache, self.every)


class _Loop(DecodingLoop):
    def __init__(self, model: PreTrainedModel, cache: IceCache, every: int) -> None:
        super().__init__(model, cache)
        self._every = every
        self._count = 0  # tokens since the savepoint, the newest included
        self._before: Savepoint | None = None

    def __call__(self, **_: Any) -> Any:
        if self._before is None:
            self._before, self._count = self.cache.savepoint(), 0
        self._count += 1
        if self._count < self._every:
            return self.feed(self.ids, self.arguments, 1)
        self.cache.restore(self._before)
        self._before = None
        self.cache.is_exact = True
        try:
            return self.feed(self.ids, self.arguments, self._every)
        finally:
            self.cache.is_exact = False
