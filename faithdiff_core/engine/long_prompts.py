"""Prompts that are longer than a text encoder takes at once: in chunks, or cut as published.

CLIP takes 77 tokens, begin and end among them. Hosts encode what is longer in chunks of 75 tokens, each with its own
begin and end, and put the embeddings one after the other; the pooled embedding is the first chunk's. The published code
keeps the first chunk alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class LongPrompt(str, Enum):
    """What becomes of the tokens after a prompt's first 75."""

    CHUNKS = "chunks"
    """They are encoded in further chunks."""

    CUT = "cut"
    """They are left out, as published."""


def token_chunks(base: Any, tokenizer: Any, text: str, long_prompt: LongPrompt) -> list[list[int]]:
    """Ids of a prompt's chunks as a text encoder takes them, each with begin, end and padding.

    Args:
        base: diffusers' pipeline, which may have textual inversions.
        tokenizer: one of its tokenizers.
        text: the prompt.
        long_prompt: whether there may be more than one.
    """
    ids = _prompt_ids(base, tokenizer, text)
    room = tokenizer.model_max_length - 2
    starts = range(0, max(1, len(ids)), room) if long_prompt is LongPrompt.CHUNKS else [0]
    chunks = [[tokenizer.bos_token_id, *ids[i : i + room], tokenizer.eos_token_id] for i in starts]
    return [chunk + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(chunk)) for chunk in chunks]


def _prompt_ids(base: Any, tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt, in which the names of textual inversions stand for their vectors."""
    convert = getattr(base, "maybe_convert_prompt", None)
    return plain_ids(tokenizer, text if convert is None else convert(text, tokenizer))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of any length without begin, end and padding."""
    # Without `verbose=False` a long text is warned of, though nothing is done with more than the encoder takes.
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids


def tokenizers_of(base: Any) -> list[Any]:
    """Tokenizers of a pipeline, in the order of its text encoders."""
    return [t for t in (base.tokenizer, getattr(base, "tokenizer_2", None)) if t is not None]


def fit_at_once(base: Any, texts: Sequence[str]) -> bool:
    """Whether all texts are short enough for one chunk."""
    return all(
        len(_prompt_ids(base, tokenizer, text)) <= tokenizer.model_max_length - 2
        for tokenizer in tokenizers_of(base)
        for text in texts
    )


def encode_in_chunks(
    base: Any, texts: Sequence[str], long_prompt: LongPrompt, device: torch.device
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Encode prompts of any length.

    Args:
        base: diffusers' pipeline for SDXL, SD 2.1 or SD 1.5.
        texts: prompts.
        long_prompt: what becomes of long ones.
        device: where to compute.

    Returns:
        For each text its embeddings, (1, tokens, width), and its pooled embedding, (1, width), or None where the
        backbone takes none.
    """
    two = getattr(base, "text_encoder_2", None) is not None
    encoders = [base.text_encoder, base.text_encoder_2] if two else [base.text_encoder]
    embeds: list[Tensor] = []
    pooled: list[Tensor | None] = []
    for text in texts:
        of_encoders: list[Tensor] = []
        first_pooled: Tensor | None = None
        for tokenizer, encoder in zip(tokenizers_of(base), encoders, strict=True):
            ids = torch.tensor(token_chunks(base, tokenizer, text, long_prompt), device=device)
            encoded = encoder(ids, output_hidden_states=True)
            # SDXL takes the last but one layer of both encoders, and the pooled embedding of the second.
            states = encoded.hidden_states[-2] if two else encoded[0]
            first_pooled = encoded[0][:1] if two else None
            of_encoders.append(states.flatten(0, 1)[None])
        embeds.append(torch.cat(of_encoders, dim=-1))
        pooled.append(first_pooled)
    return embeds, pooled
