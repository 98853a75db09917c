"""How strongly FaithDiff's U-Net acts on each part of another one: input blocks, middle block and output blocks.

The parts are those of ComfyUI's ModelMergeBlocks. What lies outside the blocks goes with its neighbors: the first
convolution and the embeddings of timestep and size with the input blocks, the last norm and convolution with the output
blocks.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from ..errors import SettingsError

_MIDDLE = ("mid_block", "middle_block")
_OUTPUT = ("up_blocks", "conv_norm_out", "conv_out", "output_blocks", "out")
"""How the names of a part's tensors begin, in diffusers' spelling and in that of single-file checkpoints."""


@dataclass(frozen=True)
class BlockStrengths:
    """A number for each part of a U-Net.

    Attributes:
        input: for input blocks (diffusers: down blocks) and embeddings.
        middle: for the middle block.
        output: for output blocks (diffusers: up blocks).
    """

    input: float = 1.0
    middle: float = 1.0
    output: float = 1.0

    @classmethod
    def uniform(cls, strength: float) -> BlockStrengths:
        """The same number for all parts."""
        return cls(strength, strength, strength)

    def times(self, strength: float) -> BlockStrengths:
        """All of them multiplied by a number."""
        return BlockStrengths(*(strength * own for own in astuple(self)))

    def at(self, name: str) -> float:
        """The number for a tensor.

        Args:
            name: in diffusers' spelling or that of single-file checkpoints, without prefix.
        """
        first = name.partition(".")[0]
        if first in _MIDDLE:
            return self.middle
        return self.output if first in _OUTPUT else self.input

    @property
    def least(self) -> float:
        """The smallest."""
        return min(astuple(self))

    @property
    def most(self) -> float:
        """The largest."""
        return max(astuple(self))

    def check_factors(self) -> None:
        """Check that these are factors on a strength.

        Raises:
            SettingsError: one does not lie between 0 and 1; the text names it.
        """
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise SettingsError(f"the factor for the {name} blocks must lie between 0 and 1, got {value}.")
