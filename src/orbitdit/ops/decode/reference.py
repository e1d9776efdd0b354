"""`decode` in plain torch: packed codes to values on a number grid; and `dequantize`: to the weight they stand for."""

import torch
from torch import Tensor

from orbitdit.codebooks import indices, points, points_on, token_gain
from orbitdit.codebooks.lloyd_max import look_up
from orbitdit.ops.int4_linear.reference import dequantize_int4
from orbitdit.packing import unpack
from orbitdit.rotation import rotation
from orbitdit.spec import INT4, LayerSpec


def decode(codes: Tensor, scales: Tensor, spec: LayerSpec, grid: str) -> tuple[Tensor, Tensor]:
    """Packed codes (rows, bytes) and scales (rows,) bf16 to values (rows, dim) on the grid and scales (rows,) fp32."""
    values, scale = points_on(spec.weight, spec.in_features, grid, codes.device)
    unpacked = unpack(codes, spec.weight.bits, spec.in_features)
    rows = look_up(indices(unpacked, spec.weight), values.view(torch.uint8))
    return rows.view(values.dtype), scales.float() * scale


def dequantize(codes: Tensor, scales: Tensor, spec: LayerSpec) -> Tensor:
    """Packed codes (rows, bytes) and scales in bf16 to the weight (rows, dim) in fp32, rotated back."""
    dim, code = spec.in_features, spec.weight
    if code.codebook == INT4:
        return dequantize_int4(codes, scales, dim)
    table, step = points(code, dim, codes.device, torch.float32)
    rows = look_up(indices(unpack(codes, code.bits, dim), code), table)
    rotated = rows * (scales.float() * (step / token_gain(spec)))[:, None]
    return rotation(dim, spec.seed or 0).inverse(rotated)
