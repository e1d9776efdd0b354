"""The CUDA kernels of `rotate_encode` and `decode` with their tables, launched on the CPU's emulator."""

from typing import NamedTuple

import numpy as np
import torch

from cuda_emulator import Launch, launch
from orbitdit.grids import dtype_of
from orbitdit.ops.decode import cuda as decode_cuda
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.rotate_encode.cuda import Kind
from orbitdit.ops.rotate_encode.means import groups, mean_gain, parts_of, reaches
from orbitdit.ops.rotate_encode.reference import NORM_EPSILONS
from orbitdit.spec import Encoding

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


def rotate_encode(x, bits, grid, prologue="", args=(), sample=None, how=AS_THE_KERNEL):
    """Values and scales from the kernel, all of them written by it; the rotation's seed is 1. With a `sample` (its
    tokens, and those that share a mean) tokens are centred, and the means' rows, values and scales come too."""
    first = args[0].shape[1] if prologue == "gelu" and args else 0
    encoding = Encoding(x.shape[1] + first, bits, grid, SEED, None if sample is None else sample[1], True)
    kind = Kind(x.dtype == torch.float16, prologue, first)
    if sample is None:
        return run(x, encoding, kind, args, (), how)
    grouping = sample[0], groups(*sample), sample[1]
    count = len(x) // sample[0] * grouping[1]
    rows = torch.full((count, encoding.dim), torch.nan, dtype=x.dtype)
    average = kind._replace(average=True)
    values, scales = run(x, encoding, average, args, (rows, *grouping), how._replace(tile=None), count)
    centring = rows, values, scales, *grouping, *reaches(encoding)
    return *run(x, encoding, kind._replace(centred=grid), args, centring, how), (rows, values, scales)


def run(x, encoding, kind, args, centring, how, count=None):
    """One launch; `count` is that of what is encoded, if not that of `x`."""
    dim, grid, prologue = encoding.dim, encoding.grid, kind.prologue
    count = len(x) if count is None else count
    coded = parts_of(encoding)[int(kind.average)] if kind.average or kind.centred else encoding
    bits = coded.bits
    tile = how.tile or rotate_encode_cuda.tile_of(dim, prologue, kind.average)
    other = args[0] if args else x
    rows, pitches = memory_of(other), (other.stride(0), x.stride(0))
    more = {"": [], "gelu": [rows, *pitches], "silu": [rows, *pitches]}
    if prologue in NORM_EPSILONS:
        scale, extra = args if prologue == "layer_norm" else ([*args, None][1], args[0])
        pitch, batch = (0, 1) if scale is None else (scale.stride(0), len(scale))
        modulation = [None if t is None else memory_of(t) for t in (scale, extra)]
        more[prologue] = [*modulation, pitch, len(x) // batch, NORM_EPSILONS[prologue]]
    bins, slope, scale = rotate_encode_cuda.code_bins(dim, bits, coded.grid, 0 if coded is encoding else 128)
    scale *= mean_gain(encoding) if kind.average else 1
    gather = torch.from_numpy(rotate_encode_cuda.gather_table(dim, SEED, tile.tokens).view(np.int16))
    values, scales = torch.full((count, dim), POISON[grid], dtype=torch.uint8), torch.full((count,), -7.0)
    if kind.average:
        values = torch.full((count, dim), 1e4, dtype=torch.float16)
    launch(
        "rotate_encode/rotate_encode.cu",
        "rotate_encode",
        Launch(
            (min(how.blocks, max(1, -(-count // tile.tokens))), 1, 1),
            32 * tile.warps,
            rotate_encode_cuda.shared_bytes(dim, tile, kind.average),
            how.reverse,
        ),
        [memory_of(x), gather, torch.from_numpy(bins), values, scales, count]
        + [float(number) for number in (*rotate_encode_cuda.scaling(dim, slope, tile), scale)]
        + more[prologue]
        + list(centring),
        rotate_encode_cuda.compile_options(dim, bits, tile, kind),
    )
    assert (scales != -7).all()
    if kind.average:
        assert (values.abs() < 128).all()
        return values, scales
    assert (values != POISON[grid]).all()
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
