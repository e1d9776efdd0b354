"""The trellis: its tables, the search against an exhaustive one, windows bit by bit, and what it gains."""

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from orbitdit import CheckpointError, ConfigError
from orbitdit.codebooks import indices, points_on, trellis
from orbitdit.codebooks import window as window_of
from orbitdit.ops.decode import cpu as decode_cpu
from orbitdit.ops.decode.reference import decode
from orbitdit.ops.viterbi import reference
from orbitdit.ops.viterbi.reference import viterbi
from orbitdit.packing import pack
from orbitdit.quantize import check_spec, search, search_device
from parameters import TRELLISES
from specs import code, spec
from training import train_trellis

GOLDEN = [[2, 3, 2, 2, 1, 2], [1, 0, 3, 0, 3, 2]]
LOG = [json.loads(line) for line in (Path(__file__).parents[1] / "training/trellis_log.jsonl").read_text().splitlines()]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_codes(rows, dim, bits, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, (rows, dim), np.uint8))


def states_of(codes, bits, states):
    """The last `states` bits of the row's stream after each code, the oldest lowest; zeros before the first."""
    found = np.zeros(codes.shape, np.int64)
    for r, row in enumerate(codes.tolist()):
        stream = [0] * states
        for i, new in enumerate(row):
            stream += [new >> bit & 1 for bit in range(bits)]
            found[r, i] = sum(bit << place for place, bit in enumerate(stream[-states:]))
    return found


def error(z, codes, table, bits):
    return np.square(z - table[states_of(codes, bits, len(table).bit_length() - 1)]).sum(-1)


@pytest.mark.parametrize(("bits", "states"), TRELLISES)
def test_tables_lie_on_points_that_every_device_multiplies_exactly(bits, states):
    table = trellis.table(bits, states)
    assert (table.shape, table.dtype) == ((1 << states,), torch.float64)
    assert trellis.table(bits, states) is table
    for grid in ("e4m3", "int8"):
        values, step = points_on(code(bits, states), 64, grid, torch.device("cpu"))
        assert torch.equal(values.double() / 32, table)
        assert step == 1 / 32 / 8
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert torch.equal(table.to(dtype).double(), table)
    assert abs(table.mean()) < 0.05
    assert table.std().item() == pytest.approx(1, abs=0.1)


def test_golden_codes_of_a_small_trellis():
    """Every one of the 4^6 sequences of six codes of two bits, on 16 states."""
    z, table = numbers(12, 6), numbers(16, seed=1)
    sequences = np.array(list(itertools.product(range(4), repeat=6)), np.uint8)
    values = table.astype(np.float64)[states_of(sequences, 2, 4)]
    best = np.square(z[:, None].astype(np.float64) - values).sum(-1).argmin(1)
    codes = viterbi(torch.from_numpy(z), torch.from_numpy(table), 2)
    np.testing.assert_array_equal(codes.numpy(), sequences[best])
    assert codes[:2].tolist() == GOLDEN


