"""`rotate_encode` on CUDA: its tables, its tiles, and the launch. See rotate_encode.cu for the idea.

Sums are in fp32, with one rounding to fp16 between the two Hadamard factors. A value differs from the reference's, by
one level at a boundary, for about 6 coordinates in 10,000 at 4 bits, 3 at 3 bits, and 20 to 30 at 6 bits, where it is
the bins too.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orbitdit.codebooks.lloyd_max import on_grid
from orbitdit.errors import TensorError
from orbitdit.grids import E4M3, GRIDS, INT8, dtype_of
from orbitdit.ops.nvrtc import kernel, num_sms, readable, upload
from orbitdit.ops.rotate_encode.means import groups, mean_gain, parts_of, reaches, sample_of
from orbitdit.ops.rotate_encode.reference import NORM_EPSILONS, encoded_width
from orbitdit.rotation import rotation
from orbitdit.spec import Encoding

Array = np.ndarray[Any, np.dtype[Any]]
TILE = 256


class Kind(NamedTuple):
    """What a kernel is compiled for beside the encoding: fp16 (else bf16), the prologue, the channels that come before
    its activation, whether it makes means, and the grid ("" for none) on which it adds them."""

    half: bool = False
    prologue: str = ""
    first: int = 0
    average: bool = False
    centred: str = ""


class Tile(NamedTuple):
    """How one width is worked on: tokens that a block of threads takes at a time, the factors of h / 256, warps a
    block, blocks that a processor shall have room for, whether `factor2` warps share a unit of h coordinates, and
    whether the factors are butterflies."""

    tokens: int
    factor1: int
    factor2: int
    warps: int
    min_blocks: int
    split: bool = False
    butterflies: bool = False


TILES = {
    1: Tile(2, 1, 1, 4, 8),
    2: Tile(2, 1, 2, 5, 4),
    4: Tile(2, 1, 4, 3, 4, butterflies=True),
    8: Tile(1, 4, 2, 5, 4),
    16: Tile(2, 4, 4, 4, 3, True, True),
}
"""By h / 256 (1 for smaller blocks). More tokens share a gather; the registers of factor * tokens tiles set the end."""
BEST_TILES = {
    1536: Tile(1, 1, 2, 3, 12),
    1920: Tile(2, 1, 1, 2, 12),
    3072: Tile(1, 1, 4, 3, 7),
    8960: Tile(2, 1, 1, 7, 5),
    13824: Tile(2, 1, 2, 8, 2),
    15360: Tile(2, 1, 4, 8, 3),
    20480: Tile(1, 4, 4, 8, 2, True, True),
}
"""By width, where measurement on an H200 found something better, or shared memory is too small for the other."""
NORM_TILES = {3840: Tile(2, 1, 1, 8, 4)}
"""By width, for norms: they keep a token in registers, and ptxas spills none of it for sm_90 with these."""
AVERAGE_TILES = {
    1: Tile(1, 1, 1, 8, 3),
    2: Tile(1, 1, 2, 8, 3),
    4: Tile(1, 1, 4, 8, 3),
    8: Tile(1, 4, 2, 8, 3),
    16: Tile(1, 4, 4, 8, 3, True, True),
}
"""By h / 256, for means: most of the time goes into reading many tokens for each."""
MAX_DIM = 24064
"""What is staged must fit into the 99 KiB of shared memory that a block has on compute capability 8.6 and 8.9."""
BINS = 4096
SIGNATURES = {"": "", "gelu": "Pii", "layer_norm": "PPiif", "silu": "Pii", "rms_norm": "PPiif"}
"""The prologues, and the arguments that each adds to the kernel's."""


def has_kernel(dim: int) -> bool:
    """Whether the kernel takes tokens of this width."""
    return dim % 16 == 0 and dim <= MAX_DIM and _factor(dim) in TILES


