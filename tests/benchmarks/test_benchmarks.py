"""The benchmarks at sizes that take no time: what they compare is the same thing, and what they write is complete."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import counts, models, registry, rows_core, rows_engine, rows_peers, shared
from benchmarks.measure import Spread, interleaved, peak_bytes
from benchmarks.results import NOT_MEASURED, Report, Result, Target, missing, table, timed
from benchmarks.settings import Settings
from faithdiff_core.backbone import SDXL
from faithdiff_core.models.alignment import Alignment, AlignmentConfig, from_published, to_published
from faithdiff_core.tiling.grid import TileGrid
from faithdiff_core.weights.unet_shapes import UNetConfig

CPU = torch.device("cpu")
TINY = AlignmentConfig(feature_channels=64, condition_channels=32, unet_channels=32, mlp_channels=128, layers=2)
TINY_UNET: dict[str, Any] = models.UNET | {
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
}
TINY_VAE: dict[str, Any] = models.VAE | {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
FIELDS = {
    "row",
    "case",
    "unit",
    "ours",
    "peer",
    "peer_name",
    "ratio",
    "ratio_name",
    "target",
    "note",
    "kind",
    "verdict",
}


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "device": CPU,
        "dtype": torch.float32,
        "sizes": (64,),
        "steps": 1,
        "repeats": 1,
        "quick": False,
        "clock": "wall",
        "say": lambda line: None,
    }
    return Settings(**(values | changes))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models in place of the published sizes."""
    from faithdiff_core.models.lq_encoder import LQEncoderConfig

    monkeypatch.setattr(models, "ALIGNMENT", TINY)
    monkeypatch.setattr(models, "LQ_ENCODER", LQEncoderConfig((32, 32, 64, 64), 1))
    monkeypatch.setattr(models, "UNET", TINY_UNET)
    monkeypatch.setattr(models, "VAE", TINY_VAE)
    monkeypatch.setattr(models, "SMALL_UNET", TINY_UNET)
    monkeypatch.setattr(models, "CONTROLNET_XS", models.CONTROLNET_XS | {"ctrl_block_out_channels": [32, 32, 32]})
    monkeypatch.setattr(rows_peers, "TRAINING_SIZE", 64)
    monkeypatch.setattr(rows_core, "TILED_SIZES", (128, 192))
    shared.release()
    yield
    shared.release()


def test_the_published_formulation_computes_what_ours_does() -> None:
    unfolded = Alignment(TINY, folded=False)
    models.randomize(unfolded)
    blocks: Iterable[Any] = unfolded.blocks
    for block in blocks:
        torch.nn.init.normal_(block.mlp.c_fc.bias)
    published = models.PublishedAlignment(TINY)
    published.load(unfolded)
    ours = Alignment(TINY)
    ours.load_state_dict(from_published(to_published(unfolded), TINY, folded=True))
    h, features = torch.randn(1, 32, 6, 5).repeat(2, 1, 1, 1), torch.randn(1, 64, 6, 5).repeat(2, 1, 1, 1)
    with torch.no_grad():
        expected = published(h, features)
        result = h + ours.residual(h[:1], ours.embed(features[:1]))
    assert (expected - h).abs().max() > 0.1
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_the_published_loop_computes_what_the_engine_does() -> None:
    chosen = settings()
    pipeline = rows_engine._pipeline(chosen)
    unfolded = Alignment(TINY, folded=False)
    models.randomize(unfolded)
    published = models.PublishedAlignment(TINY)
    published.load(unfolded)
    pipeline.alignment.load_state_dict(from_published(to_published(unfolded), TINY, folded=True))
    text = rows_engine.text_rows(chosen)
    noise, features = torch.randn(1, 4, 16, 12), torch.randn(1, 64, 16, 12)
    assert len(TileGrid(16, 12, 64)) == 6
    expected = rows_engine.published_sample(pipeline, published, features, text, noise, 2, 64)
    result = pipeline.sample(features, text, noise, steps=2, start="noise", tile=64)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    plain = rows_engine.plain_sdxl(pipeline.base, text, torch.randn(1, 4, 8, 8), 64, 2)
    assert plain.shape == (1, 4, 8, 8)


def test_the_published_sizes_are_sdxls() -> None:
    """The U-Net that diffusers makes has the tensors of the layout that files are checked against."""
    unet = models.unet(torch.device("meta"), torch.float32)
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    config = UNetConfig.from_shapes(shapes)
    assert config == UNetConfig.of(SDXL)
    assert config.shapes() == shapes


@pytest.mark.usefixtures("tiny")
def test_counts_follow_the_shapes() -> None:
    pixels = 8 * 8
    width, hidden = TINY.width, TINY.mlp_channels
    per_pixel = 2 * (width * width + 2 * width * hidden) + width * TINY.unet_channels
    assert counts.alignment_call(64) == 2 * pixels * per_pixel
    assert counts.embedding(64) == 2 * pixels * 9 * 64 * (64 + 32)
    assert counts.unet_call(64) == 2 * counts.unet_call(64, 1)


