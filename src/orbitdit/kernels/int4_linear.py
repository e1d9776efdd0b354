"""`int4_linear` on CUDA: a kernel for the few rows that modulation has, plain torch for more. See int4_linear.cu."""

from functools import cache

import torch
from torch import Tensor

from orbitdit.kernels import reference
from orbitdit.kernels.nvrtc import Kernel, kernel, processors, readable, shared_limit

ROWS = 8
"""Rows of x that the kernel takes: the columns of one tensor-core product."""
TILE, CHUNK = 16, 256
"""Rows of the weight that a warp multiplies together, and inputs that it holds."""
WARPS = 12


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See reference.py; more than 8 rows of x, fp32, and rows too wide for shared memory take that."""
    dim, n = x.shape[-1], codes.shape[0]
    rows = x.numel() // dim
    plan = None
    if 0 < rows <= ROWS and x.dtype in (torch.bfloat16, torch.float16) and n:
        plan = _plan(rows, dim, x.dtype == torch.float16, x.device.index)
    if plan is None:
        return reference.int4_linear(x, codes, scales, bias)
    built, warps, split, shared, resident = plan
    tokens = readable(x)
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    scales = scales if scales.dtype == torch.bfloat16 else scales.to(torch.bfloat16)
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    blocks = min(resident, -(-(-(-n // TILE) * split) // warps))
    bias_at = 0 if bias is None else bias.data_ptr()
    pointers = tokens.data_ptr(), codes.data_ptr(), scales.data_ptr(), bias_at, y.data_ptr()
    built.launch(blocks, 32 * warps, shared, *pointers, rows, n)
    return y


@cache
def _plan(rows: int, dim: int, half: bool, device: int) -> tuple[Kernel, int, int, int, int] | None:
    """The kernel, warps a block, warps a tile, shared bytes, blocks at a time; None if a block lacks the memory."""
    warps, split = warps_and_split(dim)
    shared = shared_bytes(rows, dim, warps, split)
    if shared > shared_limit(device):
        return None
    defines = (("DIM", dim), ("HALF", int(half)), ("WARPS", warps), ("SPLIT", split))
    built = kernel("int4_linear.cu", "int4_linear", defines, "PPPPPii", device)
    return built, warps, split, shared, processors(device) * max(1, built.blocks_per_processor(32 * warps, shared))


def warps_and_split(dim: int) -> tuple[int, int]:
    """Warps of a block, and how many of them share a tile: as many as a row has chunks, if a block has room."""
    chunks = -(-dim // CHUNK)
    split = max(s for s in range(1, min(chunks, WARPS) + 1) if chunks % s == 0 or s == min(chunks, WARPS))
    return max(split, 4 // split * split), split


def shared_bytes(rows: int, dim: int, warps: int, split: int) -> int:
    """Dynamic shared memory: partial sums, two for each warp, and x with 16 bytes between rows."""
    return warps * 1024 + rows * (512 * split * -(-dim // (CHUNK * split)) + 16)
