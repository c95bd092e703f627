"""How the architectures fare in vLLM, and docs/vllm-models.md of it.

python tests/vllm/architecture_sweep.py prints the outcomes of all, or of those it is given; with
--write it changes benchmarks/results/vllm_models.json and docs/vllm-models.md accordingly.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, BFLOAT16, make

PROMPTS = (5, 33, 100, 200, 300)  # tokens
NEW_TOKENS = 16
REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = REPOSITORY / "benchmarks" / "results" / "vllm_models.json"
DOCUMENT = REPOSITORY / "docs" / "vllm-models.md"
# Log-probabilities may differ by so much.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
_OTHERS = {
    "SlidingWindowSpec": "sliding window",
    "ChunkedLocalAttentionSpec": "chunked attention",
    "MambaSpec": "recurrent state",
}


def outcome(name: str, folder: Path, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """How an architecture fares; `run` runs a scenario of drive.py.

    "served": with exact=True it gives stock's tokens, and all requests end well within a budget;
    "refused": by the plugin at start; "not run": vLLM itself does not run it. Anything else is a
    fault of the plugin.
    """
    generator = random.Random(5)
    dtype = "bfloat16" if name in BFLOAT16 else "float32"
    model = make(name, folder)
    got = run(
        "compare",
        model=model,
        prompts=[[generator.randrange(16, 500) for _ in range(size)] for size in PROMPTS],
        tokens=NEW_TOKENS,
        llm={
            "dtype": dtype,
            "max_model_len": 512,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 512,  # less than all prompts: some come in chunks
            "block_size": 32,
            "disable_hybrid_kv_cache_manager": False,
        },
    )
    config = json.loads((model / "config.json").read_text())
    return {"class": config["architectures"][0], "dtype": dtype, **_judged(got, dtype)}


def _judged(got: dict[str, Any], dtype: str) -> dict[str, Any]:
    last = list(got.values())[-1]
    if "error" in last:
        reason = " ".join(last["error"].split())
        if "stock" in got and len(got) == 1:
            return {"outcome": "not run", "reason": reason}
        name, _, message = reason.partition(": ")
        refused = name == "InvalidArgument" and len(got) == 2
        return {"outcome": "refused" if refused else "foreign error", "reason": message}
    stock, exact, budget = got["stock"], got["exact"], got["budget"]
    if stock["tokens"] != exact["tokens"]:
        return {"outcome": "differs", "reason": f"{exact['tokens']}, not {stock['tokens']}"}
    worst = difference(stock, exact)
    if not worst <= TOLERANCE[dtype]:
        return {"outcome": "differs", "reason": f"log-probabilities differ by {worst:g}"}
    if budget["failed_requests"] or budget["reasons"] != ["length"] or not budget["steps"]:
        return {"outcome": "fails", "reason": f"{budget['reasons']}, {budget['steps']} steps"}
    return {
        "outcome": "served",
        "layers": len(exact["layers"]),
        **{key: exact[key] for key in ("shapes", "sinks", "shared", "softcap")},
        "others": sorted(_OTHERS[kind] for kind in exact["kinds"] if kind in _OTHERS),
        "difference": worst,
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest of log-probabilities, of tokens that are among the likeliest of both."""
    pairs = (
        (dict(map(tuple, mine)), dict(map(tuple, theirs)))
        for answers in zip(one["likely"], other["likely"], strict=True)
        for mine, theirs in zip(*answers, strict=True)
    )
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())


def document(table: dict[str, Any]) -> str:
    """docs/vllm-models.md."""
    models: dict[str, dict[str, Any]] = table["models"]
    of = {
        kind: {name: one for name, one in models.items() if one["outcome"] == kind}
        for kind in ("served", "refused", "not run")
    }
    served = [
        f"| {name} | `{one['class']}` | {one['layers']} | {_special(one)} | "
        f"{', '.join(one['others'])} | {one['difference']:.0e}"
        f"{'' if one['dtype'] == 'float32' else ', ' + one['dtype']} |"
        for name, one in of["served"].items()
    ]
    others = {
        kind: [f"| {name} | `{one['class']}` | {one['reason']} |" for name, one in of[kind].items()]
        for kind in ("refused", "not run")
    }
    return _DOCUMENT.format(
        vllm=table["vllm"],
        transformers=table["transformers"],
        prompts=", ".join(map(str, PROMPTS[:-1])) + f" and {PROMPTS[-1]}",
        tokens=NEW_TOKENS,
        count=len(models),
        **{f"num_{kind.replace(' ', '_')}": len(found) for kind, found in of.items()},
        served="\n".join(served),
        refused="\n".join(others["refused"]),
        not_run="\n".join(others["not run"]),
    )


def _special(one: dict[str, Any]) -> str:
    words = []
    if one["shapes"] > 1:
        words.append(f"{one['shapes']} shapes")
    if one["sinks"]:
        words.append("sinks")
    if one["softcap"]:
        words.append("soft-capped logits")
    if one["shared"]:
        words.append(f"{one['shared']} of them with another's keys and values")
    return ", ".join(words)


_DOCUMENT = """# Models in vLLM

What becomes of {count} architectures in vLLM {vllm} for CPUs with the plugin, each as a tiny random
model of transformers {transformers}: {num_served} are served, {num_refused} refused, and
{num_not_run} are not run by vLLM's build for CPUs. Served means: with `exact=True` the greedy
tokens are those of stock vLLM, {tokens} tokens behind prompts of {prompts} tokens
that are served together, some of them in chunks; and within a budget of 64 tokens all requests end
as they should. A refusal comes at start, with what to do instead.

`python tests/vllm/architecture_sweep.py --write` makes this page from
[what came out](../benchmarks/results/vllm_models.json); `make test-architectures` keeps it true.

## Served

Layers that attend to the whole context are served, those of a shape by an engine of their own;
other layers keep vLLM's cache. The last column is the largest difference of a log-probability to
stock vLLM's, with `exact=True`.

| architecture | class | served layers | of these | other layers | difference |
|---|---|---|---|---|---|
{served}

## Refused

| architecture | class | the message |
|---|---|---|
{refused}

## Not run by vLLM's build for CPUs

Whether the plugin serves these where vLLM runs them has not been tried.

| architecture | class | error of stock vLLM |
|---|---|---|
{not_run}
"""


def main(arguments: list[str]) -> None:
    import conftest
    import transformers
    from icecache.vllm.plugin import installed_version

    names = [name for name in arguments if name != "--write"] or list(ARCHITECTURES)
    table: dict[str, Any] = {"models": {}}
    if TABLE.exists():
        table = json.loads(TABLE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            run = conftest.runner(Path(folder))
            key = re.sub(r"\W+", "-", name)
            table["models"][name] = one = outcome(name, Path(folder) / key, run)
            print(f"{name}: {one}", flush=True)
    if "--write" in arguments:
        models = {name: table["models"][name] for name in ARCHITECTURES if name in table["models"]}
        versions = {"vllm": installed_version(), "transformers": transformers.__version__}
        TABLE.write_text(json.dumps({**versions, "models": models}, indent=1) + "\n")
        DOCUMENT.write_text(document({**versions, "models": models}))


if __name__ == "__main__":
    main(sys.argv[1:])
