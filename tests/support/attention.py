"""Cross-attention made to look in a wanted way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def queries_of(unet: nn.Module, factor: float) -> Iterator[None]:
    """While the context lasts, all queries of a U-Net's cross-attention are multiplied by a factor."""

    def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * factor

    layers: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    handles = [layer.to_q.register_forward_hook(scale) for layer in layers]
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
