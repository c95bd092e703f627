"""How many tokens to draft, from what drafts and verifications cost and how many were kept."""

from __future__ import annotations

_FORGET = 0.9  # weight of what was known, beside the newest measurement
_FIRST = 8  # tokens, while nothing is known
_TRY_AGAIN = 64  # verifications without a draft, after which one is tried


class DraftLength:
    """Chooses the length of the next draft; at most `most` tokens.

    A draft of k tokens takes k times the seconds of one. Its verification takes seconds that grow
    by a line with k, which is fitted. Tokens are kept with a probability of their own each: of k
    drafted, 1 + p + .. + p^k come out of the two.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._draft: float | None = None  # seconds a token
        self._kept, self._ended = 2.0, 0.4  # tokens kept, drafts of which one was not: weighted
        # Weighted sums over verifications: of 1, k, k^2, seconds, k x seconds.
        self._sums = [0.0] * 5
        self._without = 0  # verifications without a draft, one after the other

    def choose(self) -> int:
        """Tokens of the next draft, 0 where full attention alone is as fast."""
        if self._draft is None or self._sums[0] == 0.0:
            return min(_FIRST, self._most)
        base, slope = self._line()
        share = self._kept / (self._kept + self._ended)

        def tokens_a_second(k: int) -> float:
            tokens = sum(share**i for i in range(k + 1))
            return tokens / (k * self._draft + base + slope * k)  # type: ignore[operator]

        best = max(range(self._most + 1), key=tokens_a_second)
        if best == 0 and self._without >= _TRY_AGAIN:
            return min(_FIRST, self._most)
        return best

    def saw_draft(self, tokens: int, seconds: float) -> None:
        """A draft of `tokens` took `seconds`."""
        if not tokens:
            return
        newest = seconds / tokens
        known = newest if self._draft is None else self._draft
        self._draft = _FORGET * known + (1.0 - _FORGET) * newest

    def saw_verification(self, tokens: int, seconds: float) -> None:
        """The exact call over a draft of `tokens` and the token ahead of it took `seconds`."""
        self._without = 0 if tokens else self._without + 1
        newest = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [_FORGET * a + b for a, b in zip(self._sums, newest, strict=True)]

    def saw_kept(self, kept: int, drafted: int) -> None:
        """Of `drafted` tokens the first `kept` were those of full attention."""
        self._kept = _FORGET * self._kept + kept
        self._ended = _FORGET * self._ended + (kept < drafted)

    def _line(self) -> tuple[float, float]:
        """Seconds of a verification without a draft, and what each token of one adds."""
        one, k, square, seconds, product = self._sums
        spread = one * square - k * k
        mean = seconds / one
        # Where all drafts were equally long, nothing is known of the slope. A guess: eight tokens
        # more make a verification a tenth slower.
        if spread < 0.25 * one * one:
            slope = mean / 80
        else:
            slope = max(0.0, (one * product - k * seconds) / spread)
        return max(0.1 * mean, mean - slope * k / one), slope
