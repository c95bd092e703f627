"""What sequences take of host memory, in token slots; what they share is counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Account:
    tokens: int  # of the sequence
    parent: int | None  # the sequence that it was forked from
    shared: int  # tokens that it has from there
    slots: int  # without its ancestors'
    inherited: int  # slots of its ancestors when it was forked
    heirs: int = 0  # sequences that were forked from it
    is_open: bool = True


class Ledger:
    """Accounts of sequences. One that is closed counts until its heirs are closed, too: they hold
    the segments that it had."""

    def __init__(self, slots_of: Callable[[int], int]) -> None:
        """`slots_of`: slots that a sequence of so many tokens takes by itself."""
        self.used = 0  # slots
        self._slots_of = slots_of
        self._accounts: dict[int, _Account] = {}

    def __len__(self) -> int:
        """Accounts, with closed ones that count."""
        return len(self._accounts)

    def cost(self, tokens: int, shared: int = 0) -> int:
        """Slots that a sequence takes beside those that it shares.

        Once it has added half as many tokens as it shares, merging may have made a copy of these.
        """
        own = tokens - shared
        return self._slots_of(tokens if 2 * own >= shared else own)

    def cost_of(self, key: int) -> int:
        """Slots of a sequence, without its ancestors'."""
        return self._accounts[key].slots

    def held_by(self, key: int) -> int:
        """Slots of a sequence and of its ancestors: what these add after a fork is theirs."""
        return self._accounts[key].inherited + self.cost_of(key)

    def tokens(self, key: int) -> int:
        """Of a sequence."""
        return self._accounts[key].tokens

    def growth(self, key: int, tokens: int) -> int:
        """Slots that a sequence takes beside its own, once it has so many tokens, or has more."""
        account = self._accounts[key]
        most = max(tokens, account.tokens)
        return self.cost(most, account.shared) - account.slots

    def open(self, key: int, tokens: int, parent: int | None = None, shared: int = 0) -> None:
        """A sequence of so many tokens, of which it has the first `shared` from `parent`."""
        while parent is not None and shared <= self._accounts[parent].shared:
            parent = self._accounts[parent].parent  # they are an ancestor's
        inherited = 0
        if parent is None:
            shared = 0
        else:
            self._accounts[parent].heirs += 1
            inherited = self.held_by(parent)
        account = _Account(tokens, parent, shared, self.cost(tokens, shared), inherited)
        self._accounts[key] = account
        self.used += account.slots

    def set_tokens(self, key: int, tokens: int) -> None:
        """The sequence has so many tokens now."""
        account = self._accounts[key]
        account.tokens = max(tokens, account.shared)
        slots = self.cost(account.tokens, account.shared)
        self.used += slots - account.slots
        account.slots = slots

    def close(self, key: int) -> None:
        """The sequence ends."""
        self._accounts[key].is_open = False
        at: int | None = key
        while at is not None:
            account = self._accounts[at]
            if account.is_open or account.heirs > 0:
                return
            self.used -= self.cost_of(at)
            del self._accounts[at]
            at = account.parent
            if at is not None:
                self._accounts[at].heirs -= 1
