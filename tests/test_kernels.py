"""The CUDA kernels of a layer, run on the CPU by the emulator, against their definitions in `reference`."""

import ctypes

import numpy as np
import pytest
import torch

import oracle
from cuda_emulator import launch
from encoding_checks import FLIPS, NORMS, before_encoding, flips, random, tokens, tokens_of_one_input
from orbitdit import DependencyError, TensorError
from orbitdit.codebook import GRID_DTYPES, grid_bytes, on_grid
from orbitdit.kernels import centring, nvrtc, reference
from orbitdit.kernels import decode as decode_cuda
from orbitdit.kernels import matmul as matmul_cuda
from orbitdit.kernels import means as means_cuda
from orbitdit.kernels import rotate_encode as rotate_encode_cuda
from orbitdit.kernels.centring import groups
from orbitdit.kernels.rotate_encode import Tile
from orbitdit.packing import PACKED_BITS, pack
from orbitdit.quantize import weight_points_on

DTYPES = [torch.bfloat16, torch.float16]
GRIDS = ["e4m3", "int8"]
DIMS = [16, 48, 64, 128, 192, 256, 960, 1536, 1920, 2048, 3072, 3840, 4096, 12288]
POISON = {"e4m3": 0x7F, "int8": 0x80}
"""Bytes that are no level of a codebook."""


def memory_of(x):
    """All numbers from the first one of `x` (rows, columns) to the last, for rows that are part of wider ones."""
    return x.as_strided(((len(x) - 1) * x.stride(0) + x.shape[1],), (1,))


