"""What the far field is worth in a prompt within a budget.

SmolLM2-135M-Instruct, the prompts of bench_quality.py: each is attended with so many picks for
every block, once with the far field and once to the picks alone. Then both decode as IceCache does
by default, over the keys and values that came of it. KL is KL(full || method) of the next 24
tokens, mean over a prompt's steps and over prompts; `kl_prefill_ratio_*` is that with the far field
over that without.

    python benchmarks/python/bench_prefill_far_field.py --json prefill_far_field.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import icecache
import torch
import typer
from bench_quality import STEPS
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.methods import Method
from icecache.bench.prefill import Prefill, prefill
from icecache.bench.quality import DecodeStats, Subject, decode_stats
from icecache.bench.report import Result, machine, write_json
from icecache.models.local import load_model
from quality_prompts import DATA, check_data, quality_prompts
from rich.console import Console
from rich.progress import Progress

FAR, PICKS = "far field", "picks alone"


class PicksAlone(EngineSession):
    """As icecache over keys and values of a prompt whose blocks attended to their picks alone."""

    def __init__(
        self, decoder: Decoder, prefill: Prefill, budget: int, fields: Mapping[str, Any]
    ) -> None:
        prompt = EngineSession(decoder, prefill, budget, {**fields, "tail": "off"})
        held = [prompt.held(layer) for layer in range(decoder.num_layers)]
        keys, values = (torch.stack(parts) for parts in zip(*held, strict=True))
        prompt.close()
        made = replace(prefill, keys=keys, values=values)
        super().__init__(decoder, made, budget, {**fields, "prefill_budget": 0})
        self.start = prompt.start


def results(stats: list[DecodeStats], fields: dict[str, int], budget: int) -> list[Result]:
    found, means = [], {}
    picks = fields["prefill_budget"]
    for label, name in ((FAR, "far_field"), (PICKS, "picks_alone")):
        own = [float(one.kl.mean()) for one in stats if one.method.label == label]
        means[label] = fmean(own)
        params = {**fields, "token_budget": budget, "n": len(own), "worst": max(own)}
        found.append(Result(f"kl_prefill_{name}_{picks}", means[label], "nats", params))
    ratio = means[FAR] / means[PICKS]
    return [*found, Result(f"kl_prefill_ratio_{picks}", ratio, "ratio", {**fields, "n": len(own)})]


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with longbench_mini/ and text/.")] = DATA,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 18,
    picks: Annotated[int, typer.Option(min=1, help="prefill_budget.")] = 1024,
    chunk: Annotated[int, typer.Option(min=0, help="prefill_chunk; 0: the default.")] = 0,
    token_budget: Annotated[int, typer.Option(min=1, help="Of decoding.")] = 256,
) -> None:
    """Compare prompts with and without far field; takes about 20 minutes."""
    check_data(data)
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    decoder = Decoder(model)
    fields = {"prefill_budget": picks, "prefill_chunk": chunk}
    methods = [
        Method(FAR, FAR, engine_fields=fields),
        Method(PICKS, PICKS, engine_fields=fields, engine_session=PicksAlone),
    ]
    stats: list[DecodeStats] = []
    wanted = quality_prompts(tokenizer, data, prompts)
    meta = {**machine(), "model": "SmolLM2-135M-Instruct, float32", "steps": STEPS}
    with Progress(console=Console(), transient=True) as bar:
        for prompt in bar.track(wanted):
            made = prefill(decoder, prompt.tokens, STEPS, tokenizer.eos_token_id)
            stats += decode_stats(decoder, Subject(prompt.name, made), methods, token_budget)
            if json is not None:
                write_json(json, meta, results(stats, fields, token_budget))
    for result in results(stats, fields, token_budget):
        print(f"{result.name} {result.value:.5f} {result.params}")


if __name__ == "__main__":
    typer.run(main)
