"""The store's engine on a CUDA device: DeviceCache, with one of its sequences for each request.

The keys and values of a prompt go to the cache when they are complete; those of one that comes in
chunks stay on the device until then. After that a request takes one token a step, within the
budget, and all requests of a step share the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from icecache import Config, Error, InvalidArgument, OutOfPages, Phase
from icecache.device import ROOM_STEP, DeviceCache, rebuild_is_due
from icecache.vllm.host_memory import slot_bytes, slots_needed
from icecache.vllm.prompt_attention import PromptAttention


class SlotEngine:
    """The calls of icecache.Engine that a store makes. Not thread-safe.

    Device memory is taken at once: what each of `slots` requests needs whatever its length, and
    the indexes of `tokens` of them together, which is as many as host memory holds, `slots` times
    `max_tokens`, or half of what `device_share` of the device has left, whichever is least. The
    other half is for activations, and for prompts while they are read.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        scale: float,
        config: Config,
        device: torch.device,
        slots: int,
        max_tokens: int,
        device_share: float,
    ) -> None:
        self.cache = DeviceCache(
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            scale=scale,
            config=config,
            batch=slots,
            max_tokens=max_tokens,
            device=device,
        )
        memory = self.cache.memory()
        of_slot = slot_bytes(num_layers, num_kv_heads, head_dim, dtype)
        on_host = int(self.cache.config.host_memory) // of_slot
        # Of the share, what others have by now does not count.
        left = max(0, memory.free_bytes - int((1 - device_share) * memory.total_bytes))
        longest = slots_needed(max_tokens, ROOM_STEP)
        on_device = left // 2 // memory.token_bytes
        self.tokens = max(1, min(on_host, slots * longest, on_device))
        if on_device < min(on_host, longest):
            raise OutOfPages(
                f"half of the {left:,} bytes left to it holds the indexes of {on_device:,} tokens"
            )
        self.cache.limit_tokens(self.tokens)
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        self.head_dim, self.dtype = head_dim, dtype
        self._attend = PromptAttention(dtype, head_dim, scale, device)
        self._free = list(range(slots))[::-1]
        # Tokens of each slot: with those of the step under way, and those that its index was built
        # from, 0 before its prompt is complete.
        self._lengths, self._built = [0] * slots, [0] * slots
        # Prompts so far, by layer and slot: keys and values [Hkv, T, D].
        self._chunks: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._building: set[int] = set()  # slots whose prompt's index may not be done yet
        self._broken: dict[int, str] = {}  # slots whose index could not be built, and why
        self._error = "its index could not be built"  # the last of index work

    @property
    def config(self) -> Config:
        """The parameters in use, with every derived value filled in."""
        return self.cache.config

    def new_sequence(self) -> int:
        """A free slot. Raises InvalidArgument where there is none."""
        if not self._free:
            raise InvalidArgument(
                f"max_num_seqs: all {self.cache.batch} slots of the device are taken"
            )
        return self._free.pop()

    def release(self, seq: int) -> None:
        """Empties a slot. Waits for the current stream."""
        self.cache.release(seq)
        self._lengths[seq] = self._built[seq] = 0
        for layer in range(self.num_layers):
            self._chunks.pop((layer, seq), None)
        self._building.discard(seq)
        self._broken.pop(seq, None)
        self._free.append(seq)

    def truncate(self, seq: int, length: int) -> None:
        """Takes tokens back that the scheduler did not keep. Waits for the current stream."""
        self.cache.truncate(seq, length)
        for counts in (self._lengths, self._built):
            counts[seq] = min(counts[seq], length)

    def prepare(self, seq: int, count: int, phase: Phase) -> None:
        """What a slot that takes `count` tokens in the next step needs of the host before it.

        It has room for them, and its index is there, built anew where that is due. Raises Error
        where the slot cannot take part: then it must be released.
        """
        length, built = self._lengths[seq], self._built[seq]
        if (built > 0) != (phase == Phase.AUTO) or (built > 0 and count != 1):
            raise InvalidArgument(
                f"on a CUDA device a prompt is followed by one token a step, got {count} tokens "
                f"behind {length}"
            )
        if phase == Phase.AUTO:
            self._finish_building()
            if seq in self._broken:
                raise Error(self._broken[seq])
            if rebuild_is_due(length, built):
                for layer in range(self.num_layers):
                    self.cache.rebuild(layer, seq)
                self._built[seq] = length
        self.cache.reserve(seq, length + count)
        self._lengths[seq] = length + count
        if phase == Phase.PROMPT_END:
            self._built[seq] = length + count

    def begin(self, seqs: Sequence[int], firsts: Sequence[int], phases: Sequence[Phase]) -> None:
        """Before a step of slots that are prepared: who decodes in which row.

        With that a step without prompts is on the device: its layers may be replayed from a graph.
        """
        self.cache.rows_of(_decoding(seqs, firsts, phases))

    def step_packed(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
    ) -> None:
        """As Engine.step_packed(): chunks of prompts, and sequences that take one more token.

        prepare() was called for each sequence that takes a token. If host memory runs out, the call
        raises before any sequence has taken its token; prompts of the same call are written again
        when they come again. A step without prompts only launches work on the device, even a step
        of no sequences: vLLM captures it as a graph, and replays it for the sequences that begin()
        has placed by then.
        """
        prompts: dict[int, tuple[torch.Tensor, torch.Tensor, Phase]] = {}
        for seq, first, count, phase in zip(seqs, firsts, counts, phases, strict=True):
            if phase == Phase.AUTO:
                continue
            rows = slice(first, first + count)
            # Copies: index work reads them when the model is at later layers.
            key, value = (x[rows].transpose(0, 1).contiguous() for x in (keys, values))
            if (layer, seq) in self._chunks:
                before = self._chunks[layer, seq]
                key, value = (
                    torch.cat(parts, dim=1) for parts in zip(before, (key, value), strict=True)
                )
            self._attend(queries[rows], key, value, outputs[rows])
            if phase != Phase.PREFILL:
                self._building.add(seq)
                self.cache.prefill(layer, queries[rows].transpose(0, 1), key, value, sequence=seq)
            prompts[seq] = key, value, phase
        later = _decoding(seqs, firsts, phases)
        if later or not prompts:
            self._wait(layer)
            self.cache.step(
                layer,
                queries.unsqueeze(2),
                keys.unsqueeze(2),
                values.unsqueeze(2),
                self.cache.rows_of(later),
                outputs.unsqueeze(2),
            )
        for seq, (key, value, phase) in prompts.items():
            if phase == Phase.PREFILL:
                self._chunks[layer, seq] = key, value
            else:
                self._chunks.pop((layer, seq), None)

    def _finish_building(self) -> None:
        """Waits for the indexes of prompts. Slots that lack one are broken: an error of index work
        names nobody, and may come up in any later call of its layer."""
        if not self._building:
            return
        layers = range(self.num_layers)
        for layer in layers:
            self._wait(layer)
        for seq in self._building:
            if any(self.cache.length(layer, seq) == 0 for layer in layers):
                self._broken[seq] = self._error
        self._building.clear()

    def _wait(self, layer: int) -> None:
        try:
            self.cache.wait(layer)
        except Error as error:
            self._error = str(error)

    def all_stats(self) -> list[Any]:
        """The DeviceCacheStats of each layer. Waits for the current stream."""
        return [self.cache.stats(layer) for layer in range(self.num_layers)]

    def pool_bytes(self) -> int:
        """Of pages in use, in host memory."""
        return int(self.cache.memory().host_bytes)


def _decoding(
    seqs: Sequence[int], firsts: Sequence[int], phases: Sequence[Phase]
) -> tuple[tuple[int, int], ...]:
    """Those that take a token behind their prompt, each with its row."""
    given = zip(seqs, firsts, phases, strict=True)
    return tuple((seq, first) for seq, first, phase in given if phase == Phase.AUTO)
