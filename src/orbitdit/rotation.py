"""The randomized permuted block-Hadamard rotation (RPBH) of the paper, fixed by (dim, seed) alone.

With h the largest power of two that divides d, p a uniform permutation and s random signs,

    (R x)[k*h + i] = h^(-1/2) * sum_j H_h[i, j] * s[k*h + j] * x[p[k*h + j]]

where H_h is the Sylvester-Hadamard matrix. R is orthogonal, so <R w, R x> = <w, x>. Source: OrbitQuant,
arXiv 2607.02461.

The random stream is NumPy's raw Philox4x64 words with key (seed, dim) and counter zero: the stable argsort of
the first d words is p, and the top bits of the next d words are s (set means -1). Raw words and their
order are the same on every platform and in every version; golden values in the tests pin them.
"""

import numpy as np
import torch
from torch import Tensor

from orbitdit.errors import ConfigError, TensorError
from orbitdit.tables import constant


class Rotation:
    """The rotation of R^dim drawn from `seed` (0 <= seed < 2^64). Raises ConfigError for other arguments.

    Attributes: `dim`, `seed`, `block_size` (h), `permutation` (dim,) int64 and `signs` (dim,) fp32, both on the CPU.
    """

    def __init__(self, dim: int, seed: int = 0):
        if not isinstance(dim, int) or dim < 1:
            raise ConfigError(f"dim={dim!r} is not a dimension; a rotation needs an integer dim >= 1")
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed={seed!r} is not a seed; choose an integer, 0 <= seed < 2**64")
        self.dim, self.seed = dim, seed
        self.block_size = dim & -dim
        words = np.random.Philox(key=np.array([seed, dim], dtype=np.uint64)).random_raw(2 * dim)
        self.permutation = torch.from_numpy(np.argsort(words[:dim], kind="stable"))
        self.signs = torch.from_numpy(1 - 2 * (words[dim:] >> np.uint64(63)).astype(np.float32))

    def apply(self, x: Tensor) -> Tensor:
        """R x for each row of `x` (..., dim), in the dtype of `x`. Raises TensorError for other widths or dtypes."""
        self._check(x)
        permutation, signs = _tables(self.dim, self.seed, x.device, x.dtype)
        return block_hadamard(x.index_select(-1, permutation) * signs, self.block_size)

    def inverse(self, x: Tensor) -> Tensor:
        """R^T x for each row of `x` (..., dim), in the dtype of `x`. Raises TensorError as `apply` does."""
        self._check(x)
        permutation, signs = _tables(self.dim, self.seed, x.device, x.dtype)
        return torch.empty_like(x).index_copy_(-1, permutation, block_hadamard(x, self.block_size) * signs)

    def matrix(self) -> Tensor:
        """R as a dense (dim, dim) fp64 matrix: `apply(x) == x @ matrix().T`."""
        return self.apply(torch.eye(self.dim, dtype=torch.float64)).T

    def _check(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.dim,) or not x.is_floating_point():
            raise TensorError(
                f"the rotation takes floating-point rows of width {self.dim}; got {x.dtype} of shape {tuple(x.shape)}"
            )

    def __repr__(self) -> str:
        return f"Rotation(dim={self.dim}, seed={self.seed}, block_size={self.block_size})"


@constant
def rotation(dim: int, seed: int = 0) -> Rotation:
    """The shared `Rotation(dim, seed)`; layers with the same input width use the same one."""
    return Rotation(dim, seed)


@constant
def _tables(dim: int, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r = rotation(dim, seed)
    return r.permutation.to(device), r.signs.to(device, dtype)


@constant
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The Sylvester-Hadamard matrix of order `size`, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix * size**-0.5
    return scaled.to(device, dtype)


def block_hadamard(x: Tensor, block_size: int) -> Tensor:
    """H / sqrt(h) on each block of the last axis, as two small factors: H_h = H_outer (x) H_inner."""
    outer = 1 << (block_size.bit_length() // 2)
    inner = block_size // outer
    y = x.unflatten(-1, (-1, outer, inner)) @ _hadamard(inner, x.device, x.dtype)
    mixed: Tensor = _hadamard(outer, x.device, x.dtype) @ y
    return mixed.flatten(-3)
