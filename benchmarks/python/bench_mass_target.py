"""A budget for every head, or to each what its attention needs: `mass_target`.

With `mass_target` a head goes past `token_budget` until so much of its attention is exact, at most
to `max_token_budget`: heads that look at little leave tokens to those that look at much, step by
step. SmolLM2-135M-Instruct on the prompts of bench_quality.py, teacher-forced along full
attention's own continuation; KL(full || method) against the tokens that were attended, both means
over steps and heads, then prompts. "us" is attention of one head in a step, selection included.

    python benchmarks/python/bench_mass_target.py --json benchmarks/results/mass_target.json
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import icecache
import typer
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.prefill import prefill
from icecache.bench.quality import kl_divergence, teacher_forced
from icecache.bench.report import Result, machine, write_json
from icecache.models.local import load_model
from quality_prompts import DATA, check_data, quality_prompts
from rich.console import Console
from rich.progress import track
from rich.table import Table

STEPS = 24


@dataclass
class Way:
    """Settings, and what came of them on each prompt."""

    budget: int
    target: float = 0.0
    most: int = 0  # max_token_budget
    kl: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        if not self.target:
            return f"every head {self.budget}"
        return f"{self.target:.0%} of the mass, {self.budget} to {self.most:,}"

    @property
    def fields(self) -> dict[str, Any]:
        return {"mass_target": self.target, "max_token_budget": self.most} if self.target else {}

    def measure(self, session: EngineSession) -> None:
        config = session.engine.config
        stats = [
            session.engine.stats(layer, head)
            for layer in range(session.engine.num_layers)
            for head in range(session.engine.num_kv_heads)
        ]
        near = config.sink_tokens + config.window_tokens
        steps = sum(one.steps for one in stats)
        self.tokens.append(near + sum(one.tokens_selected for one in stats) / steps)
        self.seconds.append(sum(one.attend_seconds for one in stats) / steps)


def ways() -> list[Way]:
    return [Way(budget) for budget in (64, 128, 256, 512)] + [
        Way(64, 0.6, 1024),
        Way(64, 0.75, 1024),
        Way(64, 0.85, 1024),
        Way(128, 0.88, 1024),
        Way(128, 0.93, 1024),
    ]


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with longbench_mini/ and text/.")] = DATA,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 18,
) -> None:
    """Measure KL to full attention against tokens attended; takes ten minutes."""
    check_data(data)
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    decoder = Decoder(model)
    wanted = quality_prompts(tokenizer, data, prompts)
    compared = ways()
    console = Console()
    for prompt in track(wanted, "prompts", console=console, transient=True):
        made = prefill(decoder, prompt.tokens, STEPS, tokenizer.eos_token_id)
        sessions = [EngineSession(decoder, made, way.budget, way.fields) for way in compared]
        logits = teacher_forced(decoder, made, sessions)
        for way, session, row in zip(compared, sessions, logits, strict=True):
            way.kl.append(kl_divergence(made.logits, row).mean().item())
            way.measure(session)
            session.close()
    table = Table("what a head gets", title=f"{len(wanted)} prompts")
    for title in ("tokens", "KL mean", "median", "worst", "us"):
        table.add_column(title, justify="right")
    results = []
    for way in compared:
        tokens, us = mean(way.tokens), 1e6 * mean(way.seconds)
        table.add_row(
            way.label,
            f"{tokens:.0f}",
            *(f"{of(way.kl):.5f}" for of in (mean, median, max)),
            f"{us:.0f}",
        )
        name = f"{way.budget}_{round(100 * way.target)}"
        params = {"token_budget": way.budget, **way.fields, "n": len(wanted)}
        spread = {"median": median(way.kl), "max": max(way.kl)}
        results.append(Result(f"mass_target_kl_{name}", mean(way.kl), "nats", params | spread))
        results.append(Result(f"mass_target_tokens_{name}", tokens, "tokens", params))
        results.append(Result(f"mass_target_us_{name}", us, "us", params))
    console.print(table)
    if json is not None:
        meta = {"model": "SmolLM2-135M-Instruct, float32", "steps": STEPS}
        meta["prompts"] = {prompt.name: int(prompt.tokens.shape[0]) for prompt in wanted}
        write_json(json, {**machine(), **meta}, results)


if __name__ == "__main__":
    typer.run(main)
