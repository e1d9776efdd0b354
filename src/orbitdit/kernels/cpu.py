"""The operations on a CPU: close to the speed of a bf16 layer, with nothing decoded kept.

**Product.** Where the CPU multiplies int8 exactly, layers run on the int8 grid: a GEMM at twice the rate of bf16.
Elsewhere, and for 8-bit codes and 16-bit activations, centroids are multiplied in bf16.

**Weights.** A run of codes that fills whole bytes is a word of 8 or 12 bits; one look-up in a table of 256 or 4096
entries gives the values of all its codes. That is done for a block of rows at a time, so nothing decoded is kept.

**Tokens.** The permutation moves 16-bit values, and the Hadamard matrix is two small factors, in fp32. The nearest
centroid is that of the bin, of 2^16 equal ones (2^18 for 8 bits), that a coordinate falls into: it differs from the
exact one for less than a code in a thousand, at a boundary. Adding 2^23 to a small float leaves its nearest integer
in the low bits of the mantissa, which saves a conversion and keeps every index inside the table, NaN or not.

Tokens in fp32 take none of these short cuts: their codes and centroids are those of the definition.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orbitdit.codebook import codebook_on, lloyd_max, look_up, nearest, on_grid
from orbitdit.kernels import reference
from orbitdit.kernels.reference import EPSILON, normalize
from orbitdit.packing import unpack
from orbitdit.quantize import weight_points
from orbitdit.rotation import block_hadamard, rotation
from orbitdit.tables import shared

TOKEN_ELEMENTS = 1 << 20
"""Activations rotated and encoded at a time: enough for both threads, few enough for the cache."""
WEIGHT_ELEMENTS = 3 << 19
"""Weights decoded at a time: 512 rows of 3072."""
SAFE_NORMS = (1e-15, 1e15)
"""Norms whose squares fp32 holds; other tokens (zero, NaN, enormous) are encoded as the definition does it."""

MANTISSA = float(1 << 23)
"""From here to twice as much, fp32 holds the integers and nothing between them."""
CPU = torch.device("cpu")


def rotate_encode(x: Tensor, bits: int, seed: int, grid: str) -> tuple[Tensor, Tensor]:
    """See reference.py; fast for int8 and 16-bit tokens."""
    if grid != "int8" or x.dtype not in (torch.bfloat16, torch.float16):
        return reference.rotate_encode(x, bits, seed, grid)
    values, norm = _encode(x, bits, seed, torch.int8)
    return values, norm.flatten() * _token_codebook(x.shape[1], bits, torch.int8).scale


def linear(
    values: Tensor,
    token_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    states: int = 0,
) -> Tensor:
    """`decode` and `matmul` of reference.py, a block of rows at a time; fast for int8."""
    if values.dtype != torch.int8 or not multiplies_int8():
        grid = "int8" if values.dtype == torch.int8 else "e4m3"
        weight, row_scales = reference.decode(codes, scales, bits, values.shape[1], grid, states)
        return reference.matmul(values, token_scales, weight, row_scales, bias, dtype)
    return _by_rows(values, token_scales[:, None], codes, scales, bias, bits, states, dtype)


def exact_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
    seed: int,
    states: int = 0,
) -> Tensor:
    """See reference.py; fast for bf16 and fp16, which is multiplied in fp32 (fp16 products are slow on CPUs)."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return reference.exact_linear(x, codes, scales, bias, weight_bits, activation_bits, seed, states)
    tokens, norm = _encode(x, activation_bits, seed, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    return _by_rows(tokens, norm, codes, scales, bias, weight_bits, states, x.dtype)


def _by_rows(
    tokens: Tensor,
    token_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    states: int,
    dtype: torch.dtype,
) -> Tensor:
    """tokens (tokens, dim) times the decoded codes (rows, bytes), with scales (tokens, 1) and (rows,), and bias."""
    dim, scales = tokens.shape[1], scales.float()
    token_scales = token_scales * _weight_values(dim, bits, tokens.dtype, states)[1]
    bias = torch.zeros_like(scales) if bias is None else bias.float()
    outputs = tokens.new_empty(len(tokens), len(codes), dtype=dtype)
    rows = max(64, WEIGHT_ELEMENTS // dim // 64 * 64)
    for start in range(0, len(codes) if len(tokens) else 0, rows):
        block = slice(start, start + rows)
        weight = decode(codes[block], bits, dim, tokens.dtype, states)
        product = torch._int_mm(tokens, weight.T) if weight.dtype == torch.int8 else tokens @ weight.T
        torch.addcmul(bias[block], product.float().mul_(token_scales), scales[block], out=outputs[:, block])
    return outputs


@shared
def multiplies_int8() -> bool:
    """Whether int8 products are exact and fast: x86 without VNNI saturates, and other CPUs have no such kernel."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    extreme = torch.full((64, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, -extreme.T) == -256 * 127**2).all())


@shared
def _weight_values(dim: int, bits: int, dtype: torch.dtype, states: int = 0) -> tuple[Tensor, float]:
    """The points of stored codes, in `dtype`, and the scale that belongs to them."""
    if dtype == torch.int8:
        return reference.grid_points(dim, bits, states, "int8", CPU)
    return weight_points(dim, bits, states, CPU, dtype)


class TokenCodebook(NamedTuple):
    """Centroids of tokens, `scale * values` (2^b,), with the boundaries (2^b - 1,) fp64 between them."""

    values: Tensor
    boundaries: Tensor
    scale: float


@shared
def _token_codebook(dim: int, bits: int, dtype: torch.dtype) -> TokenCodebook:
    if dtype == torch.int8:
        found = on_grid(dim, bits, "int8", True)
        return TokenCodebook(found.values.to(torch.int8), found.boundaries, found.scale)
    return TokenCodebook(codebook_on(dim, bits, CPU, dtype).centroids, lloyd_max(dim, bits).boundaries, 1.0)


def decode(codes: Tensor, bits: int, dim: int, dtype: torch.dtype, states: int = 0) -> Tensor:
    """Values (rows, dim) of packed `codes` (rows, bytes) uint8, in `dtype`: int8, bf16 or fp32."""
    if states:
        words, table = _windows_of_two(codes, bits, states), _of_windows_of_two(dim, bits, states, dtype)
    elif dtype == torch.float32:
        return look_up(unpack(codes, bits, dim), _weight_values(dim, bits, dtype)[0])
    else:
        words, table = _words(codes, bits), _of_words(dim, bits, dtype)
    return table.index_select(0, words).view(dtype).view(len(codes), -1)[:, :dim]


def _windows_of_two(codes: Tensor, bits: int, states: int) -> Tensor:
    """The last `states` + `bits` bits of the stream after every second code, as int32 (rows * pairs,)."""
    pairs = math.lcm(2 * bits, 8) // (2 * bits)
    period = pairs * 2 * bits // 8
    groups = -(-codes.shape[1] // period)
    before = 2  # bytes of zeros, where the stream begins: the largest window reaches 8 to 10 bits back
    data = np.zeros((len(codes), before + groups * period + 2), np.uint8)
    data[:, before : before + codes.shape[1]] = codes.numpy()
    words = np.empty((len(codes), groups, pairs), np.int32)
    for pair in range(pairs):
        byte, shift = divmod(8 * before + (2 * pair + 2) * bits - states - bits, 8)
        four = np.ndarray(words.shape[:2], "<u4", data, byte, (data.shape[1], period))
        np.bitwise_and(
            four >> np.uint32(shift), np.uint32((1 << states + bits) - 1), out=words[:, :, pair], casting="unsafe"
        )
    return torch.from_numpy(words).flatten()


@shared
def _of_windows_of_two(dim: int, bits: int, states: int, dtype: torch.dtype) -> Tensor:
    """The values of two codes that follow each other, side by side in one integer, for each window on both."""
    window = torch.arange(1 << states + bits)
    both = torch.stack([window & (1 << states) - 1, window >> bits], 1)
    return _side_by_side(_weight_values(dim, bits, dtype, states)[0][both])


def _words(codes: Tensor, bits: int) -> Tensor:
    """The bytes of `codes`, or for 3 and 6 bits its words of 12 bits, as int32 (words,)."""
    if 8 % bits == 0:
        return codes.flatten().int()
    data = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 3)).contiguous().numpy()
    pairs = data.size // 3
    words = np.empty((pairs, 2), np.int32)
    np.bitwise_and(np.ndarray(pairs, "<u2", data, 0, 3), 4095, out=words[:, 0])
    np.right_shift(np.ndarray(pairs, "<u2", data, 1, 3), 4, out=words[:, 1])
    return torch.from_numpy(words).flatten()


@shared
def _of_words(dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The values of all codes of a word, side by side in one integer, for each word."""
    word = 8 if 8 % bits == 0 else 12
    codes = torch.arange(1 << word)[:, None] >> torch.arange(0, word, bits) & (1 << bits) - 1
    return _side_by_side(_weight_values(dim, bits, dtype)[0][codes])


def _side_by_side(values: Tensor) -> Tensor:
    """Each row of `values`, which takes 2, 4 or 8 bytes, as one integer."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.shape[1] * values.itemsize]
    return values.view(integer).flatten()


def _encode(x: Tensor, bits: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values (tokens, dim) in `dtype`, and norms (tokens, 1) fp32, of tokens `x` (tokens, dim)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    inverse = 1 / (norm + (EPSILON if bits < 16 else 0))
    values = x.new_empty(x.shape, dtype=dtype)
    count = max(1, TOKEN_ELEMENTS // x.shape[1])
    for part, factor, into in zip(x.split(count), inverse.split(count), values.split(count), strict=True):
        rotated = _rotate(part, seed)
        if bits < 16:
            _nearest(rotated, factor, bits, into)
        else:
            torch.mul(rotated, factor, out=into)
    safe = (norm > SAFE_NORMS[0]) & (norm < SAFE_NORMS[1])
    if not safe.all():
        unsafe = safe.logical_not().flatten()
        values[unsafe], norm[unsafe] = _encode_exactly(x[unsafe], bits, seed, dtype)
    return values, norm


def _encode_exactly(x: Tensor, bits: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `_encode` gives, as the definition computes it: for any norm, without a code that differs."""
    dim = x.shape[1]
    unit, norm = normalize(x, EPSILON if bits < 16 else torch.finfo(torch.float32).tiny)
    rotated = rotation(dim, seed).apply(unit)
    if bits == 16:
        return rotated.to(dtype), norm
    codebook = _token_codebook(dim, bits, dtype)
    return look_up(nearest(rotated, codebook.boundaries.float()), codebook.values), norm


def _rotate(x: Tensor, seed: int) -> Tensor:
    """R x in fp32 for each row of `x` (tokens, dim), bf16 or fp16."""
    r = rotation(x.shape[1], seed)
    moved = x.detach().view(torch.int16).numpy().take(r.permutation.numpy(), 1, mode="clip")
    return block_hadamard(torch.from_numpy(moved).view(x.dtype) * r.signs, r.block_size)


class Bins(NamedTuple):
    """Values of the centroids nearest to (k - K/2) / rate, k = 0..K-1; K is a power of two."""

    values: Tensor
    rate: float


@shared
def _bins(dim: int, bits: int, dtype: torch.dtype) -> Bins:
    values, boundaries, _ = _token_codebook(dim, bits, dtype)
    half = max(1 << 15, 512 << bits)
    rate = (half - 2) / max(float(boundaries.max()), dim**-0.5)
    codes = torch.bucketize(torch.arange(-half, half, dtype=torch.float64) / rate, boundaries)
    return Bins(values[codes], rate)


def _nearest(rotated: Tensor, inverse: Tensor, bits: int, into: Tensor) -> None:
    """Write the values nearest to `rotated` (tokens, dim), overwritten, times `inverse` (tokens, 1) to `into`."""
    table = _bins(into.shape[1], bits, into.dtype)
    number = len(table.values)
    middle = rotated.new_tensor(MANTISSA + number // 2)
    index = torch.addcmul(middle, rotated, inverse * table.rate, out=rotated).clamp_(MANTISSA, MANTISSA + number - 1)
    index = index.view(torch.int32).bitwise_and_(number - 1)
    torch.index_select(table.values, 0, index.view(-1), out=into.view(-1))
