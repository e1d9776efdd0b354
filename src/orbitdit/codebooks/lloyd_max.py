"""One fixed Lloyd-Max codebook for each (dim, bits): no data, no timestep, no prompt.

A coordinate of a uniformly random unit vector in R^d has the density f(z) ~ (1 - z^2)^((d-3)/2) on [-1, 1],
close to N(0, 1/d). `lloyd_max` gives its optimal 2^bits-level quantizer: every centroid is the mean of its
cell, every boundary the midpoint of its neighbours. Source: OrbitQuant, arXiv 2607.02461.

`on_grid` puts a codebook on a number grid that tensor cores multiply: centroid k becomes scale * value_k.

Masses and means of cells have closed forms (an incomplete beta function, and (1 - z^2)^((d-1)/2)), so the
conditions are solved by Newton's method on the positive half, where the Jacobian is tridiagonal; Lloyd's own
iteration needs thousands of rounds at 8 bits.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_banded
from scipy.special import betainc, betaln, ndtri
from torch import Tensor

from orbitdit.errors import ConfigError
from orbitdit.grids import GRIDS, Grid
from orbitdit.packing import PACKED_BITS
from orbitdit.spec import WeightCode
from orbitdit.tables import constant

MAX_BITS = 8


class Codebook(NamedTuple):
    """`centroids` (2^b,) ascending and `boundaries` (2^b - 1,) between them, fp64 on the CPU."""

    centroids: Tensor
    boundaries: Tensor


@constant
def lloyd_max(dim: int, bits: int) -> Codebook:
    """The Lloyd-Max quantizer of one coordinate of a random unit vector in R^dim, at `bits` (1..8) bits.

    The tensors are shared: treat them as constants. Raises ConfigError for other arguments.
    """
    if dim < 1:
        raise ConfigError(f"dim={dim} is not a dimension; a codebook needs dim >= 1")
    if bits not in range(1, MAX_BITS + 1):
        raise ConfigError(f"bits={bits} is not supported; a codebook has 1 to {MAX_BITS} bits")
    levels = 2 ** (bits - 1)
    # in R^1 the only unit vectors are +1 and -1: any levels that hold both are exact
    half = np.arange(1, levels + 1) / levels if dim == 1 else _solve(dim, levels)
    centroids = torch.from_numpy(np.concatenate([-half[::-1], half]))
    return Codebook(centroids, (centroids[1:] + centroids[:-1]) / 2)


@constant
def codebook_on(dim: int, bits: int, device: torch.device, dtype: torch.dtype) -> Codebook:
    """`lloyd_max(dim, bits)` rounded to `dtype` on `device`."""
    return Codebook(*(t.to(device, dtype) for t in lloyd_max(dim, bits)))


@constant
def shrinkage(dim: int, bits: int) -> float:
    """The mean of <u, q> over random unit vectors u of R^dim, where q is what the codes of u in `lloyd_max(dim, bits)`
    stand for: 1 - D, with D the mean of ||u - q||^2."""
    if dim == 1:
        return 1.0
    centroids, boundaries = (t.numpy() for t in lloyd_max(dim, bits))
    mass, mean = _cells(dim, np.concatenate([[-1.0], boundaries, [1.0]]))
    return float(dim * (mass * mean * centroids).sum())


def nearest(x: Tensor, boundaries: Tensor) -> Tensor:
    """Codes of the nearest centroids, uint8 of the shape of `x`; a value on a boundary takes the lower one."""
    return torch.bucketize(x, boundaries, out_int32=True).to(torch.uint8)


class GridCodebook(NamedTuple):
    """A codebook whose centroids are `scale` * `values`: `values` (2^b,) ascending, exact on the grid, and `boundaries`
    (2^b - 1,), both fp64 on the CPU."""

    values: Tensor
    scale: float
    boundaries: Tensor


@constant
def on_grid(dim: int, bits: int, grid: str, refit: bool) -> GridCodebook:
    """The codebook C(dim, bits) on a grid of `GRIDS`, with the scale of least squared error.

    Without `refit` the cells stay those of `lloyd_max` (for stored codes: their meaning must not depend on a grid) and
    each centroid moves to a point near it. With `refit` (for activations) Lloyd-Max runs under the constraint:
    boundaries lie midway between points, and points are the nearest to the means of their cells.
    """
    exact, target = lloyd_max(dim, bits), GRIDS[grid]
    if dim == 1:  # the only coordinates are +1 and -1, the outermost centroids
        return GridCodebook(exact.centroids.sign() * target.largest, 1 / target.largest, exact.boundaries)

    def cells(boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _cells(dim, np.concatenate([[-1.0], boundaries, [1.0]]))

    best = (np.inf, GridCodebook(exact.centroids, 1.0, exact.boundaries))
    for largest in target.sizes:
        boundaries = exact.boundaries.numpy()
        mass, mean = cells(boundaries)
        values, scale = _fit_to_grid(mass, mean, float(exact.centroids[-1]) / largest, target)
        for _ in range(20 if refit else 0):
            boundaries = scale * (values[1:] + values[:-1]) / 2
            previous = values
            mass, mean = cells(boundaries)
            values, scale = _fit_to_grid(mass, mean, scale, target)
            if np.array_equal(values, previous):
                break
        error = 1 / dim + (mass * scale * values * (scale * values - 2 * mean)).sum()
        if error < best[0]:
            best = (error, GridCodebook(torch.from_numpy(values), scale, torch.from_numpy(boundaries)))
    return best[1]


class Scalar:
    """Weights coded one by one by the nearest centroid of `lloyd_max`: a `WeightCodebook`."""

    def check(self, code: WeightCode) -> None:
        """Raise ConfigError for bits without a layout."""
        if code.bits not in PACKED_BITS or code.log2_states is not None:
            raise ConfigError(f"{code.key!r} is no scalar code; choose {', '.join(map(str, PACKED_BITS))} bits")

    def window(self, code: WeightCode) -> int:
        """The bits of one code."""
        return code.bits

    def points(self, code: WeightCode, dim: int) -> tuple[Tensor, float]:
        """The centroids."""
        return lloyd_max(dim, code.bits).centroids, 1.0

    def points_on(self, code: WeightCode, dim: int, grid: Grid) -> tuple[Tensor, float]:
        """Points near the centroids; the cells stay as they are."""
        found = on_grid(dim, code.bits, grid.name, False)
        return found.values, found.scale


NAME, CODEBOOK = "scalar", Scalar()


def _fit_to_grid(mass: np.ndarray, mean: np.ndarray, scale: float, grid: Grid) -> tuple[np.ndarray, float]:
    """The points nearest to mean / scale, the same on both sides of zero, and the scale that suits them best."""
    half = grid.round(torch.from_numpy(mean[len(mean) // 2 :] / scale)).numpy()
    points = np.concatenate([-half[::-1], half])
    return points, float((mass * mean * points).sum() / (mass * points**2).sum())


def _cells(dim: int, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass and mean of each cell of the density in R^dim between neighbouring `edges` (ascending in -1..1)."""
    above = 0.5 * betainc((dim - 1) / 2, 0.5, 1 - edges**2)
    above = np.where(edges < 0, 1 - above, above)
    with np.errstate(divide="ignore"):  # at -1 and 1 the logarithm is of zero, and the moment zero
        moment = np.exp(-betaln((dim - 1) / 2, 0.5) + (dim - 1) / 2 * np.log1p(-(edges**2))) / (dim - 1)
    mass = -np.diff(above)
    mean = -np.diff(moment) / np.where(mass > 0, mass, 1)
    return mass, np.where(mass > 0, mean, (edges[1:] + edges[:-1]) / 2)


