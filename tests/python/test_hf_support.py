"""Every causal language model of transformers is served as stock, or refused with a reason."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import hf_models
import icecache
import pytest
import support_sweep
import torch
import transformers
from hf_engines import ForgetfulEngine
from hf_models import Model
from transformers import AutoConfig, AutoModelForImageTextToText

TABLE: dict[str, Any] = json.loads(support_sweep.TABLE.read_text())
IS_THE_TABLES_VERSION = transformers.__version__ == TABLE["transformers"]


@pytest.mark.parametrize("model_type", support_sweep.MODEL_TYPES)
def test_a_model_fares_as_the_table_says(model_type: str) -> None:
    got = support_sweep.outcome(model_type)
    assert got["outcome"] in ("served", "refused", "not run"), got["reason"]
    if got["outcome"] == "refused":
        assert "without IceCache" in got["reason"]  # what to do instead
    expected = TABLE["models"].get(model_type, {"outcome": "not in the table"})
    if IS_THE_TABLES_VERSION:
        # Why transformers does not run a model depends on what else is installed.
        assert got == expected or got["outcome"] == expected["outcome"] == "not run"
    elif got["outcome"] != expected["outcome"]:
        warnings.warn(
            f"{model_type}: {got} in transformers {transformers.__version__}", stacklevel=1
        )


@pytest.mark.skipif(not IS_THE_TABLES_VERSION, reason="the table is of another transformers")
def test_the_table_has_every_model_type_of_its_version() -> None:
    assert sorted(TABLE["models"]) == support_sweep.MODEL_TYPES


def test_the_document_is_made_from_the_table() -> None:
    assert support_sweep.DOCUMENT.read_text() == support_sweep.document(TABLE)


def test_the_sweep_sees_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that forgets one token counts as one that differs."""
    forgetful = functools.partial(icecache.enable, engine_class=ForgetfulEngine)
    monkeypatch.setattr(icecache, "enable", forgetful)
    assert support_sweep.outcome("llama")["outcome"] == "differs"


def test_the_sweep_sees_foreign_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(icecache, "enable", fail)
    found = support_sweep.outcome("llama")
    assert found["outcome"] == "foreign error"
    assert "KeyError" in found["reason"]


def paligemma() -> Model:
    """The causal mask is made by the outer model, and handed on to the language model."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"intermediate_size": 16, "image_size": 28, "patch_size": 14, "projection_dim": 64}
    config = AutoConfig.for_model(
        "paligemma",
        text_config=hf_models.build("gemma", head_dim=16).config.to_dict(),
        vision_config={"model_type": "siglip_vision_model", **vision, **sizes},
        image_token_id=90,
        projection_dim=64,
    )
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    return auto.from_config(config).eval()


@pytest.mark.parametrize("rows", [1, 3])
def test_serves_the_text_of_paligemma(rows: int) -> None:
    model, batch = paligemma(), hf_models.padded(rows)
    batch["input_ids"] = batch["input_ids"].clamp(max=80)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **settings)
    icecache.enable(model)
    assert torch.equal(model.generate(**batch, **settings), expected)
    assert icecache.stats(model).total("bytes_read") > 0
