"""`int4_linear` on CUDA: a kernel for the few rows that modulation has, plain torch for more. See int4_linear.cu."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.ops.int4_linear import reference
from orbitdit.ops.nvrtc import Kernel, kernel, num_sms, readable, shared_limit

ROWS = 8
"""Rows of x that the kernel takes: the columns of one tensor-core product."""
TILE, CHUNK, GROUP = 16, 256, 64
"""Rows of the weight that a warp multiplies together, inputs that it takes at a time, and inputs with one scale."""
WARPS, CHUNKS = 12, 48
"""The most warps that share a tile (two such blocks fit in a processor's registers), and the most chunks in a row."""


class Shape(NamedTuple):
    """Warps of a block that multiply a tile together, stages, and whether the hardware copies whole rows."""

    warps: int
    stages: int
    bulk: bool

    @property
    def threads(self) -> int:
        """Threads of a block: one more warp copies."""
        return 32 * self.warps + 32

    def shared_bytes(self, dim: int) -> int:
        """Dynamic shared memory of a block: barriers, what sums start from, sums of each tile in hand, the stages."""
        rounds = -(-dim // (CHUNK * self.warps))
        stage = TILE * (self.warps * CHUNK // 2 + 32 + -(-dim // GROUP) * 2)
        starts, sums = self.warps * rounds * 256, (self.stages + rounds) // rounds * self.warps * 640
        return self.stages * 16 + starts + sums + self.stages * stage


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See reference.py; more than 8 rows of x, fp32, and rows of more than 12288 inputs take that."""
    dim, n = x.shape[-1], codes.shape[0]
    rows = x.numel() // dim
    plan = None
    if 0 < rows <= ROWS and x.dtype in (torch.bfloat16, torch.float16) and n:
        plan = _plan(dim, x.dtype == torch.float16, n % TILE == 0, x.device.index)
    if plan is None:
        return reference.int4_linear(x, codes, scales, bias)
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    scales = scales if scales.dtype == torch.bfloat16 else scales.to(torch.bfloat16)
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    read = [readable(t) for t in (x, codes, scales)]
    bias_at = 0 if bias is None else bias.data_ptr()
    pointers = *(t.data_ptr() for t in read), bias_at, y.data_ptr()
    blocks = min(plan.resident, -(-n // TILE))
    plan.kernel.launch(blocks, plan.shape.threads, plan.shared, *pointers, rows, n)
    return y


class Plan(NamedTuple):
    """A kernel, the shape of its launch, and how many blocks run at a time."""

    kernel: Kernel
    shape: Shape
    shared: int
    resident: int


@cache
def _plan(dim: int, half: bool, whole_tiles: bool, device: int) -> Plan | None:
    """What to launch for `dim` inputs, fp16 if `half` or else bf16; None if a block lacks the memory or the
    registers."""
    bulk = whole_tiles and dim % 32 == 0 and torch.cuda.get_device_capability(device) >= (9, 0)
    shape = shape_for(dim, bulk, shared_limit(device))
    if shape is None:
        return None
    defines = compile_options(dim, half, shape)
    built = kernel("int4_linear/int4_linear.cu", "int4_linear", tuple(defines.items()), "PPPPPii", device)
    shared = shape.shared_bytes(dim)
    return Plan(built, shape, shared, num_sms(device) * max(1, built.blocks_per_processor(shape.threads, shared)))


def compile_options(dim: int, half: bool, shape: Shape) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {
        "DIM": dim,
        "HALF": int(half),
        "WARPS": shape.warps,
        "STAGES": shape.stages,
        "BULK": int(shape.bulk),
    }


def shape_for(dim: int, bulk: bool, shared: int) -> Shape | None:
    """The launch for `dim` inputs where a block has `shared` bytes of shared memory; None for too many inputs.

    Warps take equal parts of a row, in as few rounds as can be. Measured on an H200 in a CUDA graph at 256, 512, 3072
    and 6144 inputs: two stages lead, and rows of 512 and less are better copied by threads.
    """
    chunks = -(-dim // CHUNK)
    if chunks > CHUNKS:
        return None
    rounds = -(-chunks // WARPS)
    shape = Shape(-(-chunks // rounds), 2, bulk and dim >= 1024)
    return shape if shape.shared_bytes(dim) <= shared else None
