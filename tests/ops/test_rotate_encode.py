"""The kernel of `rotate_encode`, run by the emulator, against its definition, and the tables that it reads."""

import numpy as np
import pytest
import torch
from emulated import How, rotate_encode

import oracle
from encoding_checks import FLIPS, NORMS, defined, flips, random, tokens, tokens_of_one_input
from orbitdit.codebooks.lloyd_max import on_grid
from orbitdit.grids import GRIDS
from orbitdit.ops import CUDA_GRIDS
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.rotate_encode.cuda import Tile

DTYPES = [torch.bfloat16, torch.float16]
DIMS = [16, 48, 64, 128, 192, 256, 960, 1536, 1920, 2048, 3072, 3840, 4096, 12288]


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


@pytest.mark.parametrize("grid", CUDA_GRIDS)
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
    values, scales = rotate_encode(x, 4, "e4m3", how=How(tile))
    assert flips((values, scales), x, 4, "e4m3") <= 3 + 1e-3 * x.numel()
    for blocks, reverse in ((1, True), (5, False), (5, True)):
        again, scales_again = rotate_encode(x, 4, "e4m3", how=How(tile, blocks, reverse))
        assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("dim", [16, 3072, 4096, 12288])
def test_the_order_of_threads_does_not_show(dim):
    x = tokens(3, dim)
    for bits in (4, 6):
        first, second = (rotate_encode(x, bits, "int8", how=How(reverse=reverse)) for reverse in (False, True))
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
    zeros = defined(x[2:3], bits, "e4m3")[0]
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
        expected, expected_scales = defined(x, bits, "e4m3")
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)


def test_no_tokens():
    assert rotate_encode(torch.empty(0, 64).bfloat16(), 4, "int8")[0].shape == (0, 64)


def test_widths_that_the_kernel_takes():
    taken = {16, 48, 1920, 5120, 8960, 10240, 12288, 13824, 15360, 20480, 24064}
    assert all(rotate_encode_cuda.has_kernel(dim) for dim in taken)
    assert not any(rotate_encode_cuda.has_kernel(dim) for dim in (1, 8, 63, 120, 8192, 24080, 24576, 32768))


def test_every_width_fits_into_the_shared_memory_of_every_device():
    """99 KiB a block on compute capability 8.6 and 8.9, of which 6 bits take 4 KiB for their bins."""
    for dim in filter(rotate_encode_cuda.has_kernel, range(16, 2**15, 16)):
        for prologue in rotate_encode_cuda.SIGNATURES:
            tile = rotate_encode_cuda.tile_of(dim, prologue)
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


@pytest.mark.parametrize("grid", CUDA_GRIDS)
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("dim", [16, 64, 3072, 15360])
def test_bins_hold_the_nearest_levels(dim, bits, grid):
    """Looked up in fp64 as the kernel does in fp32."""
    bins, slope, scale = rotate_encode_cuda.code_bins(dim, bits, grid)
    codebook = on_grid(dim, bits, grid, True)
    assert scale == codebook.scale
    boundaries, levels = codebook.boundaries.numpy() * dim**0.5, GRIDS[grid].bytes_of(codebook.values)
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
