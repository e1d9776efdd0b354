"""The CUDA kernels of `rotate_encode` and `decode` with their tables, launched on the CPU's emulator."""

from typing import NamedTuple

import numpy as np
import torch

from cuda_emulator import Launch, launch
from orbitdit.grids import dtype_of
from orbitdit.ops.decode import cuda as decode_cuda
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.rotate_encode.cuda import Kind
from orbitdit.ops.rotate_encode.means import groups
from orbitdit.ops.rotate_encode.reference import NORM_EPSILONS

SEED = 1
POISON = {"e4m3": 0x7F, "int8": 0x80}
"""Bytes that are no level of a codebook."""


def memory_of(x):
    """All numbers from the first one of `x` (rows, columns) to the last, for rows that are part of wider ones."""
    return x.as_strided(((len(x) - 1) * x.stride(0) + x.shape[1],), (1,))


class How(NamedTuple):
    """A launch of `rotate_encode`: the tile (None for the kernel's own), at most so many blocks, and whether the
    threads run in the opposite order."""

    tile: rotate_encode_cuda.Tile | None = None
    blocks: int = 2
    reverse: bool = False


AS_THE_KERNEL = How()


def rotate_encode(x, bits, grid, prologue="", args=(), means=None, how=AS_THE_KERNEL):
    """Values and scales from the kernel, all of them written by it; the rotation's seed is 1."""
    first = args[0].shape[1] if prologue == "gelu" and args else 0
    count, dim = x.shape[0], x.shape[1] + first
    tile = how.tile or rotate_encode_cuda.tile_of(dim, prologue)
    other = args[0] if args else x
    rows, pitches = memory_of(other), (other.stride(0), x.stride(0))
    more = {"": [], "gelu": [rows, *pitches], "silu": [rows, *pitches]}
    if prologue in NORM_EPSILONS:
        scale, extra = args if prologue == "layer_norm" else ([*args, None][1], args[0])
        pitch, batch = (0, 1) if scale is None else (scale.stride(0), len(scale))
        modulation = [None if t is None else memory_of(t) for t in (scale, extra)]
        more[prologue] = [*modulation, pitch, count // batch, NORM_EPSILONS[prologue]]
    bins, slope, scale = rotate_encode_cuda.code_bins(dim, bits, grid)
    gather = torch.from_numpy(rotate_encode_cuda.gather_table(dim, SEED, tile.tokens).view(np.int16))
    values, scales = torch.full((count, dim), POISON[grid], dtype=torch.uint8), torch.full((count,), -7.0)
    launch(
        "rotate_encode/rotate_encode.cu",
        "rotate_encode",
        Launch(
            (min(how.blocks, max(1, -(-count // tile.tokens))), 1, 1),
            32 * tile.warps,
            rotate_encode_cuda.shared_bytes(dim, tile),
            how.reverse,
        ),
        [memory_of(x), gather, torch.from_numpy(bins), values, scales, count]
        + [float(number) for number in (*rotate_encode_cuda.scaling(dim, slope, tile), scale)]
        + more[prologue]
        + ([means.rows, means.tokens, groups(means.tokens, means.group_size), means.group_size] if means else []),
        rotate_encode_cuda.compile_options(
            dim, bits, tile, Kind(x.dtype == torch.float16, prologue, first, bool(means))
        ),
    )
    assert (values != POISON[grid]).all()
    assert (scales != -7).all()
    return values.view(dtype_of(grid)), scales


def decode(weights, points, bits, dim, window, resident=None, reverse=False):
    """Bytes, row scales and biases of several weights (their packed codes, scales, and biases or None), one after the
    other, by blocks of 64 threads; `points` are the kernel's table and its scale."""
    (packed, scales, biases), (table, scale) = weights, points
    sizes = [len(codes) for codes in packed]
    total = sum(sizes)
    values, row_scales = torch.full((total, dim), 0x80, dtype=torch.uint8), torch.full((total,), torch.nan)
    collected = torch.full((total,), torch.nan, dtype=torch.float16) if biases else None
    missing = [None] * (decode_cuda.MEMBERS - len(sizes))
    given = biases or [None] * len(sizes)
    pointers = [*packed, *missing, *scales, *missing, *given, *missing, table, values, row_scales, collected]
    ends = [sum(sizes[: i + 1]) for i in range(decode_cuda.MEMBERS - 1)]
    bounds = [bound for end in ends for bound in (end * dim // decode_cuda.CHUNK, end)]
    chunks = total * dim // decode_cuda.CHUNK
    blocks = decode_cuda.blocks_for(chunks, 64, resident)
    arguments = [*pointers, *bounds, chunks, total, dim // decode_cuda.CHUNK, scale]
    defines = decode_cuda.compile_options(bits, window, len(sizes), bool(biases)) | {"THREADS": 64}
    launch("decode/decode.cu", "decode", Launch((blocks, 1, 1), 64, reverse=reverse), arguments, defines)
    return values, row_scales, collected
