"""vLLM plugin: long contexts in bounded KV memory.

vLLM loads `register` through its entry point group `vllm.general_plugins` in every process. It
changes nothing until a server or an `LLM` is configured for IceCache, see `engine_args`.

    llm = LLM(model, **icecache.vllm.engine_args(token_budget=256, host_memory="8G"))

    icecache serve MODEL --token-budget 256 --host-memory 8G [vLLM flags]

settings     what a user sets, and the vLLM arguments that follow from it
plugin       what vLLM loads where IceCache is installed, asked for or not
names        every vLLM name that the plugin touches
support      what is refused, and what to do instead
host_memory  how much of it a request takes
prompts      where prompts within a budget are cut
scheduler    vLLM's own, which also ends requests that a worker lost
drafts       where drafted tokens come from, and which layers draft
spec         how many of vLLM's blocks a request holds: IceCacheSpec, IceCacheManager
connector    request ids, lifecycle and statistics between scheduler and workers
backend      the attention backends
metadata     what the scheduler tells the workers with every step
prefixes     what a new request begins with, and who goes for whom
ledger       what sequences take of host memory
worker       what one worker process knows: its layers, its store and the step under way
engines      an engine for each shape of layer, and where each layer's keys and values are
store        the worker's engines: requests, their sequences and their steps
metrics      statistics, for the log and for Prometheus
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icecache.vllm.plugin import register

if TYPE_CHECKING:
    from icecache.vllm.settings import engine_args

__all__ = ["engine_args", "register"]


def __getattr__(name: str) -> Any:
    # Imported when first used: vLLM imports this package wherever it is installed.
    if name == "engine_args":
        from icecache.vllm.settings import engine_args

        return engine_args
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
