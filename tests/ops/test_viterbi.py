"""The Viterbi kernel, run on the CPU by the emulator, against the algorithm in numpy and an exhaustive search."""

import itertools

import numpy as np
import pytest
import torch

from cuda_emulator import Launch, launch
from orbitdit.codebooks import trellis
from orbitdit.errors import TensorError
from orbitdit.ops.viterbi import cuda as viterbi_cuda
from orbitdit.ops.viterbi.reference import viterbi


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_definition(z, table, bits):
    """Costs in fp32, state by state; numpy's argmin takes the first of equals."""
    states = len(table)
    cost = np.full(states, np.inf, np.float32)
    cost[0] = 0
    decisions = []
    for number in z:
        decisions.append(cost.reshape(-1, 1 << bits).argmin(1))
        least = cost.reshape(-1, 1 << bits).min(1)
        off = number - table
        cost = np.tile(least, 1 << bits) + off * off
    assert cost.dtype == np.float32
    state = int(cost.argmin())
    codes = []
    for decided in reversed(decisions):
        group = state % len(decided)
        codes.append(state // len(decided))
        state = group << bits | int(decided[group])
    return np.array(codes[::-1], np.uint8)


def windows(codes, bits, states):
    """The state after each code of a row."""
    state, found = 0, []
    for code in codes:
        state = state >> bits | int(code) << (states - bits)
        found.append(state)
    return found


def encode(z, table, bits, blocks=2, reverse=False):
    (rows, dim), states = z.shape, len(table).bit_length() - 1
    defines = viterbi_cuda.compile_options(bits, states)
    threads = defines["THREADS"]
    codes = torch.full((rows, dim), 255, dtype=torch.uint8)
    workspace = torch.full((blocks * -(-dim // 4) * 4 * threads,), 255, dtype=torch.uint8)
    arguments = [torch.from_numpy(z), torch.from_numpy(table), workspace, codes, rows, dim]
    how = Launch((blocks, 1, 1), threads, reverse=reverse)
    launch("viterbi/viterbi.cu", "viterbi", how, arguments, defines)
    return codes.numpy()


def check(z, table, bits, **how):
    expected = np.stack([by_definition(row, table, bits) for row in z])
    np.testing.assert_array_equal(encode(z, table, bits, **how), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bits", viterbi_cuda.BITS)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 4), (9, 63), (5, 137)])
def test_codes_are_those_of_the_definition(rows, dim, bits, reverse):
    """Rows that are no multiple of those of a block, more of them than blocks, and parts of words and chunks."""
    check(numbers(rows, dim), numbers(256, seed=1), bits, reverse=reverse)


@pytest.mark.parametrize(("bits", "states"), [(2, 9), (2, 10), (3, 10), (4, 10), (2, 12), (3, 12), (4, 12)])
def test_every_number_of_states(bits, states):
    table = numbers(1 << states, seed=1)
    for reverse in (False, True):
        check(numbers(3, 22), table, bits, blocks=1 + reverse, reverse=reverse)


@pytest.mark.parametrize(("bits", "states"), [(2, 8), (3, 8), (4, 8), (2, 12)])
def test_codes_are_those_of_the_cpu(bits, states):
    """The tables that are shipped, whose values are few and mostly stand twice: ties are common."""
    z = numbers(5, 96)
    table = trellis.table(bits, states).float()
    codes = viterbi(torch.from_numpy(z), table, bits)
    np.testing.assert_array_equal(encode(z, table.numpy(), bits), codes.numpy())


@pytest.mark.parametrize("bits", viterbi_cuda.BITS)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_take_the_lowest_state(bits, levels):
    """Few different values, and numbers midway between them: most costs are equal."""
    table = (np.random.default_rng(0).integers(levels, size=256) - levels // 2).astype(np.float32)
    z = (np.random.default_rng(1).integers(-8, 9, (9, 41)) / 4).astype(np.float32)
    check(z, table, bits)
    check(z, table, bits, reverse=True)


def test_states_that_cannot_be_reached_stay_so():
    """Only two codes: the start is state 0, whatever the others would save."""
    table = np.full(256, 1e6, np.float32)
    reached = [windows([a, b], 2, 8) for a in range(4) for b in range(4)]
    table[[state for path in reached for state in path]] = 1e18
    check(np.zeros((2, 2), np.float32), table, 2)
    check(np.full((2, 9), 3e18, np.float32), table, 2)


@pytest.mark.parametrize("bits", viterbi_cuda.BITS)
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_no_other_codes_have_less_error(bits, dim):
    if bits * dim > 12:
        dim = 12 // bits
    z, table = numbers(4, dim), numbers(256, seed=1)
    every = list(itertools.product(range(1 << bits), repeat=dim))
    values = table[np.array([windows(codes, bits, 8) for codes in every])].astype(np.float64)
    errors = ((z[:, None] - values) ** 2).sum(-1)
    assert encode(z, table, bits).tolist() == [list(every[at]) for at in errors.argmin(1)]


@pytest.mark.parametrize(
    ("rows", "dim", "states", "blocks"),
    [
        (1, 1, 12, 1),
        (3072, 3072, 12, 615),  # five rounds of 660 blocks and fewer
        (3072, 15360, 12, 512),  # 546 blocks of 3.9 MB are allowed
        (18432, 3072, 8, 659),  # four rows a block, seven rounds
    ],
)
def test_blocks_and_their_workspace(rows, dim, states, blocks):
    threads = viterbi_cuda.compile_options(2, states)["THREADS"]
    found, size = viterbi_cuda.blocks_and_workspace(rows, dim, states, threads, 132 * 5)
    assert found == blocks
    assert size == blocks * -(-dim // 4) * 4 * threads <= viterbi_cuda.WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("z", "table", "bits", "message"),
    [
        (torch.zeros(2, 16), torch.zeros(256), 6, "2 to 4 bits .* got 6 bits and 256 values"),
        (torch.zeros(2, 16), torch.zeros(128), 2, "2 bits and 128 values"),
        (torch.zeros(2, 16), torch.zeros(300), 2, "2 bits and 300 values"),
        (torch.zeros(2, 16), torch.zeros(256), 2, "fp32 rows on CUDA; got torch.float32 .* on cpu"),
        (torch.zeros(2, 16).double(), torch.zeros(256), 2, "got torch.float64"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(z, table, bits, message):
    with pytest.raises(TensorError, match=message):
        viterbi_cuda.encode(z, table, bits)