class CodeTable(NamedTuple):
    """Equal bins over [-reach, reach] with at most one boundary each: `below` (K,) uint8 counts the boundaries below
    a bin, `boundary` (K,) is the one inside it (infinite if there is none)."""

    reach: float
    below: Tensor
    boundary: Tensor


@constant
def code_table(dim: int, bits: int) -> CodeTable:
    """The bins of `lloyd_max(dim, bits)`, in fp32 on the CPU."""
    boundaries = lloyd_max(dim, bits).boundaries.float().double()
    reach = max(1.01 * float(boundaries.abs().max()), dim**-0.5)
    number = int(2 * reach / float(boundaries.diff().min() if len(boundaries) > 1 else reach)) | 1
    while True:  # no boundary may lie where rounding could put a value into the neighbouring bin
        edges = torch.linspace(-reach, reach, number + 1, dtype=torch.float64)
        first = torch.bucketize(edges, boundaries)
        if (edges[:, None] - boundaries).abs().min() > 1e-5 * reach and (first.diff() <= 1).all():
            break
        number += 2
    padded = torch.cat([boundaries, torch.tensor([torch.inf], dtype=torch.float64)])
    inside = torch.where(first.diff() > 0, padded[first[:-1]], torch.inf)
    return CodeTable(reach, first[:-1].to(torch.uint8), inside.float())


def nearest_by_table(x: Tensor, table: CodeTable) -> Tensor:
    """What `nearest` gives for fp32 `x` on the CPU, with one compare a value in place of a search."""
    number = len(table.below)
    index = (x.flatten() + table.reach).mul_(number / (2 * table.reach)).int().clamp_(0, number - 1)
    above = x.flatten() > table.boundary.index_select(0, index)
    return (table.below.index_select(0, index) + above.view(torch.uint8)).view(x.shape)


def look_up(codes: Tensor, centroids: Tensor) -> Tensor:
    """The centroids that `codes` name, in their dtype."""
    return centroids.index_select(0, codes.flatten().int()).view(codes.shape)


def _solve(dim: int, levels: int) -> np.ndarray:
    """The `levels` positive centroids of the symmetric quantizer with 2 * `levels` levels."""
    log_constant = -betaln((dim - 1) / 2, 0.5)

    def density(z: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(log_constant + (dim - 3) / 2 * np.log1p(-(z**2))))

    def cells(c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inner boundaries, and mass and mean of each cell; the outermost cell ends at 1."""
        inner = (c[1:] + c[:-1]) / 2
        return inner, *_cells(dim, np.concatenate([[0.0], inner, [1.0]]))

    # the density of an optimal quantizer's points goes as f^(1/3): a Gaussian of variance 3/d
    c: np.ndarray = np.minimum(ndtri(0.5 + (np.arange(levels) + 0.5) / (2 * levels)) * np.sqrt(3 / dim), 1)
    c = c if c[-1] < 0.9 else (np.arange(levels) + 0.5) / levels
    for _ in range(20):
        c = cells(c)[2]
    for _ in range(40):
        inner, mass, mean = cells(c)
        f = density(inner)
        by_upper = np.concatenate([f * (inner - mean[:-1]) / mass[:-1], [0.0]])
        by_lower = np.concatenate([[0.0], f * (mean[1:] - inner) / mass[1:]])
        band = np.zeros((3, levels))
        band[0, 1:] = -by_upper[:-1] / 2
        band[1] = 1 - (by_upper + by_lower) / 2
        band[2, :-1] = -by_lower[1:] / 2
        step = solve_banded((1, 1), band, mean - c)
        while not _ascending(c + step):
            step = step / 2
        c = c + step
        if np.abs(step).max() <= 1e-14 * c[-1]:
            break
    return c


def _ascending(c: np.ndarray) -> bool:
    return bool(c[0] > 0 and c[-1] < 1 and (np.diff(c) > 0).all())
