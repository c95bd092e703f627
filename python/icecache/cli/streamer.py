"""Prints tokens as they are generated, and takes the time."""

from __future__ import annotations

import time
from typing import Any

from transformers import TextStreamer


class TimedStreamer(TextStreamer):
    """Prints new tokens to stdout; knows when the first and the last one came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self.started = time.perf_counter()
        self.first = self.last = self.started
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        # transformers hands over the prompt first.
        if self._prompt_seen:
            self.last = time.perf_counter()
            self.first = self.first if self.tokens else self.last
            self.tokens += int(value.numel())
        self._prompt_seen = True
        super().put(value)  # type: ignore[no-untyped-call]

    def summary(self, prompt_tokens: int) -> str:
        """Tokens and speeds of prompt and answer, one line."""
        prefill = self.first - self.started
        text = f"prompt {prompt_tokens} tokens in {prefill:.1f} s"
        if prefill > 0:
            text += f" ({prompt_tokens / prefill:.0f}/s)"
        text += f", answer {self.tokens} tokens"
        if self.tokens > 1:
            decode = self.last - self.first
            text += f" in {decode:.1f} s ({(self.tokens - 1) / decode:.1f}/s)"
        return text
