"""Lossless decoding on many kinds of text: whether each token is full attention's, and its logits.

SmolLM2-135M-Instruct in float32 through transformers' own `generate`, greedy. Prompts are samples
of LongBench, questions of GSM8K behind worked examples, and stretches of novels and essays, 512 to
7,500 tokens each. Stock transformers then reads prompt and answer in one call: where its best token
is another than the answer's, the token counts as different, unless the two best logits lie within
1e-4. As every token is checked behind the same text, none different means that stock's own
`generate` gives the same text.

- different_tokens, of all kinds and of each
- kl_largest: the largest KL(stock || lossless) of a token, nats; kl_mean the mean
- kept: the share of drafted tokens that were full attention's
- tpot_ms: time of a token, the prompt's left out

    python benchmarks/python/bench_lossless_texts.py --json benchmarks/results/lossless_texts.json

`--prompts 1 --steps 5488 --kinds novels --lengths 512 --sample` is one long generation. With
`--along --decoding budget,refresh` the answer is the novel's own text: how far decoding without
verification drifts, and how much of that stays where every 256 tokens are computed once more.
"""

from __future__ import annotations

import itertools
import json as json_lines
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import icecache
import torch
import typer
from bench_lossless import TIE, Clock, drafts_of
from icecache.bench.prompts import as_chat, longbench_prompts
from icecache.bench.quality import kl_divergence
from icecache.bench.report import Result, machine, write_json
from icecache.models.local import check_context, load_model, twin
from lengths import parse_lengths
from quality_prompts import DATA, check_data
from rich.console import Console
from rich.progress import Progress
from transformers import LogitsProcessor

EXAMPLES = 8  # worked, before a question
Ids = torch.Tensor  # [T]


class Decoding(str, Enum):
    """What `generate` is enabled with beside the budget."""

    lossless = "lossless"
    refresh = "refresh"
    budget = "budget"

    @property
    def settings(self) -> dict[str, Any]:
        """Of icecache.enable."""
        if self is Decoding.lossless:
            return {"lossless": True}
        return {"refresh_every": 256} if self is Decoding.refresh else {}


class Along(LogitsProcessor):
    """Chooses a text's own tokens."""

    def __init__(self, text: Ids) -> None:
        self._text = text

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self._text[ids.shape[1]].view(1)
        return torch.full_like(scores, -torch.inf).index_fill(1, token, 0.0)


@dataclass(frozen=True)
class Answer:
    """What was found of one prompt."""

    decoding: Decoding
    kind: str
    length: int  # tokens of the prompt
    different: int  # tokens of the answer; meaningless unless full attention's best is chosen
    seconds: float  # a token, the first left out
    kl: torch.Tensor  # [steps], nats
    kept: int
    drafted: int


@dataclass(frozen=True)
class Plan:
    """What all answers have in common."""

    steps: int
    token_budget: int
    sample: bool
    along: bool


def longbench(tokenizer: Any, data: Path) -> Iterator[Ids]:
    """Samples of all tasks."""
    for prompt in longbench_prompts(tokenizer, data / "longbench_mini"):
        yield prompt.tokens


def questions(tokenizer: Any, data: Path) -> Iterator[Ids]:
    """Each question behind worked examples."""
    lines = (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json_lines.loads(line) for line in lines]
    for start in range(0, len(rows) - EXAMPLES, EXAMPLES + 1):
        *worked, asked = rows[start : start + EXAMPLES + 1]
        text = "".join(
            f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in worked
        )
        yield as_chat(tokenizer, f"{text}Question: {asked['question']}\nThink step by step.")


def stretches(tokenizer: Any, data: Path, lengths: list[int], more: int) -> Iterator[Ids]:
    """Of novels, plays and essays in turn, of each length in turn, and `more` tokens behind it."""
    sizes = itertools.cycle(lengths)
    texts = []
    for name in ("mobydick.txt", "tinyshakespeare.txt", "wikitext2_test.txt"):
        text = (data / "text" / name).read_text(encoding="utf-8")
        texts.append(torch.tensor(tokenizer(text[:1_000_000], verbose=False).input_ids))
    for start in itertools.count(1000, 20_000):
        for ids in texts:
            size = next(sizes) + more
            if start + size > ids.shape[0]:
                return
            yield ids[start : start + size]


