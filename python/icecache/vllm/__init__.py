"""vLLM plugin: long contexts in bounded KV memory.

vLLM loads `register` through its entry point group `vllm.general_plugins` in every process. It
changes nothing until a server or an `LLM` is configured for IceCache, see `engine_args`.

    llm = LLM(model, **icecache.vllm.engine_args(token_budget=256, host_memory="8G"))

    icecache serve MODEL --token-budget 256 --host-memory 8G [vLLM flags]

settings     what a user sets, and the vLLM arguments that follow from it
names        every vLLM name that the plugin touches
support      what is refused, and what to do instead
host_memory  how much of it a request takes
scheduler    vLLM's own, which also ends requests that a worker lost
spec         how many of vLLM's blocks a request holds: IceCacheSpec, IceCacheManager
connector    request ids, lifecycle and statistics between scheduler and workers
backend      the attention backends
metadata     what the scheduler tells the workers with every step
worker       what one worker process knows: its layers, its store and the step under way
store        the worker's engine: requests, their sequences and their steps
slots        that engine on a CUDA device: one sequence of a DeviceCache for each request
metrics      statistics, for the log and for Prometheus
"""

from __future__ import annotations

from icecache.vllm.settings import engine_args

__all__ = ["engine_args", "register"]


def register() -> None:
    """Makes vLLM know IceCache's KV-cache spec and attention backend; its plugin entry point."""
    from icecache.vllm.names import is_supported_version

    # Without a word: this runs wherever both packages are installed. A server that asks for
    # IceCache under another vLLM is refused by the connector.
    if not is_supported_version():
        return
    from icecache.vllm.backend import register_backends
    from icecache.vllm.spec import register_spec

    register_spec()
    register_backends()
