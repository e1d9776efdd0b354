"""`decode` on CUDA: packed codes to grid bytes. See decode.cu."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orbitdit.codebooks import CODEBOOKS
from orbitdit.codebooks import window as window_of
from orbitdit.errors import TensorError
from orbitdit.grids import GRIDS, dtype_of
from orbitdit.ops.nvrtc import Kernel, kernel, num_sms, upload
from orbitdit.ops.operands import Packed
from orbitdit.spec import LayerSpec, WeightCode

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK = 16
"""Codes that a thread turns at a time: rows must be multiples of it."""
THREADS, TRELLIS_THREADS, UNROLL = 256, 512, 2
"""Threads a block, which shares a table, and chunks that each asks for at a time."""
MEMBERS = 4
"""Weights that are decoded together."""
INDEX_BITS = 14
"""Trellis codes are looked up in pairs where that makes no longer index: a table of 32 KiB."""


def decode(codes: Tensor, scales: Tensor, spec: LayerSpec, grid: str) -> tuple[Tensor, Tensor]:
    """Grid values (rows, dim) and scales (rows,) fp32 of contiguous codes (rows, bytes) and bf16 scales (rows,)."""
    return decode_all(Packed([codes], [scales], [None]), spec, grid)[:2]


def decode_all(packed: Packed, spec: LayerSpec, grid: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode` of up to four weights that are coded as `spec` says, row after row, and their biases (of 16 bits each)
    likewise, or None without.

    Raises TensorError for widths that are no multiple of 16 and for codes that are not contiguous.
    """
    rows, device, bias = sum(codes.shape[0] for codes in packed.codes), packed.codes[0].device, packed.biases[0]
    values = torch.empty(rows, spec.in_features, dtype=dtype_of(grid), device=device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=device)
    collected = None
    if bias is not None and len(packed.codes) > 1:
        collected = torch.empty(rows, dtype=bias.dtype, device=device)
    decode_into((values, row_scales, collected), packed, spec.weight, grid)
    return values, row_scales, bias if collected is None else collected


def decode_into(out: tuple[Tensor, Tensor, Tensor | None], packed: Packed, code: WeightCode, grid: str) -> None:
    """`decode_all` into contiguous values (rows, dim), row scales of as many numbers, and a bias, if given."""
    values, row_scales, bias = out
    rows, dim = values.shape
    pointers: list[int] = []
    bounds: list[int] = []
    end = 0
    for codes in packed.codes:
        if dim % CHUNK or not codes.is_contiguous():
            raise TensorError(f"decode takes contiguous rows of a multiple of {CHUNK} codes; got {dim}")
        pointers.append(codes.data_ptr())
        end += codes.shape[0]
        bounds += end * dim // CHUNK, end
    if not rows:
        return
    members, chunks = len(packed.codes), rows * dim // CHUNK
    absent = (0,) * (MEMBERS - members)
    pointers += absent
    scales = [s if s.dtype == torch.bfloat16 else s.to(torch.bfloat16) for s in packed.scales]
    pointers += [s.data_ptr() for s in scales]
    pointers += absent
    pointers += (0,) * MEMBERS if bias is None else [*(b.data_ptr() for b in packed.biases if b is not None), *absent]
    bounds += (chunks, rows) * len(absent)
    built, table, scale, threads, resident = _kernel(code, dim, grid, members, bias is not None, values.device.index)
    outputs = table, values.data_ptr(), row_scales.data_ptr(), 0 if bias is None else bias.data_ptr()
    blocks, ends = blocks_for(chunks, threads, resident), bounds[: 2 * MEMBERS - 2]
    built.launch(blocks, threads, 0, *pointers, *outputs, *ends, chunks, rows, dim // CHUNK, scale)


def blocks_for(chunks: int, threads: int, resident: int | None) -> int:
    """Blocks for all chunks; of at most `resident`, those that end together."""
    blocks = -(-chunks // (threads * UNROLL))
    return blocks if resident is None else -(-blocks // -(-blocks // resident))


def compile_options(bits: int, window: int, members: int, bias: bool) -> dict[str, int]:
    """The kernel's compile-time constants for codes of `bits` whose indices are the last `window` bits of the row."""
    sliding = window > bits
    return {
        "BITS": bits,
        "STATES": window if sliding else 0,
        "CODES": 2 if sliding and window + bits <= INDEX_BITS else 1,
        "MEMBERS": members,
        "BIAS": int(bias),
        "THREADS": TRELLIS_THREADS if sliding else THREADS,
        "UNROLL": UNROLL,
    }


def table_of(values: Array, bits: int, window: int, codes: int) -> Array:
    """Bytes (entries, codes): the `values` (2**window,) of so many consecutive codes, by all bits that they depend
    on."""
    index = np.arange(1 << window + (codes - 1) * bits)[:, None] >> bits * np.arange(codes)
    table: Array = values[index & len(values) - 1]
    return table


@cache
def _kernel(
    code: WeightCode, dim: int, grid: str, members: int, bias: bool, device: int
) -> tuple[Kernel, int, float, int, int | None]:
    """The kernel, the address of its table, the factor of row scales, threads, and blocks that run at a time (None:
    all of them are launched)."""
    window = window_of(code)
    values, scale = CODEBOOKS[code.codebook].points_on(code, dim, GRIDS[grid])
    constants = compile_options(code.bits, window, members, bias)
    built = kernel("decode/decode.cu", "decode", tuple(constants.items()), "P" * 16 + "i" * 9 + "f", device)
    table = upload(table_of(GRIDS[grid].bytes_of(values), code.bits, window, constants["CODES"]), device)
    threads = constants["THREADS"]
    resident = num_sms(device) * max(1, built.blocks_per_processor(threads, 0)) if constants["STATES"] else None
    return built, table, scale, threads, resident
