"""Matrices as products of two thin ones: the singular value decomposition, exact or randomised.

The randomised one is Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), algorithms
4.4 and 5.1: a random projection finds the space of the largest singular vectors, power iterations sharpen it, and the
decomposition is that of a small matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Random vectors beyond the rank."""

POWER_ITERATIONS = 2
"""Each one multiplies by the matrix and its transpose once more, which separates large singular values from small."""

EXACT_FROM = 0.5
"""Decompose exactly where the random vectors are more than this share of the smaller side: it is no slower."""


@dataclass(frozen=True)
class Decomposition:
    """The largest singular values and vectors of a matrix.

    Attributes:
        left: (rows, rank), orthonormal columns.
        values: (rank,), largest first, none of them zero.
        right: (rank, columns), orthonormal rows.
        energy: sum of all squared singular values, which is that of all squared entries.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps a share of the energy; all of them where none does."""
        kept = self.values.double().square().cumsum(0)
        return min(len(kept), int((kept < share * self.energy).sum()) + 1) if len(kept) else 0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Two matrices (rows, rank) and (rank, columns) whose product is the best of that rank.

        Each takes the root of the singular values, so that both have values of the same size, which suits half
        precision.
        """
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def decompose(matrix: Tensor, rank: int, seed: int = 0) -> Decomposition:
    """Find the largest singular values and vectors of a matrix.

    Args:
        matrix: (rows, columns), float32.
        rank: how many; fewer where the others are zero within rounding.
        seed: of the random projection.
    """
    smaller = min(matrix.shape)
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)
    count = min(rank + OVERSAMPLING, smaller)
    if not energy:
        count = 0
    if count > EXACT_FROM * smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = _randomised(matrix, count, seed)
    found = min(rank, int((values > torch.finfo(matrix.dtype).eps * values[:1]).sum()))
    return Decomposition(left[:, :found], values[:found], right[:found], energy)


def _randomised(matrix: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn((matrix.shape[1], count), generator=generator)
    basis = torch.linalg.qr(matrix @ directions).Q
    for _ in range(POWER_ITERATIONS):
        # Orthogonal again after each product: small singular values would drown in rounding otherwise.
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
