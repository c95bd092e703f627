"""What becomes of each causal language model that transformers knows, and docs/support.md of it.

python tests/python/support_sweep.py prints outcomes of all model types, or of those it is given;
with --write it changes data/support.json and docs/support.md accordingly.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import icecache
import torch
import transformers
from tiny_models import VOCABULARY, tiny_model
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PROMPT = 56
NEW_TOKENS = 4
BUDGET = 40  # below the prompt: steps select

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TABLE = Path(__file__).parent / "data" / "support.json"
# What differs between messages that give the same reason.
_SPECIFICS = re.compile(
    r"[\w-]+ (?=caches|has a |has cross|does not use)|\w+_attention\w*, | = [\d.\[\], ]+|"
    r"\d+|'\w+'|\(by \w+\)"
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"


def outcome(model_type: str) -> dict[str, Any]:
    """How a tiny random model of this type fares.

    "served": with exact=True it gives stock's tokens and logits, and it runs within a budget;
    "refused": by an icecache error ahead of the first token; "not run": transformers itself does
    not run it. Anything else is a fault of icecache.
    """
    try:
        model = tiny_model(model_type)
        expected = generate(model)
    except Exception as error:
        return {"outcome": "not run", "reason": _one_line(error)}
    try:
        icecache.enable(model, exact=True)
        got = generate(model)
        read = icecache.stats(model).total("bytes_read")
        icecache.enable(model, token_budget=BUDGET)
        generate(model)
        steps = icecache.stats(model).total("steps")
    except icecache.Error as error:
        return {"outcome": "refused", "reason": str(error)}
    except Exception as error:
        return {"outcome": "foreign error", "reason": traceback.format_exc(limit=-3) or str(error)}
    if fault := difference(got, expected) or ("" if read and steps else "the engine had no part"):
        return {"outcome": "differs", "reason": fault}
    types = set(get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0])
    return {"outcome": "served", "stock": sorted(types - {"full_attention", "dummy"})}


@torch.inference_mode()
def generate(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and their logits."""
    ids = torch.randint(3, VOCABULARY - 8, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


def difference(
    got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> str:
    """Empty if tokens are equal, and logits up to 1e-4 of the largest."""
    if not torch.equal(got[0], expected[0]):
        return "other tokens"
    error = float((got[1] - expected[1]).abs().max() / expected[1].abs().max().clamp(min=1))
    return "" if error <= 1e-4 else f"logits differ by {error:.1e}"


def document(table: dict[str, Any]) -> str:
    """docs/support.md: the table by outcome and reason."""
    models = table["models"]
    served: dict[str, list[str]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    messages: dict[str, str] = {}
    not_run = []
    for name, entry in models.items():
        if entry["outcome"] == "served":
            served[", ".join(entry["stock"]) or "none"].append(name)
        elif entry["outcome"] == "refused":
            kind = _SPECIFICS.sub("", entry["reason"])
            messages.setdefault(kind, entry["reason"])
            refused[kind].append(name)
        else:
            not_run.append(f"| `{name}` | {entry['reason'].replace('|', '')} |")
    total = sum(map(len, served.values()))
    lines = [
        "# Models of transformers",
        "",
        f"Every causal language model that transformers {table['transformers']} knows, as a tiny",
        f"random model of its own configuration class: of {len(models)} model types "
        f"{total} are served, {sum(map(len, refused.values()))}",
        f"refused, and {len(not_run)} do not run in transformers itself as they are made here. "
        "Served means: with",
        "`exact=True` the greedy tokens are those of the model without IceCache, the logits equal "
        "to 1e-4,",
        "and the model runs within a budget. A refusal comes ahead of the first token.",
        "",
        "`python tests/python/support_sweep.py --write` makes this page; "
        "`tests/python/test_hf_support.py` keeps it true.",
        "",
        "## Served",
        "",
        "Layers that attend to the whole context are served; layers of the types named here keep "
        "transformers' own cache.",
        "",
        "| stock layers | model types |",
        "|---|---|",
        *(f"| {kinds} | {_names(names)} |" for kinds, names in sorted(served.items())),
        "",
        "## Refused",
        "",
        "| the message, for the first of them | model types |",
        "|---|---|",
        *(f"| {messages[kind]} | {_names(names)} |" for kind, names in refused.items()),
        "",
        "## Not run by transformers as made here",
        "",
        "| model type | error without IceCache |",
        "|---|---|",
        *not_run,
    ]
    return "\n".join(lines) + "\n"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def main(arguments: list[str]) -> None:
    """See the module."""
    names = [name for name in arguments if name != "--write"] or MODEL_TYPES
    table: dict[str, Any] = {"transformers": transformers.__version__, "models": {}}
    if names != MODEL_TYPES:
        table["models"] = json.loads(TABLE.read_text())["models"]
    for name in names:
        table["models"][name] = outcome(name)
        print(name, table["models"][name], flush=True)
    if "--write" in arguments:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        DOCUMENT.write_text(document(table))


if __name__ == "__main__":
    main(sys.argv[1:])
