"""Each architecture is served as stock, or refused with a reason, as docs/vllm-models.md says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architecture_sweep
import pytest
from architectures import ARCHITECTURES
from conftest import Run
from icecache.vllm.plugin import installed_version

TABLE: dict[str, Any] = json.loads(architecture_sweep.TABLE.read_text())
# One for each kind of layer, and of refusal; `make test-architectures` runs them all.
REPRESENTATIVES = {
    "DeepSeek 3",  # latent attention
    "Falcon-H1",  # state spaces
    "Gemma 2",  # soft-capped logits
    "Gemma 4, shared layers",  # and a head dim of 512
    "gpt-oss",  # sinks
    "HRM text",  # not causal
    "Laguna",  # two shapes
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.sweep)
        for name in ARCHITECTURES
    ],
)
def test_an_architecture_fares_as_the_table_says(run: Run, tmp_path: Path, name: str) -> None:
    got = architecture_sweep.outcome(name, tmp_path, run)
    assert got["outcome"] in ("served", "refused", "not run"), got["reason"]
    if got["outcome"] == "refused":
        assert "stock vLLM" in got["reason"]  # what to do instead
    expected = dict(TABLE["models"][name])
    if TABLE["vllm"] != installed_version():
        pytest.skip(f"the table is of vLLM {TABLE['vllm']}, this one gives {got}")
    for one in (got, expected):
        one.pop("difference", None)
        if one["outcome"] == "not run":
            del one["reason"]  # it depends on what else is installed
    assert got == expected


def test_the_table_has_every_architecture() -> None:
    assert list(TABLE["models"]) == list(ARCHITECTURES)


def test_the_document_is_made_from_the_table() -> None:
    assert architecture_sweep.DOCUMENT.read_text() == architecture_sweep.document(TABLE)
