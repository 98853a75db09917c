"""What a run over an archive knows of the work on an image: it is given a file's bytes, and gives back files.

Nothing here, nor in the modules that list, hand out and write down, imports torch: the real work is in `restoring`,
which only the processes import that do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Given:
    """What a worker has read for an image.

    Attributes:
        name: of the image's file, for messages and metadata.
        target: name of the result, relative to the output folder, with slashes; it says the format.
        texts: by their endings, the contents of the files with captions beside the image.
        mask: name and bytes of the mask's file, or None.
    """

    name: str
    target: str
    texts: Mapping[str, bytes] = field(default_factory=dict)
    mask: tuple[str, bytes] | None = None


@dataclass(frozen=True)
class Result:
    """What an image became.

    Attributes:
        files: names, as in `Task.names`, and contents, in the order in which they are written.
        size: height and width in pixels.
        notes: what a user should know about the image.
        image: for `Engine.thumbnail`.
    """

    files: Sequence[tuple[str, bytes]]
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    image: Any = None


class Engine(Protocol):
    """Does the work on images, in one process, with what was loaded once."""

    def read(self, content: bytes, name: str) -> Any:
        """Decode an image file.

        Raises:
            ImageError: it cannot be read.
        """

    def is_result(self, content: bytes, image: Any, given: Given) -> bool:
        """Whether a file is what `work` would make of the image."""

    def work(self, image: Any, given: Given) -> Result:
        """Do the work; whatever it raises is put down as this image's failure."""

    def thumbnail(self, image: Any) -> str:
        """A small JPEG file in base64."""

    def free_memory(self) -> None:
        """Give back what a failed call held."""


class Task(Protocol):
    """What is done to every image of a run; plain data, which is sent to the workers."""

    @property
    def digest(self) -> str:
        """Changes with anything that changes results, but for the images themselves."""

    @property
    def caption_suffixes(self) -> tuple[str, ...]:
        """Endings of the files beside an image that belong to it."""

    @property
    def wants_gpu(self) -> bool:
        """Whether a worker takes a GPU where there are any."""

    def names(self, target: str) -> tuple[str, ...]:
        """Names of all files that an image becomes, by the name of the result, which comes last."""

    def start(self) -> Engine:
        """Load what the work needs.

        Raises:
            FaithDiffError: it cannot be loaded.
        """
