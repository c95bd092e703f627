"""A prompt is paid once: sequences that are kept for prompts that begin as they do.

SGLang's RadixAttention (Zheng et al. 2024) and vLLM's prefix caching share blocks of keys and
values; here a sequence that is forked brings its index along.
"""

from __future__ import annotations

from collections.abc import Sequence

from icecache._core import PrefixTable, PrefixText
from icecache.engine import Engine
from icecache.errors import InvalidArgument

__all__ = ["PrefixStore", "PrefixTable", "PrefixText"]


class PrefixStore:
    """Sequences of an engine that are kept for prompts that begin as they do.

        seq, known = store.open(prompt)   # a sequence that holds the first `known` tokens
        ...                               # prefill prompt[known:], decode an answer
        store.keep(seq, prompt + answer)  # in place of engine.release(seq)

    What is kept takes no memory from others: where the engine needs pages, sequences that are kept
    end, the least recently used first. Texts of different `space` share nothing: give each user one
    where their texts must not meet. Not thread-safe; other threads may use the engine, but not for
    sequences that are kept here.
    """

    def __init__(self, engine: Engine, block_tokens: int = 16) -> None:
        """`block_tokens`: fewer common tokens are not shared."""
        self.engine = engine
        self._block = engine.config.prompt_block
        self._table = PrefixTable(block_tokens)

    def __len__(self) -> int:
        """Sequences that are kept."""
        return len(self._table)

    def open(self, tokens: Sequence[int], space: str = "") -> tuple[int, int]:
        """A new sequence, and how many of `tokens` it holds already: at most all but the last.

        With `prefill_budget` these are a multiple of PREFILL_BLOCK, whose tokens choose together.
        The rest is for the caller to prefill, as of a prompt whose first chunk is done.
        """
        text = self._table.text(tokens, space=space)
        while True:
            kept, common = self._table.find(text)
            known = min(common, len(tokens) - 1)
            known -= known % self._block
            if known <= 0:
                return self.engine.new_sequence(), 0
            if self.engine.contains(kept):
                self._table.use(kept)
                return self.engine.fork(kept, known), known
            self._table.remove(kept)

    def keep(self, seq: int, tokens: Sequence[int], space: str = "") -> None:
        """Ends a sequence that holds `tokens`, and keeps it for prompts to come.

        Sequences that are kept and hold nothing but the beginning of it are released. Raises
        InvalidArgument, and changes nothing, where the sequence has another number of tokens.
        """
        layers = range(self.engine.num_layers)
        lengths = {self.engine.length(seq, layer) for layer in layers}
        if lengths != {len(tokens)}:
            raise InvalidArgument(
                f"tokens: expected as many as sequence {seq} holds ({sorted(lengths)}), got "
                f"{len(tokens)}"
            )
        covered = self._table.add(seq, self._table.text(tokens, space=space))
        self.engine.retain(seq)
        for old in covered:
            self._release(old)

    def clear(self) -> None:
        """Releases all that is kept."""
        for seq in self._table.sequences():
            self._table.remove(seq)
            self._release(seq)

    def _release(self, seq: int) -> None:
        if self.engine.contains(seq):
            self.engine.release(seq)
