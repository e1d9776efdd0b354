"""The kernel of `decode`, run by the emulator: exactly the definition's bytes."""

import numpy as np
import pytest
import torch
from emulated import decode

from encoding_checks import random
from orbitdit.codebooks import CODEBOOKS
from orbitdit.grids import GRIDS, INT8
from orbitdit.ops.decode import cuda as decode_cuda
from orbitdit.ops.decode import reference
from orbitdit.packing import PACKED_BITS, pack
from specs import spec

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
    return codes, ([pack(c, bits) for c in codes], scales, biases)


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("rows", "dim", "bias"), DECODED)
def test_decode_is_exact(rows, dim, bias, bits, grid):
    """Weights are decoded one after the other, and their biases collected."""
    _, (packed, scales, biases) = some_weights(rows, dim, bias, bits)
    layer = spec(dim, sum(rows), bits)
    expected, expected_scales = reference.decode(torch.cat(packed), torch.cat(scales), layer, grid)
    values, scale = CODEBOOKS["scalar"].points_on(layer.weight, dim, GRIDS[grid])
    table = torch.from_numpy(decode_cuda.table_of(GRIDS[grid].bytes_of(values), bits, bits, 1))
    for reverse in (False, True):
        weights = packed, scales, biases
        found, row_scales, collected = decode(weights, (table, scale), bits, dim, bits, reverse=reverse)
        assert torch.equal(found, expected.view(torch.uint8))
        assert torch.equal(row_scales, expected_scales)
        assert collected is None or torch.equal(collected, torch.cat(biases))


def windows(codes, bits, states):
    """The last `states` bits of each row's stream up to the end of each code, bit by bit."""
    stream = (codes.numpy()[..., None] >> np.arange(bits) & 1).reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (states - bits, 0)))
    return sum(stream[:, k : k + codes.shape[1] * bits : bits].astype(np.int64) << k for k in range(states))


TRELLISES = [(2, 4), (2, 8), (2, 12), (3, 9), (3, 12), (4, 5), (4, 10), (4, 12)]


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
    codes, weights = some_weights(rows, dim, bias, bits)
    values = torch.randint(-127, 128, (1 << states,), generator=torch.Generator().manual_seed(states)).double()
    expected = values.numpy().astype(np.int8)[windows(torch.cat(codes), bits, states)]
    at_once = decode_cuda.compile_options(bits, states, 1, False)["CODES"]
    table = torch.from_numpy(decode_cuda.table_of(INT8.bytes_of(values), bits, states, at_once))
    _, scales, biases = weights
    for reverse, resident in ((False, None), (True, 1), (False, 2)):
        found, row_scales, collected = decode(weights, (table, 0.25), bits, dim, states, resident, reverse)
        assert np.array_equal(found.view(torch.int8).numpy(), expected)
        assert torch.equal(row_scales, torch.cat(scales).float() / 4)
        assert collected is None or torch.equal(collected, torch.cat(biases))


def test_blocks_that_decode_end_together():
    assert decode_cuda.blocks_for(1, 512, 528) == 1
    assert decode_cuda.blocks_for(3072 * 192, 512, None) == 576
    assert decode_cuda.blocks_for(3072 * 192, 512, 528) == 288
