"""How many of vLLM's blocks a request holds, and when host memory is full.

The engine keeps the keys and values of a request, all of them, in its pages. Of vLLM's pool a
request holds one block for life: a seat, whose number tells the worker which row of a batch is
whose. vLLM's scheduler thereby admits as many and as long requests as host memory holds.

Layers that draft keep their keys and values in vLLM's blocks. A request then has blocks for all its
tokens, and the first of them is its seat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from icecache.vllm.host_memory import TREE, Room, slots_needed
from icecache.vllm.names import (
    AttentionSpec,
    FullAttentionManager,
    FullAttentionSpec,
    KVCacheSpecRegistry,
    SingleTypeKVCacheManager,
)
from icecache.vllm.prefixes import Prefixes


@dataclass(frozen=True, kw_only=True)
class HostMemorySpec:
    """What a KV-cache spec says of host memory; beside one of vLLM's specs."""

    host_slots: int = 0  # tokens that there is memory for, of every layer and KV head
    slot_bytes: int = 0  # of such a token, in all layers and KV heads of a worker, at most
    room_step: int = 0  # by which requests grow on a CUDA device; 0: on the CPU
    room: Room = TREE  # that a request takes on the CPU

    @classmethod
    def of(cls, spec: AttentionSpec, **memory: Any) -> Any:
        """In place of a stock spec; `memory`: fields of this class."""
        own = {f.name for f in fields(HostMemorySpec)}
        shared = [f.name for f in fields(cls) if f.init and f.name not in own]
        return cls(**{name: getattr(spec, name) for name in shared}, **memory)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Of all layers: stages of a pipeline may have unequal numbers of layers, and so of tokens.

        Raises AssertionError, as vLLM's does, for layers that differ otherwise.
        """
        assert all(isinstance(spec, cls) for spec in specs)
        memory: dict[str, Any] = {f.name: getattr(specs[0], f.name) for f in fields(HostMemorySpec)}
        memory["host_slots"] = min(spec.host_slots for spec in specs)
        memory["slot_bytes"] = max(spec.slot_bytes for spec in specs)
        alike = [replace(spec, **memory) for spec in specs]
        return replace(super().merge(alike), **memory)  # type: ignore[misc]

    def slots_of(self, tokens: int) -> int:
        """Slots that a request of `tokens` takes."""
        return slots_needed(tokens, self.room_step, self.room)


@dataclass(frozen=True, kw_only=True)
class IceCacheSpec(HostMemorySpec, AttentionSpec):  # type: ignore[misc]
    """KV-cache spec of all full-attention layers that the engines serve, whatever their shapes."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of vLLM's pool that one request takes at most."""
        return int(self.page_size_bytes)


@dataclass(frozen=True, kw_only=True)
class DraftingSpec(HostMemorySpec, FullAttentionSpec):  # type: ignore[misc]
    """KV-cache spec of layers that draft. The served layers have no spec: they are in its group."""


class HostMemoryManager(SingleTypeKVCacheManager):  # type: ignore[misc]
    """A manager of blocks that gives requests no more tokens in all than host memory holds."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.prefixes = Prefixes(kv_cache_spec.slots_of, kv_cache_spec.host_slots)
        # Both in tokens, by request. `asked`: there is room for so many; vLLM has been told how
        # many blocks the request needs, and may give it these. `held`: the request has blocks,
        # and host memory for so many.
        self._asked: dict[str, int] = {}
        self._held: dict[str, int] = {}

    def has_room(self, request_id: str, num_tokens: int) -> bool:
        """True where host memory holds so many tokens of a request, which may then ask for blocks.

        Where it does not, the scheduler is told that it needs more blocks than there are: it lets a
        new request wait, and preempts where a running one must grow.
        """
        if num_tokens <= self._held.get(request_id, -1):
            return True
        room = self.prefixes.make_room(request_id, num_tokens)
        if room:
            self._asked[request_id] = max(room, self._asked.get(request_id, 0))
        return room > 0

    def hold(self, request_id: str, num_tokens: int) -> None:
        """The request gets blocks, and host memory for all tokens that it asked for."""
        if num_tokens <= self._held.get(request_id, -1):
            return
        tokens = max(num_tokens, self._asked.pop(request_id, 0))
        self.prefixes.hold(request_id, tokens)
        self._held[request_id] = tokens

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The blocks of a request that ends or is preempted."""
        self.prefixes.leave(request_id)
        self._asked.pop(request_id, None)
        self._held.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """0: cascade attention has no blocks to share."""
        return 0

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Prefixes keeps what is shared."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """No hit in vLLM's blocks: the connector offers what Prefixes finds."""
        return tuple([] for _ in kv_cache_group_ids), 0


class IceCacheManager(HostMemoryManager):
    """One block a request. vLLM asks for each request in each step: most times nothing changes."""

    def __init__(self, kv_cache_spec: IceCacheSpec, **kwargs: Any) -> None:
        kwargs["max_admission_blocks_per_request"] = 1
        super().__init__(kv_cache_spec, **kwargs)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """0 or 1; more than there are where host memory does not hold `num_tokens` of it."""
        if num_tokens <= self._held.get(request_id, -1):
            return 0
        if not self.has_room(request_id, num_tokens):
            return int(self.block_pool.get_num_free_blocks()) + 1
        return 0 if self.req_to_blocks.get(request_id) else 1

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> list[Any]:
        """The request's block, if it has none yet."""
        if num_tokens <= self._held.get(request_id, -1):
            return []
        self.hold(request_id, num_tokens)
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        blocks.extend(self.block_pool.get_new_blocks(1))
        return list(blocks)

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what the workers fork takes no block of vLLM's."""

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the block stays for life."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """0: no block leaves."""
        return 0


class DraftingManager(HostMemoryManager, FullAttentionManager):  # type: ignore[misc]
    """Blocks for all tokens of a request, of which the layers that draft have keys and values."""

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """As vLLM's; more than there are where host memory does not hold `num_tokens` of it."""
        if not self.has_room(request_id, num_tokens):
            return int(self.block_pool.get_num_free_blocks()) + 1
        return int(super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> list[Any]:
        """As vLLM's."""
        self.hold(request_id, num_tokens)
        return list(super().allocate_new_blocks(request_id, num_tokens, *args))


# Whoever holds a spec has imported this module, and no other process needs to know of it.
# Before ours: a registry that is not empty takes itself for filled.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(IceCacheSpec, IceCacheManager, uniform_type_base_spec=IceCacheSpec)
KVCacheSpecRegistry.register(DraftingSpec, DraftingManager, uniform_type_base_spec=DraftingSpec)
