"""The benchmark's reference is transformers' own result, for every kind of model."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from icecache import InvalidArgument
from icecache.bench.ask import Limits, prompt_tokens, text_start
from icecache.bench.compare import compare
from icecache.bench.decoder import Decoder
from icecache.bench.methods import Method, find_methods
from icecache.bench.prefill import Prefill, prefill, save
from icecache.bench.quality import row_by_row, teacher_forced
from icecache.bench.tasks.task import Sample, Task
from icecache.hf.support import CACHE
from transformers import DynamicCache

# The windows of the models are 16 tokens wide.
LENGTH, STEPS = 90, 6
EXACT = Method("icecache", "exact", engine_fields={"exact": True})
# What IceCache serves and the methods do not compute: a soft cap, and tokens that layers share.
REFUSED = {"gemma2": "softcap", "gemma3n_text": "layer 2 on", "gemma4_text": "layer 3 on"}
ARCHITECTURES = [*(name for name in hf_models.CONFIGS if name not in REFUSED), "qwen3_next"]


@cache
def made(architecture: str) -> tuple[Decoder, Prefill]:
    decoder = Decoder(hf_models.model(architecture))
    return decoder, prefill(decoder, hf_models.prompt(1, LENGTH)[0], STEPS, None)


@torch.inference_mode()
def stock(model: Any, tokens: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Logits [1 + T, V] after `tokens` and after each of `steps`, as in generate."""
    held = DynamicCache(config=model.config)
    parts = [tokens, *steps.split(1)]
    return torch.stack(
        [model(part[None], **{CACHE: held}, use_cache=True).logits[0, -1] for part in parts]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_and_exact_methods_are_transformers_own(architecture: str) -> None:
    decoder, held = made(architecture)
    expected = stock(decoder.model, held.tokens, held.continuation[:-1])
    assert expected.std() > 0.05, "logits too small to tell anything"
    torch.testing.assert_close(held.first_logits, expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(held.logits, expected[1:], atol=1e-4, rtol=0)
    assert held.continuation.tolist() == expected.argmax(-1).tolist()
    sessions = [one.open(decoder, held, 64) for one in (*find_methods(["full"]), EXACT)]
    for logits in teacher_forced(decoder, held, sessions):
        torch.testing.assert_close(logits, expected[1:], atol=1e-4, rtol=0)
    for session in sessions:
        assert session.mass() == pytest.approx(1.0, abs=1e-5)
        session.close()


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_oss", "qwen3_next"])
def test_a_row_that_leaves_writes_on_as_it_would_alone(architecture: str) -> None:
    decoder, held = made(architecture)
    methods = find_methods(["streaming", "snapkv", "h2o"])
    outcomes = compare(decoder, held, methods, [36], [5, 9], STEPS + 1, lambda answer: False)
    left = 0
    for method, outcome in zip(methods, outcomes[1:], strict=True):
        assert max(outcome.kl) > 1e-6, "a budget of a third of the prompt must cost something"
        session, branch = method.open(decoder, held, 36), held.branch(decoder, 1)
        answer = held.continuation.tolist()[:1]
        for _ in range(STEPS):
            logits = branch.run(torch.tensor([answer[-1:]]), row_by_row([session]))
            answer.append(int(logits.argmax()))
        assert outcome.answer == answer
        left += answer != held.continuation.tolist()
    assert left, "choose a budget at which one differs"


def test_layers_of_a_window_are_not_the_methods(architecture: str = "gemma3_text") -> None:
    decoder, held = made(architecture)
    assert decoder.layers == (2,) and held.keys.shape[0] == 1
    assert decoder.scale == pytest.approx(24**-0.5)
    with pytest.raises(InvalidArgument, match=r"dense_layers: expected full-attention .* \(2\)"):
        Method("icecache", "", engine_fields={"dense_layers": "0"}).open(decoder, held, 64)


def test_a_prefill_with_other_layers_is_not_kept_in_files(tmp_path: Any) -> None:
    with pytest.raises(InvalidArgument, match="cannot be kept in files"):
        save(made("gemma3_text")[1], tmp_path / "one.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        *((name, {}, reason) for name, reason in REFUSED.items()),
        ("deepseek_v3", {"num_key_value_heads": 4}, "latent attention"),
        ("bloom", {}, "attention interface"),
    ],
)
def test_models_that_no_method_can_run_are_refused(
    architecture: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        Decoder(hf_models.build(architecture, **changes))


def test_a_model_that_loses_the_benchmarks_cache_is_refused() -> None:
    model = hf_models.build("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, CACHE: None})
    with pytest.raises(InvalidArgument, match="do not reach its attention"):
        Decoder(model)


def test_a_model_that_takes_no_cache_but_its_own_is_refused_in_our_words() -> None:
    model = hf_models.build("llama")

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a cache of its own")

    model.forward = forward
    with pytest.raises(InvalidArgument, match=r"LlamaForCausalLM does not run .* of its own"):
        Decoder(model)


def test_a_model_that_differs_with_attention_taken_over_is_refused() -> None:
    model = hf_models.build("llama")
    layer = model.model.layers[1].self_attn
    layer.o_proj.register_forward_hook(
        lambda module, given, output: (
            2 * output if "icecache" in model.config._attn_implementation else output
        )
    )
    with pytest.raises(InvalidArgument, match="predicts other tokens than by itself"):
        Decoder(model)


class Tokenizer:
    """Bytes, with a begin and an end as Gemma's tokenizer and its template put them."""

    bos, eos = 256, 257

    def __init__(self, chat: bool, *, bos: bool = True, eos: bool = False) -> None:
        self.chat_template = "template" if chat else None
        self._before, self._behind = [self.bos] * bos, [self.eos] * eos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        begins = text.startswith("<bos>")
        ids = [self.bos] * begins + [*text.removeprefix("<bos>").encode()]
        if add_special_tokens:
            ids = [*self._before, *ids, *self._behind]
        return SimpleNamespace(input_ids=ids)

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return f"<bos>user:{messages[0]['content']}\nmodel:"

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(one for one in ids if one < 256).decode()


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_begins_with_one_bos(chat: bool) -> None:
    task = Task("t", "none", 4, chat=True, score=lambda text, sample: 0.0)
    sample = Sample("s", prompt="words " * 40, answers=(), answer_prefix="So:")
    asked = prompt_tokens(Tokenizer(chat), task, sample, Limits(64))
    ids = asked.tokens.tolist()
    assert ids[0] == Tokenizer.bos and ids.count(Tokenizer.bos) == 1
    assert asked.truncated and len(ids) <= 64 - 4
    assert bytes(ids[1:]).endswith(b"So:")


def test_a_tokenizer_that_adds_nothing_in_front() -> None:
    assert text_start(Tokenizer(False, bos=False)) == []
    assert text_start(Tokenizer(False, bos=False, eos=True)) == []
    assert text_start(Tokenizer(False, bos=True, eos=True)) == [Tokenizer.bos]
