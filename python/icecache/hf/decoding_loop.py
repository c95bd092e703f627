"""transformers' own loop of greedy and sampled decoding, with its calls of the model answered.

The loop chooses tokens, stops, streams and keeps scores as it always does; a DecodingLoop stands
for the model in it, and says what the logits behind the newest token are.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from icecache import InvalidArgument
from icecache.hf.cache import IceCache
from icecache.hf.support import CACHE


class DecodingLoop(ABC):
    """Stands for the model in the loop: the model, but for its calls."""

    def __init__(self, model: PreTrainedModel, cache: IceCache) -> None:
        self.model: Any = model
        self.cache = cache
        self.ids = torch.empty(0)  # [B, L] the loop's tokens
        self.arguments: dict[str, Any] = {}  # that it gave with them

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **arguments: Any
    ) -> dict[str, Any]:
        self.ids, self.arguments = input_ids, arguments
        return {}

    @abstractmethod
    def __call__(self, **_: Any) -> Any:
        """The model's outputs, with logits `[B, 1, V]` behind the newest token."""

    def end(self) -> None:  # noqa: B027 (most loops have nothing to do then)
        """The loop is over, or was interrupted."""

    def feed(
        self, ids: torch.Tensor, arguments: dict[str, Any], count: int, logits: int = 1
    ) -> Any:
        """The model's outputs for the last `count` tokens of ids [B, L], logits of the last ones.

        `arguments` are those that the loop would give with `ids`.
        """
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=count, **arguments
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = logits
        return self.model(**inputs, return_dict=True)


class Decoding(ABC):
    """A setting of `icecache.enable` that gives `generate` of one model another DecodingLoop."""

    setting: str  # what the user asked for it by

    @abstractmethod
    def make_loop(
        self,
        model: PreTrainedModel,
        cache: IceCache,
        logits_processor: LogitsProcessorList,
        generation_config: Any,
    ) -> DecodingLoop:
        """The loop of one call of `generate`."""

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for `generate`, a model's own method.

        Raises InvalidArgument for what the loop cannot do.
        """
        arguments = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        if arguments.get("custom_generate") is not None:
            raise InvalidArgument(
                f"custom_generate: it replaces the decoding that {self.setting} brings; leave it "
                f"out, or enable the model without {self.setting}"
            )

        # transformers keeps the streamer from loops of others, and gives what is named here.
        def decode(
            model: PreTrainedModel,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            generation_config: Any,
            tokenizer: Any = None,
            **given: Any,
        ) -> Any:
            _check(generation_config, arguments.get("assistant_model"), self.setting)
            cache = given.get(CACHE)
            if not isinstance(cache, IceCache):
                raise InvalidArgument(f"use_cache: expected true with {self.setting}, got false")
            loop = self.make_loop(model, cache, logits_processor, generation_config)
            loop_of: Any = type(model)
            try:
                return loop_of._sample(
                    loop,
                    input_ids,
                    logits_processor=logits_processor,
                    generation_config=generation_config,
                    streamer=arguments.get("streamer"),
                    **given,
                )
            finally:
                loop.end()

        return generate(*args, **kwargs, custom_generate=decode)


def _check(generation_config: Any, assistant_model: Any, setting: str) -> None:
    mode = generation_config.get_generation_mode(assistant_model)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidArgument(
            f"generate: expected greedy decoding or sampling with {setting}, got {mode.value}; "
            f"enable the model without {setting} for it"
        )
    if generation_config.output_hidden_states and generation_config.return_dict_in_generate:
        raise InvalidArgument(
            f"output_hidden_states: not kept with {setting}, which computes many tokens at once; "
            f"drop the argument, or enable the model without {setting}"
        )
