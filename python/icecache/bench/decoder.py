"""A transformers model whose full attention methods may take over, one decode step at a time.

The model runs by its own forward, with its own attention over the prompt and in the reference's
steps (`OwnRun`). A method attends in the layers that attend to the whole context (`Branch`); all
other layers, of a sliding window or recurrent, keep transformers' own cache.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from icecache import InvalidArgument
from icecache.bench.cache_layers import (
    Attention,
    FullLayer,
    TakenLayer,
    check_attended,
    routed,
)
from icecache.hf.engine_handle import AttentionShape
from icecache.hf.support import CACHE, check_config, check_model, full_attention_layers

QUERIES = 256  # of a prompt's last tokens, which indexes learn from

_ROOM = 256  # tokens that the keys and values of a run grow by
_TRIAL = 24  # tokens with which a decoder tries its model
_TOLERANCE = 1e-2  # KL of a trial in a type of 16 bits, nats
_EXACT_TOLERANCE = 1e-5  # in float32


@contextmanager
def _served() -> Iterator[None]:
    """Says of a refusal by icecache.hf whom it concerns."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidArgument(
            f"the benchmark compares methods on models that IceCache serves: {error}"
        ) from error


def check_served(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers that attend to the whole context.

    Raises InvalidArgument for a model that by its configuration no method can run.
    """
    with _served():
        check_config(config)
        return tuple(full_attention_layers(config.get_text_config(decoder=True)))


class Decoder:
    """A model and how its full attention looks.

    The model is used as it is, in its dtype and on its device; between calls it has its own
    attention implementation. Not thread-safe.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises InvalidArgument for a model whose attention no method can take over.

        Tries it on a few tokens: the model with this module's caches, and with its full attention
        taken over, gives the logits that it gives by itself.
        """
        with _served():
            check_model(model)
        self.layers = check_served(model.config)
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)
        self.dtype: torch.dtype = model.dtype
        parameters = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # Rows at different positions: only where no cache of transformers' own has a row for each.
        whole = len(self.layers) == len(DynamicCache(config=model.config).layers)
        self.can_join = whole and "position_ids" in parameters
        self._shape: AttentionShape | None = None
        self.sinks: list[torch.Tensor] = []  # [Hq] a layer: the logits of learned sinks, if any
        _try_out(self)

    @property
    def shape(self) -> AttentionShape:
        """Of every full-attention layer, `scale` included."""
        assert self._shape is not None
        return self._shape

    @property
    def num_layers(self) -> int:
        """Layers that methods attend in."""
        return len(self.layers)

    @property
    def num_q_heads(self) -> int:
        return self.shape.num_q_heads

    @property
    def num_kv_heads(self) -> int:
        return self.shape.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def scale(self) -> float:
        return self.shape.scale

    def begin(self, start: int = 0) -> Branch:
        """One row that methods decode from its first token on, which is at position `start`."""
        return Branch(self, self.stock_layers(), torch.tensor([start]))

    def stock_layers(self) -> list[Any]:
        """Empty layers of transformers' own cache; None where a layer has full attention."""
        layers = DynamicCache(config=self.model.config).layers
        return [None if at in self.layers else layer for at, layer in enumerate(layers)]

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, cache: Cache, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, V] of the last of T new tokens [B, T]; positions [B, T] follow the cache."""
        placed = {} if positions is None else {"position_ids": positions}
        arguments = {CACHE: cache, "use_cache": True, **self._last_only, **placed}
        output = self.model(input_ids=tokens, **arguments)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def note(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> None:
        """What an attention call of the trial says of full attention.

        Raises InvalidArgument for what methods do not compute, and where layers differ.
        """
        for name in ("softcap", "position_bias", "sliding_window"):
            if arguments.get(name) is not None:
                raise InvalidArgument(
                    f"model: attention of layer {self.layers[index]} is called with {name}, which "
                    "the methods do not compute"
                )
        scaling, head_dim = arguments.get("scaling"), query.shape[-1]
        scale = head_dim**-0.5 if scaling is None else float(scaling)
        shape = AttentionShape(query.shape[1], key.shape[1], head_dim, key.dtype, scale)
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:
            raise InvalidArgument(
                f"model: the methods need full-attention layers that are alike; layer "
                f"{self.layers[index]} has {shape}, others {self._shape}"
            )
        sinks = arguments.get("s_aux")
        if sinks is not None:
            self.sinks.append(sinks.detach())


class OwnRun:
    """One sequence that the model decodes by itself: its own attention in every layer.

    Keys and values of the full-attention layers are contiguous; the model attends to a view.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.keys = torch.empty(0)  # [layers, Hkv, room, D]
        self.values = torch.empty(0)
        self.queries: list[torch.Tensor] = [torch.empty(0)] * decoder.num_layers
        self.step_s = 0.0  # seconds of calls with one token
        self.on_attention: Callable[..., None] | None = None  # sees every call's arguments
        self._decoder = decoder
        self._full = [_OwnLayer(self, index, 0) for index in range(decoder.num_layers)]
        self._stock = decoder.stock_layers()

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._full[0].seen

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [V] after `tokens` [T], which become part of the sequence.

        Queries of calls with more than one token are kept: the last 256, [Hq, n, D] a layer.
        """
        decoder, start = self._decoder, time.perf_counter()
        with routed(decoder.config):
            logits = decoder.forward(tokens[None], _cache(decoder, self._full, self._stock))
        check_attended(self._full, decoder.layers)
        if tokens.shape[0] == 1:
            self.step_s += time.perf_counter() - start
        return logits[0].clone()  # of a model that makes logits of all tokens, one

    def fork(self) -> OwnRun:
        """A run with the same tokens."""
        other = copy.copy(self)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        other.queries = list(self.queries)
        other._full = [_OwnLayer(other, layer.index, layer.seen) for layer in self._full]
        other._stock = self.stock_layers()
        return other

    def stock_layers(self) -> list[Any]:
        """Copies of transformers' own cache of the other layers, as in Decoder.stock_layers."""
        return _of_rows(self._stock, [0])

    def append(
        self, index: int, keys: torch.Tensor, values: torch.Tensor, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [1, Hkv, T, D] in a layer; what it holds then, [1, Hkv, end, D]."""
        start = end - keys.shape[2]
        if not self.keys.numel():
            shape = (len(self._full), keys.shape[1], end + _ROOM, keys.shape[3])
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        elif end > self.keys.shape[2]:
            more = (0, 0, 0, end - self.keys.shape[2] + _ROOM)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[index, :, start:end] = keys[0]
        self.values[index, :, start:end] = values[0]
        return self.keys[None, index, :, :end], self.values[None, index, :, :end]


class _OwnLayer(FullLayer):
    """A layer of an OwnRun."""

    def __init__(self, run: OwnRun, index: int, seen: int) -> None:
        super().__init__(index, seen)
        self._run = run

    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run.append(self.index, keys, values, self.seen)

    def attend(
        self,
        own: Callable[..., tuple[torch.Tensor, Any]],
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        arguments: Mapping[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        self.is_attended = True
        run = self._run
        if run.on_attention is not None:
            run.on_attention(self.index, query, key, arguments)
        if query.shape[2] > 1:
            seen = [run.queries[self.index]] if run.queries[self.index].numel() else []
            run.queries[self.index] = torch.cat([*seen, query[0]], 1)[:, -QUERIES:].clone()
        return own(module, query, key, value, mask, **arguments)


class Branch:
    """Rows that methods decode. What the methods hold is theirs: here is where the rows stand.

    `positions` [B]: of each row's next token. All are the same where `decoder.can_join` is False.
    """

    def __init__(
        self, decoder: Decoder, stock_layers: Sequence[Any], positions: torch.Tensor
    ) -> None:
        """`stock_layers`: as Decoder.stock_layers, with B rows. They become this branch's own."""
        self.positions = positions
        self._decoder = decoder
        self._stock = list(stock_layers)
        start = int(positions[0])
        self._full = [TakenLayer(index, start) for index in range(decoder.num_layers)]

    def run(self, tokens: torch.Tensor, attend: Attention) -> torch.Tensor:
        """Logits [B, V] of the last of T new tokens [B, T]; `attend` is full attention."""
        decoder = self._decoder
        for layer in self._full:
            layer.attention = attend
        new = torch.arange(tokens.shape[1])
        together = bool((self.positions == self.positions[0]).all())
        positions = None if together else self.positions[:, None] + new
        with routed(decoder.config):
            logits = decoder.forward(tokens, _cache(decoder, self._full, self._stock), positions)
        check_attended(list(self._full), decoder.layers)
        self.positions = self.positions + tokens.shape[1]
        return logits

    def fork(self, rows: Sequence[int]) -> Branch:
        """A branch of these rows of this one."""
        return Branch(
            self._decoder, _of_rows(self._stock, rows), self.positions[torch.tensor(rows)]
        )

    def joined(self, others: Iterable[Branch]) -> Branch:
        """One branch with the rows of all; only where `decoder.can_join`."""
        assert self._decoder.can_join
        positions = [self.positions, *(other.positions for other in others)]
        return Branch(self._decoder, self._stock, torch.cat(positions))


def _cache(decoder: Decoder, full: Sequence[FullLayer], stock: Sequence[Any]) -> Cache:
    layers = list(stock)
    for at, layer in zip(decoder.layers, full, strict=True):
        layers[at] = layer
    return Cache(layers=layers)


def _of_rows(stock: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Copies of transformers' layers with these of their rows."""
    index = torch.tensor(rows)
    copies = []
    for layer in stock:
        other = copy.deepcopy(layer)
        if other is not None:
            other.reorder_cache(index)
        copies.append(other)
    return copies


@torch.inference_mode()
def _try_out(decoder: Decoder) -> None:
    """Learns the shape of full attention, and that nothing of the model changes on the way.

    1. The model by itself, with transformers' cache.  2. An OwnRun.  3. A Branch whose attention
    is this function's own.  Raises InvalidArgument where 2 or 3 differ from 1.
    """
    size = decoder.config.vocab_size
    chance = torch.Generator().manual_seed(0)
    # Of the middle of the vocabulary: special tokens are at its ends.
    tokens = torch.randint(size // 8, size // 2, (_TRIAL,), generator=chance)
    prompt, following = tokens[:-2], tokens[-2:]
    cache = DynamicCache(config=decoder.model.config)
    expected = [decoder.forward(part[None], cache)[0] for part in (prompt, *following.split(1))]

    run = OwnRun(decoder)
    run.on_attention = decoder.note
    own = [run.run(prompt)]
    run.on_attention = None
    branch = Branch(decoder, run.stock_layers(), torch.tensor([run.length]))
    held = [(keys, values) for keys, values in zip(run.keys, run.values, strict=True)]
    held = [(k[:, : run.length].clone(), v[:, : run.length].clone()) for k, v in held]

    def attend(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        k, v = (torch.cat(both, 1) for both in zip(held[layer], (keys[0], values[0]), strict=True))
        held[layer] = (k, v)
        rows = decoder.scale * queries.reshape(k.shape[0], -1, k.shape[2]).float()
        scores = rows @ k.mT.float()
        if decoder.sinks:
            sinks = decoder.sinks[layer].float().reshape(k.shape[0], -1, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores, -1)[..., : k.shape[1]]
        return (weights @ v.float()).to(queries.dtype).reshape(queries.shape)

    taken = [own[0]]
    for part in following.split(1):
        own.append(run.run(part))
        taken.append(branch.run(part[None], attend)[0])
    most = _EXACT_TOLERANCE if decoder.dtype == torch.float32 else _TOLERANCE
    for what, got in (("with the benchmark's cache", own), ("with attention taken over", taken)):
        worst = max(_kl(a, b) for a, b in zip(expected, got, strict=True))
        if not worst <= most:
            raise InvalidArgument(
                f"model: {type(decoder.model).__name__} {what} predicts other tokens than by "
                f"itself (KL {worst:.2g} nats), so that no method can be measured on it"
            )


def _kl(truth: torch.Tensor, other: torch.Tensor) -> float:
    log_p, log_q = torch.log_softmax(truth.double(), -1), torch.log_softmax(other.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum())
