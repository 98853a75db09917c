"""Attribution maps in the engine: where the words of the prompts act in the restored images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attribution.recorder import DEFAULT_MEMORY, CrossAttentionRecorder, RecordedRow
from ..attribution.words import content_tokens, split_words, word_positions
from ..tiling.grid import Tile, TileGrid
from .long_prompts import LongPrompt, plain_ids, token_chunks, tokenizers_of


@dataclass
class PromptAttention:
    """Records the cross-attention of some images' prompts in one sampling run.

    Attributes:
        recorder: what records.
        tokens: of each image's prompt, chunks and padding included.
    """

    recorder: CrossAttentionRecorder
    tokens: list[int]

    def recording(
        self, group: Sequence[tuple[int, Tile]], grids: Sequence[TileGrid], copies: int, x: Tensor
    ) -> AbstractContextManager[None]:
        """The context of a U-Net call for some images' tiles.

        Args:
            group: image and tile of each row.
            grids: of each image, in this step.
            copies: 2 with guidance, where the negative half comes first.
            x: the whole latents.
        """
        rows = [
            RecordedRow(
                row=(copies - 1) * len(group) + i,
                image=image,
                tile=tile,
                tokens=self.tokens[image],
                weights=grids[image].weights(tile, x.device) if len(grids[image]) > 1 else None,
            )
            for i, (image, tile) in enumerate(group)
        ]
        height, width = x.shape[-2:]
        return self.recorder.call(rows, copies * len(group), x.shape[0], (height, width), x.device)


@dataclass
class Attribution:
    """Which words to attribute, and after a run of the pipeline the maps.

    Args:
        words: words or phrases with commas between them, or a list; each has to be in every prompt.
        memory: bytes that the recording may take.

    Attributes:
        maps: for each image, the mean attention to each word at every position of the latent, (words, h, w), on the
            CPU; `attribution.overlay.image_maps` brings them to the image's size.
    """

    words: str | Sequence[str]
    memory: int = DEFAULT_MEMORY
    maps: list[Tensor] = field(default_factory=list, init=False)
    _positions: list[list[list[int]]] = field(default_factory=list, init=False, repr=False)
    _tokens: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.words = split_words(self.words if isinstance(self.words, str) else ",".join(self.words))

    def begin(self, base: Any, prompts: Sequence[str], long_prompt: LongPrompt) -> None:
        """Find the words in the prompts, before any work.

        Raises:
            SettingsError: a word is not in a prompt, or in the part of it that is cut.
        """
        tokenizer = tokenizers_of(base)[0]
        self._positions, self._tokens = [], []
        for prompt in prompts:
            chunks = token_chunks(base, tokenizer, prompt, long_prompt)
            content = content_tokens(chunks, {tokenizer.bos_token_id}, tokenizer.eos_token_id)
            self._positions.append(word_positions(self.words, prompt, content, lambda w: plain_ids(tokenizer, w)))
            self._tokens.append(sum(map(len, chunks)))
        self.maps = [torch.empty(0)] * len(prompts)

    def of(self, images: Sequence[int], *, masked: bool = False) -> PromptAttention:
        """A recording of some images, for one run; with a mask, parts of them may not be sampled."""
        recorder = CrossAttentionRecorder(self.memory)
        tokens = [self._tokens[i] for i in images]
        recorder.begin(max(tokens), gaps=masked)
        return PromptAttention(recorder, tokens)

    def keep(self, images: Sequence[int], attention: PromptAttention) -> None:
        """Keep what a run recorded of some images.

        Raises:
            SettingsError: nothing was recorded.
        """
        maps = attention.recorder.recorded()
        for row, image in enumerate(images):
            of_words = [maps.mean(positions)[row] for positions in self._positions[image]]
            self.maps[image] = torch.stack(of_words).cpu()
