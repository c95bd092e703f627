"""IceCache as a model of lm-evaluation-harness: the package lm_eval, extra `lm-eval`.

    python -m icecache.bench.lm_eval_model --model icecache \\
        --model_args pretrained=FOLDER,token_budget=256 --tasks TASKS ...

is the command `lm_eval` with this model registered. An lm_eval that reads the entry points
`lm_eval.models` knows the model without it.

generate_until         the prompt is attended exactly, the answer written within the token budget
loglikelihood          the context but its last token is attended exactly. That token and those of
                       the continuation are fed one at a time, so that every token that counts is
                       predicted within the budget; one forward call over all of them would be a
                       prefill, which no token budget touches
loglikelihood_rolling  the same over lm_eval's windows of max_length tokens: each scores all behind
                       its first token, the last one what the one before it did not reach

With prefill_budget, prompts and contexts attend within it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from icecache import Config, Error, InvalidArgument, Unavailable, __version__, config_fields
from icecache.hf import enable
from icecache.hf.support import CACHE
from icecache.models.local import model_folder

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise Unavailable(
        f"lm_eval cannot be imported ({error}): pip install 'icecache[lm-eval]'"
    ) from error

__all__ = ["NAME", "IceCacheLM", "main"]

NAME = "icecache"
_HFLM = frozenset(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
_FIELDS = frozenset(field.name for field in config_fields()) - _HFLM  # `device` is lm_eval's
# What puts the model on accelerators, or something that is not a transformers model around it.
_REFUSED = ("parallelize", "tp_plan", "peft", "autogptq", "gptqmodel", "mixed_precision_dtype")
_DEVICES = (None, "cpu", "cuda", "cuda:0")  # the latter two are lm_eval's own defaults

logger = logging.getLogger(__name__)

# The key of a request in lm_eval's cache, its context and its continuation in tokens.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]  # log-likelihood, whether greedy decoding writes the continuation


class IceCacheLM(HFLM):  # type: ignore[misc]
    """A transformers model on the CPU, with IceCache enabled.

    `pretrained` is "smollm2" or what HFLM takes; `model_args` are parameters of HFLM and fields
    of icecache.Config. Raises InvalidArgument for all others, before anything is loaded.
    """

    def __init__(self, pretrained: Any, **model_args: Any) -> None:
        _check(model_args)
        fields = {name: model_args.pop(name) for name in [*model_args] if name in _FIELDS}
        self._settings = Config(**fields)
        if pretrained == "smollm2":
            pretrained = str(model_folder(pretrained))
        super().__init__(pretrained=pretrained, **{**model_args, "device": "cpu"})
        enable(self.model, **fields)
        # Logits of a whole context take more memory than its cache.
        known = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if known else {}

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, with IceCache's version and parameters."""
        ours = {"icecache_version": __version__, "icecache": self._settings.to_dict()}
        return {**super().get_model_info(), **ours}

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """The answers to `requests`, in their order; see the module for how they are scored.

        A context is prefilled once for all its continuations, `batch_size` of which are fed at a
        time.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            kept = self._truncated(context, continuation)
            by_context.setdefault(tuple(kept), []).append(number)
        answers: list[Answer] = [(0.0, False)] * len(requests)
        total = sum(len(continuation) for _, _, continuation in requests)
        disable = disable_tqdm or self.rank != 0
        with tqdm(total=total, desc="Scoring", unit="token", disable=disable) as bar:
            for context_tokens, numbers in by_context.items():
                continuations = [requests[number][2] for number in numbers]
                for at, answer in self._score(context_tokens, continuations):
                    key = requests[numbers[at]][0]
                    answers[numbers[at]] = answer
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    bar.update(len(continuations[at]))
        return answers

    def _truncated(self, context: list[int], continuation: list[int]) -> list[int]:
        """The end of `context` that fits before `continuation`, whose last token is not fed."""
        if not 1 <= len(continuation) <= self.max_length:
            raise InvalidArgument(
                f"continuation: expected 1 to {self.max_length} tokens, got {len(continuation)}"
            )
        room = self.max_length + 1 - len(continuation)
        if len(context) > room:
            logger.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:]

    def _score(
        self, context: Sequence[int], continuations: Sequence[list[int]]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers of all `continuations` of `context`, with their places, longest first."""
        cache = None
        if len(context) > 1:
            _, cache = self._feed([context[:-1]], cache)
        logits, cache = self._feed([context[-1:]], cache)
        order = sorted(range(len(continuations)), key=lambda at: -len(continuations[at]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            rows = [continuations[at] for at in places]
            yield from zip(places, self._follow(logits, cache, rows), strict=True)

    def _follow(self, logits: torch.Tensor, cache: Any, rows: list[list[int]]) -> list[Answer]:
        """Answers of `rows`, from long to short, each after `logits` [1, V] and a fork of `cache`.

        Row by row the same as alone: each is an engine sequence of its own.
        """
        if len(rows[0]) > 1:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(rows))
        logits = logits.expand(len(rows), -1)
        sums, greedy = [0.0] * len(rows), [True] * len(rows)
        for at in range(len(rows[0])):
            going = [row for row in rows if len(row) > at]
            if at:
                if len(going) < logits.shape[0]:
                    cache.batch_select_indices(torch.arange(len(going)))
                logits, cache = self._feed([row[at - 1 : at] for row in going], cache)
            likelihoods = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            best = logits.argmax(-1).tolist()
            for number, row in enumerate(going):
                sums[number] += float(likelihoods[number, row[at]])
                greedy[number] &= best[number] == row[at]
        return list(zip(sums, greedy, strict=True))

    def _feed(self, tokens: Sequence[Sequence[int]], cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits [B, V] of the last of the new `tokens` [B, T], and the cache with them."""
        arguments = {CACHE: cache, "use_cache": True, **self._last_only}
        output = self.model(torch.tensor(tokens), **arguments)
        return output.logits[:, -1], getattr(output, CACHE)


def _check(model_args: dict[str, Any]) -> None:
    """Raises InvalidArgument for what cannot be served."""
    unknown = [name for name in model_args if name not in _HFLM | _FIELDS]
    if unknown:
        near = [one for name in unknown for one in difflib.get_close_matches(name, _HFLM | _FIELDS)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InvalidArgument(
            "model_args: expected parameters of lm_eval's HFLM and fields of icecache.Config, got "
            f"{', '.join(unknown)}{hint}"
        )
    refused = [name for name in _REFUSED if model_args.get(name)]
    if refused:
        raise InvalidArgument(
            f"model_args: IceCache serves a transformers model as it is, on the CPU; leave out "
            f"{', '.join(refused)}"
        )
    if model_args.get("device") not in _DEVICES:
        raise InvalidArgument(f"device: expected cpu, got {model_args['device']}")
    batch_size = model_args.get("batch_size", 1)
    if not str(batch_size).isdecimal() or not int(batch_size):
        raise InvalidArgument(f"batch_size: expected a number of at least 1, got {batch_size}")


def main() -> None:
    """The command `lm_eval`, which then knows the model; an Error is one line on stderr."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# By name: run as a command, this module has another one.
if NAME not in model_registry:
    model_registry.register(NAME, target="icecache.bench.lm_eval_model:IceCacheLM")

if __name__ == "__main__":
    main()
