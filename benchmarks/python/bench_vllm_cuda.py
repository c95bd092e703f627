"""What a token costs in vLLM on a GPU, with IceCache and without.

A model of Llama-3.1-8B's shape with random weights (no file is fetched), one request with a prompt
of random tokens. Two engines, a process each, one after the other: each fills the device. Full CUDA
graphs for decode steps, no torch.compile, one vLLM configuration for both but for IceCache; stock
vLLM attends with the backend that it chooses for the device.

    python benchmarks/python/bench_vllm_cuda.py --json benchmarks/results/vllm_cuda.json

Needs vLLM and a GPU of 80 GiB. `--layers 2 --context 2048` shows on a CPU that it works.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from icecache.bench.report import Result
from icecache.vllm import engine_args
from llama_8b import DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, WORDS
from transformers import LlamaConfig
from vllm_process import EngineProcess
from vllm_results import show_and_write

ANSWER = 512  # tokens that the request may make, of the context
WARM_UP = 4  # decode steps


def shape(layers: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=context,
        dtype="bfloat16",
    )


def measure(arguments: dict[str, Any], prompt: list[int], steps: int) -> dict[str, Any]:
    """Seconds of the prompt, and milliseconds of each of `steps` decode steps."""
    engine = EngineProcess(arguments)
    try:
        prefill = engine.admit([prompt], ANSWER)
        engine.decode(WARM_UP)
        rates = engine.decode(steps)["rates"]
    finally:
        engine.close()
    return {"prefill_s": prefill["seconds"], "step_ms": [1e3 / rate for rate in rates]}


def main(
    context: Annotated[int, typer.Option(min=1024, help="Tokens, prompt and answer.")] = 131072,
    layers: Annotated[int, typer.Option(min=1)] = LAYERS,
    steps: Annotated[int, typer.Option(min=8, help="Timed decode steps.")] = 64,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    host_memory: Annotated[str, typer.Option(help="Of IceCache, for pages.")] = "24G",
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time a request with IceCache and without; takes about 3 minutes."""
    # In vLLM's V2 runner full graphs need prompts that come whole (docs/vllm.md).
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    on_gpu = torch.cuda.is_available()
    chooser = random.Random(0)
    prompt = [chooser.randrange(3, 128000) for _ in range(context - ANSWER)]
    with TemporaryDirectory() as folder:
        shape(layers, context).save_pretrained(folder)
        arguments: dict[str, Any] = {
            "model": folder,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "seed": 0,
            "max_model_len": context,
            "max_num_seqs": 1,
            "max_num_batched_tokens": min(context, 16384),
            "gpu_memory_utilization": 0.6 if on_gpu else 0.3,
            "enable_prefix_caching": False,
            "async_scheduling": False,
        }
        if on_gpu:
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
            arguments["compilation_config"] = {**graphs, "cudagraph_capture_sizes": [1]}
        else:
            arguments["enforce_eager"] = True
        ours = engine_args(token_budget=token_budget, host_memory=host_memory)
        ours["num_gpu_blocks_override"] = 2
        measured = {
            "icecache": measure({**arguments, **ours}, prompt, steps),
            "stock": measure(arguments, prompt, steps),
        }
    params = {"context": context, "layers": layers, "token_budget": token_budget, "batch": 1}
    results = []
    medians = {}
    for name, each in measured.items():
        low, medians[name], high = quantiles(each["step_ms"], n=4)
        spread = {"q25": low, "q75": high, "n": steps}
        results.append(Result(f"tpot_{name}", medians[name], "ms", {**params, **spread}))
        results.append(Result(f"prefill_{name}", each["prefill_s"], "s", params))
    ratio = medians["stock"] / medians["icecache"]
    results.append(Result("tpot_ratio", ratio, "ratio", params))
    title = f"Llama-3.1-8B's shape, {layers} layers, {context:,} tokens"
    show_and_write(title, results, json)


if __name__ == "__main__":
    typer.run(main)
