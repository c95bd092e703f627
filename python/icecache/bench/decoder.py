"""A transformers model whose full attention methods may take over, one decode step at a time.

The model runs by its own forward, with its own attention over the prompt and in the reference's
steps (`OwnRun`). A method attends in the layers that attend to the whole context (`Branch`); all
other layers, of a sliding window or recurrent, keep transformers' own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from icecache import Error, InvalidArgument
from icecache.bench.cache_layers import AttentionCall
from icecache.bench.runs import Branch, OwnRun
from icecache.hf.support import CACHE, check_config, check_model, full_attention_layers
from icecache.shape import CacheShape

_TRIAL = 24  # tokens with which a decoder tries its model
_TOLERANCE = 5e-2  # KL of a trial in a type of 16 bits, nats
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
        text_config = config.get_text_config(decoder=True)
        layers = tuple(full_attention_layers(text_config))
    modes = getattr(text_config, "kv_sharing_modes", None) or ()
    if "reuse" in modes:
        raise InvalidArgument(
            f"model: layers of {config.model_type} share the keys and values of others, from layer "
            f"{modes.index('reuse')} on, which the methods do not; choose another model"
        )
    return layers


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
        self._makes_some = "logits_to_keep" in parameters  # logits of the last tokens alone
        # Rows at different positions: only where no cache of transformers' own has a row for each.
        whole = len(self.layers) == len(DynamicCache(config=model.config).layers)
        self.can_join = whole and "position_ids" in parameters
        self._shape: CacheShape | None = None
        self.sinks: list[torch.Tensor] = []  # [Hq] a layer: the logits of learned sinks, if any
        try:
            _try_out(self)
        except Error:
            raise
        except Exception as error:  # whatever a model makes of a cache that it does not know
            raise InvalidArgument(
                f"model: {type(model).__name__} does not run with the benchmark's cache "
                f"({type(error).__name__}: {error}), so that no method can be measured on it"
            ) from error

    @property
    def shape(self) -> CacheShape:
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
        return self.shape.softmax_scale

    def begin(self, start: int = 0) -> Branch:
        """One row that methods decode from its first token on, which is at position `start`."""
        return Branch(self, self.stock_layers(), torch.tensor([start]))

    def stock_layers(self) -> list[Any]:
        """Empty layers of transformers' own cache; None where a layer has full attention."""
        layers = DynamicCache(config=self.model.config).layers
        return [None if at in self.layers else layer for at, layer in enumerate(layers)]

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        cache: Cache,
        positions: torch.Tensor | None = None,
        keep: int = 1,
    ) -> torch.Tensor:
        """Logits [B, keep, V] of the last `keep` of T new tokens [B, T].

        The positions [B, T] follow the cache where none are given.
        """
        arguments: dict[str, Any] = {CACHE: cache, "use_cache": True}
        if self._makes_some:
            arguments["logits_to_keep"] = keep
        if positions is not None:
            arguments["position_ids"] = positions
        logits: torch.Tensor = self.model(input_ids=tokens, **arguments).logits
        return logits[:, -keep:]

    def note(self, index: int, call: AttentionCall) -> None:
        """What an attention call of the trial says of full attention.

        Raises InvalidArgument for what methods do not compute, and where layers differ.
        """
        query, key, arguments = call.query, call.key, call.arguments
        for name in ("softcap", "position_bias", "sliding_window"):
            if arguments.get(name) is not None:
                raise InvalidArgument(
                    f"model: attention of layer {self.layers[index]} is called with {name}, which "
                    "the methods do not compute"
                )
        scaling, head_dim = arguments.get("scaling"), query.shape[-1]
        scale = head_dim**-0.5 if scaling is None else float(scaling)
        shape = CacheShape(
            self.num_layers, query.shape[1], key.shape[1], head_dim, key.dtype, scale
        )
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
    expected = [decoder.forward(part[None], cache)[0, -1] for part in (prompt, *following.split(1))]

    run = OwnRun(decoder)
    run.on_attention = decoder.note
    own = [run.run(prompt)]
    run.on_attention = None
    branch = Branch(decoder, run.stock_layers(), torch.tensor([run.length]))
    held = [layer.fork() for layer in run.held]

    def attend(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        held[layer].append(keys[0], values[0])
        k, v = held[layer].keys, held[layer].values
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
