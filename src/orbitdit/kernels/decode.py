"""`decode` on CUDA: packed codes to grid bytes. See decode.cu."""

from functools import cache

import torch
from torch import Tensor

from orbitdit.codebook import on_grid
from orbitdit.kernels.nvrtc import kernel, upload
from orbitdit.kernels.reference import DTYPES
from orbitdit.kernels.rotate_encode import grid_bytes

CHUNK = 16
THREADS, UNROLL = 256, 4


def supported(dim: int) -> bool:
    """Whether the kernel takes rows of this width."""
    return dim % CHUNK == 0


def decode(codes: Tensor, scales: Tensor, bits: int, dim: int, grid: str) -> tuple[Tensor, Tensor]:
    """Grid values (rows, dim) and scales (rows,) fp32 of contiguous codes (rows, bytes) and bf16 scales (rows,)."""
    rows = len(codes)
    values = torch.empty(rows, dim, dtype=DTYPES[grid], device=codes.device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=codes.device)
    chunks = rows * dim // CHUNK
    if chunks:
        built, table, scale = _kernel(bits, dim, grid, codes.device.index)
        blocks = -(-chunks // (THREADS * UNROLL))
        pointers = codes.data_ptr(), table, values.data_ptr(), scales.data_ptr(), row_scales.data_ptr()
        built.launch(blocks, THREADS, 0, *pointers, chunks, rows, scale)
    return values, row_scales


@cache
def _kernel(bits: int, dim: int, grid: str, device: int):
    codebook = on_grid(dim, bits, grid, False)
    defines = (("BITS", bits), ("THREADS", THREADS), ("UNROLL", UNROLL))
    built = kernel("decode.cu", "decode", defines, "PPPPPiif", device)
    return built, upload(grid_bytes(codebook.values, grid), device), codebook.scale
