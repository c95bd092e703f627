"""What a server finds in a long text, beside the transformers front end."""

from __future__ import annotations

from pathlib import Path

import icecache
import pytest
from models import manual
from serving import ask, serving


def needle(number: int, characters: int) -> tuple[str, str]:
    """A question over real text, and the number that answers it."""
    answer = str(7301946 + 1117 * number)
    lines = manual(characters).split("\n")
    at = len(lines) * (number + 1) // 4
    fact = f"One of the special magic numbers for amber-falcon is: {answer}."
    text = "\n".join([*lines[:at], fact, *lines[at:]])
    question = (
        "A special magic number is hidden within the following text. Memorize it.\n"
        f"{text}\nWhat is the special magic number for amber-falcon mentioned in the text?"
    )
    return question, answer


@pytest.mark.parametrize("budget", [128, 256])
def test_needles_are_answered_as_by_the_transformers_front_end(
    smollm2: Path, tmp_path: Path, budget: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    start = "The special magic number for amber-falcon mentioned in the text is"
    prompts = []
    for number in range(3):
        question, _ = needle(number, 5500)
        text = tokenizer.apply_chat_template(
            ask(question), tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(text + start).input_ids)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    icecache.enable(model, token_budget=budget)
    want = []
    for prompt in prompts:
        import torch

        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        want.append(tokenizer.decode(tokens[0, len(prompt) :]))
    del model
    options = ("--token-budget", str(budget), "--set", f"dense_tokens={budget}")
    options = (*options, "--host-memory", "1G")
    with serving(smollm2, tmp_path / "log", *options) as server:
        client = server.client()
        got = [
            client.completions.create(
                model=server.model, prompt=prompt, max_tokens=10, temperature=0
            )
            .choices[0]
            .text
            for prompt in prompts
        ]
    found = [[needle(n, 5500)[1] in text for n, text in enumerate(texts)] for texts in (want, got)]
    assert found[0] == found[1], (want, got)
    assert sum(found[0]) >= 2
