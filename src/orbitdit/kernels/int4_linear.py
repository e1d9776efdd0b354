"""`int4_linear` on CUDA: a kernel for the few rows that modulation has, plain torch for more. See int4_linear.cu."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.kernels import reference
from orbitdit.kernels.nvrtc import Kernel, kernel, processors, readable, shared_limit

ROWS = 8
"""Rows of x that the kernel takes: the columns of one tensor-core product."""
TILE, CHUNK, GROUP = 16, 256, 64
"""Rows of the weight that a warp multiplies together, inputs that it takes at a time, and inputs with one scale."""
WARPS, CHUNKS = 16, 32
"""The most warps of a block, and the most chunks in a row: what registers hold of x."""


class Shape(NamedTuple):
    """Warps of a block, how many share a tile, stages of shared memory, and whether the hardware copies whole rows."""

    warps: int
    split: int
    stages: int
    bulk: bool
    early: int = 1

    def shared_bytes(self, dim: int) -> int:
        """Dynamic shared memory of a block: a barrier for each stage, two partial sums for each warp, the stages."""
        rows = self.warps // self.split * TILE
        pitch = -(-dim // (CHUNK * self.split)) * self.split * CHUNK // 2 + 32
        return -(-self.stages // 2) * 16 + self.warps * 1280 + self.stages * rows * (pitch + -(-dim // GROUP) * 2)


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See reference.py; more than 8 rows of x, fp32, and rows too wide for shared memory take that."""
    dim, n = x.shape[-1], codes.shape[0]
    rows = x.numel() // dim
    plan = None
    if 0 < rows <= ROWS and x.dtype in (torch.bfloat16, torch.float16) and n:
        plan = _plan(dim, x.dtype == torch.float16, n % TILE == 0, x.device.index)
    if plan is None:
        return reference.int4_linear(x, codes, scales, bias)
    return launch(plan, x, codes, scales, bias)


class Plan(NamedTuple):
    """A kernel, the shape of its launch, and how many blocks run at a time."""

    kernel: Kernel
    shape: Shape
    shared: int
    resident: int


def launch(plan: Plan, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`int4_linear` of 1 to 8 rows of x."""
    dim, n = x.shape[-1], codes.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    scales = scales if scales.dtype == torch.bfloat16 else scales.to(torch.bfloat16)
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    read = [readable(t) for t in (x, codes, scales)]
    warps, split = plan.shape.warps, plan.shape.split
    blocks = min(plan.resident, -(-(-(-n // TILE) * split) // warps))
    bias_at = 0 if bias is None else bias.data_ptr()
    pointers = *(t.data_ptr() for t in read), bias_at, y.data_ptr()
    plan.kernel.launch(blocks, 32 * warps, plan.shared, *pointers, x.numel() // dim, n)
    return y


def build(shape: Shape, dim: int, half: bool, device: int) -> Plan:
    """The kernel for inputs of `dim` numbers, fp16 if `half` or else bf16."""
    defines = (("DIM", dim), ("HALF", int(half)), *((name.upper(), int(v)) for name, v in shape._asdict().items()))
    built = kernel("int4_linear.cu", "int4_linear", defines, "PPPPPii", device)
    shared = shape.shared_bytes(dim)
    return Plan(built, shape, shared, processors(device) * max(1, built.blocks_per_processor(32 * shape.warps, shared)))


@cache
def _plan(dim: int, half: bool, whole_tiles: bool, device: int) -> Plan | None:
    """What to launch for `dim` inputs; None if a block lacks the memory or the registers."""
    bulk = whole_tiles and dim % 32 == 0 and torch.cuda.get_device_capability(device) >= (9, 0)
    shape = shape_for(dim, bulk, shared_limit(device))
    return None if shape is None else build(shape, dim, half, device)


def shape_for(dim: int, bulk: bool, shared: int) -> Shape | None:
    """As many warps to a tile as a row has chunks, and as many stages as `shared` bytes hold, or None."""
    chunks = -(-dim // CHUNK)
    if chunks > CHUNKS:
        return None
    split = -(-chunks // -(-chunks // WARPS))
    warps = max(split, 4 // split * split)
    bulk = bulk and dim >= 1024
    for stages in range(8, 1, -1):
        shape = Shape(warps, split, stages if split == warps else 2, bulk)
        if shape.shared_bytes(dim) <= shared:
            return shape
    return None
