"""Lists of images, which the host runs through a graph one by one."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from .models import CATEGORY


class TestList(io.ComfyNode):
    """Two images as a list; their sizes may differ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestList",
            category=CATEGORY,
            inputs=[io.Image.Input("first"), io.Image.Input("second")],
            outputs=[io.Image.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, first: Tensor, second: Tensor) -> io.NodeOutput:
        return io.NodeOutput([first, second])


class TestCollect(io.ComfyNode):
    """A list as one value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestCollect",
            category=CATEGORY,
            is_input_list=True,
            inputs=[io.Image.Input("values")],
            outputs=[io.AnyType.Output()],
        )

    @classmethod
    def execute(cls, values: list[Tensor]) -> io.NodeOutput:
        return io.NodeOutput(values)
