"""DeviceCache on this GPU: kernels, transfers, and steps of a whole model beside full attention.

python benchmarks/python/bench_cuda.py --json benchmarks/results/GPU-NAME.json

The model has the shape of Llama-3.1-8B and random weights; its keys are synthetic (clusters), its
queries drift from step to step, and prompts are put into the caches without computing them: what is
measured is time and memory, not quality. Both sides run the same steps as CUDA graphs in one
process. Full attention is torch's SDPA over a preallocated cache, the query heads of a group packed
into one matrix, which is the faster of its two forms.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import icecache
import torch
import typer
from cuda_cache import clean
from cuda_kernels import bench_kernels, roofs, warm_up
from cuda_model import Model, largest_batch, with_full_cache, with_icecache
from icecache.bench.report import machine


def rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def compare(model: Model, batch: int, tokens: int) -> dict[str, Any]:
    """Full attention, and IceCache within its budget and, up to 32,768 tokens, with residents."""
    full = with_full_cache(model, batch, tokens)
    clean()
    ours = with_icecache(model, batch, tokens)
    row = {"batch": batch, "tokens": tokens, "icecache": ours, "full": full}
    if full["fits"]:
        row["speedup"] = full["tpot_ms"]["median"] / ours["tpot_ms"]["median"]
        if tokens <= 32768:
            clean()
            resident = with_icecache(model, batch, tokens, resident=True)
            row["resident"] = resident
            row["resident_over_full"] = resident["tpot_ms"]["median"] / full["tpot_ms"]["median"]
    return row


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where results go.")] = None,
    seconds_allowed: Annotated[float, typer.Option("--seconds", help="No new run past it.")] = 300,
) -> None:
    """Measures DeviceCache on the current GPU."""
    begin = time.perf_counter()
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "machine": {**machine(), **roofs()},
        "kernels": [],
        "model": [],
        "largest": [],
        "left_out": [],
    }
    print(json.dumps(results["machine"]), flush=True)

    def save() -> None:
        results["seconds"] = time.perf_counter() - begin
        if json_file is not None:
            json_file.write_text(json.dumps(rounded(results), indent=1) + "\n")

    def run(part: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() - begin > seconds_allowed:
            results["left_out"].append(f"{name}: time was up")
            return
        try:
            results[part].append(measure())
        except (icecache.Error, RuntimeError) as error:
            results["left_out"].append(f"{name}: {error}")
        else:
            print(json.dumps(results[part][-1]), flush=True)
        clean()
        save()

    warm_up()
    for batch, tokens in ((1, 32768), (16, 32768), (1, 131072), (16, 131072)):
        measure = functools.partial(bench_kernels, batch, tokens, results["machine"])
        run("kernels", f"kernels at {batch} x {tokens}", measure)
    model = Model()

    for tokens in (32768, 131072, 1048576):
        run("largest", f"largest batch of {tokens}", functools.partial(largest_batch, tokens))
    cases = [(1, 1024), (1, 131072), (16, 131072), (1, 8192), (1, 32768), (1, 262144)]
    cases += [(4, 8192), (4, 32768), (4, 131072), (16, 8192), (16, 32768)]
    for batch, tokens in cases:
        run(
            "model",
            f"model at {batch} x {tokens}",
            functools.partial(compare, model, batch, tokens),
        )
    at = {(row["batch"], row["tokens"]): row for row in results["model"]}
    if {(1, 1024), (1, 131072)} <= at.keys():
        results["tpot_128k_over_1k"] = (
            at[1, 131072]["icecache"]["tpot_ms"]["median"]
            / at[1, 1024]["icecache"]["tpot_ms"]["median"]
        )
    save()
    print(json.dumps({k: v for k, v in results.items() if not isinstance(v, list)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
