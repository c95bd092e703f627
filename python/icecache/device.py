"""DeviceCache: the KV cache of a model that runs on a CUDA device.

The device holds sinks, a window, a 16-byte sketch of every key, mean values of far-field nodes and
recently used rows; pinned host memory holds all keys and values. Dimension letters: B sequences,
T tokens of a prompt, or of a sequence in a step, Hq query heads, Hkv KV heads, D head dim.
"""

from __future__ import annotations

import weakref

import torch

from icecache import _core
from icecache.config import Config, Value, wrap
from icecache.engine import core_settings
from icecache.errors import InvalidArgument
from icecache.fakes import require_one_device
from icecache.shape import CacheShape

_QUERIES = 512  # rows of a group that shape the metric; csrc/cuda/build.h
_RECENT = 64  # tokens whose queries a sequence keeps for that; csrc/cuda/step.h
_LEAST_BUILT = 512  # tokens from which an index is built anew whenever it has doubled
ROOM_STEP = _core.DeviceCache.room_step  # tokens by which a sequence's room grows
STEP_TOKENS = _core.DeviceCache.step_tokens  # that a step adds to a sequence, at most
KIND = "cuda"  # of torch.device; tests put an emulator on the CPU in its place


class DeviceCache:
    """KV cache of one model on one CUDA device, and decode attention within a token budget.

    B sequences of up to `max_tokens` each. A prompt enters whole, layer by layer, also while other
    sequences decode; after that a step adds one token to every sequence that holds a prompt, or to
    those that it names one or several, and attends. A step is a chain of
    kernels on torch's current stream: no host decision, no allocation but its output, and it may be
    captured into a CUDA graph. Not thread-safe.

    A sequence that gets its prompt takes memory for the tokens that reserve() named, or for
    `max_tokens`: of the device, where limit_tokens() can set a bound, and of the host (pinned),
    within `host_memory`. What all sequences need whatever their length is taken at once.

    With `device_tokens` sequences are resident while they fit: the device holds the keys and values
    of all their tokens, too, and a step attends to all of them. When memory is wanted the longest
    gives way: from its next step on it attends within the budget, until its next prompt. Graphs
    that were captured before see that.

    Errors: InvalidArgument for shapes, dtypes and settings that the kernels do not cover (with what
    they do); Unavailable without CUDA in the build or a device; OutOfPages where host or device
    memory does not suffice; CudaError where CUDA fails.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        batch: int,
        max_tokens: int,
        device: torch.device | str | int = "cuda",
        scale: float | None = None,
        logit_softcap: float = 0.0,
        config: Config | None = None,
        **config_fields: Value,
    ) -> None:
        """Head dims 64, 96, 128, 256; up to 16 query heads a KV head; any of three dtypes;
        no `logit_softcap`.

        `config_fields` are fields of Config, and take precedence over `config`. `device_pages`
        bounds the row cache of a layer's sequence (default: three steps' candidates).
        `device_tokens` (default 0) is how many tokens resident sequences have together, in all
        layers, rounded up to 256; their memory is taken at once, for no more than `batch` times
        `max_tokens`. OutOfPages where the device has less.
        """
        self.shape = CacheShape(
            num_layers, num_q_heads, num_kv_heads, head_dim, dtype, scale, logit_softcap
        )
        settings = core_settings(self.shape, config, config_fields)
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if where.type != KIND:
            raise InvalidArgument(f"device must be a CUDA device, got {where}; use icecache.Engine")
        if where.index is None and KIND == "cuda":
            current = torch.cuda.current_device() if torch.cuda.is_available() else 0
            where = torch.device("cuda", current)
        self._cache = _core.DeviceCache(*settings, batch, max_tokens, where.index or 0)
        self.device = where
        self.dtype = dtype
        self.batch = batch
        self.max_tokens = max_tokens
        self.num_layers = num_layers
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        # Who stands in which row, for steps of some sequences. Not of inference mode: what is made
        # in there cannot be written outside.
        with torch.inference_mode(False):
            self._rows = torch.full((STEP_TOKENS, batch), -1, dtype=torch.int32, device=where)
        self._places: tuple[tuple[int, int, int], ...] = ()
        self._room = [0] * batch  # tokens that reserve() has named
        # Tensors that index work still reads, by layer.
        self._held: dict[int, list[torch.Tensor]] = {}
        self._number = _register(self)

    @property
    def config(self) -> Config:
        """The parameters in use: a copy, with every derived value filled in."""
        return wrap(self._cache.config())

    def limit_tokens(self, tokens: int) -> None:
        """Takes device memory for the indexes of `tokens`, of all sequences together, at once.

        From then on there is no more: reserve() and prefill() raise OutOfPages. Without it memory
        comes as sequences grow. A sequence takes it by steps of `ROOM_STEP` tokens.
        """
        self._cache.limit_tokens(tokens)

    def reserve(self, sequence: int, tokens: int) -> None:
        """Gives a sequence room for `tokens` at least, by steps of `ROOM_STEP`; all or nothing.

        Before its prompt, and before the step that would be one too many: a sequence without room
        answers with NaN. Where it grows the current stream is waited for. Graphs that were captured
        before see the room. A resident sequence stays so, at the cost of longer ones, or is not any
        more. Raises InvalidArgument beyond max_tokens, OutOfPages.
        """
        if not 0 <= sequence < self.batch or tokens > self._room[sequence]:
            self._cache.reserve(sequence, tokens)
            self._room[sequence] = tokens

    def prefill(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sequence: int | None = None,
    ) -> None:
        """Takes a prompt whose attention the caller computed itself.

        Keys and values [B, Hkv, T, D], queries [B, Hq, T, D] (of which the last few shape the
        metric), post-RoPE; with `sequence`, without B and for that sequence alone. Index work runs
        on threads and streams of its own behind the caller, and keeps the tensors until it is done;
        of earlier layers at most a few wait at a time.
        """
        if sequence is None:
            for row in range(self.batch):
                self.prefill(layer, queries[row], keys[row], values[row], row)
            return
        rows = self._rows_to_index(queries, keys, values)
        for earlier in [n for n in self._held if n != layer]:
            if self._cache.built(earlier) or len(self._held) > _WAITING:
                self.wait(earlier)
        self._held.setdefault(layer, []).extend(rows)
        self._cache.prefill(layer, sequence, *rows)

    def extend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sequence: int,
    ) -> None:
        """Takes tokens behind those of a sequence, whose attention the caller computed itself.

        Tensors as for prefill(), with `sequence`: T tokens that attend to what gather() gives and
        to one another, as the suffix of a forked prompt, or a turn of a conversation, does.
        Leaves what T steps would leave, to the bit; takes room as reserve() does. Waits for the
        current stream. Raises InvalidArgument for a sequence that holds no token in this layer.
        """
        self._cache.extend(layer, sequence, *self._rows_to_index(queries, keys, values))

    def _rows_to_index(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> list[torch.Tensor]:
        """Keys, values and the last queries of a prompt or a part of one, as kernels read them."""
        for name, tensor, heads in (
            ("queries", queries, self.num_q_heads),
            ("keys", keys, self.num_kv_heads),
            ("values", values, self.num_kv_heads),
        ):
            if tensor.ndim != 3 or tensor.shape[0] != heads or tensor.shape[2] != self.head_dim:
                raise InvalidArgument(
                    f"{name} must be [{heads}, T, {self.head_dim}], got {list(tensor.shape)}"
                )
            self._check(name, tensor)
        recent = max(_RECENT, _QUERIES // (self.num_q_heads // self.num_kv_heads))
        rows = [
            row if row.stride(2) == 1 and not _odd(row) else row.contiguous()
            for row in (keys.resolve_neg(), values.resolve_neg())
        ]
        # Queries are part of a larger tensor that need not outlive the layer: a copy.
        rows.append(queries[:, -recent:].clone(memory_format=torch.contiguous_format))
        return rows

    def step(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adds one token to every sequence that holds a prompt, and attends.

        Queries [B, Hq, 1, D], keys and values [B, Hkv, 1, D]; the result is [B, Hq, 1, D]: zeros
        where a sequence holds nothing, NaN where it is full (and stays as it is).

        With `rows`, an int32 tensor [B] on the device, some sequences take part, in any order:
        rows[b] is the row of sequence b in tensors [A, ...], -1 where it sits this step out. Each
        row belongs to one sequence at most (not looked at: a graph may be replayed with other
        rows); rows of none come out as zeros, or as they were in `out`, where that is given: a
        contiguous tensor like the queries, which is returned.

        With `rows` [T, B], T at most STEP_TOKENS, a sequence takes up to T tokens: rows[t, b] is
        the row of its t-th. Each attends to those before it, and comes out as T steps of one token
        give it, to the bit: drafts, and the token ahead of them.
        """
        if out is None:
            make = torch.empty if rows is None else torch.zeros
            out = make(queries.shape, dtype=self.dtype, device=self.device)
        torch.ops.icecache.device_step(
            self._number,
            layer,
            queries.contiguous(),
            keys.contiguous(),
            values.contiguous(),
            out,
            rows,
        )
        return out

    def rows_of(self, places: tuple[tuple[int, int, int], ...], tokens: int = 1) -> torch.Tensor:
        """`rows` [tokens, B] of a step. A place is a sequence, the row of the first of its tokens,
        and how many of them follow each other, at most `tokens`; other sequences sit the step out.

        Always the same memory, of -1 at first, written in place where the places are not those of
        the last call: steps that were captured with it are replayed with the rows that it holds by
        then, of as many tokens as they were captured with. Does not wait for the device.
        """
        if places != self._places:
            # Pinned memory that torch gives to nobody else before the copy is done.
            rows = torch.full(
                (STEP_TOKENS, self.batch),
                -1,
                dtype=torch.int32,
                device="cpu",
                pin_memory=self.device.type == "cuda",
            )
            for sequence, row, count in places:
                rows[:count, sequence] = torch.arange(
                    row, row + count, dtype=torch.int32, device="cpu"
                )
            self._rows.copy_(rows, non_blocking=True)
            self._places = places
        return self._rows[:tokens]

    def rebuild(self, layer: int, sequence: int) -> None:
        """Builds the index of one sequence anew from all its tokens and its recent queries.

        Metric, sketches and far-field nodes are the prompt's until then: call it between steps when
        a sequence has grown to twice what it was. Waits for the work.
        """
        self._cache.rebuild(layer, sequence)

    def fork(self, sequence: int, source: int) -> None:
        """Makes `sequence` a copy of `source`; whole pages of host memory are shared."""
        self._cache.fork(sequence, source)
        self._room[sequence] = self._room[source]

    def truncate(self, sequence: int, length: int) -> None:
        """Takes tokens back, so that the sequence holds the first `length` in every layer.

        Waits for the current stream. Tokens that came one by one since the last build cost a
        kernel; a length within the tokens of that build, one more build.
        """
        self._cache.truncate(sequence, length)

    def take_back(self, sequence: int, length: int) -> None:
        """As truncate(), but that a sequence which holds fewer tokens stays as it is.

        Rejected drafts cost one kernel for all layers, and nothing is waited for: so it is for
        tokens that came since the last build, whose pages no fork shares.
        """
        self._cache.take_back(sequence, length)

    def evict(self, sequence: int) -> None:
        """Takes a sequence's device memory for all its tokens, at once, if it is resident.

        Its next step attends within the budget. Does not wait for the device.
        """
        self._cache.evict(sequence)

    def release(self, sequence: int) -> None:
        """Empties a sequence and gives its pages back. Waits for the current stream."""
        self._cache.release(sequence)
        self._room[sequence] = 0
        self._held.clear()

    def wait(self, layer: int) -> None:
        """Waits on the host until the index work of a layer is done; rethrows its first error.

        A step does so by itself; one that is replayed from a graph does not.
        """
        try:
            self._cache.wait(layer)
        finally:
            self._held.pop(layer, None)

    def synchronize(self) -> None:
        """Waits on the host until all index work is done; rethrows its first error."""
        for layer in range(self.num_layers):
            self.wait(layer)

    def length(self, layer: int = 0, sequence: int = 0) -> int:
        """Tokens of a sequence in one layer. Waits for the current stream."""
        return self._cache.length(layer, sequence)

    def gather(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, L, D] of a sequence, in order of position."""
        shape = (self.num_kv_heads, self.length(layer, sequence), self.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._cache.gather(layer, sequence, keys, values)
        return keys, values

    def stats(self, layer: int, kv_head: int | None = None) -> _core.HeadStats:
        """Sums over steps, sequences and KV heads of one layer. Waits for the current stream.

        `steps` are those within the budget, `dense_steps` those of resident sequences.
        With `kv_head` of that head alone.
        """
        return self._cache.stats(layer, -1 if kv_head is None else kv_head)

    def memory(self) -> _core.DeviceCacheMemory:
        """Bytes held on the device and in host memory, and how many sequences are resident."""
        return self._cache.memory()

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.device or tensor.dtype != self.dtype:
            raise InvalidArgument(
                f"{name} must be {self.dtype} on {self.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )

    def _step(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        if rows is not None and rows.ndim == 1:
            rows = rows[None]
        self._cache.step(layer, queries, keys, values, out, rows)
        self._held.pop(layer, None)


def rebuild_is_due(length: int, built: int) -> bool:
    """Whether a sequence of `length` tokens wants rebuild(), with `built` at the last build."""
    return length >= max(_LEAST_BUILT, 2 * built)


# Layers whose index work may wait: each keeps the keys and values of a prompt on the device.
_WAITING = 4

# An operator takes numbers, not objects.
_caches: weakref.WeakValueDictionary[int, DeviceCache] = weakref.WeakValueDictionary()
_next = 0


def _register(cache: DeviceCache) -> int:
    global _next
    _next += 1
    _caches[_next] = cache
    return _next


def _odd(row: torch.Tensor) -> bool:
    """True where rows do not begin at multiples of 16 bytes."""
    size = row.element_size()
    return bool(row.data_ptr() % 16 or any(stride * size % 16 for stride in row.stride()[:2]))


@torch.library.custom_op("icecache::device_step", mutates_args=("out",))
def _device_step(
    cache: int,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor | None,
) -> None:
    found = _caches.get(cache)
    if found is None:
        raise InvalidArgument(f"cache must be the number of a DeviceCache that exists, got {cache}")
    found._step(layer, queries, keys, values, out, rows)


@_device_step.register_fake
def _(
    cache: int,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor | None,
) -> None:
    require_one_device(queries=queries, keys=keys, values=values, out=out, rows=rows)
