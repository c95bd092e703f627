"""The prefix store of a vLLM scheduler: what a new request begins with, and who goes for whom.

When a request ends or is preempted, its sequence is kept in the workers' engines; a request whose
prompt begins alike forks it there and computes the rest. What is kept goes, the least recently used
first, before a request waits or is preempted for want of host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from icecache.prefix_store import PrefixTable, PrefixText
from icecache.vllm.ledger import Ledger
from icecache.vllm.names import MEDIUM_CPU, BlockRemoved, BlockStored, RequestStatus

AHEAD = 16  # tokens that a running request is given room for before it needs it: of a page


@dataclass(frozen=True)
class Fork:
    """A sequence begins with the first tokens of another one."""

    owner: int
    tokens: int


@dataclass
class _Waiting:
    """What a waiting request asks the tables, and what they answered last."""

    tokens: int  # of the request
    text: PrefixText | None
    version: tuple[int, int] = (-1, -1)  # of the tables, when they answered
    kept: tuple[int, int] = (-1, 0)  # the sequence, and the tokens that agree
    running: tuple[int, int] = (-1, 0)


@dataclass
class _Running:
    """A request that holds memory."""

    key: int  # of its sequence, never used again
    request: Any = None  # vLLM's, once it is admitted
    fork: Fork | None = None
    is_stale: bool = False  # computed by weights that are no more: nobody may share it
    prompt: int = 0  # tokens that it computes as a prompt


@dataclass
class Changes:
    """What the workers have to do with sequences that are no request's any more."""

    gone: set[int] = field(default_factory=set)  # release
    kept: set[int] = field(default_factory=set)  # retain


