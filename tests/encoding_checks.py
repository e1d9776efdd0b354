"""Tokens to encode, how a kernel's codes may differ from the definition's, and how often a model encodes."""

import gc

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orbitdit.codebooks.lloyd_max import on_grid
from orbitdit.ops.rotate_encode import reference
from orbitdit.packing import pack
from orbitdit.rotation import rotation
from orbitdit.spec import Encoding
from orbitdit.tokens import Tokens

FLIPS = {2: 1e-3, 3: 1e-3, 4: 1e-3, 6: 4e-3}
"""Share of the values that may be those of a neighbouring cell, by bits."""
NORMS = (1e-12, 1e-10, 1e-6, 1e-3, 1, 1e3, 1e10, 1e18, 1e20, 1e30, 3.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, dim: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal tokens with a few channels 30 times as large, as in a DiT."""
    x = random(count, dim, seed=seed)
    x[:, :: max(1, dim // 5)] *= 30
    return x.to(dtype)


def tokens_of_one_input(dim: int) -> Tensor:
    """They are zero outside of a block of the Hadamard matrix, where a value lies on a boundary: it takes the lower."""
    x = torch.zeros(6, dim)
    placed = [(0, 1), (1, -3), (15, 0.5), (dim // 2, 7), (dim - 2, 1e20), (dim - 1, -1e-9)]
    for row, (channel, value) in enumerate(placed):
        x[row, channel] = value
    return x.bfloat16()


def prologue_inputs(
    prologue: str,
    count: int,
    dim: int,
    first: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens and arguments for `reference.apply_prologue`, as parts of wider rows where a model has them so.

    A `batch` of 0 is for an RMSNorm without modulation.
    """
    if prologue == "silu":
        merged = tokens(count, 2 * dim, dtype).to(device) / 4
        return merged[:, :dim], (merged[:, dim:],)
    if prologue == "gelu":
        x = tokens(count, dim - first + 64, dtype).to(device) / 8
        return x[:, 64:], (tokens(count, first, dtype, seed=3).to(device),) if first else ()
    x, rows = tokens(count, dim, dtype).to(device), (0.5 * random(batch, 2 * dim, seed=7)).to(device, dtype)
    scale, shift = rows[:, :dim], rows[:, dim:]
    if prologue == "layer_norm":
        return x, (scale, shift)
    weight = (1 + random(1, dim, seed=9) / 4).to(device, dtype)
    return x, (weight, scale) if batch else (weight,)


def packed(rows: int, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Packed codes (rows, bytes) and bf16 scales (rows,) of a weight."""
    codes = torch.randint(1 << bits, (rows, dim), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    return pack(codes, bits), random(rows).exp().bfloat16()


def defined(x: Tensor, bits: int, grid: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The definition's values and scales of tokens `x` (tokens, dim)."""
    return reference.rotate_encode(x, Encoding(x.shape[1], bits, grid, seed))


def flips(encoded: tuple[Tensor, Tensor], x: Tensor, bits: int, grid: str, seed: int = 1) -> int:
    """How many values differ from the definition's, after checks that these are neighbours across a near boundary."""
    (values, scales), dim = encoded, x.shape[1]
    expected, expected_scales = defined(x, bits, grid, seed)
    # sums of tensor cores are cut off, not rounded
    torch.testing.assert_close(scales, expected_scales, rtol=4e-6 if x.is_cuda else 1e-6, atol=0)
    codebook = on_grid(dim, bits, grid, True)
    levels = codebook.values.float().unique().to(x.device)
    code, expected_code = (torch.bucketize(v.float(), levels) for v in (values, expected))
    assert torch.equal(levels[code], values.float())
    flipped = code != expected_code
    assert ((code - expected_code).abs() <= 1).all()
    boundaries = (levels[code] + levels[expected_code])[flipped] / 2 * codebook.scale * dim**0.5
    rotated = rotation(dim, seed).apply(reference.normalize(x)[0])[flipped] * dim**0.5
    reach = 2e-3 if bits <= 4 else 4e-3
    assert ((rotated - boundaries).abs() <= reach * (1 + boundaries.abs())).all()
    return int(flipped.sum())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def relative(got: Tensor, expected: Tensor) -> float:
    """The error's norm over that of `expected`, in fp64 on the CPU."""
    got, expected = got.cpu().double(), expected.cpu().double()
    return float((got - expected).norm() / expected.norm())


class _Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.orbitdit.linear.default
        return function(*args, **(kwargs or {}))


def counted(function):
    """What `function` gives, and how often tokens were encoded for it."""
    with _Count() as count:
        result = function()
    return result, count.number


def tokens_alive() -> list[Tokens]:
    """The `Tokens` that something still holds."""
    return [found for found in gc.get_objects() if type(found) is Tokens]
