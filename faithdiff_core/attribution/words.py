"""Words of a prompt and the positions of their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..errors import SettingsError

LONGEST_LIST = 60
"""Words that an error lists."""


def split_words(text: str) -> list[str]:
    """`"hair, red window"` as its words and phrases.

    Raises:
        SettingsError: there is none.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise SettingsError("Attribution needs words of the prompt, with commas between them; there is none.")
    return words


def content_tokens(chunks: Sequence[Sequence[int]], special: set[int], end: int) -> list[tuple[int, int]]:
    """Positions and ids of a prompt's tokens, without those for begin, end and padding.

    Args:
        chunks: the ids of each chunk that is encoded by itself, padded; positions count through all chunks.
        special: ids that are never part of a text.
        end: id of the end token; what follows it in a chunk is padding.
    """
    found = []
    first = 0
    for chunk in chunks:
        for i, token in enumerate(chunk):
            if token == end and i > 0:
                break
            if token not in special:
                found.append((first + i, token))
        first += len(chunk)
    return found


def word_positions(
    words: Sequence[str], prompt: str, tokens: Sequence[tuple[int, int]], ids_of: Callable[[str], Sequence[int]]
) -> list[list[int]]:
    """Positions of the tokens of each word, of all places where it stands.

    Args:
        words: words or phrases.
        prompt: for the error.
        tokens: from `content_tokens`.
        ids_of: ids of a text by itself.

    Raises:
        SettingsError: a word is not in the prompt; the text lists the prompt's words.
    """
    ids = [token for _, token in tokens]
    found = []
    for word in words:
        wanted = list(ids_of(word))
        starts = [i for i in range(len(ids) - len(wanted) + 1) if wanted and ids[i : i + len(wanted)] == wanted]
        if not starts:
            there = list(dict.fromkeys(re.findall(r"[^\W\d_][\w'-]*", prompt.lower())))
            more = f", ... ({len(there)} in all)" if len(there) > LONGEST_LIST else ""
            listed = ", ".join(there[:LONGEST_LIST]) + more if there else "none: it is empty"
            raise SettingsError(f"The word {word!r} is not in the prompt. Its words are: {listed}.")
        found.append(sorted({tokens[i + j][0] for i in starts for j in range(len(wanted))}))
    return found
