"""The store's engine on a CUDA device: DeviceCache, with one of its sequences for each request.

Attention over a prompt is torch's own. Its keys and values go to the cache when they are complete;
those of a prompt that comes in chunks stay on the device until then. After that a request takes one
token a step, within the budget, and all requests of a step share the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from icecache import Config, Error, InvalidArgument, Phase
from icecache.device import DeviceCache, rebuild_is_due


@dataclass(frozen=True)
class SlotStats:
    """Sums over requests of one layer and KV head; what a device does not measure stays 0."""

    steps: int
    hits: int
    misses: int
    bytes_moved: int
    dense_steps: int = 0
    tokens_selected: int = 0
    pages_selected: int = 0
    bytes_read: int = 0
    mass: float = 0.0
    select_seconds: float = 0.0
    attend_seconds: float = 0.0
    index_seconds: float = 0.0


class SlotEngine:
    """The calls of icecache.Engine that a store makes. Not thread-safe.

    Device memory is taken at once, for `slots` requests of `max_tokens`.
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
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        self.head_dim, self.dtype = head_dim, dtype
        self._scale = scale
        self._free = list(range(slots))[::-1]
        self._lengths = [[0] * slots for _ in range(num_layers)]
        self._built = [[0] * slots for _ in range(num_layers)]
        # Prompts so far, by layer and slot: keys and values [Hkv, T, D].
        self._chunks: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._broken: dict[int, str] = {}  # slots whose index could not be built, and why

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
        for layer, lengths in enumerate(self._lengths):
            lengths[seq] = 0
            self._chunks.pop((layer, seq), None)
        self._broken.pop(seq, None)
        self._free.append(seq)

    def truncate(self, seq: int, length: int) -> None:
        """Takes tokens back that the scheduler did not keep. Waits for the current stream."""
        self.cache.truncate(seq, length)
        for layer in range(self.num_layers):
            for counts in (self._lengths[layer], self._built[layer]):
                counts[seq] = min(counts[seq], length)

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
        """As Engine.step_packed(): prompts, or chunks of them, and sequences with one more token.

        Raises before any decodes where one cannot, and where host memory ends: what prompts of the
        same call left is replaced when they come again.
        """
        lengths = self._lengths[layer]
        given = list(zip(seqs, firsts, counts, phases, strict=True))
        later = tuple((seq, first) for seq, first, _, _ in given if lengths[seq] > 0)
        for seq, _, count, _ in given:
            if seq in self._broken:
                raise Error(self._broken[seq])
            if lengths[seq] > 0 and count != 1:
                raise InvalidArgument(
                    "on a CUDA device a prompt is followed by one token a step, got "
                    f"{count} tokens behind {lengths[seq]}"
                )
        prompts: dict[int, tuple[torch.Tensor, torch.Tensor, Phase]] = {}
        for seq, first, count, phase in given:
            if lengths[seq] > 0:
                continue
            rows = slice(first, first + count)
            # Copies: index work reads them when the model is at later layers.
            query, key, value = (
                x[rows].transpose(0, 1).contiguous() for x in (queries, keys, values)
            )
            if (layer, seq) in self._chunks:
                before = self._chunks[layer, seq]
                key, value = (
                    torch.cat(parts, dim=1) for parts in zip(before, (key, value), strict=True)
                )
            outputs[rows] = self._attend(query, key, value).transpose(0, 1)
            if phase != Phase.PREFILL:
                self.cache.prefill(layer, query, key, value, sequence=seq)
            prompts[seq] = key, value, phase
        if later:
            self._decode(layer, queries, keys, values, outputs, later)
        for seq, (key, value, phase) in prompts.items():
            if phase == Phase.PREFILL:
                self._chunks[layer, seq] = key, value
            else:
                self._chunks.pop((layer, seq), None)
                lengths[seq] = self._built[layer][seq] = key.shape[1]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Full attention of the last tokens [Hq, T', D] of a prompt over it [Hkv, T, D]."""
        count, length = query.shape[1], key.shape[1]
        mask = None if count == length else causal_lower_right(count, length)
        attended: torch.Tensor = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return attended[0]

    def _decode(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
        later: tuple[tuple[int, int], ...],
    ) -> None:
        lengths, built = self._lengths[layer], self._built[layer]
        for seq, _ in later:
            if rebuild_is_due(lengths[seq], built[seq]):
                self.cache.rebuild(layer, seq)
                built[seq] = lengths[seq]
        try:
            self.cache.step(
                layer,
                queries.unsqueeze(2),
                keys.unsqueeze(2),
                values.unsqueeze(2),
                self.cache.rows_of(later),
                outputs.unsqueeze(2),
            )
        except Error as error:  # of index work, before the step: of whose?
            for seq, _ in later:
                if self.cache.length(layer, seq) != lengths[seq]:
                    self._broken[seq] = str(error)
            raise
        for seq, _ in later:
            lengths[seq] += 1

    def stats(self, layer: int, kv_head: int) -> SlotStats:
        """Waits for the current stream."""
        of_head = self.cache.stats(layer, kv_head)
        return SlotStats(of_head.steps, of_head.hits, of_head.misses, of_head.bytes_moved)

    def pool_bytes(self) -> int:
        """Of pages in use, in host memory."""
        return int(self.cache.memory().host_bytes)
