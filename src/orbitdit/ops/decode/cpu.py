"""`decode` on a CPU: a run of codes that fills whole bytes is a word of 8 or 12 bits, and one look-up in a table of 256
or 4096 entries gives the values of all its codes; codes whose indices slide along the row are looked up in pairs."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orbitdit.codebooks import points, points_on, window
from orbitdit.codebooks.lloyd_max import look_up
from orbitdit.packing import unpack
from orbitdit.spec import WeightCode
from orbitdit.tables import constant

Array = np.ndarray[Any, np.dtype[Any]]
CPU = torch.device("cpu")


@constant
def weight_values(code: WeightCode, dim: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The points of stored codes, in `dtype` (int8, bf16 or fp32), and the scale that belongs to them."""
    return points_on(code, dim, "int8", CPU) if dtype == torch.int8 else points(code, dim, CPU, dtype)


def decode(codes: Tensor, code: WeightCode, dim: int, dtype: torch.dtype) -> Tensor:
    """Values (rows, dim) of packed `codes` (rows, bytes) uint8, in `dtype`: int8, bf16 or fp32."""
    if window(code) > code.bits:
        words, table = _windows_of_two(codes, code.bits, window(code)), _values_of_windows(code, dim, dtype)
    elif dtype == torch.float32:
        return look_up(unpack(codes, code.bits, dim), weight_values(code, dim, dtype)[0])
    else:
        words, table = _words(codes, code.bits), _values_of_words(code, dim, dtype)
    return table.index_select(0, words).view(dtype).view(len(codes), -1)[:, :dim]


def _windows_of_two(codes: Tensor, bits: int, window: int) -> Tensor:
    """The last `window` + `bits` bits of the stream after every second code, as int32 (rows * pairs,)."""
    pairs = math.lcm(2 * bits, 8) // (2 * bits)
    period = pairs * 2 * bits // 8
    groups = -(-codes.shape[1] // period)
    before = 2  # bytes of zeros, where the stream begins: the largest window reaches 8 to 10 bits back
    data = np.zeros((len(codes), before + groups * period + 2), np.uint8)
    data[:, before : before + codes.shape[1]] = codes.numpy()
    words = np.empty((len(codes), groups, pairs), np.int32)
    mask = np.uint32((1 << window + bits) - 1)
    for pair in range(pairs):
        byte, shift = divmod(8 * before + (2 * pair + 2) * bits - window - bits, 8)
        four: Array = np.ndarray(words.shape[:2], "<u4", data, byte, (data.shape[1], period))
        np.bitwise_and(four >> np.uint32(shift), mask, out=words[:, :, pair], casting="unsafe")
    return torch.from_numpy(words).flatten()


@constant
def _values_of_windows(code: WeightCode, dim: int, dtype: torch.dtype) -> Tensor:
    """The values of two codes that follow each other, side by side in one integer, for each window on both."""
    bits = window(code)
    both = torch.arange(1 << bits + code.bits)
    indices = torch.stack([both & (1 << bits) - 1, both >> code.bits], 1)
    return _side_by_side(weight_values(code, dim, dtype)[0][indices])


def _words(codes: Tensor, bits: int) -> Tensor:
    """The bytes of `codes`, or for 3 and 6 bits its words of 12 bits, as int32 (words,)."""
    if 8 % bits == 0:
        return codes.flatten().int()
    data = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 3)).contiguous().numpy()
    pairs = data.size // 3
    words = np.empty((pairs, 2), np.int32)
    first: Array = np.ndarray(pairs, "<u2", data, 0, 3)
    second: Array = np.ndarray(pairs, "<u2", data, 1, 3)
    np.bitwise_and(first, 4095, out=words[:, 0])
    np.right_shift(second, 4, out=words[:, 1])
    return torch.from_numpy(words).flatten()


@constant
def _values_of_words(code: WeightCode, dim: int, dtype: torch.dtype) -> Tensor:
    """The values of all codes of a word, side by side in one integer, for each word."""
    bits = code.bits
    word = 8 if 8 % bits == 0 else 12
    codes = torch.arange(1 << word)[:, None] >> torch.arange(0, word, bits) & (1 << bits) - 1
    return _side_by_side(weight_values(code, dim, dtype)[0][codes])


def _side_by_side(values: Tensor) -> Tensor:
    """Each row of `values`, which takes 2, 4 or 8 bytes, as one integer."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.shape[1] * values.itemsize]
    return values.view(integer).flatten()
