"""A weight matrix to codes and scales, and back.

Each row w_i is rotated, w'_i = R w_i, and divided by its norm n_i = ||w'_i||. Its codes are then the nearest centroids
(the paper's), or those of a trellis (see `trellis`), and stand for a row w^'_i. What is stored as the row's scale, in
bf16, is n_i ("norm", the paper's) or n_i * ||w'_i||^2 / <w'_i, w^'_i> ("unbiased-rows"). Codes of least squared error
shrink what they stand for, by 12% at 2 bits; the unbiased scale, that of EDEN (Vargaftik et al., arXiv 2108.08842),
undoes it: w_i times what its codes stand for is ||w_i||^2 again.

A layer's tokens are coded too, and shrink likewise, by 3.5% at 3 bits. By how much hardly differs from token to token,
so a constant undoes that: with "unbiased" the rows' scales carry it (`token_gain`), and layers compute as before.

`quantize_int4` is for the modulation layers: symmetric round-to-nearest in groups of 64 inputs with scale = absmax / 7.

All work in fp64 (the trellis search in fp32), row block by row block, so that the same weight gives the same codes on
every device and in every version: rounding differences practically never decide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit import trellis
from orbitdit.codebook import codebook_on, kept, look_up, nearest, on_grid
from orbitdit.config import SCALES
from orbitdit.errors import ConfigError, TensorError
from orbitdit.packing import GROUP, pack, packed_width, unpack
from orbitdit.rotation import rotation

_BLOCK_ELEMENTS = 1 << 23


class QuantizedWeight(NamedTuple):
    """Packed `codes` (rows, bytes) uint8, and `scales` in bf16: (rows,) or, for INT4, (rows, groups)."""

    codes: Tensor
    scales: Tensor


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise TensorError, naming the tensor, unless `weight` is a finite floating-point matrix."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TensorError(f"{name}: a floating-point matrix is needed; got {weight.dtype} of {tuple(weight.shape)}")
    if weight.is_meta:
        raise TensorError(f"{name} has no data (it is on the meta device): load the weights first")
    if not torch.isfinite(weight).all():
        raise TensorError(f"{name} holds NaN or Inf: repair the checkpoint before quantizing it")


def quantize_weight(
    weight: Tensor,
    bits: int,
    seed: int = 0,
    name: str = "weight",
    *,
    states: int = 0,
    scale: str = "norm",
    activation_bits: int = 16,
) -> QuantizedWeight:
    """Codes and row scales of `weight` (rows, dim), on its device: scalar ones at 2, 3, 4, 6 or 8 bits, or trellis ones
    with 2**`states` states (see `trellis`). The scale "unbiased" takes account of tokens of `activation_bits`.

    A row of zeros gets scale zero. Raises TensorError for weights that `check_weight` refuses, ConfigError for other
    bits, states and scales; `name` is used in messages.
    """
    check_weight(weight, name)
    dim = weight.shape[1]
    gain = token_gain(dim, activation_bits, scale)
    packed_width(dim, bits)
    points, step = weight_points(dim, bits, states, weight.device, torch.float64)
    boundaries = codebook_on(dim, bits, weight.device, torch.float64).boundaries

    def encode(block: Tensor) -> QuantizedWeight:
        rotated = rotation(dim, seed).apply(block.double())
        norm = rotated.norm(dim=1)
        unit = rotated / norm.where(norm > 0, 1)[:, None]
        codes = trellis.encode((unit * dim**0.5).float(), bits, states) if states else nearest(unit, boundaries)
        if scale != "norm":
            projection = (unit * look_up(indices(codes, bits, states), points)).sum(1) * step
            norm = norm * (unit.square().sum(1) / projection).where(projection > 0, 1) * gain
        return QuantizedWeight(pack(codes, bits), norm.to(torch.bfloat16))

    return _by_rows(encode, weight)


def token_gain(dim: int, activation_bits: int, scale: str) -> float:
    """The factor in rows' scales that undoes the shrinking of tokens of width `dim`: 1 but for `scale` "unbiased".

    Raises ConfigError for an unknown scale.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale={scale!r} is not supported; choose one of {', '.join(SCALES)}")
    return 1 / kept(dim, activation_bits) if scale == "unbiased" and activation_bits < 16 else 1.0


def dequantize_weight(
    quantized: QuantizedWeight, bits: int, dim: int, seed: int = 0, states: int = 0, gain: float = 1.0
) -> Tensor:
    """The weight (rows, dim) in fp32 that the codes stand for, rotated back; `gain` is `token_gain`'s."""
    points, step = weight_points(dim, bits, states, quantized.codes.device, torch.float32)
    rows = look_up(indices(unpack(quantized.codes, bits, dim), bits, states), points)
    rotated = rows * (quantized.scales.float() * (step / gain))[:, None]
    return rotation(dim, seed).inverse(rotated)


def weight_points(dim: int, bits: int, states: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """`points` in `dtype`, and `step`: a row of scale n stands for n * step * points[indices]."""
    if states:
        return trellis.table_on(bits, states, device, dtype), dim**-0.5
    return codebook_on(dim, bits, device, dtype).centroids, 1.0


def weight_points_on(dim: int, bits: int, states: int, grid: str) -> tuple[Tensor, float]:
    """`weight_points` on the number grid "e4m3" or "int8", fp64 on the CPU."""
    if states:
        values, unit = trellis.on_grid(bits, states)
        return values, unit * dim**-0.5
    scalar = on_grid(dim, bits, grid, False)
    return scalar.values, scalar.scale


def indices(codes: Tensor, bits: int, states: int) -> Tensor:
    """Which of `weight_points` each of the unpacked `codes` (rows, dim) stands for: itself, or a window on the row."""
    return trellis.windows(codes, bits, states) if states else codes


def quantize_int4(weight: Tensor, name: str = "weight") -> QuantizedWeight:
    """INT4 codes (stored plus 8) and bf16 scales (rows, groups of 64) of `weight`; raises as `quantize_weight`."""
    check_weight(weight, name)
    dim = weight.shape[1]

    def encode(block: Tensor) -> QuantizedWeight:
        groups = torch.nn.functional.pad(block.double(), (0, -dim % GROUP)).unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
        step = scale.double().where(scale > 0, 1)[..., None]
        codes = (groups / step).round().clamp(-7, 7) + 8
        return QuantizedWeight(pack(codes.to(torch.uint8).flatten(1)[:, :dim], 4), scale)

    return _by_rows(encode, weight)


def dequantize_int4(quantized: QuantizedWeight, dim: int) -> Tensor:
    """The weight (rows, dim) in fp32 that the INT4 codes stand for."""
    scale = quantized.scales.float().repeat_interleave(GROUP, 1)[:, :dim]
    return (unpack(quantized.codes, 4, dim).float() - 8) * scale


def _by_rows(encode, weight: Tensor) -> QuantizedWeight:
    """`encode` over blocks of rows, to bound the memory that fp64 takes."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    parts = [encode(block) for block in weight.detach().split(rows)]
    return QuantizedWeight(*(torch.cat(column) for column in zip(*parts, strict=True)))
