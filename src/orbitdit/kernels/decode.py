"""`decode` on CUDA: packed codes to grid bytes. See decode.cu."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from orbitdit.codebook import on_grid
from orbitdit.kernels.nvrtc import kernel, upload
from orbitdit.kernels.reference import DTYPES
from orbitdit.kernels.rotate_encode import grid_bytes

CHUNK = 16
"""Codes that a thread turns at a time: rows must be multiples of it."""
THREADS, UNROLL = 256, 2
MEMBERS = 4
"""Weights that are decoded together."""


def decode(codes: Tensor, scales: Tensor, bits: int, dim: int, grid: str) -> tuple[Tensor, Tensor]:
    """Grid values (rows, dim) and scales (rows,) fp32 of contiguous codes (rows, bytes) and bf16 scales (rows,)."""
    return decode_all([codes], [scales], [None], bits, dim, grid)[:2]


def decode_all(
    codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None], bits: int, dim: int, grid: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode` of up to four weights, row after row, and their biases (16 bits) likewise, or None if they have none."""
    members, device = len(codes), codes[0].device
    ends = list(accumulate(len(c) for c in codes))
    rows, chunks = ends[-1], ends[-1] * dim // CHUNK
    values = torch.empty(rows, dim, dtype=DTYPES[grid], device=device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=device)
    bias = biases[0]
    collect = members > 1 and bias is not None
    if collect:
        bias = torch.empty(rows, dtype=bias.dtype, device=device)  # type: ignore[union-attr]
    if chunks:
        built, table, scale = _kernel(bits, dim, grid, members, collect, device.index)
        pointers = [
            pointer
            for tensors in (codes, scales, biases if collect else ())
            for pointer in (*(t.data_ptr() for t in tensors), *(0,) * (MEMBERS - len(tensors)))  # type: ignore[union-attr]
        ]
        outputs = table, values.data_ptr(), row_scales.data_ptr(), bias.data_ptr() if collect else 0  # type: ignore[union-attr]
        bounds = [bound for end in (*ends, *(rows,) * MEMBERS)[: MEMBERS - 1] for bound in (end * dim // CHUNK, end)]
        blocks = -(-chunks // (THREADS * UNROLL))
        built.launch(blocks, THREADS, 0, *pointers, *outputs, *bounds, chunks, rows, scale)
    return values, row_scales, bias


@cache
def _kernel(bits: int, dim: int, grid: str, members: int, bias: bool, device: int):
    codebook = on_grid(dim, bits, grid, False)
    constants = {"BITS": bits, "MEMBERS": members, "BIAS": int(bias), "THREADS": THREADS, "UNROLL": UNROLL}
    built = kernel("decode.cu", "decode", tuple(constants.items()), "P" * 16 + "i" * 8 + "f", device)
    return built, upload(grid_bytes(codebook.values, grid), device), codebook.scale
