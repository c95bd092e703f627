"""icecache generate: text from a local model, within a token budget."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icecache.cli.options import MOST_TOKENS, Settings, parse_settings
from icecache.errors import InvalidArgument

if TYPE_CHECKING:
    from icecache.hf import ModelStats


class DType(str, Enum):
    """Number formats of weights and cache; auto is what the folder holds."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def generate(
    model: Annotated[
        str, typer.Argument(help='A local folder with a transformers model, or "smollm2".')
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", help="A text file that is put before the prompt."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--plain", help="Use the model's chat template where it has one.")
    ] = True,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            max=MOST_TOKENS,
            help="Length of the answer at most.",
        ),
    ] = 128,
    token_budget: Annotated[
        int | None,
        typer.Option(help="Tokens attended exactly per KV head and step; 256 where not given."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The model's stock attention, for comparison.")
    ] = False,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="Full attention's own text: the budget drafts only."),
    ] = False,
    settings: Settings = None,
    dtype: Annotated[DType, typer.Option(help="Number format of weights and cache.")] = DType.auto,
) -> None:
    """Generate text greedily with a local model. Statistics go to stderr."""
    from icecache.documents import read_document
    from icecache.models.local import (
        check_context,
        load_config,
        load_model,
        load_tokenizer,
        model_folder,
    )

    if not prompt and prompt_file is None:
        raise InvalidArgument("--prompt or --prompt-file is needed, got neither")
    given = [] if token_budget is None else [f"--token-budget {token_budget}"]
    given += ["--lossless"] if lossless else []
    given += [f"--set {setting}" for setting in settings or ()]
    if full and given:
        raise InvalidArgument(
            "--full is the model's stock attention, which has no parameters: expected nothing "
            f"beside it, got {', '.join(given)}"
        )
    fields = parse_settings(settings, token_budget=token_budget)
    parts = [read_document(prompt_file)] if prompt_file else []
    text = "\n\n".join([*parts, prompt] if prompt else parts)
    folder = model_folder(model)
    model_config = load_config(folder)
    inputs = _tokens(load_tokenizer(folder), text, chat)
    length = int(inputs["input_ids"].shape[1])
    check_context(model_config, length, max_new_tokens)  # before the weights are read

    import icecache
    from icecache.cli.streamer import TimedStreamer

    loaded, tokenizer = load_model(folder, dtype.value)
    if not full:
        icecache.enable(loaded, lossless=lossless, **fields)
    runner: Any = loaded
    streamer = TimedStreamer(tokenizer)
    # The output keeps the cache alive: its memory is reported below.
    output = runner.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    typer.echo(streamer.summary(length), err=True)
    if not full:
        typer.echo(_report(icecache.stats(loaded)), err=True)
    del output


def _tokens(tokenizer: Any, text: str, chat: bool) -> Any:
    if chat and tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    return tokenizer(text, return_tensors="pt")


def _report(stats: ModelStats) -> str:
    memory = stats.memory
    held = (
        f"{memory.device_bytes / 2**20:.1f} MiB on the device, "
        f"{(memory.pool_bytes + memory.index_bytes + memory.query_bytes) / 2**20:.1f} MiB "
        "in host memory"
    )
    steps, sparse = stats.total("steps"), stats.sparse_prompt
    prompt = f"{sparse:.1%} of the prompt attended within prefill_budget; " if sparse else ""
    if not steps:
        what = "answer's " if sparse else ""
        return f"{prompt}{what}attention was full: the sequence fits the token budget; {held}"
    drafts = ""
    if stats.lossless is not None and stats.lossless.drafted:
        share = stats.lossless.kept / stats.lossless.drafted
        drafts = (
            f"{stats.lossless.drafted} tokens drafted, {share:.0%} of them kept, in "
            f"{stats.lossless.verifications} verifications; in drafts, "
        )
    read = ""
    if not stats.total("prompt_tokens"):  # bytes read for prompts are among those counted
        each = stats.total("bytes_read") / (steps + stats.total("dense_steps"))
        read = f"{each / 1024:.0f} KiB read per KV head and step; "
    return (
        f"{prompt}{drafts}attention mass attended exactly: {stats.total('mass') / steps:.1%} on "
        f"average, {stats.worst_mass:.1%} at worst; {read}{held}"
    )