def by_definition(z, table, bits):
    """One row, state by state, each operation in fp32; numpy's argmin takes the first of equals."""
    cost = np.where(np.arange(len(table)) == 0, np.float32(0), np.float32(np.inf))
    decided = []
    for number in z:
        groups = cost.reshape(-1, 1 << bits)
        decided.append(groups.argmin(1))
        off = number - table
        cost = np.tile(groups.min(1), 1 << bits) + off * off
    state, codes = int(cost.argmin()), []
    for lowest in reversed(decided):
        codes.append(state // len(lowest))
        state = state % len(lowest)
        state = state << bits | int(lowest[state])
    return codes[::-1]


@pytest.mark.parametrize("dim", [1, 2, 5, 63])
@pytest.mark.parametrize(("bits", "states"), [(2, 4), (2, 5), (2, 8), (3, 7), (3, 8), (4, 8), (1, 6), (3, 10)])
def test_codes_are_the_definitions_ties_included(bits, states, dim):
    """Coarse numbers and a table of few values tie at every step."""
    for z, table in (
        (numbers(3, dim), numbers(1 << states, seed=1)),
        (numbers(3, dim).round(), numbers(1 << states, seed=1).round()),
    ):
        codes = viterbi(torch.from_numpy(z), torch.from_numpy(table), bits)
        assert codes.dtype == torch.uint8
        assert codes.tolist() == [by_definition(row, table, bits) for row in z]


@pytest.mark.parametrize(("bits", "states"), [(2, 8), (3, 10), (2, 12)])
def test_rows_do_not_depend_on_each_other(bits, states):
    """More rows than are worked on at a time, in one call and one by one, from any thread and with any strides."""
    rows, coded = (reference.CHUNK_STATES >> states) + 3, code(bits, states)
    z = torch.from_numpy(numbers(2 * rows, 22))[::2]
    codes = search(z, coded, 22)
    assert torch.equal(codes[-5:], torch.cat([search(row[None], coded, 22) for row in z[-5:]]))
    found = []
    thread = threading.Thread(target=lambda: found.append(search(z.contiguous(), coded, 22)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], codes)


def test_no_rows():
    assert search(torch.zeros(0, 40), code(2, 8), 40).shape == (0, 40)


@pytest.mark.parametrize("dim", [1, 2, 3, 63, 137])
@pytest.mark.parametrize(("bits", "states"), TRELLISES)
def test_windows_and_decoding_against_the_stream_bit_by_bit(bits, states, dim):
    codes = random_codes(5, dim, bits, dim)
    expected = states_of(codes, bits, states)
    layer = spec(dim, 5, bits, states=states)
    assert window_of(layer.weight) == states
    np.testing.assert_array_equal(indices(codes, layer.weight).numpy(), expected)
    packed, table = pack(codes, bits), trellis.table(bits, states)
    for dtype, unit in ((torch.int8, 32), (torch.bfloat16, 1), (torch.float32, 1)):
        values = decode_cpu.decode(packed, layer.weight, dim, dtype)
        assert values.dtype == dtype
        assert torch.equal(values.double(), table[expected] * unit)
    scales = torch.from_numpy(numbers(5)).exp().bfloat16()
    for grid in ("e4m3", "int8"):
        values, row_scales = decode(packed, scales, layer, grid)
        assert torch.equal(values.double() / 32, table[expected])
        np.testing.assert_allclose(row_scales.double() * 32, scales.double() / dim**0.5, rtol=1e-6)


def test_decoding_takes_any_strides():
    codes = pack(random_codes(6, 64, 2), 2)
    wide = torch.stack([codes, codes], 2)[:, :, 0]
    expected = decode_cpu.decode(codes, code(2, 12), 64, torch.int8)
    assert torch.equal(decode_cpu.decode(wide, code(2, 12), 64, torch.int8), expected)


@pytest.mark.parametrize(("bits", "most", "scalar"), [(2, 0.0715, 0.11748), (3, 0.0187, 0.03454)])
def test_error_on_normal_rows(bits, most, scalar):
    """Of 3,072 weights, from the fixed start: far below the best scalar codes, in reach of the bound 4^-bits."""
    z = numbers(48, 3072, seed=3)
    codes = search(torch.from_numpy(z), code(bits, 12), 3072)
    mse = error(z.astype(np.float64), codes, trellis.table(bits, 12).numpy(), bits).mean() / 3072
    assert 4.0**-bits < mse < most < 0.62 * scalar
    logged = next(line["mse"] for line in LOG if (line["bits"], line["states"]) == (bits, 12))
    assert mse == pytest.approx(logged, rel=0.01)


def test_what_training_found():
    """One line for each table; points of both grids instead of any cost 0.2% at 2^12 states and 2 or 3 bits."""
    figures = {(line["bits"], line["states"]): line for line in LOG}
    assert sorted(figures) == sorted(TRELLISES)
    for (bits, states), line in figures.items():
        assert line["mse"] <= (1.002 if states == 12 and bits < 4 else 1.013) * line["mse_free"]
        assert 4.0**-bits < line["mse"] < oracle.mean_squared_error(4096, *scalar_codebook(bits))
    assert figures[2, 12]["mse"] <= 0.0715
    assert figures[3, 12]["mse"] <= 0.0187
    for bits in (2, 3, 4):
        assert figures[bits, 12]["mse"] < figures[bits, 10]["mse"] < figures[bits, 8]["mse"]


def test_training_in_small(monkeypatch, capsys):
    """A few rounds on few numbers: the error falls, and successors of a state start in different quarters."""
    monkeypatch.setattr(train_trellis, "ROWS", 128)
    monkeypatch.setattr(train_trellis, "FREE", 5)
    monkeypatch.setattr(train_trellis, "ROUNDED", 3)
    first = train_trellis.first_table(2, 8, np.random.default_rng(0))
    assert sorted((first.reshape(4, 64) > 0).sum(0)) == [2] * 64
    found = train_trellis.train(2, 8)
    assert "8/8" in capsys.readouterr().err
    table = train_trellis.to_points(found)
    assert np.abs(table - found).max() <= 0.13
    z = numbers(40, 256, seed=9)
    before, after = (np.square(z - t[train_trellis.code(z, t, 2)]).mean() for t in (first, table))
    assert 0.07 < after < 0.985 * before
    assert np.isin(trellis.table(2, 8), train_trellis.POINTS).all()
    assert np.array_equal(train_trellis.train(2, 8), found)


def scalar_codebook(bits):
    centroids = oracle.codebook(4096, bits)
    return centroids, oracle.midpoints(centroids)


@pytest.mark.parametrize(("bits", "states"), [(1, 12), (6, 12), (2, 6), (2, 11), (2, 0)])
def test_trellises_that_do_not_exist(bits, states):
    culprit = f"bits={bits}" if bits not in (2, 3, 4) else f"log2_states={states}"
    for function in (trellis.table, lambda *asked: check_spec(spec(64, 64, asked[0], states=asked[1]))):
        with pytest.raises(ConfigError, match=f"{culprit} is not supported; choose .*") as caught:
            function(bits, states)
        assert "\n" not in str(caught.value)


def test_a_damaged_file_of_tables_is_refused(monkeypatch, tmp_path):
    good = trellis.FILE.read_bytes()
    damaged = tmp_path / "trellis.safetensors"
    monkeypatch.setattr(trellis, "FILE", damaged)
    with pytest.raises(CheckpointError, match="missing"):
        trellis._tables.__wrapped__()
    for data in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
        damaged.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"trellis\.safetensors .*checksum.*install") as caught:
            trellis._tables.__wrapped__()
        assert "\n" not in str(caught.value)
    damaged.write_bytes(good)
    assert len(trellis._tables.__wrapped__()) == len(TRELLISES)


@pytest.mark.parametrize(
    ("device", "cuda", "gpus", "where"),
    [
        ("cpu", "13.0", 1, "cuda:0"),
        ("cpu", "13.0", 0, "cpu"),
        ("cpu", None, 1, "cpu"),
        ("cuda:1", "13.0", 2, "cuda:1"),
        ("meta", "13.0", 1, "meta"),
    ],
)
def test_weights_on_a_cpu_are_searched_on_a_gpu_if_there_is_one(device, cuda, gpus, where, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert search_device(torch.device(device)) == torch.device(where)
