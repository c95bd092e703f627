"""A model of vLLM's scheduler and of a worker around Prefixes, with vLLM's own requests.

It checks what has to hold after every step: the worker has what a request forks, and these are the
request's own tokens, of its own user; events, ledger and worker agree on what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icecache.vllm.prefixes import Fork, Prefixes
from scenarios_prefixes import announced
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

BLOCK = 4
LONGEST = 400  # tokens of a request

init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK, sha256)


def make_request(name: str, tokens: Sequence[int] | None, answer: int = 8, **given: Any) -> Request:
    """A request for `answer` tokens behind `tokens`."""
    params = given.pop("params", None) or SamplingParams(max_tokens=answer)
    prompt = None if tokens is None else list(tokens)
    return Request(name, prompt, params, None, block_hasher=HASHER, **given)


def slots_of(tokens: int) -> int:
    return tokens + 3


class Scheduling:
    """Requests in vLLM's order of calls; the worker's part of a step is done at once."""

    def __init__(self, capacity: int = 10_000, chunk: int = 10_000) -> None:
        """`capacity`: slots of host memory; `chunk`: tokens of a request that a step computes."""
        self.prefixes = Prefixes(slots_of, capacity)
        self.prefixes.turn_on(BLOCK, LONGEST, with_events=True)
        self.chunk = chunk
        self.requests: dict[str, Request] = {}
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.hits: dict[str, int] = {}  # tokens that each request forked, the last time
        self.preemptions = 0
        self.events: list[Any] = []
        self._ended: list[str] = []  # since the last step
        # The worker's sequences: their tokens, and the user that each is of.
        self.held: dict[int, tuple[list[int], Any]] = {}
        self.kept: set[int] = set()

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request.request_id)

    def step(self) -> None:
        """One step: who runs grows, who waits is admitted; then the worker computes."""
        before = self.preemptions
        grown = [name for name in list(self.running) if name in self.running and self._grow(name)]
        scheduled = [name for name in grown if name in self.running]
        if self.preemptions == before:
            scheduled += self._admit()
        for name in self._ended:
            self.prefixes.finished(name)
        self._ended.clear()
        forks = {name: self.prefixes.take_fork(name) for name in scheduled}
        self.change()
        for name in scheduled:
            self._compute(name, forks[name])
        self.check()

    def _grow(self, name: str) -> bool:
        """A running request gets memory for its next tokens, at the cost of the last ones."""
        request = self.requests[name]
        count = min(self.chunk, request.num_tokens - request.num_computed_tokens)
        while not self.prefixes.make_room(name, request.num_computed_tokens + count):
            victim = self.running[-1]
            self.preempt(victim)
            if victim == name:
                return False
        self.prefixes.hold(name, request.num_computed_tokens + count)
        return True

    def _admit(self) -> list[str]:
        admitted = []
        for name in list(self.waiting):
            request = self.requests[name]
            hit = self.prefixes.match(request) if request.num_computed_tokens == 0 else 0
            if hit is None:
                continue
            if not self.prefixes.make_room(name, request.num_tokens):
                break
            self.prefixes.hold(name, request.num_tokens)
            self.prefixes.admit(request, hit)
            if request.num_computed_tokens == 0:
                request.num_computed_tokens = self.hits[name] = hit
            request.status = RequestStatus.RUNNING
            self.waiting.remove(name)
            self.running.append(name)
            admitted.append(name)
        return admitted

    def change(self) -> None:
        """The scheduling is over: the worker is told which sequences go, and which are kept."""
        changes = self.prefixes.end_of_scheduling()
        for key in changes.gone:
            self.held.pop(key, None)
            self.kept.discard(key)
        self.kept |= changes.kept & self.held.keys()

    def _compute(self, name: str, fork: Fork | None) -> None:
        request, key = self.requests[name], self.prefixes.key(name)
        tokens, user = list(request.all_token_ids), (request.cache_salt, request.lora_request)
        if fork is not None:
            theirs, other = self.held[fork.owner]
            assert other == user, "a fork of another user's sequence"
            assert theirs[: fork.tokens] == tokens[: fork.tokens], "a fork of other tokens"
            assert len(theirs) >= fork.tokens == request.num_computed_tokens
            self.held[key] = (theirs[: fork.tokens], user)
        done = request.num_computed_tokens
        count = min(self.chunk, request.num_tokens - done)
        mine = self.held.setdefault(key, ([], user))[0]
        assert len(mine) >= done
        mine[done:] = tokens[done : done + count]
        request.num_computed_tokens += count
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids((sum(tokens) + len(tokens)) % 5)
            if request.num_output_tokens >= request.max_tokens or request.num_tokens >= LONGEST:
                self.end(name, RequestStatus.FINISHED_LENGTH_CAPPED)

    def end(self, name: str, status: RequestStatus) -> None:
        """A request ends, wherever it stands."""
        request = self.requests.pop(name)
        request.status = status
        (self.running if name in self.running else self.waiting).remove(name)
        self.prefixes.keep(request)
        self.prefixes.leave(name)
        self._ended.append(name)

    def abort(self, name: str) -> None:
        self.end(name, RequestStatus.FINISHED_ABORTED)

    def preempt(self, name: str) -> None:
        request = self.requests[name]
        self.running.remove(name)
        self.prefixes.keep(request)
        self.prefixes.leave(name)
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
        self.waiting.insert(0, name)
        self.preemptions += 1

    def lose(self, name: str, owner: int) -> None:
        """The worker did not have what a request was to begin with: it begins anew."""
        self.held.pop(owner, None)
        self.prefixes.start_cold(name, owner)
        self.preempt(name)

    def run(self, most: int = 10_000) -> None:
        """Until all requests have ended, and the worker knows."""
        for _ in range(most):
            if not self.requests:
                break
            self.step()
        assert not self.requests, "some request waits for ever"
        self.step()

    def check(self) -> None:
        """Behind a step the scheduler's books, the worker and the events agree."""
        prefixes, ledger = self.prefixes, self.prefixes.ledger
        kept = prefixes._kept.sequences()
        running = {prefixes.key(name) for name in self.running}
        assert running.isdisjoint(kept)
        told, prefixes.events = prefixes.events, []
        self.events += told or []
        assert announced(self.events) == {hash_ for key in kept for hash_ in prefixes._hashes[key]}
        accounts = ledger._accounts
        assert ledger.used == sum(ledger.cost_of(key) for key in accounts)
        assert {key for key, account in accounts.items() if account.is_open} == {*running, *kept}
        assert not prefixes._matches, "a pin that outlives the scheduling"

    def check_empty(self) -> None:
        """Nothing is left of requests that have ended, once what is kept has gone."""
        prefixes = self.prefixes
        while prefixes._evict():
            pass
        self.step()
        assert prefixes.kept == 0, "a sequence that nobody can evict"
        assert prefixes.ledger.used == 0 and len(prefixes.ledger) == 0
        assert not self.held and not self.kept and not announced(self.events)
        left = (prefixes._running, prefixes._request_of, prefixes._waiting, prefixes._cold)
        assert not any(left) and not prefixes._announced and not prefixes._hashes
        assert len(prefixes._prompts) == 0
