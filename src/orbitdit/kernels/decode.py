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
    rows, device, bias = sum(packed.shape[0] for packed in codes), codes[0].device, biases[0]
    values = torch.empty(rows, dim, dtype=GRID_DTYPES[grid], device=device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=device)
    collected = None if bias is None or len(codes) == 1 else torch.empty(rows, dtype=bias.dtype, device=device)
    decode_into(codes, scales, biases, bits, grid, values, row_scales, collected)
    return values, row_scales, bias if collected is None else collected


def decode_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: int,
    grid: str,
    values: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
) -> None:
    """`decode_all` into contiguous `values` (rows, dim), `row_scales` of as many numbers, and `bias`, if given."""
    rows, dim = values.shape
    pointers: list[int] = []
    bounds: list[int] = []
    end = 0
    for packed in codes:
        if dim % CHUNK or not packed.is_contiguous():
            raise TensorError(f"decode takes contiguous rows of a multiple of {CHUNK} codes; got {dim}")
        pointers.append(packed.data_ptr())
        end += packed.shape[0]
        bounds += end * dim // CHUNK, end
    if not rows:
        return
    members, chunks = len(codes), rows * dim // CHUNK
    absent = (0,) * (MEMBERS - members)
    pointers += absent
    scales = [s if s.dtype == torch.bfloat16 else s.to(torch.bfloat16) for s in scales]
    pointers += [s.data_ptr() for s in scales]
    pointers += absent
    pointers += (0,) * MEMBERS if bias is None else [*(b.data_ptr() for b in biases), *absent]  # type: ignore[union-attr]
    bounds += (chunks, rows) * len(absent)
    built, table, scale = _kernel(bits, dim, grid, members, bias is not None, values.device.index)
    outputs = table, values.data_ptr(), row_scales.data_ptr(), 0 if bias is None else bias.data_ptr()
    blocks = -(-chunks // (THREADS * UNROLL))
    built.launch(blocks, THREADS, 0, *pointers, *outputs, *bounds[: 2 * MEMBERS - 2], chunks, rows, scale)


@cache
def _kernel(bits: int, dim: int, grid: str, members: int, bias: bool, device: int):
    codebook = on_grid(dim, bits, grid, False)
    constants = {"BITS": bits, "MEMBERS": members, "BIAS": int(bias), "THREADS": THREADS, "UNROLL": UNROLL}
    built = kernel("decode.cu", "decode", tuple(constants.items()), "P" * 16 + "i" * 8 + "f", device)
    return built, upload(grid_bytes(codebook.values, grid), device), codebook.scale
