"""A task for archives that takes drawn times instead of restoring; workers import it, so it imports no torch."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from faithdiff_core.archive.task import Given, Result
from faithdiff_core.errors import ImageError


@dataclass(frozen=True)
class DrawnTimes:
    """Takes a time that is drawn by the image's name, and fails for some of them; task and engine in one.

    Attributes:
        mean: seconds an image; times are uniform from half of it to one and a half.
        failing: fraction of images that fail.
    """

    mean: float = 0.5
    failing: float = 0.05
    digest: str = "drawn"
    caption_suffixes: tuple[str, ...] = ()
    wants_gpu: bool = False

    def drawn(self, name: str) -> tuple[float, bool]:
        """Seconds, and whether the image fails."""
        source = random.Random(name)
        return source.uniform(0.5, 1.5) * self.mean, source.random() < self.failing

    def names(self, target: str) -> tuple[str, ...]:
        """An image becomes its result alone."""
        return (target,)

    def start(self) -> DrawnTimes:
        """Nothing is loaded."""
        return self

    def read(self, content: bytes, name: str) -> bytes:
        """The file's bytes as they are."""
        return content

    def is_result(self, content: bytes, image: bytes, given: Given) -> bool:
        """No file tells what it was made of."""
        return False

    def work(self, image: bytes, given: Given) -> Result:
        """Wait.

        Raises:
            ImageError: the image was drawn to fail.
        """
        seconds, fails = self.drawn(given.name)
        time.sleep(seconds)
        if fails:
            raise ImageError(f"{given.name} was drawn to fail.")
        return Result([(given.target, b"a result")], (8, 8), image=image)

    def thumbnail(self, image: bytes) -> str:
        """As many characters as a small photograph has."""
        return "A" * 6000

    def free_memory(self) -> None:
        """Nothing is held."""
