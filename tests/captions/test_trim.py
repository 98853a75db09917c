"""Trimming of generated captions."""

from __future__ import annotations

import pytest

from faithdiff_core import trim_caption


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("The image features a cat. It sits. It sleeps.", "A cat. It sits."),
        ("The image shows two dogs! Are they happy? Yes. No.", "Two dogs! Are they happy?"),
        ("The image features one sentence without an end", "One sentence without an end"),
        ("The image features a 3.5 inch disk. Old. Grey.", "A 3.5 inch disk. Old."),
        ("  The\nimage features   many\tspaces. ", "Many spaces."),
        ("", ""),
        ("   ", ""),
        ("cat", "Cat"),
        ("a small cat", "A small cat"),
        ("the image features élan. Ärger.", "Élan. Ärger."),
    ],
)
def test_trim(caption: str, expected: str) -> None:
    assert trim_caption(caption) == expected


def test_numbers() -> None:
    text = "One two three. Four five. Six."
    assert trim_caption(text, sentences=0, skip_words=0) == text
    assert trim_caption(text, sentences=1, skip_words=0) == "One two three."
    assert trim_caption(text, sentences=1, skip_words=1) == "Two three."
