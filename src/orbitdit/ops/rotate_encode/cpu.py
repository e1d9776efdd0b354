"""`rotate_encode` on a CPU: as fast as a bf16 layer needs it, for int8 and bf16 values.

The permutation moves 16-bit values, and the Hadamard matrix is two small factors, in fp32. The nearest centroid is that
of the bin, of 2^16 equal ones (2^18 for 8 bits), that a coordinate falls into: it differs from the exact one for less
than a code in a thousand, at a boundary. Adding 2^23 to a small float leaves its nearest integer in the low bits of the
mantissa, which saves a conversion and keeps every index inside the table, NaN or not.

Tokens in fp32 take none of these short cuts: their codes and centroids are those of the definition.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.codebooks.lloyd_max import codebook_on, lloyd_max, look_up, nearest, on_grid
from orbitdit.grids import INT8
from orbitdit.ops.rotate_encode import reference
from orbitdit.ops.rotate_encode.means import encode_centred
from orbitdit.ops.rotate_encode.reference import EPSILON, normalize
from orbitdit.rotation import block_hadamard, rotation
from orbitdit.spec import Encoding
from orbitdit.tables import constant

TOKEN_ELEMENTS = 1 << 20
"""Activations rotated and encoded at a time: enough for both threads, few enough for the cache."""
SAFE_NORMS = (1e-15, 1e15)
"""Norms whose squares fp32 holds; other tokens (zero, NaN, enormous) are encoded as the definition does it."""
MANTISSA = float(1 << 23)
"""From here to twice as much, fp32 holds the integers and nothing between them."""
CPU = torch.device("cpu")


def rotate_encode(x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """See reference.py; fast for int8 and 16-bit tokens."""
    if encoding.grid != INT8.name or x.dtype not in (torch.bfloat16, torch.float16):
        return reference.rotate_encode(x, encoding)
    if encoding.group_size is not None:
        return encode_centred(x, encoding, rotate_encode)
    values, norm = encode(x.reshape(-1, encoding.dim), encoding.bits, encoding.seed, torch.int8)
    return values, norm.flatten() * _token_codebook(encoding.dim, encoding.bits, torch.int8).scale


def encode_exactly(x: Tensor, encoding: Encoding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See reference.py; of bf16 and fp16 tokens `x` (..., dim)."""

    def centroids(x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        values, norm = encode(x, encoding.bits, encoding.seed, dtype)
        return values, norm.flatten()

    if encoding.group_size is not None:
        return encode_centred(x, encoding, centroids)
    return centroids(x.reshape(-1, encoding.dim), encoding)


class TokenCodebook(NamedTuple):
    """Centroids of tokens, `scale * values` (2^b,), with the boundaries (2^b - 1,) fp64 between them."""

    values: Tensor
    boundaries: Tensor
    scale: float


@constant
def _token_codebook(dim: int, bits: int, dtype: torch.dtype) -> TokenCodebook:
    if dtype == torch.int8:
        found = on_grid(dim, bits, "int8", True)
        return TokenCodebook(found.values.to(torch.int8), found.boundaries, found.scale)
    return TokenCodebook(codebook_on(dim, bits, CPU, dtype).centroids, lloyd_max(dim, bits).boundaries, 1.0)


def encode(x: Tensor, bits: int | None, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values (tokens, dim) in `dtype`, and norms (tokens, 1) fp32, of bf16 or fp16 tokens `x` (tokens, dim): centroids
    of codes of so many bits, or for None the rotated coordinates themselves."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    inverse = 1 / (norm + (0 if bits is None else EPSILON))
    values = x.new_empty(x.shape, dtype=dtype)
    count = max(1, TOKEN_ELEMENTS // x.shape[1])
    for part, factor, into in zip(x.split(count), inverse.split(count), values.split(count), strict=True):
        rotated = _rotate(part, seed)
        if bits is None:
            torch.mul(rotated, factor, out=into)
        else:
            _nearest(rotated, factor, bits, into)
    safe = (norm > SAFE_NORMS[0]) & (norm < SAFE_NORMS[1])
    if not safe.all():
        unsafe = safe.logical_not().flatten()
        values[unsafe], norm[unsafe] = _encode_exactly(x[unsafe], bits, seed, dtype)
    return values, norm


def _encode_exactly(x: Tensor, bits: int | None, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `encode` gives, as the definition computes it: for any norm, without a code that differs."""
    dim = x.shape[1]
    unit, norm = normalize(x, torch.finfo(torch.float32).tiny if bits is None else EPSILON)
    rotated = rotation(dim, seed).apply(unit)
    if bits is None:
        return rotated.to(dtype), norm
    codebook = _token_codebook(dim, bits, dtype)
    return look_up(nearest(rotated, codebook.boundaries.float()), codebook.values), norm


def _rotate(x: Tensor, seed: int) -> Tensor:
    """R x in fp32 for each row of `x` (tokens, dim), bf16 or fp16."""
    r = rotation(x.shape[1], seed)
    moved = x.detach().view(torch.int16).numpy().take(r.permutation.numpy(), 1, mode="clip")
    return block_hadamard(torch.from_numpy(moved).view(x.dtype) * r.signs, r.block_size)


class ValueTable(NamedTuple):
    """Values of the centroids nearest to (k - K/2) / rate, k = 0..K-1; K is a power of two."""

    values: Tensor
    rate: float


@constant
def _value_table(dim: int, bits: int, dtype: torch.dtype) -> ValueTable:
    values, boundaries, _ = _token_codebook(dim, bits, dtype)
    half = max(1 << 15, 512 << bits)
    rate = (half - 2) / max(float(boundaries.max()), dim**-0.5)
    codes = torch.bucketize(torch.arange(-half, half, dtype=torch.float64) / rate, boundaries)
    return ValueTable(values[codes], rate)


def _nearest(rotated: Tensor, inverse: Tensor, bits: int, into: Tensor) -> None:
    """Write the values nearest to `rotated` (tokens, dim), overwritten, times `inverse` (tokens, 1) to `into`."""
    table = _value_table(into.shape[1], bits, into.dtype)
    number = len(table.values)
    middle = rotated.new_tensor(MANTISSA + number // 2)
    index = torch.addcmul(middle, rotated, inverse * table.rate, out=rotated).clamp_(MANTISSA, MANTISSA + number - 1)
    index = index.view(torch.int32).bitwise_and_(number - 1)
    torch.index_select(table.values, 0, index.view(-1), out=into.view(-1))
