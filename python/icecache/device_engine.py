"""DeviceEngine: the verbs of Engine for a model on a CUDA device, over one DeviceCache or more.

Dimension letters as in engine.py; N rows of a packed step, A sequences of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NoReturn

import torch

from icecache import HeadStats, MemoryStats
from icecache.device import ROOM_STEP, STEP_TOKENS, DeviceCache
from icecache.engine import Phase
from icecache.errors import Error, InvalidArgument
from icecache.lane_steps import attend_suffix, decode, decoding, packed
from icecache.lanes import Fork, Lanes, take_memory
from icecache.prompt_attention import AttendPrompt
from icecache.prompt_attention import attend_prompt as attend_by_torch

_NEW_TOKENS = 32768  # capacity behind a prompt where max_tokens is not given
_GONE = -1  # in place of what a fork copies: it is no longer what it was
_ELSE = "or run the model on the CPU, or without IceCache"


class DeviceEngine:
    """The verbs of icecache.Engine for sequences on one CUDA device. Not thread-safe.

    A prompt enters by append() and observe() as a whole, after the caller has attended it, or by
    step_packed() in chunks; these stay on the device until the prompt is complete. What follows a
    prompt attends as on the CPU: a token, or up to `decode_tokens` in one call of step(), within
    the budget, to the bit as token by token; more, and what is to be verified, exactly. For that
    the keys and values of what the sequence holds come to the device, a layer at a time. So it is
    with the suffix of a fork in step_packed(), whose pages are its own alone.

    With `lanes`, so many sequences share one DeviceCache, and the kernels of a step. Device memory
    is taken at once: what each of the lanes needs whatever its length, and the indexes of `tokens`
    of them together, which is as many as host memory holds, `lanes` times `max_tokens`, or half of
    what `device_share` of the device has left, whichever is least. The other half is for
    activations, and for prompts while they are read.

    Without `lanes`, sequences whose prompts enter in one call form a batch with a cache of its own,
    which grows up to `max_tokens`, or 32,768 tokens behind the prompt. A step is of one batch.
    What the caches of other batches have taken of `device_tokens` is left out of its own.

    A fork takes a free lane, or else that of the next sequence of its cache which is released, as
    beams come and go, if what it copies has not gone on by then. Anything else is refused.
    """

    room_step = ROOM_STEP  # tokens by which a sequence grows

    def __init__(
        self,
        *,
        device: torch.device,
        lanes: int | None = None,
        max_tokens: int | None = None,
        device_share: float = 1.0,
        attend_prompt: AttendPrompt | None = None,
        step_tokens: int = 1,
        **settings: Any,
    ) -> None:
        """`settings` are those of DeviceCache; `attend_prompt` attends what is attended exactly.

        With `lanes`, `max_tokens` must be given. `step_tokens`: as many tokens of a sequence does
        step_packed() without sequences have work for, 1..16; drafts, and the token ahead of them.
        Raises as DeviceCache, and OutOfPages where the device does not hold one longest sequence.
        """
        if not 1 <= step_tokens <= STEP_TOKENS:
            raise InvalidArgument(
                f"step_tokens: expected 1 to {STEP_TOKENS} on a CUDA device, got {step_tokens}"
            )
        self._settings = {"device": device, **settings}
        self._max_tokens = max_tokens
        self._step_tokens = step_tokens
        by_torch = partial(attend_by_torch, scale=settings.get("scale"))
        self._attend_prompt: AttendPrompt = attend_prompt or by_torch
        self._shared: Lanes | None = None  # those of all sequences; None: each batch has its own
        self._batches: list[Lanes] = []
        self._waiting: list[int] = []  # sequences that get a lane with their prompt
        self._forks: dict[int, Fork] = {}
        self._next = 0
        if lanes is None:
            # Refuses settings now and not at the first token.
            cache = self._make_cache(1, 1024)
        else:
            cache = self._make_cache(lanes, max_tokens or 0)
            self.tokens = take_memory(cache, device_share)
            self._shared = Lanes(cache)
            self._batches.append(self._shared)
        self.config = cache.config
        self.shape = cache.shape
        # By layer and KV head, of batches that are gone: nothing so far, like a new cache's.
        self._past = {
            (layer, head): cache.stats(layer, head)
            for layer in range(self.shape.num_layers)
            for head in range(self.shape.num_kv_heads)
        }

    def new_sequence(self) -> int:
        """An empty sequence; its number is never used again.

        Raises InvalidArgument where all lanes are taken.
        """
        if self._shared is None:
            self._waiting.append(self._next)
        elif self._shared.free:
            self._shared.enter(self._next)
        else:
            raise InvalidArgument(
                f"lanes: all {self._shared.cache.batch} lanes of the device are taken"
            )
        self._next += 1
        return self._next - 1

    def fork(self, seq: int, length: int | None = None) -> int:
        """A sequence with the same tokens, or the first `length`; whole pages are shared."""
        lanes, lane = self._place(seq)
        if lanes.free:
            lanes.copy(lanes.free[-1], lane)
            lanes.shorten(lanes.free[-1], length)
            lanes.enter(self._next)
        else:
            self._forks[self._next] = Fork(seq, length)
        self._next += 1
        return self._next - 1

    def retain(self, seq: int) -> None:
        """Refused: a sequence takes a lane, which others want."""
        raise InvalidArgument(f"seq: a device retains no sequences, got {seq}; release it")

    def contains(self, seq: int) -> bool:
        """False for what was released."""
        has_lane = any(seq in lanes.of for lanes in self._batches)
        return has_lane or seq in self._waiting or seq in self._forks

    def truncate(self, seq: int, length: int) -> None:
        """Keeps the first `length` tokens of every layer. Waits for the current stream."""
        if seq in self._waiting:
            return
        if length == 0 and self._shared is None:  # it enters anew, with others maybe
            self.release(seq)
            self._waiting.append(seq)
        elif seq in self._forks:
            fork = self._forks[seq]
            fork.length = int(min(fork.tokens(), length))
        else:
            lanes, lane = self._place(seq)
            if lanes.shorten(lane, length):
                for fork in self._forks.values():
                    if fork.source == seq and fork.tokens() > length:
                        fork.source = _GONE

    def release(self, seq: int) -> None:
        """Ends a sequence. Waits for the current stream."""
        if seq in self._waiting:
            self._waiting.remove(seq)
            return
        if self._forks.pop(seq, None) is not None:
            return
        lanes, lane = self._place(seq)
        if self._hand_on(seq, lanes, lane):
            return
        if lanes is self._shared or len(lanes.of) > 1:
            lanes.leave(seq)
            return
        for (layer, head), past in self._past.items():
            self._past[layer, head] = past + lanes.cache.stats(layer, head)
        self._batches.remove(lanes)

    def _hand_on(self, seq: int, lanes: Lanes, lane: int) -> bool:
        """Gives the lane of a sequence that ends to a fork that waits. Says whether one does.

        The longest of its own forks takes it, and the others are copies of that one then; else the
        oldest fork of another sequence of the same cache.
        """
        heirs = [heir for heir, fork in self._forks.items() if fork.source == seq]
        if heirs:
            heirs.sort(key=lambda heir: self._forks[heir].tokens())
            heir = heirs.pop()
            for other in heirs:
                self._forks[other].source = heir
        else:
            others = [heir for heir, fork in self._forks.items() if fork.source in lanes.of]
            if not others:
                return False
            heir = others[0]
            lanes.copy(lane, lanes.of[self._forks[heir].source])
        lanes.of[heir] = lanes.of.pop(seq)
        lanes.shorten(lane, self._forks.pop(heir).length)
        return True

    def length(self, seq: int, layer: int = 0) -> int:
        """Tokens of a sequence in one layer. Waits for the current stream."""
        if seq in self._waiting:
            return 0
        lanes, lane = self._place(seq)
        return lanes.cache.length(layer, lane)

    def append(self, seqs: Sequence[int], layer: int, keys: Any, values: Any) -> None:
        """Prompts whose attention the caller computes, and whose queries observe() gets next.

        Keys, values [B, Hkv, T, D] or B of [Hkv, T_b, D].
        """
        if all(seq in self._waiting for seq in seqs):
            self._open_batch(seqs, max(row.shape[1] for row in keys))
        for seq, key, value in zip(seqs, keys, values, strict=True):
            lanes, lane = self._place(seq)
            if lanes.lengths[layer][lane]:
                _refuse_chunks(key.shape[1])
            lanes.prompts[layer, lane] = key, value

    def _open_batch(self, seqs: Sequence[int], longest: int) -> None:
        """Makes a cache for sequences that enter together, with prompts of up to `longest`."""
        capacity = self._max_tokens or longest + _NEW_TOKENS
        if longest > capacity:
            raise InvalidArgument(
                f"max_tokens: the prompt has {longest} tokens, and there is room for {capacity}; "
                "give icecache.enable a larger max_tokens"
            )
        lanes = Lanes(self._make_cache(len(seqs), capacity))
        for seq in seqs:
            lanes.enter(seq)
        self._batches.append(lanes)
        self._waiting = [seq for seq in self._waiting if seq not in seqs]

    def observe(
        self, seqs: Sequence[int], layer: int, queries: Any, phase: Phase = Phase.AUTO
    ) -> None:
        """The queries of prompts that were appended; their index is built behind the caller.

        Refuses PREFILL: a prompt is observed as a whole.
        """
        if phase == Phase.PREFILL:
            raise InvalidArgument(
                "phase: a CUDA device takes the queries of whole prompts, got PREFILL; call "
                "step_packed() for chunks"
            )
        for seq, query in zip(seqs, queries, strict=True):
            lanes, lane = self._place(seq)
            key, value = lanes.prompts.pop((layer, lane))
            lanes.cache.reserve(lane, key.shape[1] + 1)
            lanes.cache.prefill(layer, query, key, value, sequence=lane)
            lanes.lengths[layer][lane] = lanes.built[layer][lane] = key.shape[1]

    def attend(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: Any,
        phase: Phase = Phase.AUTO,
        lse: Any = None,
    ) -> Any:
        """Refused: on a device tokens are attended by the step that appends them."""
        _refuse_chunks(len(queries))

    def step(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        phase: Phase = Phase.AUTO,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends T tokens to each of A sequences of one batch, and attends, as Engine.step().

        Queries [A, Hq, T, D], keys and values [A, Hkv, T, D]; the result is [A, Hq, T, D]. Refuses
        `lse`, and more tokens than there is room for: then none is taken.
        """
        _refuse_lse(lse)
        lanes, places = self._places(seqs)
        count = queries.shape[2]
        lanes.prepare_tokens(places, layer, count)
        self._goes_on(seqs)
        if phase == Phase.VERIFY or count > self.config.decode_tokens:
            each = [*zip(places, queries, keys, values, strict=True)]
            # All of what may fail comes before the first token is taken.
            outs = [
                attend_suffix(lanes, lane, layer, given, self._attend_prompt)
                for lane, *given in each
            ]
            for lane, query, key, value in each:
                lanes.cache.extend(layer, query, key, value, lane)
                lanes.lengths[layer][lane] += count
            return torch.stack(outs).transpose(1, 2)
        outs = []
        for part in zip(*(x.split(STEP_TOKENS, 2) for x in (queries, keys, values)), strict=True):
            outs.append(decode(lanes.cache, places, layer, part))
            for lane in places:
                lanes.lengths[layer][lane] += part[0].shape[2]
        return torch.cat(outs, dim=2)

    def prepare(self, seq: int, count: int, phase: Phase) -> None:
        """What a sequence that takes `count` tokens in the next step_packed() needs before it.

        It has room for them, and its index is there, built anew where that is due. Raises Error
        where the sequence cannot take part: then it must be released.
        """
        lanes, lane = self._place(seq)
        length, built = lanes.lengths[0][lane], lanes.built[0][lane]
        is_prompt = phase != Phase.AUTO
        if not is_prompt and (built == 0 or count > STEP_TOKENS):
            raise InvalidArgument(
                f"on a CUDA device a step takes up to {STEP_TOKENS} tokens behind a prompt, got "
                f"{count} tokens behind {length}"
            )
        if built > 0:
            lanes.finish_building()
            if lane in lanes.broken:
                raise Error(lanes.broken[lane])
            lanes.rebuild_if_due(lane, range(self.shape.num_layers))
        lanes.cache.reserve(lane, length + count)
        self._goes_on([seq])
        (lanes.extending.add if is_prompt and built > 0 else lanes.extending.discard)(lane)
        for lengths, builts in zip(lanes.lengths, lanes.built, strict=True):
            lengths[lane] = length + count
            if phase == Phase.PROMPT_END and built == 0:
                builts[lane] = length + count

    def begin(
        self,
        seqs: Sequence[int],
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
    ) -> None:
        """Before a packed step of sequences that are prepared: who decodes in which rows.

        With that a step without prompts is on the device: its layers may be replayed from a graph.
        """
        lanes, places = self._places(seqs)
        lanes.cache.rows_of(decoding([*zip(places, firsts, counts, phases, strict=True)]))

    def step_packed(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        outputs: torch.Tensor,
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
        lse: torch.Tensor | None = None,
    ) -> None:
        """As Engine.step_packed(): chunks of prompts, and sequences that take up to 16 more tokens.

        prepare() was called for each sequence that takes a token. If host memory runs out, the call
        raises before any sequence has taken its token; prompts of the same call are written again
        when they come again. A step without prompts only launches work on the device, even a step
        of no sequences: vLLM captures it as a graph, and replays it for the sequences that begin()
        has placed by then, with up to `step_tokens` tokens each. Refuses `lse`, and to attend
        without keys and values.
        """
        _refuse_lse(lse)
        if keys is None or values is None:
            raise InvalidArgument(
                "keys, values: a CUDA device attends in the step that appends them, got None; "
                "run the model on the CPU"
            )
        lanes, places = self._places(seqs)
        rows = [*zip(places, firsts, counts, phases, strict=True)]
        tensors = queries, keys, values, outputs
        packed(lanes, layer, tensors, rows, self._attend_prompt, self._step_tokens)

    def stats(self, layer: int, kv_head: int) -> HeadStats:
        """Sums since the start, over all sequences. Waits for the current stream."""
        now = [lanes.cache.stats(layer, kv_head) for lanes in self._batches]
        return reduce(add, now, self._past[layer, kv_head])

    def all_stats(self) -> list[HeadStats]:
        """Sums of each layer of each batch. Waits for the current stream."""
        layers = range(self.shape.num_layers)
        return [lanes.cache.stats(layer) for lanes in self._batches for layer in layers]

    def memory(self) -> MemoryStats:
        """Bytes held."""
        held = [lanes.cache.memory() for lanes in self._batches]
        return MemoryStats.of(
            device_bytes=sum(m.device_bytes for m in held),
            pool_bytes=sum(m.host_bytes for m in held),
            sequences=len(self._waiting) + sum(len(lanes.of) for lanes in self._batches),
            resident_sequences=sum(m.resident_sequences for m in held),
            resident_bytes=sum(m.resident_bytes for m in held),
        )

    def pool_bytes(self) -> int:
        """Bytes of pages in use, in host memory."""
        return self.memory().pool_bytes

    def _make_cache(self, batch: int, max_tokens: int) -> DeviceCache:
        settings = self._settings
        if taken := sum(lanes.cache.memory().resident_bytes for lanes in self._batches):
            left = int(self.config.device_tokens) - taken // self.shape.token_bytes
            settings = {**settings, "device_tokens": max(0, left)}
        return DeviceCache(batch=batch, max_tokens=max_tokens, **settings)

    def _place(self, seq: int) -> tuple[Lanes, int]:
        """The batch that a sequence is in, and its lane."""
        lanes, places = self._places([seq])
        return lanes, places[0]

    def _places(self, seqs: Sequence[int]) -> tuple[Lanes, list[int]]:
        """The batch that all of `seqs` are in, and their lanes."""
        for lanes in self._batches:
            if not seqs or seqs[0] in lanes.of:
                places = [lanes.of.get(seq, _GONE) for seq in seqs]
                if _GONE not in places:
                    return lanes, places
        if any(seq in self._forks for seq in seqs):
            raise InvalidArgument(
                "batch_size: on a CUDA device a batch keeps its number of sequences (contrastive "
                f"search and copies of a cache make more); {_ELSE}"
            )
        for seq in seqs:
            if not any(seq in lanes.of for lanes in self._batches):
                raise InvalidArgument(
                    f"sequence must be one of this engine's live sequences, got {seq}"
                )
        raise InvalidArgument(
            "past_key_values: on a CUDA device sequences that entered in different batches "
            f"cannot continue in one; {_ELSE}"
        )

    def _goes_on(self, seqs: Sequence[int]) -> None:
        """Sequences take tokens: forks that wait cannot be copies of them any more."""
        for fork in self._forks.values():
            if fork.source in seqs:
                fork.source = _GONE


def _refuse_lse(lse: Any) -> None:
    if lse is not None:
        raise InvalidArgument(
            f"lse: expected None, a CUDA device gives none, got a {type(lse).__name__}; run the "
            "model on the CPU"
        )


def _refuse_chunks(tokens: int) -> NoReturn:
    raise InvalidArgument(
        "attention_mask: on a CUDA device tokens that follow a prompt have no padding, got "
        f"{tokens} for a cache that holds some; pass the whole prompt at once, {_ELSE}"
    )