def ask(model: Any, enabled: Any, name: Decoding, kind: str, text: Ids, plan: Plan) -> Answer:
    """An answer of the enabled model to a prompt, read again by the stock one.

    `text`: the prompt, and the answer where that is given.
    """
    before, clock, steps = drafts_of(enabled), Clock(), plan.steps
    prompt = text[:-steps] if plan.along else text
    torch.manual_seed(0)
    output = enabled.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=plan.sample,
        logits_processor=[Along(text)] if plan.along else [],
        pad_token_id=0,
        streamer=clock,
        return_dict_in_generate=True,
        output_scores=False,
        output_logits=True,
    )
    after = drafts_of(enabled)
    length = prompt.shape[0]
    with torch.inference_mode():
        stock = model(output.sequences[:, :-1], logits_to_keep=steps).logits[0]
    chosen = output.sequences[0, length:]
    # min_new_tokens forbids the end of the text, to both.
    forbidden = torch.tensor(model.generation_config.eos_token_id).view(-1)
    kl = kl_divergence(stock, torch.cat(output.logits))
    stock = stock.index_fill(1, forbidden, -torch.inf)
    best = stock.topk(2, 1).values
    own = stock.gather(1, chosen[:, None])[:, 0]
    different = (own < best[:, 0]) & (best[:, 0] - best[:, 1] >= TIE)
    return Answer(
        name,
        kind,
        length,
        int(different.sum()),
        (clock.times[-1] - clock.times[1]) / (steps - 1),
        kl,
        after.kept - before.kept if before and after else 0,
        after.drafted - before.drafted if before and after else 0,
    )


def results(answers: list[Answer], plan: Plan) -> list[Result]:
    found = []
    decodings = list(dict.fromkeys(one.decoding for one in answers))
    kinds = sorted({one.kind for one in answers})
    for name, kind in itertools.product(decodings, [*kinds, "all"]):
        own = [one for one in answers if one.decoding is name and kind in (one.kind, "all")]
        kl = torch.cat([one.kl for one in own])
        params = {
            "kind": kind,
            "n": len(own),
            "decoding": name.value,
            "steps": plan.steps,
            "sampled": plan.sample,
            "along_text": plan.along,
            "token_budget": plan.token_budget,
            "shortest": min(one.length for one in own),
            "longest": max(one.length for one in own),
        }
        found += [
            Result("kl_largest", float(kl.max()), "nats", params),
            Result("kl_mean", float(kl.mean()), "nats", params),
            Result("tpot_ms", 1e3 * median(one.seconds for one in own), "ms", params),
        ]
        if not plan.sample and not plan.along:
            different = sum(one.different for one in own)
            found.append(Result("different_tokens", different, "tokens", params))
        if drafted := sum(one.drafted for one in own):
            kept = sum(one.kept for one in own) / drafted
            found.append(Result("kept", kept, "share", params))
    return found


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the texts.")] = DATA,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 20,
    steps: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 256,
    kinds: Annotated[str, typer.Option(help="Kinds of text.")] = "longbench,questions,novels",
    lengths: Annotated[str, typer.Option(help="Tokens of novels.")] = "512,1500,3000,5000,7500",
    token_budget: Annotated[int, typer.Option(min=1, help="Of a draft.")] = 64,
    decoding: Annotated[str, typer.Option(help="Of lossless, refresh, budget.")] = "lossless",
    sample: Annotated[bool, typer.Option("--sample", help="Sampled answers, else greedy.")] = False,
    along: Annotated[bool, typer.Option("--along", help="Novels go on with their text.")] = False,
) -> None:
    """Check lossless decoding on many texts; takes about an hour."""
    check_data(data)
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    decodings = [Decoding(name) for name in decoding.split(",")]
    chosen = kinds.split(",")
    if along and (chosen != ["novels"] or Decoding.lossless in decodings):
        # Drafts know nothing of the text.
        raise typer.BadParameter("--along: expected --kinds novels, --decoding budget or refresh")
    plan = Plan(steps, token_budget, sample, along)
    enabled = {
        name: icecache.enable(twin(model), token_budget, **name.settings) for name in decodings
    }
    sources = {
        "longbench": longbench(tokenizer, data),
        "questions": questions(tokenizer, data),
        "novels": stretches(tokenizer, data, parse_lengths(lengths), steps if along else 0),
    }
    answers: list[Answer] = []
    with Progress(console=Console(), transient=True) as bar:
        task = bar.add_task("", total=prompts * len(chosen) * len(decodings))
        # Kind by kind in turn, so that results of a run that was cut short are of all of them.
        for _ in range(prompts):
            for kind in chosen:
                text = next(sources[kind])
                check_context(model.config, text.shape[0], 0 if along else steps)
                for name, one in enabled.items():
                    answers.append(ask(model, one, name, kind, text, plan))
                    bar.advance(task)
                    if json is not None:
                        meta = {**machine(), "model": "SmolLM2-135M-Instruct, float32"}
                        write_json(json, meta, results(answers, plan))
    for result in results(answers, plan):
        params = result.params
        print(f"{params['decoding']:9} {params['kind']:10} {result.name:18} {result.value:.4g}")


if __name__ == "__main__":
    typer.run(main)
