"""The bit layout: golden bytes written out, a reader that goes bit by bit, and density."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from orbitdit import ConfigError, TensorError
from orbitdit.packing import pack, packed_width, unpack
from parameters import AWKWARD, GRID_BITS, REAL_WIDTHS, WEIGHT_BITS

GOLDEN = [
    (2, [0, 1, 2, 3], [0b11_10_01_00]),
    (2, [3, 0, 0, 0, 1], [0b00_00_00_11, 0b00_00_00_01]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    (3, [7], [0b00000_111]),
    (3, [0, 0, 6], [0b10_000_000, 0b0000000_1]),
    (4, [0x1, 0x2, 0xF], [0x21, 0x0F]),
    (4, [0xA, 0x5, 0x0, 0xC], [0x5A, 0xC0]),
    (6, [0b000001, 0b100010, 0b111111, 0b010101], [0b10_000001, 0b1111_1000, 0b010101_11]),
    (6, [0b110011, 0b101010], [0b10_110011, 0b0000_1010]),
    (8, [0x00, 0x7F, 0x80, 0xFF], [0x00, 0x7F, 0x80, 0xFF]),
]


def bytes_tensor(values):
    return torch.tensor(values, dtype=torch.uint8)


def random_codes(shape, bits, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8))


@pytest.mark.parametrize(("bits", "codes", "packed"), GOLDEN)
def test_golden_bytes(bits, codes, packed):
    got = pack(bytes_tensor(codes), bits)
    assert got.dtype == torch.uint8
    assert got.tolist() == packed
    assert unpack(bytes_tensor(packed), bits, len(codes)).tolist() == codes


def test_rows_start_at_their_own_byte():
    codes = bytes_tensor([[[1, 2, 3], [4, 5, 6]], [[7, 0, 7], [0, 0, 0]]])
    packed = bytes_tensor([[[0b11_010_001, 0], [0b10_101_100, 1]], [[0b11_000_111, 1], [0, 0]]])
    assert torch.equal(pack(codes, 3), packed)
    assert torch.equal(unpack(packed, 3, 3), codes)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(bits=st.sampled_from(WEIGHT_BITS), dim=st.integers(1, 300), rows=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_round_trip_at_full_density(bits, dim, rows, seed):
    codes = random_codes((rows, dim), bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-dim * bits // 8))
    assert packed_width(dim, bits) == -(-dim * bits // 8)
    got = unpack(packed, bits, dim)
    assert got.dtype == torch.uint8
    assert torch.equal(got, codes)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("dim", [2, 7, *AWKWARD, 256])
def test_a_reader_that_goes_bit_by_bit_agrees(dim, bits):
    codes = random_codes((3, dim), bits)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(oracle.unpack(packed.numpy(), bits, dim), codes.numpy())
    np.testing.assert_array_equal(oracle.unpack(packed.numpy(), bits, dim), unpack(packed, bits, dim).numpy())


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("dim", [2, 3, 5, 7, *AWKWARD])
def test_padding_bits_are_zero(dim, bits):
    last = pack(torch.full((2, dim), 2**bits - 1, dtype=torch.uint8), bits)[:, -1]
    used = (dim * bits - 1) % 8 + 1
    assert last.tolist() == [2**used - 1] * 2


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("dim", REAL_WIDTHS)
def test_real_widths_are_dense(dim, bits):
    """Whole bytes for whole rows: every byte value of every position comes back."""
    codes = random_codes((4, dim), bits)
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits, dim), codes)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_non_contiguous_and_empty_inputs(bits):
    codes = random_codes((6, 40), bits)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    assert torch.equal(pack(codes[:, ::2], bits), pack(codes[:, ::2].clone(), bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed[::2], bits, 40), codes[::2])
    assert torch.equal(unpack(packed.T.contiguous().T, bits, 40), codes)
    assert pack(codes[:0], bits).shape == (0, 5 * bits)
    assert unpack(packed[:0], bits, 40).shape == (0, 40)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 9, 16, -2])
def test_bits_without_a_layout_are_refused(bits):
    for call in (
        lambda: packed_width(8, bits),
        lambda: pack(torch.zeros(1, 8, dtype=torch.uint8), bits),
        lambda: unpack(torch.zeros(1, 8, dtype=torch.uint8), bits, 8),
    ):
        with pytest.raises(ConfigError, match=str(bits)):
            call()


@pytest.mark.parametrize("bits", GRID_BITS)
def test_codes_too_large_are_refused(bits):
    codes = torch.full((2, 9), 2**bits - 1, dtype=torch.uint8)
    pack(codes, bits)
    codes[1, 8] += 1
    with pytest.raises(TensorError, match=str(2**bits)):
        pack(codes, bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_other_types_are_refused(dtype):
    with pytest.raises(TensorError):
        pack(torch.zeros(2, 8, dtype=dtype), 4)
    with pytest.raises(TensorError):
        unpack(torch.zeros(2, 4, dtype=dtype), 4, 8)


@pytest.mark.parametrize("width", [0, 2, 4])
def test_packed_tensors_of_another_size_are_refused(width):
    """Eight codes of three bits are three bytes; a byte less or more is a damaged file, not a guess."""
    with pytest.raises(TensorError, match="3"):
        unpack(torch.zeros(2, width, dtype=torch.uint8), 3, 8)


def test_a_scalar_is_refused():
    with pytest.raises(TensorError):
        pack(torch.tensor(1, dtype=torch.uint8), 4)
    with pytest.raises(TensorError):
        unpack(torch.tensor(1, dtype=torch.uint8), 4, 1)