def rotate_encode(x, bits, grid, seed=1, tile=None, blocks=2, reverse=False, before="", extras=(), means=None):
    """Values and scales from the kernel, all of them written by it."""
    first = extras[0].shape[1] if before == "gelu" and extras else 0
    count, dim = x.shape[0], x.shape[1] + first
    tile = tile or rotate_encode_cuda.tile_of(dim, before)
    other = extras[0] if extras else x
    rows, pitches = memory_of(other), (other.stride(0), x.stride(0))
    more = {"": [], "gelu": [rows, *pitches], "silu": [rows, *pitches]}
    if before in reference.NORM_EPSILONS:
        scale, extra = extras if before == "layer_norm" else ([*extras, None][1], extras[0])
        pitch, batch = (0, 1) if scale is None else (scale.stride(0), len(scale))
        modulation = [None if t is None else memory_of(t) for t in (scale, extra)]
        more[before] = [*modulation, pitch, count // batch, reference.NORM_EPSILONS[before]]
    bins, slope, scale = rotate_encode_cuda.bin_table(dim, bits, grid)
    gather = torch.from_numpy(rotate_encode_cuda.gather_table(dim, seed, tile.tokens).view(np.int16))
    values, scales = torch.full((count, dim), POISON[grid], dtype=torch.uint8), torch.full((count,), -7.0)
    launch(
        "rotate_encode.cu",
        "rotate_encode",
        (min(blocks, max(1, -(-count // tile.tokens))), 1, 1),
        32 * tile.warps,
        rotate_encode_cuda.shared_bytes(dim, tile),
        [memory_of(x), gather, torch.from_numpy(bins), values, scales, count]
        + [float(number) for number in (*rotate_encode_cuda.scaling(dim, slope, tile), scale)]
        + more[before]
        + ([means.rows, means.tokens, groups(means.tokens, means.each), means.each] if means else []),
        rotate_encode_cuda.compile_options(dim, bits, x.dtype == torch.float16, tile, before, first, bool(means)),
        reverse,
    )
    assert (values != POISON[grid]).all()
    assert (scales != -7).all()
    return values.view(GRID_DTYPES[grid]), scales


@pytest.mark.parametrize("dim", DIMS)
def test_values_are_those_of_the_definition(dim):
    for bits, grid in ((3, "int8"), (4, "e4m3"), (4, "int8"), (3, "e4m3")):
        for count in (1, 3, 5):
            x = tokens(count, dim, seed=bits)
            assert flips(rotate_encode(x, bits, grid), x, bits, grid) <= 3 + 1e-3 * x.numel()


@pytest.mark.parametrize(("dim", "dtype"), [(48, "f16"), (960, "f16"), (3072, "f16"), (4096, "f16"), (1920, "bf16")])
def test_both_dtypes_and_6_bits(dim, dtype):
    x = tokens(3, dim, torch.float16 if dtype == "f16" else torch.bfloat16)
    for bits in (4, 6):
        assert flips(rotate_encode(x, bits, "e4m3"), x, bits, "e4m3") <= 3 + FLIPS[bits] * x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("before", "dim", "first", "batch"),
    [
        ("gelu", 64, 0, 1),
        ("gelu", 192, 64, 1),
        ("gelu", 1920, 384, 1),
        ("gelu", 3072, 0, 1),
        ("gelu", 12288, 0, 1),
        ("gelu", 15360, 3072, 1),
        ("layer_norm", 64, 0, 6),
        ("layer_norm", 1536, 0, 2),
        ("layer_norm", 1920, 0, 3),
        ("layer_norm", 3072, 0, 1),
        ("layer_norm", 5120, 0, 2),
        ("silu", 64, 0, 1),
        ("silu", 1536, 0, 1),
        ("silu", 1920, 0, 1),
        ("silu", 10240, 0, 1),
        ("rms_norm", 64, 0, 6),
        ("rms_norm", 960, 0, 0),
        ("rms_norm", 3072, 0, 2),
        ("rms_norm", 3840, 0, 1),
        ("rms_norm", 3840, 0, 3),
    ],
)
def test_what_comes_before_the_encoding(before, dim, first, batch, dtype):
    x, extras = before_encoding(before, 6, dim, first, batch, dtype)
    made = reference.apply_before(x, before, extras)
    values, scales = rotate_encode(x, 4, "e4m3", before=before, extras=extras)
    expected, expected_scales = reference.rotate_encode(made, 4, 1, "e4m3")
    # what rounds differently to 16 bits moves a token a little
    torch.testing.assert_close(scales, expected_scales, rtol=1e-3, atol=0)
    levels = on_grid(dim, 4, "e4m3", True).values.float()
    code, expected_code = (torch.bucketize(v.float(), levels) for v in (values, expected))
    assert (code - expected_code).abs().max() <= 1
    assert (code != expected_code).sum() <= 3 + 2e-3 * code.numel()
    again = rotate_encode(x, 4, "e4m3", before=before, extras=extras, blocks=1, reverse=True)
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 960, 1920, 3072, 7680])
@pytest.mark.parametrize("each", [2, 3, 5])
def test_tokens_less_their_means(dim, each, dtype):
    """Two pictures of five tokens; two and three of them leave a mean of fewer."""
    x = tokens(10, dim, dtype)
    rows = centring.token_means(x.view(2, 5, dim), each)
    found = rotate_encode(x, 3, "e4m3", means=rotate_encode_cuda.Means(rows, 5, each))
    assert flips(found, centring.less_means(x, rows, 5, each), 3, "e4m3") <= 3 + FLIPS[3] * x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens_each", "each"), [(5, 2), (5, 5), (32, 16), (33, 16)])
@pytest.mark.parametrize("dim", [16, 1920])
def test_means_of_tokens(dim, tokens_each, each, dtype):
    """Rounded once of fp32 sums; a token that is spoilt counts as zero where it is."""
    x = tokens(3 * tokens_each, dim, dtype).view(3, tokens_each, dim)
    x[1, 0, 3], x[2, -1, 5] = torch.nan, torch.inf
    count = centring.groups(tokens_each, each)
    found = torch.full((3 * count, dim), -7, dtype=dtype)
    blocks = -(-3 * count * dim // 8 // 128)
    defines = means_cuda.compile_options(dtype == torch.float16)
    sizes = [3 * count, dim // 8, tokens_each, count, each]
    launch("means.cu", "token_means", (blocks, 1, 1), 128, 0, [x, found, *sizes], defines)
    expected = centring.token_means(x, each)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-5)


@pytest.mark.parametrize("before", ["gelu", "layer_norm"])
def test_what_precedes_the_encoding_is_read_as_what_it_is(before, monkeypatch):
    """Other dtypes (a modulation in fp32), other strides and parts of tensors: the kernel reads 16-bit rows."""
    x, read = tokens(6, 64), []
    extras = [random(2, 200, seed=seed)[:, 1:65] for seed in (7, 8)] if before == "layer_norm" else [random(6, 16).T.T]

    def launch(x_at, values, scales, count, gain, *more):
        assert gain == 1
        places = [(x_at, 64, 6, 64)]
        if before == "layer_norm":
            places += [(at, more[2], 2, 64) for at in more[:2]]
        else:
            places += [(more[0], more[1], 6, 16)]
        for at, pitch, rows, width in places:
            memory = (ctypes.c_uint16 * (pitch * (rows - 1) + width)).from_address(at)
            words = [memory[pitch * row : pitch * row + width] for row in range(rows)]
            read.append(torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.bfloat16))

    monkeypatch.setattr(rotate_encode_cuda, "_launcher", lambda *_: launch)
    rotate_encode_cuda.rotate_encode(x, 4, 1, "int8", None, before, extras)
    assert len(read) == 1 + len(extras)
    assert all(torch.equal(found, t.bfloat16()) for found, t in zip(read, [x, *extras], strict=True))


def test_channels_beside_gelu_that_no_vector_takes_are_refused():
    with pytest.raises(TensorError, match="a multiple of 8 channels beside those of GELU; got 12"):
        rotate_encode_cuda.rotate_encode(tokens(2, 52), 4, 1, "int8", None, "gelu", [tokens(2, 12)])


@pytest.mark.parametrize("before", ["gelu", "layer_norm", "silu", "rms_norm"])
def test_spoilt_tokens_leave_the_others_alone_whatever_comes_before(before):
    x, extras = before_encoding(before, 5, 1536)
    values, scales = rotate_encode(x, 4, "e4m3", before=before, extras=extras)
    x[1, 7], x[3, 900] = torch.nan, torch.inf
    spoilt, spoilt_scales = rotate_encode(x, 4, "e4m3", before=before, extras=extras)
    good = torch.tensor([0, 2, 4])
    assert torch.equal(spoilt[good].view(torch.uint8), values[good].view(torch.uint8))
    assert torch.equal(spoilt_scales[good], scales[good])
    assert not spoilt_scales[[1, 3]].isfinite().any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("dim", [48, 1024, 3072])
def test_few_values_flip(dim, bits, grid):
    x = tokens(-(-120_000 // dim), dim)
    assert flips(rotate_encode(x, bits, grid), x, bits, grid) <= FLIPS[bits] * x.numel()


@pytest.mark.parametrize(
    ("dim", "tile"),
    [
        (96, Tile(4, 1, 1, 2, 1)),
        (768, Tile(1, 1, 1, 4, 1)),
        (768, Tile(4, 1, 1, 1, 1)),
        (1024, Tile(1, 1, 4, 2, 1)),
        (1024, Tile(4, 2, 2, 4, 1)),
        (2560, Tile(2, 1, 2, 3, 1)),
        (2048, Tile(2, 2, 4, 4, 1)),
        (4096, Tile(1, 4, 4, 4, 1, True)),
        (1024, Tile(4, 2, 2, 6, 1, True)),
        (1024, Tile(2, 1, 4, 2, 1, butterflies=True)),
        (2048, Tile(1, 4, 2, 3, 1, butterflies=True)),
        (4096, Tile(2, 4, 4, 8, 1, True, butterflies=True)),
    ],
)
def test_every_tile_gives_the_same_bits(dim, tile):
    x = tokens(9, dim)
    values, scales = rotate_encode(x, 4, "e4m3", tile=tile)
    assert flips((values, scales), x, 4, "e4m3") <= 3 + 1e-3 * x.numel()
    for blocks, reverse in ((1, True), (5, False), (5, True)):
        again, scales_again = rotate_encode(x, 4, "e4m3", tile=tile, blocks=blocks, reverse=reverse)
        assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("dim", [16, 3072, 4096, 12288])
def test_the_order_of_threads_does_not_show(dim):
    x = tokens(3, dim)
    for bits in (4, 6):
        first, second = (rotate_encode(x, bits, "int8", reverse=reverse) for reverse in (False, True))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("dim", [64, 1536, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spoilt_tokens_and_zeros_leave_the_others_alone(dtype, dim, bits):
    x = tokens(10, dim, dtype)
    values, scales = rotate_encode(x, bits, "e4m3")
    for row, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        x[row, 5 * row] = value
    x[2] = 0
    spoilt, spoilt_scales = rotate_encode(x, bits, "e4m3")
    good = torch.tensor([0, 3, 5, 6, 8, 9])
    assert torch.equal(spoilt[good].view(torch.uint8), values[good].view(torch.uint8))
    assert torch.equal(spoilt_scales[good], scales[good])
    assert not spoilt_scales[[1, 4, 7]].isfinite().any()
    assert spoilt_scales[2] == 0
    zeros = reference.rotate_encode(x[2:3], bits, 1, "e4m3")[0]
    assert torch.equal(spoilt[2:3].view(torch.uint8), zeros.view(torch.uint8))


@pytest.mark.parametrize("dim", [64, 3072, 4096])
def test_norms_of_any_size(dim):
    sizes = torch.tensor(NORMS)[:, None]
    unit = torch.nn.functional.normalize(random(len(sizes), dim), dim=1)
    for bits in (4, 6):
        x = (unit * sizes).bfloat16()
        assert flips(rotate_encode(x, bits, "int8"), x, bits, "int8") <= 3 + FLIPS[bits] * x.numel()
    half = (random(4, dim).clamp(-2, 2) * torch.tensor([3e-7, 1e-4, 1.0, 3e4])[:, None]).half()
    # the first token has few different inputs, so more of its coordinates lie on a boundary
    assert flips(rotate_encode(half, 4, "int8"), half, 4, "int8") <= 3 + 2e-3 * half.numel()


@pytest.mark.parametrize("dim", [16, 192, 256, 3072, 4096])
def test_tokens_of_one_input(dim):
    x = tokens_of_one_input(dim)
    for bits in (3, 4):
        values, scales = rotate_encode(x, bits, "e4m3")
        expected, expected_scales = reference.rotate_encode(x, bits, 1, "e4m3")
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)


def test_no_tokens():
    assert rotate_encode(torch.empty(0, 64).bfloat16(), 4, "int8")[0].shape == (0, 64)


def test_widths_that_the_kernel_takes():
    taken = {16, 48, 1920, 5120, 8960, 10240, 12288, 13824, 15360, 20480, 24064}
    assert all(rotate_encode_cuda.supported(dim) for dim in taken)
    assert not any(rotate_encode_cuda.supported(dim) for dim in (1, 8, 63, 120, 8192, 24080, 24576, 32768))


def test_every_width_fits_into_the_shared_memory_of_every_device():
    """99 KiB a block on compute capability 8.6 and 8.9, of which 6 bits take 4 KiB for their bins."""
    for dim in filter(rotate_encode_cuda.supported, range(16, 2**15, 16)):
        for before in rotate_encode_cuda.SIGNATURES:
            tile = rotate_encode_cuda.tile_of(dim, before)
            assert rotate_encode_cuda.shared_bytes(dim, tile) + rotate_encode_cuda.BINS + 512 <= 99 << 10, dim


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 48, 256, 960, 3072])
def test_the_gather_is_the_permutation_with_its_signs(dim, count):
    """From the layouts that the kernel's text and the prelude describe back to channels, entry by entry."""
    permutation, signs = oracle.permutation_and_signs(dim, 9)
    table = rotate_encode_cuda.gather_table(dim, 9, count)
    assert table.shape == (-(-dim // 256), 32, 8)
    seen = np.zeros(len(table) * 256, bool)
    for (tile, lane, i), entry in np.ndenumerate(table):
        row, column = 2 * (lane % 4) + i % 2 + 8 * (i // 2 % 2), lane // 4 + 8 * (i // 4)
        order = [(column, 0), (column, 3), (row, 3), (column, 1), (column, 2), (row, 0), (row, 1), (row, 2)]
        slot = 256 * tile + sum((number >> bit & 1) << k for k, (number, bit) in enumerate(order))
        assert not seen[slot]
        seen[slot] = True
        if slot >= dim:
            assert entry == dim
            continue
        vector, within = divmod(int(entry) & 0x7FFF, 8 // count)
        part, vector = divmod(vector, dim // 8)
        assert 8 * vector + part * (8 // count) + within == permutation[slot]
        assert (entry >> 15 == 1) == (signs[slot] < 0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("dim", [16, 64, 3072, 15360])
def test_bins_hold_the_nearest_levels(dim, bits, grid):
    """Looked up in fp64 as the kernel does in fp32."""
    bins, slope, scale = rotate_encode_cuda.bin_table(dim, bits, grid)
    codebook = on_grid(dim, bits, grid, True)
    assert scale == codebook.scale
    boundaries, levels = codebook.boundaries.numpy() * dim**0.5, grid_bytes(codebook.values, grid)
    assert slope * np.abs(boundaries).max() < 0.5
    z = np.concatenate([random(200_000).double().numpy(), np.linspace(-40, 40, 999)])
    nearest = levels[np.searchsorted(boundaries, z)]
    place = np.clip(z * slope + 0.5, 0, 1)
    if bits <= 4:
        assert bins.shape == (128,)
        place = np.rint(place * (2**21 - 1)).astype(np.int64)
        entry = bins.view(np.uint32)[place >> 16].astype(np.int64)
        own = np.where((place & 0xFFFF) > entry >> 16, entry >> 8, entry) & 255
        assert (own != nearest).mean() < 1e-4
    else:
        assert bins.shape == (rotate_encode_cuda.BINS,)
        own = bins[np.rint(place * (rotate_encode_cuda.BINS - 1)).astype(np.int64)]
        assert (own != nearest).mean() < FLIPS[bits]
        assert set(bins) == set(levels)
    assert own[-999:][0] == levels[0]
    assert own[-1] == levels[-1]


def decode(packed, scales, biases, table, scale, bits, dim, states=0, resident=None, reverse=False):
    """Bytes, row scales and biases of several weights, one after the other, by blocks of 64 threads."""
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
    defines = decode_cuda.compile_options(bits, states, len(sizes), bool(biases)) | {"THREADS": 64}
    launch("decode.cu", "decode", (blocks, 1, 1), 64, 0, arguments, defines, reverse)
    return values, row_scales, collected


DECODED = [
    ((1,), 16, False),
    ((7,), 48, False),
    ((9,), 3072, False),
    ((300,), 16, False),
    ((3, 5), 64, True),
    ((2, 1, 70), 48, False),
    ((1, 40, 2, 3), 32, True),
]
"""Rows of each weight, their width, and whether they have biases."""


def some_weights(rows, dim, bias, bits):
    generator = torch.Generator().manual_seed(bits)
    codes = [torch.randint(1 << bits, (n, dim), generator=generator).to(torch.uint8) for n in rows]
    scales = [random(n, seed=i).exp().bfloat16() for i, n in enumerate(rows)]
    biases = [random(n, seed=9 + i).half() for i, n in enumerate(rows)] if bias else None
    return codes, [pack(c, bits) for c in codes], scales, biases


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("rows", "dim", "bias"), DECODED)
def test_decode_is_exact(rows, dim, bias, bits, grid):
    """Weights are decoded one after the other, and their biases collected."""
    _, packed, scales, biases = some_weights(rows, dim, bias, bits)
    expected, expected_scales = reference.decode(torch.cat(packed), torch.cat(scales), bits, dim, grid)
    values, scale = weight_points_on(dim, bits, 0, grid)
    table = torch.from_numpy(decode_cuda.table_of(values, bits, 0, 1, grid))
    for reverse in (False, True):
        found, row_scales, collected = decode(packed, scales, biases, table, scale, bits, dim, reverse=reverse)
        assert torch.equal(found, expected.view(torch.uint8))
        assert torch.equal(row_scales, expected_scales)
        assert collected is None or torch.equal(collected, torch.cat(biases))


def windows(codes, bits, states):
    """The last `states` bits of each row's stream up to the end of each code, bit by bit."""
    stream = (codes.numpy()[..., None] >> np.arange(bits) & 1).reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (states - bits, 0)))
    return sum(stream[:, k : k + codes.shape[1] * bits : bits].astype(np.int64) << k for k in range(states))


TRELLISES = [(2, 4), (2, 8), (2, 12), (3, 9), (3, 12), (4, 4), (4, 10), (4, 12)]


@pytest.mark.parametrize(
    ("rows", "dim", "bias", "bits", "states"),
    [
        (*weights, *trellis)
        for weights in DECODED
        for trellis in TRELLISES
        if len(weights[0]) == 1 or trellis == (3, 12)
    ],
)
def test_decode_of_trellis_codes_is_exact(rows, dim, bias, bits, states):
    """Rows begin with zeros, whatever the row before ended with; and fewer blocks than chunks."""
    codes, packed, scales, biases = some_weights(rows, dim, bias, bits)
    values = torch.randint(-127, 128, (1 << states,), generator=torch.Generator().manual_seed(states)).double()
    expected = values.numpy().astype(np.int8)[windows(torch.cat(codes), bits, states)]
    at_once = decode_cuda.compile_options(bits, states, 1, False)["CODES"]
    table = torch.from_numpy(decode_cuda.table_of(values, bits, states, at_once, "int8"))
    for reverse, resident in ((False, None), (True, 1), (False, 2)):
        found, row_scales, collected = decode(packed, scales, biases, table, 0.25, bits, dim, states, resident, reverse)
        assert np.array_equal(found.view(torch.int8).numpy(), expected)
        assert torch.equal(row_scales, torch.cat(scales).float() / 4)
        assert collected is None or torch.equal(collected, torch.cat(biases))


def test_blocks_that_decode_end_together():
    assert decode_cuda.blocks_for(1, 512, 528) == 1
    assert decode_cuda.blocks_for(3072 * 192, 512, None) == 576
    assert decode_cuda.blocks_for(3072 * 192, 512, 528) == 288


@pytest.mark.parametrize("bias", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rows"), [(1, 16), (5, 48), (3, 400)])
@pytest.mark.parametrize("kind_of_sums", [torch.int32, torch.float32])
def test_scaling_is_what_the_definition_does_to_sums(kind_of_sums, count, rows, dtype, bias):
    generator = torch.Generator().manual_seed(rows)
    values, weight = (torch.randint(-127, 128, (n, 64), generator=generator).to(torch.int8) for n in (count, rows))
    token_scales, row_scales = random(count).exp(), random(rows, seed=1).exp() / 1000
    bias = None if bias is None else random(rows, seed=2).to(bias)
    sums, y = (values.int() @ weight.int().T).to(kind_of_sums), torch.full((count, rows), torch.nan, dtype=dtype)
    arguments = [sums, token_scales, row_scales, y if bias is None else bias, y, count, rows]
    defines = matmul_cuda.compile_options(kind_of_sums, dtype, None if bias is None else bias.dtype) | {"THREADS": 64}
    launch("scale.cu", "scale", (2, 1, 1), 64, 0, arguments, defines)
    assert torch.equal(y, reference.matmul(values, token_scales, weight, row_scales, bias, dtype))


def test_a_missing_library_is_named():
    with pytest.raises(DependencyError, match="libnothing"):
        nvrtc._library("libnothing.so.0")
