"""What the page shows while a node works: the progress bar and a line of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

StepCallback = Callable[[int, Any, Any, int], None]
"""ComfyUI's: (step, denoised, x, total steps), called at the end of a step."""


class TileProgress:
    """Counts steps times tiles on ComfyUI's progress bar.

    At the end of a step ComfyUI's callback sets the bar and sends the preview, as always; this moves the bar
    between. It never goes back: a sampler that asks the model twice in a step passes the same tiles again.

    Args:
        steps: the sampler's steps.
        tiles: tiles of the latent.
    """

    def __init__(self, steps: int, tiles: int) -> None:
        self._steps = steps
        self._tiles = tiles
        self._step = 0
        self._value = 0
        self._bar = comfy.utils.ProgressBar(steps * tiles)

    def callback(self, host: StepCallback) -> StepCallback:
        """ComfyUI's callback (`latent_preview.prepare_callback`) with its steps stretched over the tiles."""

        def at_step_end(step: int, x0: Any, x: Any, total_steps: int) -> None:
            self._step = max(self._step, min(step + 1, self._steps))
            self._value = self._step * self._tiles
            host(self._value - 1, x0, x, self._steps * self._tiles)

        return at_step_end

    def tiles_done(self, done: int, total: int) -> None:
        """Move the bar: `done` of the running step's `total` tiles are finished."""
        end = min(self._step + 1, self._steps) * self._tiles
        value = min(self._step * self._tiles + done * self._tiles // total, end - 1)
        if value > self._value:
            self._value = value
            self._bar.update_absolute(value, self._steps * self._tiles)

    @property
    def step_text(self) -> str:
        """The running step in words."""
        return f"Step {min(self._step + 1, self._steps)} of {self._steps}, "


def show_tiles(progress: TileProgress | None, first: int, last: int, total: int) -> None:
    """Say in the running node which tiles (counted from 1) are sampled; nothing where there is only one."""
    if total > 1:
        tiles = f"tile {first}" if first == last else f"tiles {first} to {last}"
        text = f"{progress.step_text if progress else ''}{tiles} of {total}"
        show_text(text[0].upper() + text[1:])


def work_progress() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the running node's bar and raises where the run was cancelled."""
    bar: comfy.utils.ProgressBar | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return progress


def show_text(text: str) -> None:
    """Put a line of text into the running node. Without a server or a running node there is no place to show it."""
    context = get_executing_context()
    if context is None:
        return
    # Here, not above: ComfyUI can run without a server, and its module is a large one.
    from server import PromptServer  # type: ignore[import-not-found]

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, context.node_id)
