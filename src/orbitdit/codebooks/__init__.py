"""The codebooks that weights can have, behind one small protocol.

A codebook is data: the `points` that indices stand for, and the `window`, the number of bits of a row's stream that an
index depends on. With b bits a weight and a window of b bits the code of a weight is its index, and the nearest point
is found directly; with a longer window the index of a weight slides along the row's bit stream, and Viterbi's algorithm
finds the codes (see `trellis`). Decoding, on every device, is one table look-up a weight.

To add one: a module here whose `NAME` and `CODEBOOK` are its name and an object that has these members, and its name in
`config.CODEBOOKS`.
"""

import pkgutil
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from orbitdit.codebooks import lloyd_max, trellis
from orbitdit.grids import GRIDS, Grid
from orbitdit.spec import LayerSpec, WeightCode
from orbitdit.tables import constant


class WeightCodebook(Protocol):
    """What a codebook of weights must say of itself; `code` has the bits a weight and other choices of a layer."""

    def check(self, code: WeightCode) -> None:
        """Raise ConfigError unless there is such a codebook."""

    def window(self, code: WeightCode) -> int:
        """Bits of the row's stream that an index depends on, `code.bits` or more."""

    def points(self, code: WeightCode, dim: int) -> tuple[Tensor, float]:
        """`points` (2**window,) fp64 on the CPU, and `step`: a row of scale n stands for n * step * points[indices].
        Points are ascending where the window is `code.bits`, and of unit variance where it is longer."""

    def points_on(self, code: WeightCode, dim: int, grid: Grid) -> tuple[Tensor, float]:
        """The same with points that are exact on a number grid."""


_MODULES = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
CODEBOOKS: dict[str, WeightCodebook] = {module.NAME: module.CODEBOOK for module in _MODULES}
"""The codebooks by name."""


def window(code: WeightCode) -> int:
    """See `WeightCodebook.window`."""
    return CODEBOOKS[code.codebook].window(code)


@constant
def points(code: WeightCode, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """`WeightCodebook.points` in `dtype` on `device`."""
    found, step = CODEBOOKS[code.codebook].points(code, dim)
    return found.to(device, dtype), step


@constant
def points_on(code: WeightCode, dim: int, grid: str, device: torch.device) -> tuple[Tensor, float]:
    """`WeightCodebook.points_on` in the grid's dtype on `device`."""
    found, step = CODEBOOKS[code.codebook].points_on(code, dim, GRIDS[grid])
    return found.float().to(GRIDS[grid].dtype).to(device), step


def indices(codes: Tensor, code: WeightCode) -> Tensor:
    """Which of the points each of the unpacked `codes` (rows, dim) uint8 stands for: itself, or a window on its row,
    int32."""
    bits = window(code)
    return codes if bits == code.bits else trellis.windows(codes, code.bits, bits)


def token_gain(spec: LayerSpec) -> float:
    """The factor in rows' scales that undoes the shrinking of tokens: 1 but for the scale "unbiased"."""
    if spec.tokens is None or spec.weight.scale != "unbiased":
        return 1.0
    return 1 / lloyd_max.shrinkage(spec.in_features, spec.tokens.bits)
