"""Local folders with transformers models, and what fits into a model's context."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from icecache.errors import Error, InvalidArgument
from icecache.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")


def model_folder(name: str) -> Path:
    """A folder with a transformers model: `name` itself, or the small model "smollm2"."""
    check_model(name)
    if name == "smollm2":
        from icecache.models import smollm2

        return smollm2()
    return Path(name).expanduser()


def check_model(name: str) -> None:
    """Raises InvalidArgument for what model_folder() would not take; fetches nothing."""
    if name == "smollm2":
        return
    wanted = 'model must be a local folder or "smollm2", got '
    try:
        folder = Path(name).expanduser()
        if not name or not folder.is_dir():
            raise InvalidArgument(wanted + (name or "an empty name"))
        if not (folder / "config.json").is_file():
            raise InvalidArgument(f"model must be a folder with a config.json, got {folder}")
    except InvalidArgument:
        raise
    except (OSError, RuntimeError) as error:  # too long a name, no such user's home
        raise InvalidArgument(f"{wanted}{name}: {error}") from error


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration; raises Error where it cannot be read."""
    from transformers import AutoConfig

    config: PretrainedConfig = _loaded(
        folder,
        "configuration",
        lambda name: AutoConfig.from_pretrained(name, local_files_only=True),
    )
    return config


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; raises Error where it cannot be read."""
    from transformers import AutoTokenizer

    return _loaded(
        folder, "tokenizer", lambda name: AutoTokenizer.from_pretrained(name, local_files_only=True)
    )


def load_model(folder: Path, dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Model in evaluation mode, and tokenizer; raises Error where one cannot be read.

    `dtype`: "auto" (as the folder has it), "float32", "bfloat16" or "float16".
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model: Any = _loaded(
        folder,
        "model",
        lambda name: AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=True),
    )
    evaluated: PreTrainedModel = model.eval()
    return evaluated, tokenizer


def check_context(config: PretrainedConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Raises InvalidArgument where prompt and answer do not fit into the model's context."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise InvalidArgument(
            f"the document does not fit into the model's context of {limit} tokens: "
            f"{prompt_tokens} tokens of prompt + {new_tokens} to generate = "
            f"{prompt_tokens + new_tokens}; shorten it or use a model with a longer context"
        )


def _loaded(folder: Path, part: str, load: Callable[[str], T]) -> T:
    # Damaged files surface as many exceptions: of json, safetensors, tokenizers, torch, KeyError.
    with quiet(warnings=True):
        try:
            return load(str(folder))
        except Exception as error:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            raise Error(f"the {part} in {folder} does not load: {reason}") from error


def twin(model: Any) -> Any:
    """A second model on the same weights, so that only one of the two is enabled."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
