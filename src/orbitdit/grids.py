"""Number grids: the sets of numbers that a product is computed on.

A tensor core only multiplies, so the centroids of a codebook need not be uniform: centroid k becomes scale * value_k
with value_k exact in a type that the hardware takes. Adding a grid means adding a `Grid` to `GRIDS` here: a CPU
computes on it then, to compare. For a grid that a GPU multiplies, `ops.CUDA_GRIDS` names it, and the kernels of `ops`
write its values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EXACT = "exact"
"""No grid: the fp32 centroids themselves are multiplied, in fp32 or rounded once to the dtype of the input."""


@dataclass(frozen=True)
class Grid:
    """A number grid. `dtype` holds its values, a byte each; `round` takes fp64 numbers to the nearest of them; `sizes`
    are the values of the largest centroid that are tried when a codebook is laid on the grid, up to `largest`."""

    name: str
    dtype: torch.dtype
    largest: float
    round: Callable[[Tensor], Tensor]
    sizes: tuple[float, ...]

    def nearest(self, values: Tensor) -> Tensor:
        """The grid's numbers nearest to `values`, in its dtype."""
        return self.round(values).to(self.dtype)

    def bytes_of(self, values: Tensor) -> np.ndarray:
        """`values` of the grid, as its bytes, uint8."""
        data: np.ndarray = values.float().to(self.dtype).view(torch.uint8).numpy()
        return data


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()


def _to_int8(values: Tensor) -> Tensor:
    return values.round().clamp(-127, 127)


E4M3 = Grid("e4m3", torch.float8_e4m3fn, 448.0, _to_e4m3, tuple(np.linspace(224, 448, 65)))
INT8 = Grid("int8", torch.int8, 127.0, _to_int8, tuple(np.arange(8, 127.5, 0.5)))
GRIDS: dict[str, Grid] = {grid.name: grid for grid in (E4M3, INT8)}
"""The grids by name. "exact" is no grid: see `EXACT`."""


def dtype_of(grid: str) -> torch.dtype:
    """The dtype of values on a grid."""
    return GRIDS[grid].dtype
