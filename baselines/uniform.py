"""Uniform codes of weights and activations: round-to-nearest, the search of a clipping ratio, and GPTQ.

A weight is (code - zero) * scale with codes 0 .. 2^bits - 1, and one scale (and zero point) for each `group` of
neighbouring inputs of a row. Scales are rounded to bf16 before they are used, as they would be stored.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SHRINK = tuple(1 - 0.01 * i for i in range(80))
"""Clipping ratios that are tried, as in GPTQ's own search."""


class Grid(NamedTuple):
    """The points that codes of `bits` stand for: `scale` and `zero` (rows, groups) in fp32. Symmetric grids have their
    zero point in the middle of the codes and store none."""

    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool


def grid_of(weight: Tensor, bits: int, group: int, symmetric: bool, search: bool = False) -> Grid:
    """The grid of `weight` (rows, dim) in groups of `group` inputs (a divisor of dim): from the extremes of each group,
    or from the share of them with the least squared error when `search` is set."""
    groups = weight.unflatten(1, (-1, group))
    best, least = _grid(groups, bits, symmetric, 1.0), None
    for ratio in SHRINK if search else ():
        grid = _grid(groups, bits, symmetric, ratio)
        error = (decode(encode(weight, grid), grid) - weight).unflatten(1, (-1, group)).square().sum(-1)
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        least = error if least is None else torch.minimum(error, least)
        scale, zero = (torch.where(better, new, old) for new, old in zip(grid[:2], best[:2], strict=True))
        best = Grid(scale, zero, bits, symmetric)
    return best


def _grid(groups: Tensor, bits: int, symmetric: bool, ratio: float) -> Grid:
    if symmetric:
        scale = ratio * groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0) * ratio, groups.amax(-1).clamp(min=0) * ratio
        scale = (high - low) / (2**bits - 1)
        zero = -low / scale.where(scale > 0, 1)
    scale = scale.to(torch.bfloat16).float()
    return Grid(scale.where(scale > 0, 1), zero.round().clamp(0, 2**bits - 1), bits, symmetric)


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """The codes of `weight` (rows, dim), uint8: round-to-nearest."""
    group = weight.shape[1] // grid.scale.shape[1]
    scale, zero = (t.repeat_interleave(group, 1) for t in grid[:2])
    return _codes(weight, scale, zero, grid.bits).to(torch.uint8)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The weight (rows, dim) in fp32 that `codes` stand for."""
    group = codes.shape[1] // grid.scale.shape[1]
    scale, zero = (t.repeat_interleave(group, 1) for t in grid[:2])
    return (codes - zero) * scale


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, block: int = 128) -> Tensor:
    """Codes of `weight` (rows, dim) by GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1), uint8.

    Inputs are quantized one after the other, in order; the error of each is made up for by those not yet quantized, as
    `hessian` (dim, dim), the mean of x x^T, says. The grid stays what it is ("static groups"). `damping` times the mean
    of the hessian's diagonal is added to it.
    """
    dim, group = weight.shape[1], weight.shape[1] // grid.scale.shape[1]
    h = hessian.double()
    diagonal = h.diagonal()
    unused = diagonal <= 0
    mean = diagonal.mean()
    h = h + torch.diag(damping * mean.where(mean > 0, 1) + unused.double())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, dim, block):
        end = min(start + block, dim)
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            scale, zero = grid.scale[:, j // group], grid.zero[:, j // group]
            codes[:, j] = _codes(w[:, j], scale, zero, grid.bits)
            errors[:, j - start] = (w[:, j] - (codes[:, j] - zero) * scale) / upper[j, j]
            w[:, j:end] -= errors[:, j - start, None] * upper[j, j:end]
        w[:, end:] -= errors @ upper[start:end, end:]
    return codes.to(torch.uint8)


class Activation(NamedTuple):
    """How activations are rounded, anew for each token: at `bits` (16: not at all), in groups of `group` inputs (0: the
    whole token), on a symmetric grid that ends at `clip` times the largest magnitude, or from least to largest value.
    `unsigned` (groups,) marks groups without negative values, whose codes then all serve the positive ones."""

    bits: int
    group: int = 0
    symmetric: bool = True
    clip: float = 1.0
    unsigned: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., dim) rounded to its grid, in its dtype."""
        if self.bits == 16:
            return x
        groups = x.unflatten(-1, (-1, self.group or x.shape[-1]))
        full = 2**self.bits - 1
        if not self.symmetric:
            low, high = groups.aminmax(dim=-1, keepdim=True)
            low, high = low.float().clamp_(max=0), high.float().clamp_(min=0)
            scale = ((high - low) / full).clamp_(min=1e-20)
            least = (low / scale).round_()
            return _rounded(groups, scale, least, least + full)
        signed = 2 ** (self.bits - 1) - 1
        unsigned = torch.zeros(1, dtype=torch.bool, device=x.device) if self.unsigned is None else self.unsigned
        most = torch.where(unsigned, full, signed)[:, None].float()
        largest = torch.linalg.vector_norm(groups, torch.inf, dim=-1, keepdim=True).float()
        scale = (largest * self.clip / most).clamp_(min=1e-20)
        return _rounded(groups, scale, torch.where(unsigned, 0, -signed - 1)[:, None].float(), most)


def _rounded(groups: Tensor, scale: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """`groups` (..., groups, size) on a grid of steps `scale` from `least` to `most` of them, as (..., dim).

    Computed in fp32, and in place: on a GPU the passes over memory are what takes time.
    """
    codes = (groups / scale).round_().clamp_(least, most)
    return codes.mul_(scale).flatten(-2).to(groups.dtype)
