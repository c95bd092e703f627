"""Prefixes and Ledger without an engine: who shares what, what it costs; nothing leaks."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from icecache.prefix_store import PrefixTable
from icecache.vllm import prefixes as module
from icecache.vllm.ledger import Ledger
from scheduling import BLOCK, Scheduling, make_request, slots_of
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import RequestStatus


def serve(machine: Scheduling, name: str, tokens: list[int] | None, **given: Any) -> int:
    """Tokens that a request forked, which runs alone from beginning to end."""
    machine.add(make_request(name, tokens, **given))
    machine.run()
    return machine.hits[name]


# --- what is shared


def test_prompts_are_shared_token_by_token_but_for_their_last_token() -> None:
    machine = Scheduling()
    prompt = list(range(30))
    assert serve(machine, "first", prompt) == 0
    assert serve(machine, "again", prompt) == 29
    assert serve(machine, "another last token", [*prompt[:-1], 99]) == 29
    assert serve(machine, "another one before", [*prompt[:-2], 99, 98]) == 28
    assert serve(machine, "less than a block", prompt[: BLOCK - 1]) == 0
    assert serve(machine, "one block", prompt[:BLOCK]) == BLOCK - 1
    assert serve(machine, "one token", [0]) == 0
    machine.check_empty()


@pytest.mark.parametrize("collide", [False, True], ids=["hashes", "hashes that collide"])
def test_users_and_adapters_share_nothing(collide: bool) -> None:
    machine = Scheduling()
    prompt = list(range(30))
    plain = make_request("plain", prompt).block_hashes
    kinds: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"lora_request": LoRARequest("a", 1, "/one")},
        {"lora_request": LoRARequest("a", 2, "/two")},  # the name points elsewhere now
        {"lora_request": LoRARequest("b", 3, "/one")},
        {"lora_request": LoRARequest("a", 1, "/one"), "cache_salt": "a"},
    ]
    for turn in range(2):
        for number, kind in enumerate(kinds):
            request = make_request(f"{turn}{number}", prompt, **kind)
            if collide:
                request.block_hashes = list(plain)
                request._block_hasher = None
            machine.add(request)
            machine.run()
            assert machine.hits[request.request_id] == (29 if turn else 0)
    machine.check_empty()


def picture(identifier: str, offset: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset, 6))


def test_behind_pictures_whole_blocks_are_shared() -> None:
    machine = Scheduling()
    prompt = [*range(10), *[7] * 6, *range(30, 45)]  # 31 tokens, of which 10 to 15 are a picture
    cat, dog = [picture("cat", 10)], [picture("dog", 10)]
    assert serve(machine, "cat", prompt, mm_features=cat) == 0
    assert serve(machine, "cat again", prompt, mm_features=cat) == 28
    assert serve(machine, "another question", [*prompt[:-1], 99], mm_features=cat) == 28
    assert serve(machine, "dog", prompt, mm_features=dog) == 8, "blocks ahead of the picture"
    assert serve(machine, "none", prompt) == 8
    assert serve(machine, "none again", prompt) == 30
    machine.check_empty()


def test_prompts_given_as_embeddings_share_whole_blocks() -> None:
    machine = Scheduling()
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    other = torch.cat([rows[:14], -rows[14:]])
    assert serve(machine, "rows", None, prompt_embeds=rows) == 0
    assert serve(machine, "again", None, prompt_embeds=rows.clone()) == 28
    assert serve(machine, "other", None, prompt_embeds=other) == 12
    assert serve(machine, "the same ids", [0] * 30) == 0
    machine.check_empty()


def test_a_request_may_read_nothing_and_is_kept_all_the_same() -> None:
    machine = Scheduling()
    prompt = list(range(30))
    alone = SamplingParams(max_tokens=8, skip_reading_prefix_cache=True)
    assert serve(machine, "first", prompt, params=alone) == 0
    assert serve(machine, "second", prompt, params=alone) == 0
    assert serve(machine, "third", prompt) == 29
    machine.check_empty()


def test_a_twin_waits_for_a_prompt_and_goes_on_where_its_client_left() -> None:
    machine = Scheduling(chunk=8)
    machine.add(make_request("first", list(range(40))))
    machine.add(make_request("twin", list(range(40))))
    machine.add(make_request("beginning", [*range(10), 99]))
    machine.step()
    assert machine.running == ["first"] and machine.waiting == ["twin", "beginning"]
    machine.step()
    machine.step()  # 16 tokens are there when it begins
    assert machine.running == ["first", "beginning"] and machine.hits["beginning"] == 10
    machine.abort("first")
    machine.step()
    assert machine.hits["twin"] == 24
    machine.run()
    machine.check_empty()


def test_a_twin_that_leaves_while_it_waits_leaves_nothing() -> None:
    machine = Scheduling(chunk=8)
    machine.add(make_request("first", list(range(40))))
    machine.add(make_request("twin", list(range(40))))
    machine.step()
    machine.abort("twin")
    machine.run()
    machine.check_empty()


def test_a_lost_owner_is_forgotten_and_its_heir_starts_cold() -> None:
    machine = Scheduling()
    prompt = list(range(30))
    serve(machine, "first", prompt)
    (owner,) = machine.kept
    machine.add(make_request("second", prompt))
    machine.step()
    assert machine.hits["second"] == 29
    machine.lose("second", owner)
    machine.step()
    assert machine.hits["second"] == 0 and machine.prefixes.kept == 0
    machine.run()
    assert serve(machine, "third", prompt) == 29
    machine.check_empty()


def test_a_request_that_failed_is_not_kept() -> None:
    machine = Scheduling()
    machine.add(make_request("first", list(range(30))))
    machine.step()
    machine.end("first", RequestStatus.FINISHED_ERROR)
    machine.run()
    assert machine.prefixes.kept == 0 and serve(machine, "second", list(range(30))) == 0
    machine.check_empty()


def test_after_a_reset_running_requests_are_not_shared() -> None:
    machine = Scheduling()
    machine.add(make_request("first", list(range(30))))
    machine.step()
    machine.prefixes.reset()
    machine.add(make_request("second", list(range(30))))
    machine.step()
    assert machine.hits["second"] == 0
    machine.run()
    assert machine.prefixes.kept == 1, "the second alone"
    machine.check_empty()


# --- a session: a request that is given more input


def more_input(machine: Scheduling, name: str, tokens: list[int]) -> None:
    """As vLLM's scheduler does with the next chunk of a session, whose answer has ended."""
    request = machine.requests[name]
    done = request.num_computed_tokens
    del request._all_token_ids[done:], request.block_hashes[done // BLOCK :]
    request._all_token_ids.extend(tokens)
    request._output_token_ids.clear()
    request.update_block_hashes()
    request.num_prompt_tokens = request.num_tokens
    request.status = RequestStatus.WAITING
    machine.running.remove(name)
    machine.waiting.append(name)


def test_a_session_goes_on_and_others_share_all_that_it_was_given() -> None:
    machine = Scheduling()
    machine.add(make_request("session", list(range(20))))
    machine.step()
    machine.step()
    more_input(machine, "session", list(range(50, 70)))
    given = list(machine.requests["session"].all_token_ids)
    assert len(given) == 41
    machine.step()
    machine.add(make_request("other", given))
    machine.step()
    assert machine.hits == {"session": 0, "other": 40}
    machine.run()
    machine.check_empty()


def test_a_session_is_not_shared_after_a_reset() -> None:
    machine = Scheduling()
    machine.add(make_request("session", list(range(20))))
    machine.step()
    machine.prefixes.reset()
    more_input(machine, "session", list(range(50, 70)))
    machine.step()
    machine.add(make_request("other", list(range(20))))
    machine.step()
    assert machine.hits["other"] == 0
    machine.run()
    machine.check_empty()


# --- memory


def test_what_was_matched_is_not_evicted_for_the_request_that_matched_it() -> None:
    machine = Scheduling(capacity=200)
    serve(machine, "first", list(range(100)), answer=1)
    serve(machine, "other", list(range(200, 260)), answer=1)
    # It needs the other's room; the first one is the least recently used.
    request = make_request("again", [*range(100), *range(40)], answer=1)
    assert machine.prefixes.match(request) == 100
    assert machine.prefixes.make_room("again", 140)
    assert machine.prefixes.evictions == 1
    machine.change()
    machine.add(request)
    machine.run()
    assert machine.hits["again"] == 100
    machine.check_empty()


def test_an_owner_too_large_beside_its_heir_is_not_forked() -> None:
    machine = Scheduling(capacity=200)
    serve(machine, "first", list(range(150)), answer=1)
    assert serve(machine, "second", [*range(20), *range(300, 380)], answer=1) == 0
    assert machine.prefixes.evictions == 1
    machine.check_empty()


def test_a_store_full_of_what_is_pinned_lets_requests_wait() -> None:
    machine = Scheduling(capacity=240)
    for number in range(2):
        serve(machine, f"first {number}", [number] * 100, answer=1)
    pinned = [make_request(f"pins {number}", [*[number] * 100, 99]) for number in range(2)]
    for request in pinned:
        assert machine.prefixes.match(request) == 100
    machine.prefixes.hold("pins 0", 101)
    machine.prefixes.admit(pinned[0], 100)
    assert not machine.prefixes.make_room("third", 100)
    assert machine.prefixes.evictions == 0
    machine.prefixes.leave("pins 0")
    machine.change()
    for request in pinned:
        machine.prefixes.finished(request.request_id)
    machine.step()
    machine.check_empty()


def test_a_request_alone_has_room() -> None:
    machine = Scheduling(capacity=50)
    assert serve(machine, "long", list(range(100))) == 0
    machine.check_empty()


def test_what_is_shared_is_counted_once_and_as_long_as_an_heir_lives() -> None:
    ledger = Ledger(slots_of)
    ledger.open(1, 100)
    ledger.open(2, 110, 1, 100)
    assert ledger.used == slots_of(100) + slots_of(10)
    assert ledger.held_by(2) == ledger.used and ledger.held_by(1) == slots_of(100)
    ledger.set_tokens(1, 120)
    assert ledger.used == slots_of(120) + slots_of(10)
    assert ledger.held_by(2) == slots_of(100) + slots_of(10), "what the first adds is its own"
    ledger.open(3, 90, 2, 80)  # of tokens that are the first's
    ledger.close(1)
    assert ledger.used == slots_of(120) + 2 * slots_of(10) and len(ledger) == 3
    ledger.set_tokens(2, 151)  # half as many as it shares: merged, it has a copy
    assert ledger.used == slots_of(120) + slots_of(151) + slots_of(10)
    ledger.close(2)
    assert ledger.used == slots_of(120) + slots_of(10)
    ledger.close(3)
    assert ledger.used == 0 and len(ledger) == 0


# --- what a request that waits costs


class Counted:
    """A PrefixTable that counts calls."""

    calls: ClassVar[Counter[str]]

    def __init__(self, block_tokens: int) -> None:
        self._table = PrefixTable(block_tokens)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._table, name)

        def counted(*args: Any) -> Any:
            self.calls[name] += 1
            return method(*args)

        return counted

    def __contains__(self, key: int) -> bool:
        return key in self._table

    def __len__(self) -> int:
        return len(self._table)


