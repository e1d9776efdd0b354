"""A weight matrix to codes and scales, and back.

`quantize_weight` is the paper's: rotate each row w_i, store its norm n_i = ||R w_i|| in bf16 and the nearest
centroids of R w_i / n_i at b bits. `quantize_int4` is for the modulation layers: symmetric round-to-nearest
in groups of 64 inputs with scale = absmax / 7. Both work in fp64, row block by row block, so that the same
weight gives the same codes on every device and in every version: rounding differences practically never decide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.codebook import codebook_on, look_up, nearest
from orbitdit.errors import TensorError
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


def quantize_weight(weight: Tensor, bits: int, seed: int = 0, name: str = "weight") -> QuantizedWeight:
    """Codes and row norms of `weight` (rows, dim) at 2, 3, 4, 6 or 8 bits, on its device; paper, section 3.

    A row of zeros gets scale zero. Raises TensorError for weights that `check_weight` refuses, ConfigError for
    other bits; `name` is used in messages.
    """
    check_weight(weight, name)
    dim = weight.shape[1]
    packed_width(dim, bits)
    boundaries = codebook_on(dim, bits, weight.device, torch.float64).boundaries

    def encode(block: Tensor) -> QuantizedWeight:
        rotated = rotation(dim, seed).apply(block.double())
        norm = rotated.norm(dim=1)
        unit = rotated / norm.where(norm > 0, 1)[:, None]
        return QuantizedWeight(pack(nearest(unit, boundaries), bits), norm.to(torch.bfloat16))

    return _by_rows(encode, weight)


def dequantize_weight(quantized: QuantizedWeight, bits: int, dim: int, seed: int = 0) -> Tensor:
    """The weight (rows, dim) in fp32 that the codes stand for, rotated back."""
    centroids = codebook_on(dim, bits, quantized.codes.device, torch.float32).centroids
    rotated = look_up(unpack(quantized.codes, bits, dim), centroids) * quantized.scales.float()[:, None]
    return rotation(dim, seed).inverse(rotated)


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
