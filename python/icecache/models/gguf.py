"""Models in one GGUF file, as folders for `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icecache.models.quiet import quiet


def convert(gguf: Path, folder: Path) -> None:
    """Writes model (float32) and tokenizer of a GGUF file to `folder`. Takes half a minute."""
    # Imported here: they take seconds, and a model is made once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held, name = str(gguf.parent), gguf.name
    with quiet(warnings=False):
        model: Any = AutoModelForCausalLM.from_pretrained(held, gguf_file=name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(held, gguf_file=name)
        # The weights are not quantized any more, but marked so, which refuses to be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
