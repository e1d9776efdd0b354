"""`int4_linear` in plain torch: weights in INT4, activations as they are."""

import torch
from torch import Tensor

from orbitdit.packing import GROUP, unpack


def dequantize_int4(codes: Tensor, scales: Tensor, dim: int) -> Tensor:
    """The weight (rows, dim) in fp32 that codes (rows, bytes) and scales (rows, groups of 64) stand for."""
    scale = scales.float().repeat_interleave(GROUP, 1)[:, :dim]
    return (unpack(codes, 4, dim).float() - 8) * scale


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., dim) times INT4 weights (rows, bytes) with scales (rows, groups of 64), in the dtype of `x`."""
    with torch.autocast(x.device.type, enabled=False):
        weight = dequantize_int4(codes, scales, x.shape[-1]).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
