"""`int4_linear` on CUDA: a kernel for the few rows that modulation has, plain torch for more. See int4_linear.cu."""

from functools import cache

import torch
from torch import Tensor

from orbitdit.kernels import reference
from orbitdit.kernels.nvrtc import Kernel, kernel, processors

ROWS = 8
"""Rows of x that the kernel takes: the columns of one tensor-core product."""
TILE, CHUNK = 16, 256
"""Rows of the weight that a warp multiplies together, and inputs that it holds."""
WARPS = 12


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See reference.py; rows of x beyond 8, and fp32, take that."""
    dim, n = x.shape[-1], len(codes)
    tokens = x.reshape(-1, dim).contiguous()
    rows = len(tokens)
    if not 0 < rows <= ROWS or x.dtype not in (torch.bfloat16, torch.float16) or not n:
        return reference.int4_linear(x, codes, scales, bias)
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype)
    device = x.device.index
    built, warps, split = _kernel(dim, x.dtype == torch.float16, device)
    shared = shared_bytes(rows, dim, warps, split)
    tiles = -(-n // TILE)
    resident = processors(device) * max(1, built.blocks_per_processor(32 * warps, shared))
    blocks = min(resident, -(-tiles * split // warps))
    bias_at = 0 if bias is None else bias.data_ptr()
    pointers = tokens.data_ptr(), codes.data_ptr(), scales.data_ptr(), bias_at, y.data_ptr()
    built.launch(blocks, 32 * warps, shared, *pointers, rows, n)
    return y.view(*x.shape[:-1], n)


@cache
def _kernel(dim: int, half: bool, device: int) -> tuple[Kernel, int, int]:
    warps, split = warps_and_split(dim)
    defines = (("DIM", dim), ("HALF", int(half)), ("WARPS", warps), ("SPLIT", split))
    return kernel("int4_linear.cu", "int4_linear", defines, "PPPPPii", device), warps, split


def warps_and_split(dim: int) -> tuple[int, int]:
    """Warps of a block, and how many of them share a tile: as many as a row has chunks, if a block has room."""
    chunks = -(-dim // CHUNK)
    split = max(s for s in range(1, min(chunks, WARPS) + 1) if chunks % s == 0 or s == min(chunks, WARPS))
    return max(split, 4 // split * split), split


def shared_bytes(rows: int, dim: int, warps: int, split: int) -> int:
    """Dynamic shared memory: partial sums, two for each warp, and x with 16 bytes between rows."""
    return warps * 1024 + rows * (512 * split * -(-dim // (CHUNK * split)) + 16)
