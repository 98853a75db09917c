"""Tiny CLIP tokenizers and text encoders in SDXL's format: enough to tell captions apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 514
"""256 bytes, once within a word and once at its end, and two marks for the start and end of a text."""


def byte_tokenizer(folder: Path, pad: str) -> Any:
    """A CLIP tokenizer that knows no words, only bytes.

    Args:
        folder: where vocabulary and merges are written.
        pad: the token that short texts are filled up with.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), pad_token=pad, model_max_length=77)


def text_encoder(hidden_size: int, pooled: int, projected: bool) -> Any:
    """A CLIP text encoder of two layers with random weights, for `byte_tokenizer`.

    Args:
        hidden_size: width of the embeddings.
        pooled: width of the pooled embedding.
        projected: SDXL's second text encoder, which projects the pooled embedding, instead of its first.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=pooled,
        hidden_act="gelu" if projected else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
