"""Equally spaced levels, for comparison: what quantizers that round to nearest after a rotation use.

The steps are those of least squared error for N(0, 1) with 2^b levels on both sides of zero (Max, "Quantizing for
minimum distortion", 1960).
"""

import torch
from torch import Tensor

from orbitdit.errors import ConfigError
from orbitdit.grids import Grid
from orbitdit.spec import WeightCode

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352}
"""By bits a weight."""


class Uniform:
    """Weights coded one by one by the nearest of equally spaced levels: a `WeightCodebook`."""

    def check(self, code: WeightCode) -> None:
        """Raise ConfigError for bits without a step."""
        if code.bits not in STEPS or code.log2_states is not None:
            raise ConfigError(f"{code.key!r} is no uniform code; choose {', '.join(map(str, STEPS))} bits")

    def window(self, code: WeightCode) -> int:
        """The bits of one code."""
        return code.bits

    def points(self, code: WeightCode, dim: int) -> tuple[Tensor, float]:
        """Odd whole numbers, in units of half a step."""
        levels = 1 << code.bits
        points = 2 * torch.arange(levels, dtype=torch.float64) + 1 - levels
        unit = STEPS[code.bits] / 2 * dim**-0.5
        return points * unit, 1.0

    def points_on(self, code: WeightCode, dim: int, grid: Grid) -> tuple[Tensor, float]:
        """The whole numbers themselves, or on a grid without the largest of them the nearest values."""
        levels = 1 << code.bits
        points = 2 * torch.arange(levels, dtype=torch.float64) + 1 - levels
        unit = max(1.0, (levels - 1) / grid.largest)
        return grid.round(points / unit), unit * STEPS[code.bits] / 2 * dim**-0.5


NAME, CODEBOOK = "uniform", Uniform()
