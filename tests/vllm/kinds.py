"""A tiny random model of each kind of attention that vLLM knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import IMAGE, SIDE, VOCABULARY, random_weights, tiny_gemma3, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CHUNK = 64  # tokens that a layer of Llama 4 attends to, from a multiple of it on


def bert(folder: Path) -> Path:
    """Every token attends to all of its text."""
    random_weights(BertModel(BertConfig(**SIZE, pad_token_id=0))).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def embedding_llama(folder: Path) -> Path:
    """A decoder of which the last token's state is taken."""
    _tokenizer().save_pretrained(folder)
    return tiny_llama(folder)


def llama4(folder: Path) -> Path:
    """Chunked attention in three of four layers, full attention in the last."""
    config = Llama4TextConfig(
        **{**SIZE, **IDS, "num_hidden_layers": 4, "num_attention_heads": 4},
        intermediate_size_mlp=128,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        moe_layers=[],
        interleave_moe_layer_step=0,
        attention_chunk_size=CHUNK,
        use_qk_norm=False,
        no_rope_layers=[1, 1, 1, 0],
    )
    random_weights(Llama4ForCausalLM(config)).save_pretrained(folder)
    return folder


def deepseek(folder: Path) -> Path:
    """Multi-head latent attention."""
    config = DeepseekV3Config(
        **SIZE,
        **IDS,
        num_key_value_heads=2,
        first_k_dense_replace=2,
        kv_lora_rank=512,
        q_lora_rank=32,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    )
    random_weights(DeepseekV3ForCausalLM(config)).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """Cross attention to one second of sound."""
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=448,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        **IDS,
    )
    random_weights(WhisperForConditionalGeneration(config)).save_pretrained(folder)
    sound = WhisperFeatureExtractor(chunk_length=1)
    words = {**_words(), "<|startoftranscript|>": VOCABULARY - 1}
    text = WhisperTokenizer(vocab=words, merges=[], unk_token="<|endoftext|>")
    WhisperProcessor(sound, text).save_pretrained(folder)
    return folder


def blip2(folder: Path) -> Path:
    """A vision tower, a querying transformer and a decoder."""
    inner: dict[str, Any] = {
        name: SIZE[name]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**inner, image_size=SIDE, patch_size=14),
        qformer_config=Blip2QFormerConfig(**inner, encoder_hidden_size=64, vocab_size=VOCABULARY),
        text_config=OPTConfig(**SIZE, **IDS, ffn_dim=128, word_embed_proj_dim=64),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    random_weights(Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    pixels = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Blip2Processor(pixels, _tokenizer(), num_query_tokens=8).save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(_words(), unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def _words() -> dict[str, int]:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>"]
    words = {word: number for number, word in enumerate(special)}
    words |= {f"w{number}": number for number in range(len(special), VOCABULARY)}
    del words[f"w{IMAGE}"]
    return {**words, "<image>": IMAGE}


KINDS: dict[str, Callable[[Path], Path]] = {
    "decoder": tiny_llama,
    "pooling": embedding_llama,
    "encoder": bert,
    "cross attention": whisper,
    "hybrid": tiny_gemma3,
    "latent attention": deepseek,
    "chunked attention": llama4,
    "vision": blip2,
}


def make(kind: str, folder: Path) -> Path:
    """The model of this kind, in `folder`."""
    torch.manual_seed(0)
    return KINDS[kind](folder)