def test_a_request_that_waits_reads_its_text_once_and_looks_again_after_changes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PrefixTable", Counted)
    monkeypatch.setattr(Counted, "calls", calls := Counter(), raising=False)
    machine = Scheduling(capacity=163)
    serve(machine, "first", list(range(40)), answer=1)
    machine.add(make_request("long", list(range(200, 300)), answer=12))
    machine.step()
    machine.add(make_request("waits", [*range(40), *range(15)], answer=1))
    calls.clear()
    for _ in range(10):
        machine.step()
    assert machine.waiting == ["waits"] and machine.running == ["long"]
    assert (calls["text"], calls["find"], calls["pin"]) == (1, 2, 10)
    machine.run()
    assert machine.hits["waits"] == 40
    # It looked once more when the other had ended. Its admission needs no new text, each end does.
    assert (calls["text"], calls["find"]) == (3, 4)
    machine.check_empty()


# --- everything at once


@pytest.mark.parametrize(
    ("seed", "capacity", "chunk"), [(0, 10_000, 16), (1, 700, 16), (2, 450, 7), (3, 900, 400)]
)
def test_a_thousand_random_operations(seed: int, capacity: int, chunk: int) -> None:
    generator = random.Random(seed)
    machine = Scheduling(capacity, chunk)
    texts = [[generator.randrange(5) for _ in range(generator.randint(1, 90))] for _ in range(8)]
    lora = LoRARequest("a", 1, "/one")
    hits: Counter[bool] = Counter()
    for number in range(1_000):
        kind = generator.choices(
            ["add", "step", "abort", "preempt", "lose", "reset"], [30, 60, 4, 2, 2, 1]
        )[0]
        running = list(machine.running)
        if kind == "add" and len(machine.requests) < 12:
            tokens = [*generator.choice(texts), *texts[0][: generator.choice([0, 1, 9])]]
            given = generator.choice([{}, {}, {"cache_salt": "a"}, {"lora_request": lora}])
            machine.add(make_request(f"r{number}", tokens, generator.randint(1, 9), **given))
        elif kind == "step":
            before = dict(machine.hits)
            machine.step()
            hits.update(hit > 0 for name, hit in machine.hits.items() if name not in before)
        elif kind == "abort" and machine.requests:
            machine.abort(generator.choice(sorted(machine.requests)))
        elif kind == "preempt" and running:
            machine.preempt(generator.choice(running))
        elif kind == "lose" and running and machine.kept:
            machine.step()
            if machine.running and machine.prefixes.kept:
                owner = generator.choice(machine.prefixes._kept.sequences())
                machine.lose(generator.choice(machine.running), owner)
        elif kind == "reset":
            machine.prefixes.reset()
    machine.run()
    assert hits[True] > 40
    assert capacity == 10_000 or machine.preemptions > 0 or machine.prefixes.evictions > 0
    machine.check_empty()
