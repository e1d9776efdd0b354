"""`decode` on CUDA: packed codes to grid bytes. See decode.cu."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from orbitdit.codebook import GRID_DTYPES, grid_bytes
from orbitdit.errors import TensorError
from orbitdit.kernels.nvrtc import kernel, processors, upload
from orbitdit.quantize import weight_points_on

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
    rows, device, bias = sum(packed.shape[0] for packed in codes), codes[0].device, biases[0]
    values = torch.empty(rows, dim, dtype=GRID_DTYPES[grid], device=device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=device)
    collected = None if bias is None or len(codes) == 1 else torch.empty(rows, dtype=bias.dtype, device=device)
    decode_into(codes, scales, biases, bits, grid, values, row_scales, collected, states)
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
    states: int = 0,
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
    collect, device = bias is not None, values.device.index
    built, table, scale, threads, resident = _kernel(bits, states, dim, grid, members, collect, device)
    outputs = table, values.data_ptr(), row_scales.data_ptr(), 0 if bias is None else bias.data_ptr()
    blocks, ends = blocks_for(chunks, threads, resident), bounds[: 2 * MEMBERS - 2]
    built.launch(blocks, threads, 0, *pointers, *outputs, *ends, chunks, rows, dim // CHUNK, scale)


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
    values, scale = weight_points_on(dim, bits, states, grid)
    constants = compile_options(bits, states, members, bias)
    built = kernel("decode.cu", "decode", tuple(constants.items()), "P" * 16 + "i" * 9 + "f", device)
    table = upload(table_of(values, bits, states, constants["CODES"], grid), device)
    threads = constants["THREADS"]
    resident = processors(device) * max(1, built.blocks_per_processor(threads, 0)) if states else None
    return built, table, scale, threads, resident
