"""The fake-quantized linear layer that every method ends in, and the rotations that some of them use.

    y = Q(R((x + shift) / smooth)) W^T + L(x) + bias        L: the low-rank branch, on what Q is given before R

The weight is held dequantized, in the dtype of the model; `stored` counts the bytes that would be kept instead: packed
codes, scales and smoothing factors in bf16, zero points in a byte, low-rank factors in bf16. (A shift is a constant of
the activation function, and is not counted; nor is the bias, which every method has.)
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from baselines.uniform import Activation, Grid, decode
from orbitdit.errors import ConfigError
from orbitdit.packing import pack

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
"""A regular Hadamard matrix: all its rows have the same sum."""


class Rotation(NamedTuple):
    """x -> blocks of (x * signs), each times `matrix` (size, size), which is orthogonal; `signs` (dim,)."""

    signs: Tensor
    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """The rotated rows of `x` (..., dim), in its dtype."""
        blocks = (x * self.signs.to(x.dtype)).unflatten(-1, (-1, len(self.matrix)))
        return (blocks @ self.matrix.to(x.dtype)).flatten(-2)

    def conjugate(self, hessian: Tensor) -> Tensor:
        """R H R^T."""
        return self.apply(self.apply(hessian).T)


def block_hadamard(dim: int, seed: int, device: torch.device) -> Rotation:
    """Random signs, then the Sylvester-Hadamard matrix on blocks of the largest power of two that divides `dim`.

    Raises ConfigError for an odd `dim`.
    """
    size = dim & -dim
    if size == 1:
        raise ConfigError(f"its {dim} inputs are odd, so that no Hadamard matrix fits")
    words = np.random.Philox(key=np.array([seed, dim], dtype=np.uint64)).random_raw(dim)
    signs = torch.from_numpy(1 - 2 * (words >> np.uint64(63)).astype(np.float32))
    matrix = torch.from_numpy(hadamard(size) * size**-0.5).float()
    return Rotation(signs.to(device), matrix.to(device))


def regular_hadamard(dim: int, device: torch.device, largest: int = 256) -> Rotation:
    """Kronecker powers of H4 on blocks of the largest power of four that divides `dim` and is at most `largest`.

    Raises ConfigError when four does not divide `dim`.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < largest and dim % (4 * len(matrix)) == 0:
        matrix = np.kron(matrix, H4 / 2)
    if len(matrix) == 1:
        raise ConfigError(f"its {dim} inputs are no multiple of four, the least order of a regular Hadamard matrix")
    return Rotation(torch.ones(dim, device=device), torch.from_numpy(matrix).float().to(device))


class FakeQuantLinear(nn.Module):
    """See the module's docstring; takes (..., in) in any floating dtype and gives (..., out) in that of its weight."""

    def __init__(
        self,
        codes: Tensor,
        grid: Grid,
        activation: Activation,
        *,
        rotation: Rotation | None = None,
        smooth: Tensor | None = None,
        shift: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.activation, self.rotation = activation, rotation
        down, up = low_rank or (None, None)
        inverse = None if smooth is None else 1 / smooth
        halves = [t.to(torch.bfloat16) for t in (grid.scale, smooth, down, up) if t is not None]
        zeros = [] if grid.symmetric else [grid.zero.to(torch.uint8)]
        self.stored = sum(t.nbytes for t in (pack(codes, grid.bits), *zeros, *halves))
        tensors = {"weight": decode(codes, grid), "inverse": inverse, "shift": shift, "down": down, "up": up}
        for name, tensor in {**tensors, "bias": None}.items():
            self.register_buffer(name, tensor, persistent=False)

    weight: Tensor
    inverse: Tensor | None
    shift: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.shift is not None:
            x = x + self.shift
        if self.inverse is not None:
            x = x * self.inverse
        rotated = x if self.rotation is None else self.rotation.apply(x)
        y = nn.functional.linear(self.activation(rotated), self.weight, self.bias)
        if self.down is not None and self.up is not None:
            y = y + nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return y

    def finish(self, bias: Tensor | None, dtype: torch.dtype) -> "FakeQuantLinear":
        """This layer with the bias of the layer that it stands for, in `dtype`; what the shift adds is taken off."""
        if self.shift is not None:
            added = nn.functional.linear(self.shift * (1 if self.inverse is None else self.inverse), self.effective())
            bias = -added if bias is None else bias.float() - added
        self.bias = None if bias is None else bias.detach().clone()
        return self.to(dtype)

    def effective(self) -> Tensor:
        """The weight (out, in) that stands before unrounded inputs, after shift and smoothing and before rotation."""
        weight = self.weight
        if self.rotation is not None:
            eye = torch.eye(self.in_features, dtype=weight.dtype, device=weight.device)
            weight = weight @ self.rotation.apply(eye).T
        return weight if self.down is None or self.up is None else weight + self.up @ self.down

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.stored}"