@pytest.mark.usefixtures("tiny")
def test_the_peers_cost_what_their_parts_cost() -> None:
    results = list(rows_peers.rows(settings()))
    assert {result.row for result in results} == {"peers", "upscaler"}
    whole = [result for result in results if result.case.startswith("operations of sampling")]
    unet, meta = counts.unet_call(1024), torch.device("meta")
    controlnet = models.controlnet(meta, torch.float32)
    inputs = models.unet_inputs(2, 128, meta, torch.float32)
    hint = torch.empty(2, 3, 1024, 1024, device=meta)
    beside = 20 * (unet + counts.count(lambda: controlnet(**inputs, controlnet_cond=hint)))
    assert whole[0].peer is not None
    assert whole[0].peer.median == pytest.approx(beside / 1e12)
    tiles = [result for result in results if result.row == "upscaler"]
    assert [result.peer_name.split(", ")[1] for result in tiles[::2]] == [f"{n} tiles of 1056" for n in (4, 16, 64)]
    assert [result.case.split(": ")[1] for result in tiles[-2:]] == ["225 tiles of 1024", "81 tiles of 1024"]
    for result in results:
        json.dumps(result.as_dict())
        assert result.ours is not None
        assert result.ours.median > 0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "name", ["floor", "alignment", "alignment-share", "tiles", "engine", "published-loop", "attribution"]
)
def test_a_row_gives_complete_lines(name: str) -> None:
    row = next(row for row in registry.ROWS if row.name == name)
    results = list(row.run(settings()))
    assert results
    for result in results:
        data = result.as_dict()
        assert set(data) == FIELDS
        assert result.row == name
        json.dumps(data)
        if result.kind == NOT_MEASURED:
            assert result.ours is None
            assert result.note
        else:
            assert result.ours is not None
            assert result.ours.median > 0
            assert (result.peer is None) == (result.peer_name == "")
    judged = any(result.target is not None for result in results)
    # The targets of these three are about sizes that are not run here.
    assert judged != (name in ("floor", "tiles", "published-loop"))


@pytest.mark.usefixtures("tiny")
def test_the_command_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--quick", "--sizes", "64", "--repeats", "3", "--rows", "alignment"]
    assert command.main([*arguments, "--json", str(out)]) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert {"date", "torch", "device", "clock", "rounds"} <= set(data["machine"])
    assert "--rows alignment" in data["command"]
    first = data["results"][0]
    assert set(first) == FIELDS
    assert len(first["ratio"]["values"]) == 3
    assert first["ratio"]["low"] <= first["ratio"]["median"] <= first["ratio"]["high"]
    ours, peer = first["ours"]["values"], first["peer"]["values"]
    assert first["ratio"]["values"] == pytest.approx([b / a for a, b in zip(ours, peer, strict=True)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| alignment |")]
    assert len(lines) == len(data["results"])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SystemExit, match="multiples of 64"):
        command.main(["--device", "cpu", "--sizes", "100", "--rows", "alignment"])


def test_without_a_host_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_host", lambda: None)
    rows = [row for row in registry.ROWS if row.needs_host]
    results = [result for _, result in command.run_rows(rows, settings())]
    assert [result.row for result in results] == [row.name for row in rows]
    assert all(result.kind == NOT_MEASURED and "COMFYUI_PATH" in result.note for result in results)


def test_a_target_is_judged_by_the_ratio_if_there_is_one() -> None:
    ours, peer = Spread((1.0, 2.0, 3.0)), Spread((2.0, 2.0, 2.0))
    result = timed("row", "case", ours, peer, "peer", target=Target("<=", 1.0))
    assert result.ratio is not None
    assert result.ratio.values == (0.5, 1.0, 1.5)
    assert (result.ratio.low, result.ratio.high) == (0.75, 1.25)
    assert result.verdict == "met"
    assert timed("row", "case", ours, peer, "peer", target=Target("<=", 0.9)).verdict == "missed"
    assert Result("row", "case", "s", Spread((0.2,)), target=Target("<=", 0.15)).verdict == "missed"
    assert missing("row", "case", "why", Target("<=", 1.0)).verdict == ""
    lines = table([result, missing("row", "case", "why")]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "1000 ms" not in lines[2]
    assert "2000 ms [1.5e+03 .. 2.5e+03]" in lines[2]
    assert NOT_MEASURED in lines[3]


def test_sides_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    times = interleaved(settings(repeats=2), {"a": lambda: calls.append("a"), "b": lambda: time.sleep(0.01)})
    assert calls == ["a"] * 3
    assert len(times["a"].values) == 2
    assert min(times["b"].values) >= 0.01
    resting = interleaved(settings(repeats=1, clock="cpu"), {"b": lambda: time.sleep(0.05)})
    assert resting["b"].median < 0.05


def test_the_peak_is_what_was_held_at_once() -> None:
    mebi = 2**20

    def work() -> None:
        for _ in range(3):
            block = torch.ones(64 * mebi // 4)
            del block

    assert peak_bytes(CPU, work) == 64 * mebi
    assert peak_bytes(CPU, lambda: [torch.ones(mebi), torch.ones(mebi)]) == 8 * mebi
    assert peak_bytes(CPU, lambda: None) == 0


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = timed("row", "case", Spread((1.0, 2.0)), Spread((2.0, 2.0)), "peer", target=Target("<=", 1.0))
    Report("command", {}, [result]).plot(tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no ratio"):
        Report("command", {}, []).plot(tmp_path / "none.png")
