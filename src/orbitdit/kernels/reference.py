"""Each operation in plain torch: what the kernels are held to, and what runs where there are none."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orbitdit.codebook import GRID_DTYPES, bins, codebook_on, look_up, nearest, nearest_by_bins, on_grid
from orbitdit.packing import unpack
from orbitdit.quantize import QuantizedWeight, dequantize_int4, indices, weight_points, weight_points_on
from orbitdit.rotation import rotation
from orbitdit.tables import shared

EPSILON = 1e-10


def normalize(x: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """x / (||x|| + epsilon) and ||x|| (..., 1), in fp32; the norm neither overflows nor underflows where it exists."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    norm = largest * (x / largest.where(largest > 0, 1)).norm(dim=-1, keepdim=True)
    return x / (norm + epsilon), norm


NORM_EPSILONS = {"layer_norm": 1e-6, "rms_norm": 1e-5}
"""Of the norms in front of AdaLN's modulation: LayerNorm's in every family, and Z-Image's RMSNorm."""


def apply_before(x: Tensor, before: str, extras: Sequence[Tensor]) -> Tensor:
    """Tokens (tokens, dim) as the encoding takes them, in the dtype of `x` (tokens, channels): what comes before it.

    "": `x` itself. "gelu": the channels of `extras[0]` (tokens, first), if given, and gelu(x) in its tanh
    approximation. "silu": silu(x) * gate for `extras` gate (tokens, dim). "layer_norm": LayerNorm(x) * (1 + scale) +
    shift for `extras` scale and shift (batch, dim), each row for as many consecutive tokens. "rms_norm": RMSNorm(x) *
    weight * (1 + scale) for `extras` weight (1, dim) and scale (batch, dim), or without the last factor if that is not
    given. In fp32, rounded once.
    """
    if not before:
        return x
    if before == "gelu":
        y = torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)
        return torch.cat([*extras, y], dim=1)
    if before == "silu":
        return (torch.nn.functional.silu(x.float()) * extras[0].float()).to(x.dtype)
    rows = [t.float().repeat_interleave(x.shape[0] // t.shape[0], 0) for t in extras]
    if before == "rms_norm":
        weight, *scales = rows
        y = torch.nn.functional.rms_norm(x.float(), x.shape[1:], eps=NORM_EPSILONS[before]) * weight
        return (y * (1 + scales[0]) if scales else y).to(x.dtype)
    scale, shift = rows
    y = torch.nn.functional.layer_norm(x.float(), x.shape[1:], eps=NORM_EPSILONS[before])
    return (y * (1 + scale) + shift).to(x.dtype)


def encoded_width(x: Tensor, before: str, extras: Sequence[Tensor]) -> int:
    """Channels of what `apply_before` makes."""
    return x.shape[-1] + (extras[0].shape[-1] if before == "gelu" and extras else 0)


def rotate_encode(x: Tensor, bits: int, seed: int, grid: str) -> tuple[Tensor, Tensor]:
    """Tokens `x` (tokens, dim) to values (tokens, dim) on the grid and scales (tokens,) fp32.

    Value * scale is the nearest point of the grid's codebook to R x, in fp32.
    """
    unit, norm = normalize(x)
    dim = x.shape[-1]
    values, boundaries, scale = _token_codebook(dim, bits, grid, x.device)
    codes = nearest(rotation(dim, seed).apply(unit), boundaries)
    return look_up(codes, values.view(torch.uint8)).view(values.dtype), norm.flatten() * scale


def decode(codes: Tensor, scales: Tensor, bits: int, dim: int, grid: str, states: int = 0) -> tuple[Tensor, Tensor]:
    """Packed codes (rows, bytes) and scales (rows,) bf16 to values (rows, dim) on the grid and scales (rows,) fp32.

    The codes are those of a trellis of 2^`states` states, or scalar ones if that is 0.
    """
    values, scale = grid_points(dim, bits, states, grid, codes.device)
    rows = look_up(indices(unpack(codes, bits, dim), bits, states), values.view(torch.uint8))
    return rows.view(values.dtype), scales.float() * scale


@shared
def grid_points(dim: int, bits: int, states: int, grid: str, device: torch.device) -> tuple[Tensor, float]:
    """`weight_points_on` in the grid's dtype, on a device."""
    values, scale = weight_points_on(dim, bits, states, grid)
    return values.float().to(GRID_DTYPES[grid]).to(device), scale


def matmul(
    values: Tensor, token_scales: Tensor, weight: Tensor, row_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(tokens, dim) and (rows, dim) on one grid, with their scales, to (tokens, rows) in `dtype`; sums in fp32."""
    y = (values.float() @ weight.float().T) * token_scales[:, None] * row_scales
    return (y if bias is None else y + bias.float()).to(dtype)


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
    """The definition of a layer on tokens `x` (tokens, dim), packed codes (rows, bytes) and scales (rows,).

    The codes are those of a trellis of 2^`states` states, or scalar ones if that is 0.
    Norms, rotation and codes in fp32; the product multiplies the centroids in the dtype of `x` if that is bf16 or fp16,
    else in fp32. With 16 activation bits the rotated tokens themselves are multiplied.
    """
    dim = x.shape[-1]
    dtype = x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.float32
    points, step = weight_points(dim, weight_bits, states, x.device, dtype)
    rows = look_up(indices(unpack(codes, weight_bits, dim), weight_bits, states), points)
    if activation_bits == 16:
        unit, norm = normalize(x, torch.finfo(torch.float32).tiny)
        token = rotation(dim, seed).apply(unit).to(dtype)
    else:
        token_codes, norm = encode_tokens(x, activation_bits, seed)
        token = look_up(token_codes, codebook_on(dim, activation_bits, x.device, dtype).centroids)
    y = (token @ rows.T) * norm * (scales.float() * step)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def encode_tokens(x: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (..., d) uint8 and norms (..., 1) fp32 of tokens `x` (..., d) in any floating dtype.

    The codes are the nearest centroids of R x / (||x|| + 1e-10), all in fp32.
    """
    unit, norm = normalize(x)
    dim = x.shape[-1]
    rotated = rotation(dim, seed).apply(unit)
    if x.is_cpu:
        return nearest_by_bins(rotated, bins(dim, bits)), norm
    return nearest(rotated, codebook_on(dim, bits, x.device, torch.float32).boundaries), norm


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, dim) times INT4 weights (rows, bytes) with scales (rows, groups of 64), in the dtype of `x`."""
    dim = x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        weight = dequantize_int4(QuantizedWeight(codes, scales), dim).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@shared
def _token_codebook(dim: int, bits: int, grid: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    found = on_grid(dim, bits, grid, True)
    return found.values.float().to(GRID_DTYPES[grid]).to(device), found.boundaries.float().to(device), found.scale
