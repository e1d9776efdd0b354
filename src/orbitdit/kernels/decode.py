"""`decode` on CUDA: packed codes to grid bytes. See decode.cu."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from orbitdit import trellis
from orbitdit.codebook import GRID_DTYPES, grid_bytes, on_grid
from orbitdit.errors import TensorError
from orbitdit.kernels.nvrtc import kernel, processors, upload

CHUNK = 16
"""Codes that a thread turns at a time: rows must be multiples of it."""
THREADS, TRELLIS_THREADS, UNROLL = 256, 512, 2
"""Threads a block, which shares a table, and chunks that each asks for at a time."""
MEMBERS = 4
"""Weights that are decoded together."""
INDEX_BITS = 14
"""Trellis codes are looked up in pairs where that makes no longer index: a table of 32 KiB."""


def decode(codes: Tensor, scales: Tensor, bits: int, dim: int, grid: str, states: int = 0) -> tuple[Tensor, Tensor]:
    """Grid values (rows, dim) and scales (rows,) fp32 of contiguous codes (rows, bytes) and bf16 scales (rows,).

    `states` is 0 for the codes of C(dim, bits), else log2 of the states of the trellis.
    """
    return decode_all([codes], [scales], [None], bits, dim, grid, states)[:2]


def decode_all(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: int,
    dim: int,
    grid: str,
    states: int = 0,
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
        built, table, scale, threads, resident = _kernel(bits, states, dim, grid, len(codes), collect, device.index)
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
        counts = chunks, rows, dim // CHUNK
        blocks = blocks_for(chunks, threads, resident)
        built.launch(blocks, threads, 0, *pointers, *outputs, *bounds, *counts, scale)
    return values, row_scales, bias


def blocks_for(chunks: int, threads: int, resident: int | None) -> int:
    """Blocks for all chunks; of at most `resident`, those that end together."""
    blocks = -(-chunks // (threads * UNROLL))
    return blocks if resident is None else -(-blocks // -(-blocks // resident))


def compile_options(bits: int, states: int, members: int, bias: bool) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {
        "BITS": bits,
        "STATES": states,
        "CODES": 2 if states and states + bits <= INDEX_BITS else 1,
        "MEMBERS": members,
        "BIAS": int(bias),
        "THREADS": TRELLIS_THREADS if states else THREADS,
        "UNROLL": UNROLL,
    }


def table_of(values: Tensor, bits: int, states: int, codes: int, grid: str) -> np.ndarray:
    """Bytes (entries, codes) on the grid: the values of so many consecutive codes, by all bits that they depend on."""
    index = np.arange(1 << (states or bits) + (codes - 1) * bits)[:, None] >> bits * np.arange(codes)
    return grid_bytes(values, grid)[index & len(values) - 1]


@cache
def _kernel(bits: int, states: int, dim: int, grid: str, members: int, bias: bool, device: int):
    """The kernel, the addresses of its table, the factor of row scales, threads, and blocks that run at a time (None:
    all of them are launched)."""
    values, scale = codebook(bits, states, dim, grid)
    constants = compile_options(bits, states, members, bias)
    built = kernel("decode.cu", "decode", tuple(constants.items()), "P" * 16 + "i" * 9 + "f", device)
    table = upload(table_of(values, bits, states, constants["CODES"], grid), device)
    threads = constants["THREADS"]
    resident = processors(device) * max(1, built.blocks_per_processor(threads, 0)) if states else None
    return built, table, scale, threads, resident


def codebook(bits: int, states: int, dim: int, grid: str) -> tuple[Tensor, float]:
    """Values on the grid, and what one of them stands for in a row of norm 1."""
    if states:
        values, scale = trellis.on_grid(bits, states, grid)
        return values, scale / dim**0.5
    scalar = on_grid(dim, bits, grid, False)
    return scalar.values, scalar.scale