def rotate_encode(
    x: Tensor, encoding: Encoding, prologue: str = "", prologue_args: Sequence[Tensor] = (), tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Values (tokens, dim) on the grid and scales (tokens,) fp32 of what `prologue` makes of bf16 or fp16 `x` (...,
    channels); see reference.py. `prologue_args` (rows, channels) are read in the dtype of `x`; each of their rows is
    for one token or, of a norm, for as many tokens as there are to a row.

    Raises TensorError for other dtypes and for widths that `has_kernel` refuses.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TensorError(f"rotate_encode takes bf16 or fp16 tokens; got {x.dtype}")
    tokens, in_sample = x.numel() // max(1, x.shape[-1]), sample_of(x)
    x, prologue_args = _rows(x), [_rows(t) for t in prologue_args]
    dim = encoded_width(x, prologue, prologue_args)
    values = torch.empty((tokens, dim), dtype=dtype_of(encoding.grid), device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if not tokens:
        return values, scales
    kind = Kind(x.dtype == torch.float16, prologue, dim - x.shape[1])
    source, more = _source(x, prologue, prologue_args)
    device, size = x.device.index, encoding.group_size
    if size is None:
        launch = _launcher(encoding, kind, tile, device)
        launch(source[0], values.data_ptr(), scales.data_ptr(), tokens, *more)
        return values, scales
    grouping = in_sample, groups(in_sample, size), size
    means = tokens // in_sample * grouping[1]
    # of each: the mean, and its values in fp16, and its scale
    scratch = torch.empty(means * (2 * dim + 2), dtype=torch.float16, device=x.device)
    rows = scratch.data_ptr()
    mean_values, mean_scales = rows + 2 * means * dim, rows + 4 * means * dim
    average = _launcher(encoding, kind._replace(average=True), None, device)
    average(source[0], mean_values, mean_scales, means, *more, rows, *grouping)
    launch = _launcher(encoding, kind._replace(centred=encoding.grid), tile, device)
    centring = rows, mean_values, mean_scales, *grouping, *reaches(encoding)
    launch(source[0], values.data_ptr(), scales.data_ptr(), tokens, *more, *centring)
    return values, scales


def _rows(x: Tensor) -> Tensor:
    """(..., channels) as (rows, channels)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _source(
    x: Tensor, prologue: str, prologue_args: Sequence[Tensor]
) -> tuple[tuple[int, list[Tensor]], tuple[int | float, ...]]:
    """The address of tokens `x` (tokens, channels), the tensors that must live until the launch, and the arguments
    that the prologue adds to the kernel's."""
    if not prologue:
        x = readable(x)
        return (x.data_ptr(), [x]), ()
    tokens = x.shape[0]
    x, *others = (_readable_rows(t.to(x.dtype)) for t in (x, *prologue_args))
    if prologue in ("gelu", "silu"):
        other = others[0] if others else x
        return (x.data_ptr(), [x, other]), (other.data_ptr(), other.stride(0), x.stride(0))
    x = x.contiguous()
    scale: Tensor | None
    if prologue == "rms_norm":
        extra, scale = others[0], others[1] if len(others) > 1 else None
    else:
        scale, extra = others if others[0].stride(0) == others[1].stride(0) else [t.contiguous() for t in others]
    address, pitch, batch = (0, 0, 1) if scale is None else (scale.data_ptr(), scale.stride(0), scale.shape[0])
    more = address, extra.data_ptr(), pitch, tokens // batch, NORM_EPSILONS[prologue]
    return (x.data_ptr(), [x, extra] if scale is None else [x, extra, scale]), more


def _readable_rows(x: Tensor) -> Tensor:
    """`x` (rows, channels), or a copy of it if its rows are not contiguous or not aligned as vectors of 16 bytes."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()


def tile_of(dim: int, prologue: str = "", average: bool = False) -> Tile:
    """The tile for a width, the prologue of its encoding, and whether it is of means."""
    if average:
        return AVERAGE_TILES[_factor(dim)]
    own = NORM_TILES.get(dim) if prologue in NORM_EPSILONS else None
    return own or BEST_TILES.get(dim) or TILES[_factor(dim)]


@cache
def _launcher(encoding: Encoding, kind: Kind, tile: Tile | None, device: int) -> Callable[..., None]:
    """A function that launches the kernel for one width and codebook; None is the best tile."""
    dim = encoding.dim
    if not has_kernel(dim):
        raise TensorError(f"rotate_encode has no kernel for tokens of width {dim}: run this layer on the grid 'exact'")
    if kind.first % 8:
        raise TensorError(f"rotate_encode takes a multiple of 8 channels beside those of GELU; got {kind.first}")
    tile = tile or tile_of(dim, kind.prologue, kind.average)
    coded = parts_of(encoding)[int(kind.average)] if kind.average or kind.centred else encoding
    table, slope, scale = code_bins(dim, coded.bits, coded.grid, 128 if kind.average or kind.centred else 0)
    defines = compile_options(dim, coded.bits, tile, kind)
    signature = "PPPPPifff" + SIGNATURES[kind.prologue] + centring_signature(kind)
    built = kernel("rotate_encode/rotate_encode.cu", "rotate_encode", tuple(defines.items()), signature, device)
    gather_on, table_on = upload(gather_table(dim, encoding.seed, tile.tokens), device), upload(table, device)
    shared = shared_bytes(dim, tile, kind.average)
    threads = 32 * tile.warps
    resident = num_sms(device) * max(1, built.blocks_per_processor(threads, shared))
    to_unit, slope = scaling(dim, slope, tile)
    scale *= mean_gain(encoding) if kind.average else 1.0

    def launch(x: int, values: int, scales: int, tokens: int, *more: int | float) -> None:
        groups = -(-tokens // tile.tokens)
        rounds = -(-groups // resident)
        blocks = -(-groups // rounds)  # all blocks are done at the same time
        pointers = x, gather_on, table_on, values, scales
        built.launch(blocks, threads, shared, *pointers, tokens, to_unit, slope, scale, *more)

    return launch


def centring_signature(kind: Kind) -> str:
    """The arguments that means add to a kernel's."""
    return "Piii" if kind.average else "PPPiiiff" if kind.centred else ""


NO_KIND = Kind()
CENTRED = ("", E4M3.name, INT8.name)


def compile_options(dim: int, bits: int, tile: Tile, kind: Kind = NO_KIND) -> dict[str, int]:
    """The kernel's compile-time constants."""
    row_bits, column_bits = _hadamard_bits(dim)
    return {
        "DIM": dim,
        "TOKENS": tile.tokens,
        "FACTOR1": tile.factor1,
        "FACTOR2": tile.factor2,
        "ROW_BITS": row_bits,
        "COLUMN_BITS": column_bits,
        "BINS": 32 if bits <= 4 else BINS,
        "WARPS": tile.warps,
        "MIN_BLOCKS": tile.min_blocks,
        "SPLIT": int(tile.split),
        "BUTTERFLIES": int(tile.butterflies),
        "HALF": int(kind.half),
        "BEFORE": list(SIGNATURES).index(kind.prologue),
        "FIRST": kind.first,
        "AVERAGE": int(kind.average),
        "CENTRED": CENTRED.index(kind.centred),
    }


def shared_bytes(dim: int, tile: Tile, average: bool = False) -> int:
    """Dynamic shared memory: the staged tokens (a short one and the next) with 8 channels of zeros, and what warps
    exchange."""
    exchanged = tile.warps // tile.factor2 * tile.factor1 * tile.factor2 * tile.tokens * 512 if tile.split else 0
    staged = 2 if tile.tokens == 1 and dim <= 4096 and not average else tile.tokens
    return 2 * staged * (dim + 8) + exchanged


def scaling(dim: int, slope: float, tile: Tile) -> tuple[float, float]:
    """What the two products leave out: factors to unit variance after the first, and to bins after the second."""
    rows, columns = (bits.bit_count() for bits in _hadamard_bits(dim))
    to_unit = (dim / (tile.factor1 << rows)) ** 0.5
    return to_unit, slope * (tile.factor2 << columns) ** -0.5


def gather_table(dim: int, seed: int, tokens: int) -> Array:
    """(tiles, 32 lanes, 8) uint16: where in shared memory a lane finds the inputs of its tile; top bit: negate.

    The 8 are those of a B operand, (column 0 or 8) x (row 0 or 8) x (row 0 or 1).
    """
    lane = np.arange(32)[:, None]
    g, q = lane >> 2, lane & 3
    column_high, row_high, row_low = (np.arange(8) >> bit & 1 for bit in (2, 1, 0))
    slot = _coordinate(2 * q + row_low + 8 * row_high, g + 8 * column_high)
    slots = TILE * np.arange(-(-dim // TILE))[:, None, None] + slot
    drawn = rotation(dim, seed)
    inside = slots < dim
    slots = np.where(inside, slots, 0)
    places = _places(dim, tokens)[drawn.permutation.numpy()[slots]]
    negate = drawn.signs.numpy()[slots] < 0
    return np.where(inside, places | negate << 15, dim).astype(np.uint16)


def _places(dim: int, tokens: int) -> Array:
    """The place of each channel: a thread reads 8 channels and writes `tokens` vectors of 8 / tokens channels each."""
    channel = np.arange(dim)
    thread, within, vector = channel // 8, channel % 8, 8 // tokens
    return vector * (within // vector * (dim // 8) + thread) + within % vector


def _coordinate(row: Array, column: Array) -> Array:
    """Index in a tile of an element of its 16 x 16 matrix: bits c0 c3 r3 c1 c2 r0 r1 r2, low to high."""
    bits = [column, column >> 3, row >> 3, column >> 1, column >> 2, row, row >> 1, row >> 2]
    index: Array = np.sum([(bit & 1) << i for i, bit in enumerate(np.broadcast_arrays(*bits))], axis=0)
    return index


def _hadamard_bits(dim: int) -> tuple[int, int]:
    """Row and column bits of a tile that belong to the Hadamard matrix: the lowest log2(h) bits of the index."""
    used = min(dim & -dim, TILE).bit_length() - 1
    order = [("c", 0), ("c", 3), ("r", 3), ("c", 1), ("c", 2), ("r", 0), ("r", 1), ("r", 2)][:used]
    return sum(1 << bit for axis, bit in order if axis == "r"), sum(1 << bit for axis, bit in order if axis == "c")


def _factor(dim: int) -> int:
    return max(1, (dim & -dim) // TILE)


def code_bins(dim: int, bits: int, grid: str, more: int = 0) -> tuple[Array, float, float]:
    """The kernel's table as bytes, the slope of bins over coordinates of unit variance, and the codebook's scale. Bytes
    of the grid are as many `more`.

    Up to 4 bits the table is 32 words: coordinate z lies at z * slope + 0.5 of the row of bins, and a word holds a
    boundary's place in its bin above 16 bits, then the grid byte above the boundary, then the one below. For more it
    is BINS grid bytes: bin k is what z * slope + 0.5, times BINS - 1, rounds to. Of many slopes that cover the codebook
    that one is chosen which loses least by taking the middle of a bin for all of it: it has the least sum over the
    boundaries of density times distance to the nearest edge.
    """
    codebook = on_grid(dim, bits, grid, True)
    boundaries = codebook.boundaries.numpy() * dim**0.5
    values = GRIDS[grid].bytes_of(codebook.values) + np.uint8(more)
    if bits <= 4:
        slope = float(0.5 / (1.02 * np.abs(boundaries).max()))
        place = np.floor((boundaries * slope + 0.5) * (2.0**21 - 1)).astype(np.int64)
        bins = place >> 16
        if len(set(bins)) < len(bins):
            raise ValueError(f"no row of 32 bins separates the boundaries of {bits} bits at d={dim}")
        below = np.searchsorted(bins, np.arange(32))
        above, threshold = below.copy(), np.zeros(32, np.int64)
        above[bins] += 1
        threshold[bins] = place & 0xFFFF
        words = threshold << 16 | values.astype(np.int64)[above] << 8 | values[below]
        return words.astype(np.uint32).view(np.uint8), slope, codebook.scale
    slopes = 0.5 / (np.abs(boundaries).max() * np.linspace(1.01, 1.3, 4000))[:, None]
    place = (boundaries * slopes + 0.5) * (BINS - 1)
    distance = np.abs(place - np.floor(place) - 0.5) / (slopes * BINS)
    slope = float(slopes[(np.exp(-(boundaries**2) / 2) * distance).sum(1).argmin(), 0])
    middle = (np.arange(BINS) / (BINS - 1) - 0.5) / slope
    return values[np.searchsorted(boundaries, middle)], slope, codebook.scale
