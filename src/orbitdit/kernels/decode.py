"""`decode` on CUDA: packed codes to grid bytes. See decode.cu."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from orbitdit.codebook import GRID_DTYPES, grid_bytes, on_grid
from orbitdit.errors import TensorError
from orbitdit.kernels.nvrtc import kernel, upload

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
    """`decode` of up to four weights, row after row, and their biases (of 16 bits each) likewise, or None without.

    Raises TensorError for widths that are no multiple of 16 and for codes that are not contiguous.
    """
    if dim % CHUNK or not all(packed.is_contiguous() for packed in codes):
        raise TensorError(f"decode takes contiguous rows of a multiple of {CHUNK} codes; got {dim}")
    scales = [s if s.dtype == torch.bfloat16 else s.to(torch.bfloat16) for s in scales]
    device, first_bias = codes[0].device, biases[0]
    ends, rows = [], 0
    for packed in codes:
        rows += packed.shape[0]
        ends.append(rows)
    values = torch.empty(rows, dim, dtype=GRID_DTYPES[grid], device=device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=device)
    bias = first_bias
    if first_bias is not None and len(codes) > 1:
        bias = torch.empty(rows, dtype=first_bias.dtype, device=device)
    if rows:
        collect = bias is not first_bias
        built, table, scale = _kernel(bits, dim, grid, len(codes), collect, device.index)
        pointers: list[int] = []
        for tensors in (codes, scales, biases if collect else ()):
            pointers += [t.data_ptr() for t in tensors]  # type: ignore[union-attr]
            pointers += [0] * (MEMBERS - len(tensors))
        bounds: list[int] = []
        for member in range(MEMBERS - 1):
            end = ends[member] if member < len(ends) else rows
            bounds += [end * dim // CHUNK, end]
        chunks = rows * dim // CHUNK
        outputs = table, values.data_ptr(), row_scales.data_ptr(), 0 if bias is None else bias.data_ptr()
        blocks = -(-chunks // (THREADS * UNROLL))
        built.launch(blocks, THREADS, 0, *pointers, *outputs, *bounds, chunks, rows, scale)
    return values, row_scales, bias


@cache
def _kernel(bits: int, dim: int, grid: str, members: int, bias: bool, device: int):
    codebook = on_grid(dim, bits, grid, False)
    constants = {"BITS": bits, "MEMBERS": members, "BIAS": int(bias), "THREADS": THREADS, "UNROLL": UNROLL}
    built = kernel("decode.cu", "decode", tuple(constants.items()), "P" * 16 + "i" * 8 + "f", device)
    return built, upload(grid_bytes(codebook.values, grid), device), codebook.scale
