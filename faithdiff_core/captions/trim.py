"""Captions: what the text side of the model is told about an image."""

from __future__ import annotations

import re

CAPTION_PROMPT = "Describe this image and its style in a very detailed manner."
"""The question that the captions FaithDiff was trained with answer (LLaVA-1.5)."""

SKIP_WORDS = 3
"""Words dropped from the front of a generated caption ("The image features ...")."""

SENTENCES = 2
"""Sentences kept of a generated caption."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def trim_caption(caption: str, sentences: int = SENTENCES, skip_words: int = SKIP_WORDS) -> str:
    """Trim a *generated* caption as the published code does; what a person typed is never trimmed.

    The first words are dropped, what is left starts with a capital, and only the first sentences stay. A caption with
    no more words than would be dropped has no lead-in, and keeps its words.

    Args:
        caption: a captioner's answer; may be empty.
        sentences: number of sentences kept; 0 keeps all.
        skip_words: number of words dropped.
    """
    words = caption.split()
    if len(words) > skip_words:
        words = words[skip_words:]
    text = " ".join(words)
    text = text[:1].upper() + text[1:]
    if sentences > 0:
        text = " ".join(_SENTENCE_END.split(text)[:sentences])
    return text
