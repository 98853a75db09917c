"""Words that errors about weights files share."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import WeightsError

REDOWNLOAD = (
    "Download FaithDiff.bin again from https://huggingface.co/jychen9811/FaithDiff, or convert it with "
    "`python -m faithdiff_core convert`."
)


def listing(names: Sequence[str]) -> str:
    """Names separated by commas; `nothing` for none."""
    return ", ".join(names) if names else "nothing"


def truncated(name: str, size: int, expected: int) -> WeightsError:
    """The error for a file that ends too early."""
    return WeightsError(
        f"{name} is truncated: it has {size} of {expected} bytes. The download stopped early. {REDOWNLOAD}"
    )


def gigabytes(size: int) -> str:
    """A number of bytes for people, in GB, or in MB below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
