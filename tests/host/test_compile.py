"""FaithDiff in a U-Net that ComfyUI compiles with torch.compile.

The host's node is called with the backend `eager`: torch traces the U-Net and guards it as ever, and the graph runs as
it is. What goes wrong with a compiled patch (values of an earlier call that stay, graph breaks) goes wrong there too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy_host import Host
from support.host_sampling import Setup, images, load, relative

BRANCHES: dict[str, dict[str, Any]] = {
    "tiles": {"tile_size": 64},
    "another strength": {"tile_size": 64, "strength": 0.5},
}
"""What the sampler is asked for, one after the other with one compiled MODEL."""


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing that another test compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, **kw: Any) -> Any:
    """A MODEL as ComfyUI's TorchCompileModel makes it, which has no choice of such a backend."""
    helpers = importlib.import_module("comfy_api.torch_helpers")
    node = importlib.import_module("comfy_extras.nodes_torch_compile")
    static = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(model.clone).parameters else {}
    clone = model.clone(**static)
    options = {"guard_filter_fn": node.skip_torch_compile_dict}
    helpers.set_torch_compile_wrapper(model=clone, backend="eager", options=options, **kw)
    return clone


def differences(setup: Setup, model: Any) -> dict[str, float]:
    """Compiled against not compiled, in every branch. There are three tiles, each with a condition of its own."""
    features = setup.features(images(64, 104, seed=1))
    return {
        name: relative(
            setup.restore(features, model=model, steps=1, **settings), setup.restore(features, steps=1, **settings)
        )
        for name, settings in BRANCHES.items()
    }


@pytest.mark.usefixtures("fresh")
def test_one_graph_without_a_break(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host's attention for GPUs, which torch can trace, `fullgraph` does not complain."""
    attention = importlib.import_module("comfy.ldm.modules.attention")
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    assert differences(setup, compiled(setup.model, fullgraph=True)) == pytest.approx(
        dict.fromkeys(BRANCHES, 0.0), abs=1e-5
    )


@pytest.mark.usefixtures("fresh")
def test_nothing_stays_from_an_earlier_call_where_the_host_breaks_the_graph(setup: Setup) -> None:
    """The host's attention for processors cannot be traced, so the patch is compiled on its own."""
    torch._dynamo.utils.counters.clear()
    assert differences(setup, compiled(setup.model)) == pytest.approx(dict.fromkeys(BRANCHES, 0.0), abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > len(BRANCHES)
