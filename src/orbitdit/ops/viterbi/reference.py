"""`viterbi` on the CPU, in numpy: the codes of least squared error on a trellis. See `codebooks.trellis`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK_STATES = 1 << 17
"""Rows times states that a thread works on at a time: what its core's cache holds."""


def viterbi(z: Tensor, points: Tensor, bits: int) -> Tensor:
    """Codes (rows, dim) uint8 of `z` (rows, dim) fp32 by any table `points` (2**states,) fp32, states >= 2 * bits.
    Rows are shared by threads."""
    codes = torch.empty(z.shape, dtype=torch.uint8)
    numbers, values, found = z.numpy(), points.numpy(), codes.numpy()
    rows = max(1, CHUNK_STATES // len(values))

    def encode_chunk(start: int) -> None:
        found[start : start + rows] = _viterbi(numbers[start : start + rows], values, bits)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in pool.map(encode_chunk, range(0, len(z), rows)):
            assert done is None  # an exception of a thread is raised here
    return codes


def _viterbi(z: Array, points: Array, bits: int) -> Array:
    """Codes (rows, dim) of `z` (rows, dim), all rows together.

    A state is s = (c, h, j): its newest code, what lies between, and its oldest code. Distances lie as (rows, j, c, h),
    so that minima over j and sums over c run along memory; only the minima, a 2^-b of the whole, are transposed.
    """
    rows, dim = z.shape
    choices = 1 << bits
    between = len(points) >> 2 * bits
    groups = between * choices
    shape = (rows, choices, choices, between)
    targets = np.ascontiguousarray(points.reshape(choices, between, choices).transpose(2, 0, 1))
    distance = np.full(shape, np.inf, np.float32)
    distance[:, 0, 0, 0] = 0
    error, carried = np.empty(shape, np.float32), np.empty((rows, choices, 1, between), np.float32)
    least = [np.empty((rows, choices >> level, groups), np.float32) for level in range(1, bits + 1)]
    upper_wins = [np.empty(minima.shape, bool) for minima in least]
    wins = [np.empty((dim, -(-flags.size // 8)), np.uint8) for flags in upper_wins]
    for i in range(dim):
        minima = distance.reshape(rows, choices, groups)
        for level in range(bits):  # a knockout between neighbours, in which the lower j stays on a tie
            lower, upper = minima[:, 0::2], minima[:, 1::2]
            np.less(upper, lower, out=upper_wins[level])
            wins[level][i] = np.packbits(upper_wins[level], bitorder="little")
            minima = np.minimum(lower, upper, out=least[level])
        carried[:, :, 0] = minima.reshape(rows, between, choices).swapaxes(1, 2)
        np.subtract(z[:, i, None, None, None], targets, out=error)
        np.multiply(error, error, out=error)
        np.add(carried, error, out=distance)
    last = distance.transpose(0, 2, 3, 1).reshape(rows, -1).argmin(1)
    return _trace(last, wins, bits, groups)


def _trace(state: Array, wins: list[Array], bits: int, groups: int) -> Array:
    """Codes (rows, dim) of the way that ends in `state` (rows,), back through the winners of each step."""
    codes = np.empty((len(wins[0]), len(state)), np.uint8)
    row = np.arange(len(state))
    for i in reversed(range(len(codes))):
        group, codes[i] = state & groups - 1, state // groups
        j = np.zeros_like(state)
        for level in reversed(range(bits)):
            flag = (row * (1 << bits - 1 - level) + j) * groups + group
            j = 2 * j + (wins[level][i].take(flag >> 3) >> (flag & 7).astype(np.uint8) & 1)
        state = group << bits | j
    return codes.T
