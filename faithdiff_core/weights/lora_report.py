"""How well a LoRA reproduces what it was extracted from: by block, by kind of layer and by rank."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import MissingPackageError
from ..models.shapes import Shape

_KINDS = (
    (".attn1.", "self-attention"),
    (".attn2.", "cross-attention"),
    (".ff.", "feed-forward"),
    (".proj_", "projections"),
    ("emb", "embeddings"),
)
"""Parts of layers' names to what the layers are; all others are convolutions."""


@dataclass(frozen=True)
class LayerReport:
    """What was extracted from one layer. Energies are sums of squared entries.

    Attributes:
        name: diffusers' name of the layer.
        shape: of its weight.
        energy: of the difference of its weight; 0 for a norm, which is no matrix.
        other_energy: of the difference of its bias, and of a norm's weight.
        weight_energy: of its weight in the model that FaithDiff was trained from.
        values: the largest singular values of the difference.
        rank: of the LoRA.
        residual: energy of what the LoRA, as it is stored, gets wrong.
    """

    name: str
    shape: Shape
    energy: float
    other_energy: float
    weight_energy: float
    values: list[float]
    rank: int
    residual: float

    @property
    def block(self) -> str:
        """The part of the U-Net it belongs to, such as `down_blocks.1`."""
        words = self.name.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            return f"{words[0]}.{words[1]}"
        return words[0] if words[0] == "mid_block" else "outside blocks"

    @property
    def kind(self) -> str:
        """What it is, such as `self-attention`."""
        return next((kind for part, kind in _KINDS if part in f".{self.name}."), "convolutions")

    @property
    def columns(self) -> int:
        """Of the weight as a matrix: a kernel's are flattened."""
        return prod(self.shape[1:])

    def residual_at(self, rank: int) -> float:
        """Energy that the best LoRA of a rank leaves out."""
        if rank >= min(self.shape[0], self.columns):
            return 0.0  # all of it; the sum of squares below would be off by rounding
        return max(0.0, self.energy - sum(value * value for value in self.values[:rank]))

    def size_at(self, rank: int) -> int:
        """Numbers that a LoRA of a rank stores."""
        return min(rank, len(self.values)) * (self.shape[0] + self.columns)

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerReport:
        """Out of plain types, as JSON has them."""
        return cls(**(values | {"shape": tuple(values["shape"])}))


@dataclass(frozen=True)
class ExtractionReport:
    """What a LoRA reproduces of the difference that it was extracted from.

    Attributes:
        path: the file written.
        layers: all of the U-Net's.
        ranks: for which the errors and sizes are worked out.
        itemsize: bytes of a stored number.
        extra_bytes: of the file beside the LoRA's matrices.
        differences: whether biases and norms are in the file.
    """

    path: Path
    layers: list[LayerReport]
    ranks: Sequence[int]
    itemsize: int
    extra_bytes: int
    differences: bool

    @property
    def error(self) -> float:
        """Relative error of the matrices' difference, as the file stores it: 0 is exact, 1 is nothing of it."""
        return relative_error(self.layers)

    @property
    def change(self) -> float:
        """Size of the difference relative to the weights."""
        return (sum(x.energy for x in self.layers) / max(sum(x.weight_energy for x in self.layers), 1e-300)) ** 0.5

    @property
    def other_share(self) -> float:
        """Share of the whole difference's energy that biases and norms have."""
        other = sum(layer.other_energy for layer in self.layers)
        return other / max(other + sum(layer.energy for layer in self.layers), 1e-300)

    def size(self, rank: int) -> int:
        """Bytes of a file of a rank."""
        return self.extra_bytes + self.itemsize * sum(layer.size_at(rank) for layer in self.layers)

    def groups(self) -> list[tuple[str, list[LayerReport]]]:
        """Layers by block, by kind, and all of them."""
        matrices = [layer for layer in self.layers if len(layer.shape) > 1]
        named: dict[str, list[LayerReport]] = {}
        for layer in matrices:
            named.setdefault(layer.block, []).append(layer)
        for layer in sorted(matrices, key=lambda layer: layer.kind):
            named.setdefault(layer.kind, []).append(layer)
        return [*named.items(), ("all", matrices)]

    def table(self) -> str:
        """Errors by group and rank, and the sizes of the files, as text."""
        head = ["", "parameters", *(f"rank {rank}" for rank in self.ranks), "this file"]
        rows = [head]
        for name, layers in self.groups():
            errors = [relative_error(layers, rank) for rank in self.ranks]
            own = relative_error(layers)
            rows.append(
                [
                    name,
                    f"{sum(prod(layer.shape) for layer in layers) / 1e6:,.1f} M",
                    *(f"{error:.4f}" for error in (*errors, own)),
                ]
            )
        sizes = [megabytes(self.size(rank)) for rank in self.ranks]
        rows.append(["file", "", *sizes, megabytes(self.path.stat().st_size)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        kept = "are in the file as they are" if self.differences else "are not in the file"
        return "\n".join(
            [
                "Relative error of the difference: 0 is exact, 1 is nothing of it.",
                *lines,
                f"The difference is {self.change:.2%} of the weights. Biases and norms, {self.other_share:.2%} of its "
                f"energy, {kept}.",
            ]
        )

    def write_csv(self, path: Path) -> None:
        """Write one line for each layer: name, shape, rank, size of the difference, and the errors."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        errors = [f"error_rank_{rank}" for rank in self.ranks]
        writer.writerow(["layer", "shape", "rank", "relative_difference", "error", *errors])
        for layer in self.layers:
            if len(layer.shape) > 1:
                one = [layer]
                row = [relative_error(one, rank) for rank in self.ranks]
                change = (layer.energy / max(layer.weight_energy, 1e-300)) ** 0.5
                own = relative_error(one)
                shape = "x".join(map(str, layer.shape))
                writer.writerow([layer.name, shape, layer.rank, *(f"{value:.6g}" for value in (change, own, *row))])
        write_atomically(path, text.getvalue().encode())

    def plot(self, path: Path) -> None:
        """Draw the errors over the rank, for each kind of layer and for all, with the files' sizes.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axis = figure.add_subplot()
        kinds = {layer.kind for layer in self.layers}
        for name, layers in self.groups():
            if name in kinds or name == "all":
                errors = [relative_error(layers, rank) for rank in self.ranks]
                bold = name == "all"
                axis.plot(self.ranks, errors, marker="o", linewidth=3 if bold else 1.2, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(self.ranks), [f"{rank}\n{megabytes(self.size(rank))}" for rank in self.ranks])
        axis.set_xlabel("rank, and size of the file")
        axis.set_ylabel("relative error of the difference")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
        content = io.BytesIO()
        canvas.print_png(content)
        write_atomically(path, content.getvalue())


def relative_error(layers: Sequence[LayerReport], rank: int | None = None) -> float:
    """Root of the energy that is left out, over the whole; 0 where there is none.

    Args:
        layers: which to count.
        rank: of the LoRA. Defaults to what the file holds, as it is stored.
    """
    whole = sum(layer.energy for layer in layers)
    left = sum(layer.residual if rank is None else layer.residual_at(rank) for layer in layers)
    return (left / whole) ** 0.5 if whole else 0.0


def megabytes(size: int) -> str:
    """A number of bytes for people, in MB."""
    return f"{size / 1e6:,.0f} MB" if size >= 10**7 else f"{size / 1e6:.1f} MB"


def require_matplotlib() -> None:
    """Check that a plot can be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("A plot needs the package matplotlib (`pip install matplotlib`).") from error