class Prefixes:
    """Sequences of running requests and kept ones. Lives in the scheduler, as does its manager."""

    def __init__(self, slots_of: Callable[[int], int], capacity: int) -> None:
        """`slots_of`: slots of a sequence by its tokens; `capacity`: slots that there are."""
        self.ledger = Ledger(slots_of)
        self.capacity = capacity
        self.evictions = 0  # since the start
        self.changes = Changes()
        self.events: list[Any] | None = None  # for routers, where somebody takes them
        self._is_on = False
        self._block_tokens = self._whole = 1
        self._longest = 0
        self._next_key = 0
        self._running: dict[str, _Running] = {}
        self._request_of: dict[int, str] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._matches: dict[str, Fork] = {}  # of requests that are being admitted; pinned
        self._cold: set[str] = set()  # requests that start without a hit
        self._announced: dict[bytes, int] = {}  # kept sequences that have a block
        self._hashes: dict[int, list[bytes]] = {}  # of kept sequences, where events are taken
        self._make_stores()

    def turn_on(self, block_tokens: int, longest: int, with_events: bool, whole: int = 1) -> None:
        """Shares prefixes from now on. `block_tokens`: of vLLM's block hashes; `longest`: tokens
        that a request may have; `whole`: what the tokens of a hit are a multiple of."""
        self._is_on, self._whole = True, whole
        self._block_tokens, self._longest = block_tokens, longest
        self.events = [] if with_events else None
        self._make_stores()

    def _make_stores(self) -> None:
        self._kept = PrefixTable(self._block_tokens)
        self._prompts = PrefixTable(self._block_tokens)  # of running requests
        self._waiting.clear()

    # --- a request's life, in vLLM's order

    def match(self, request: Any) -> int | None:
        """Tokens of a request that it need not compute; None: ask again in the next step.

        Until the next match() of the request or the end of the scheduling, nobody evicts them.
        """
        name = request.request_id
        self._unpin(name)
        if not self._is_on or request.skip_reading_prefix_cache or name in self._cold:
            return 0
        found = self._look_up(request)
        (kept, common), (running, of_prompt) = found.kept, found.running
        most = request.num_tokens - 1
        most, common, of_prompt = (n - n % self._whole for n in (most, common, of_prompt))
        if min(of_prompt, most) > common:
            other = self._running[self._request_of[running]]
            done = other.request.num_computed_tokens
            # The end of a prompt indexes it: whoever forks it then shares its segment.
            if done < (other.prompt if 2 * of_prompt >= other.prompt else of_prompt):
                return None
            kept, common = running, of_prompt
        hit = Fork(kept, min(common, most))
        if hit.tokens <= 0 or not self._fits(hit, request):
            return 0
        self._matches[name] = hit
        if hit.owner in self._kept:
            self._kept.pin(hit.owner)
        return hit.tokens

    def _look_up(self, request: Any) -> _Waiting:
        """Who begins as a waiting request does: looked for again after a table has changed."""
        waiting = self._wait(request)
        version = (self._kept.version(), self._prompts.version())
        if waiting.text is not None and waiting.version != version:
            waiting.kept = self._kept.find(waiting.text)
            waiting.running = self._prompts.find(waiting.text)
            waiting.version = version
        return waiting

    def _wait(self, request: Any) -> _Waiting:
        """With the request's text, which is made once."""
        waiting = self._waiting.get(request.request_id)
        if waiting is None or waiting.tokens != request.num_tokens:
            text = self._text(request, request.num_tokens)
            waiting = self._waiting[request.request_id] = _Waiting(request.num_tokens, text)
        return waiting

    def _fits(self, hit: Fork, request: Any) -> bool:
        """True where the memory of the owner, which may be much more than what is shared, leaves
        enough for all that the request may ask for."""
        tokens = min(request.num_prompt_tokens + (request.max_tokens or 0), self._longest)
        needed = self.ledger.cost(max(tokens, request.num_tokens), hit.tokens)
        return self.ledger.held_by(hit.owner) + needed <= self.capacity

    def make_room(self, name: str, tokens: int) -> int:
        """The tokens of a request that host memory holds, beside all others; 0 if fewer than
        `tokens`.

        Kept sequences go for it, but none that it matched. A request that is alone has room. One
        that runs is given room ahead where some is free, so that vLLM's asking in each step finds
        nothing to do.
        """
        own = self._running.get(name)
        if own is None:
            match = self._matches.get(name)
            more = self.ledger.cost(tokens, match.tokens if match else 0)
            return tokens if self._has_room(more) or self._is_alone(name) else 0
        ahead = self.ledger.growth(own.key, tokens + AHEAD)
        if self.ledger.used + ahead <= self.capacity:
            return tokens + AHEAD
        more = self.ledger.growth(own.key, tokens)
        return tokens if self._has_room(more) or self._is_alone(name) else 0

    def _has_room(self, more: int) -> bool:
        """True where so many slots are left, or can be had for kept sequences."""
        while self.ledger.used + more > self.capacity:
            if not self._evict():
                return False
        return True

    def _is_alone(self, name: str) -> bool:
        return self._running.keys() <= {name}

    def hold(self, name: str, tokens: int) -> None:
        """The request was given memory for so many tokens, the first time as it is admitted."""
        own = self._running.get(name)
        if own is not None:
            self.ledger.set_tokens(own.key, max(tokens, self.ledger.tokens(own.key)))
            return
        own = _Running(self._next_key, fork=self._matches.get(name))
        self._next_key += 1
        self._running[name] = own
        self._request_of[own.key] = name
        if own.fork is None:
            self.ledger.open(own.key, tokens)
        else:
            self.ledger.open(own.key, tokens, own.fork.owner, own.fork.tokens)
            if own.fork.owner in self._kept:
                self._kept.use(own.fork.owner)

    def admit(self, request: Any, hit: int) -> None:
        """The request begins, resumes or is given more input; `hit`: tokens that it forks."""
        own = self._running[request.request_id]
        if hit != (own.fork.tokens if own.fork else 0):
            raise RuntimeError(
                f"IceCache: request {request.request_id} begins at token {hit}, which is not what "
                f"was offered: {own.fork}"
            )
        own.request = request
        own.prompt = request.num_tokens
        if not self._is_on:
            return
        text = self._wait(request).text
        del self._waiting[request.request_id]
        if own.key in self._prompts:  # of a session that goes on with more input
            self._prompts.remove(own.key)
        if text is not None and not own.is_stale:
            self._prompts.add(own.key, text)
            self._prompts.pin(own.key)

    def key(self, name: str) -> int:
        """Of the sequence of a running request."""
        return self._running[name].key

    def is_running(self, name: str, key: int) -> bool:
        """True where this is the sequence of a running request: not one of an earlier life."""
        own = self._running.get(name)
        return own is not None and own.key == key

    def take_fork(self, name: str) -> Fork | None:
        """What the request's sequence begins with; to be told to the workers once."""
        own = self._running[name]
        fork, own.fork = own.fork, None
        return fork

    def end_of_scheduling(self) -> Changes:
        """Matches that led to nothing are given up. What the workers have to do."""
        for name in list(self._matches):
            self._unpin(name)
        changes, self.changes = self.changes, Changes()
        return changes

    def keep(self, request: Any) -> None:
        """Before its memory is freed: keeps the sequence of a request that ends or is preempted."""
        own = self._running.get(request.request_id)
        if own is None or own.request is None or own.is_stale or not self._is_on:
            return
        if request.status == RequestStatus.FINISHED_ERROR:
            return
        in_flight = getattr(request, "num_in_flight_tokens", 0)
        length = min(request.num_computed_tokens - in_flight, request.num_tokens - 1)
        text = self._text(request, length)
        if text is None:
            return
        covered = self._kept.add(own.key, text)
        self._announce(request, own.key, length // self._block_tokens)
        for old in covered:
            self._end(old)
        self.ledger.set_tokens(own.key, length)
        self.changes.kept.add(own.key)

    def leave(self, name: str) -> None:
        """The request's memory is freed; its sequence goes unless it is kept."""
        own = self._running.pop(name, None)
        if own is None:
            return
        del self._request_of[own.key]
        if own.key in self._prompts:
            self._prompts.remove(own.key)
        if own.key not in self._kept:
            self._drop(own.key)

    def finished(self, name: str) -> None:
        """The request never comes back."""
        self._cold.discard(name)
        self._waiting.pop(name, None)

    def start_cold(self, name: str, owner: int) -> None:
        """The workers have no sequence `owner` any more: the request starts without one."""
        self._cold.add(name)
        self._running[name].is_stale = True
        if owner in self._kept:
            self._kept.remove(owner)
            self._end(owner)

    def reset(self) -> None:
        """Nothing computed so far is shared again: weights have changed, or a user asked for it."""
        for key in self._kept.sequences():
            self._end(key)
        self._matches.clear()
        self._make_stores()
        for own in self._running.values():
            own.is_stale = True

    @property
    def kept(self) -> int:
        """Sequences that are kept."""
        return len(self._kept)

    @property
    def kept_slots(self) -> int:
        """Slots that end with what is kept."""
        return self.ledger.used - sum(
            self.ledger.cost_of(own.key) for own in self._running.values()
        )

    # --- inside

    def _text(self, request: Any, length: int) -> PrefixText | None:
        """The first tokens of a request; None where they are less than a block."""
        hashes = request.block_hashes[: length // self._block_tokens]
        if not hashes:
            return None
        lora = request.lora_request
        # vLLM's hashes tell these apart as well, but before 0.32 not all of them from one another.
        space = (lora and (lora.lora_name, lora.lora_path), request.cache_salt)
        by_token = not request.mm_features and request.prompt_embeds is None
        return self._kept.text(request.all_token_ids[:length], hashes, repr(space), by_token)

    def _unpin(self, name: str) -> None:
        match = self._matches.pop(name, None)
        if match is not None and match.owner in self._kept:
            self._kept.unpin(match.owner)

    def _evict(self) -> bool:
        key = self._kept.oldest()
        if key is None:
            return False
        self._kept.remove(key)
        self._end(key)
        self.evictions += 1
        return True

    def _end(self, key: int) -> None:
        """A sequence that was kept goes."""
        self._withdraw(key)
        self._drop(key)

    def _drop(self, key: int) -> None:
        """The workers release the sequence."""
        self.ledger.close(key)
        self.changes.kept.discard(key)
        self.changes.gone.add(key)

    def _announce(self, request: Any, key: int, blocks: int) -> None:
        """The first blocks of a request can be shared."""
        if self.events is None:
            return
        hashes = self._hashes[key] = request.block_hashes[:blocks]
        fresh = [i for i, block in enumerate(hashes) if block not in self._announced]
        for block in hashes:
            self._announced[block] = self._announced.get(block, 0) + 1
        if not fresh:
            return
        # Of a chain of hashes those that are new are the last ones.
        first, size = fresh[0], self._block_tokens
        lora = request.lora_request
        self.events.append(
            BlockStored(
                block_hashes=hashes[first:],
                parent_block_hash=hashes[first - 1] if first else None,
                token_ids=request.all_token_ids[first * size : len(hashes) * size],
                block_size=size,
                lora_id=lora.adapter_id if lora else None,
                medium=MEDIUM_CPU,
                lora_name=lora.name if lora else None,
            )
        )

    def _withdraw(self, key: int) -> None:
        if self.events is None:
            return
        gone = []
        for block in self._hashes.pop(key):
            self._announced[block] -= 1
            if self._announced[block] == 0:
                del self._announced[block]
                gone.append(block)
        if gone:
            self.events.append(BlockRemoved(block_hashes=gone, medium=MEDIUM_CPU))
