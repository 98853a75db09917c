"""The real server over HTTP: a published-shape model, cancel, many prompts, bad values."""

from __future__ import annotations

import io

import numpy as np
import pytest
from comfy_host import Graph, Host, PromptRejectedError, Server
from PIL import Image
from support.server_prompts import restoration, tiny
from tiny_models.reduced_sdxl import write_reduced_adapter, write_reduced_sdxl_checkpoint


@pytest.fixture(scope="module")
def published_shape(host: Host, server: Server) -> tuple[str, str]:
    """Names of a checkpoint and an adapter file with the published widths, in the server's model folders."""
    models = server.base / "models"
    write_reduced_sdxl_checkpoint(models / "checkpoints" / "reduced.ckpt")
    write_reduced_adapter(models / "faithdiff" / "reduced_adapter.bin")
    return "reduced.ckpt", "reduced_adapter.bin"


@pytest.fixture(scope="module")
def photograph(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real photograph of 95 x 63 pixels, uploaded."""
    from skimage import data

    path = tmp_path_factory.mktemp("images") / "chelsea.png"
    Image.fromarray(data.chelsea()).resize((95, 63), Image.Resampling.LANCZOS).save(path)
    return server.upload(path)


def test_published_shape_through_the_stock_loader(
    server: Server, published_shape: tuple[str, str], photograph: str
) -> None:
    """CheckpointLoaderSimple, CLIPTextEncode, this pack, SaveImage; 95 x 63 becomes 190 x 126."""
    checkpoint, adapter = published_shape
    graph = Graph()
    base = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    loader = graph.add("FaithDiffModelLoader", faithdiff_name=adapter, weight_dtype="default", model=base[0])
    texts = [graph.add("CLIPTextEncode", clip=base[1], text=text)[0] for text in ("a photograph of a cat", "")]
    restoration(photograph, (base[0], loader), (texts[0], texts[1]), base[2], graph, tile_size=128, steps=1)
    result = server.run(graph, timeout=600)
    (image,) = result.images
    photo = Image.open(io.BytesIO(server.view(image)))
    assert photo.size == (190, 126)
    assert np.asarray(photo).std() > 1  # not one flat colour


def test_an_identical_prompt_comes_from_the_cache(server: Server, photograph: str) -> None:
    server.run(tiny(photograph, seed=11))
    again = server.run(tiny(photograph, seed=11))
    executing = [data["node"] for kind, data in again.messages if kind == "executing" and data.get("node")]
    assert executing == []


def test_bad_values_are_http_400(server: Server, photograph: str) -> None:
    for values, text in (
        ({"tile_size": 16392}, "at most 16384"),
        ({"tile_size": 63}, "nearest size that works is 64"),
        ({"tile_size": 130}, "multiple of 8"),
        ({"overlap": 0.91}, "bigger than max of 0.9"),
        ({"scheduler": "nonsense"}, "not in list"),
        ({"start_point": "middle"}, "not in list"),
        ({"steps": 1001}, "bigger than max"),
    ):
        with pytest.raises(PromptRejectedError) as rejected:
            server.run(tiny(photograph, **values))
        assert rejected.value.status == 400
        errors = [e for entry in rejected.value.body["node_errors"].values() for e in entry["errors"]]
        assert [e["extra_info"]["input_name"] for e in errors] == list(values)  # at no other input
        assert text in f"{errors[0]['message']} {errors[0]['details']}"


def test_cancel_then_another_prompt(server: Server, photograph: str) -> None:
    """Cancelled in the middle of a tiled run; the next prompt succeeds, and memory returns to what it was."""
    for seed in range(20, 24):
        server.run(tiny(photograph, seed=seed))
    before = server.resident_bytes()
    for seed in range(3):
        with server.submit(tiny(photograph, seed=100 + seed, steps=500)) as job:
            job.wait_for(lambda kind, data: kind == "progress" and data["value"] >= 2)
            server.interrupt()
            assert job.wait(60).status == "execution_interrupted"
        assert server.run(tiny(photograph, seed=200 + seed)).status == "execution_success"
    assert server.resident_bytes() < 1.05 * before


@pytest.mark.slow  # a thousand prompts and cancels: `make soak`
def test_fifty_prompts_do_not_grow_memory(server: Server, photograph: str) -> None:
    for seed in range(300, 310):
        server.run(tiny(photograph, seed=seed, steps=1))
    before = server.resident_bytes()
    for seed in range(310, 360):
        server.run(tiny(photograph, seed=seed, steps=1))
    assert server.resident_bytes() < 1.02 * before + 10e6
