"""Train the tables of trellis-coded weights on N(0, 1): python training/train_trellis.py [BITS,STATES ...].

Lloyd's iteration on a trellis (Stewart, Gray and Linde, 1982): code fresh normal numbers with the present table, then
move each entry to the mean of what it stood for. A table begins with the four, eight or sixteen successors of a state
in different quantiles (Ungerboeck's partition, at random). Rows are short, so that entries for the start of a row are
learned too. In the last rounds the table that codes is rounded to `POINTS`, which are exact in e4m3 and int8.

Writes src/orbitdit/codebooks/trellis.safetensors, and to training/trellis_log.jsonl the mean squared error on other
normal rows, of each table (`mse`) and of the unrounded one (`mse_free`). The tables are the same on every machine, as
far as its sums round alike; about 20 minutes on two cores.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.special import ndtri

from orbitdit.codebooks.trellis import FILE, UNIT, windows
from orbitdit.ops.viterbi.reference import viterbi

LOG = Path(__file__).with_name("trellis_log.jsonl")
TABLES = [(bits, states) for states in (8, 10, 12) for bits in (2, 3, 4)]
SEED, ROWS, DIM = 0, 4096, 256
FREE, ROUNDED, FORGETFUL = 40, 20, 10
"""Rounds with free entries, then with rounded ones; sums keep half a round in the first ten, then 85%."""

POSITIVE = sorted({m << e for e in range(4) for m in range(16)} - {0})
POINTS = np.array([*(-p for p in reversed(POSITIVE)), 0, *POSITIVE]) * UNIT


def main() -> None:
    chosen = [tuple(map(int, name.split(","))) for name in sys.argv[1:]] or TABLES
    for bits, states in chosen:
        started = time.perf_counter()
        free = train(bits, states)
        table = to_points(free)
        figures = {"mse": error(table, bits), "mse_free": error(free, bits)}
        line = {"bits": bits, "states": states, **{k: round(v, 6) for k, v in figures.items()}, "seed": SEED}
        line |= {"rounds": FREE + ROUNDED, "weights": ROWS * DIM, "seconds": round(time.perf_counter() - started)}
        tables = load_file(FILE) if FILE.exists() else {}
        tables[f"w{bits}.states{states}"] = torch.from_numpy(np.rint(table / UNIT).astype(np.int8))
        save_file(tables, FILE)
        with LOG.open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{line}\nsha256 of the file: {hashlib.sha256(FILE.read_bytes()).hexdigest()}", flush=True)


def train(bits: int, states: int) -> np.ndarray:
    """The table (2**states,) before rounding."""
    random = np.random.Generator(np.random.Philox(SEED))
    table = first_table(bits, states, random)
    counts, sums = np.zeros_like(table), np.zeros_like(table)
    for turn in range(FREE + ROUNDED):
        z = random.standard_normal((ROWS, DIM), dtype=np.float32)
        used = table if turn < FREE else to_points(table)
        state = code(z, used, bits)
        mse = np.square(z - used[state]).mean()
        print(f"w{bits} states {states}: {turn + 1}/{FREE + ROUNDED} mse {mse:.5f}", file=sys.stderr, flush=True)
        keep = 0.5 if turn < FORGETFUL else 0.85
        counts = keep * counts + np.bincount(state.ravel(), minlength=len(table))
        sums = keep * sums + np.bincount(state.ravel(), z.ravel(), minlength=len(table))
        table = np.where(counts > 0, sums / np.maximum(counts, 1e-9), table)
    return table


def first_table(bits: int, states: int, random: np.random.Generator) -> np.ndarray:
    """Normal quantiles: the successors of each state, in random order, take one in each of 2**bits equal parts."""
    choices, groups = 1 << bits, 1 << states - bits
    within = np.stack([random.permutation(groups) for _ in range(choices)])
    part = np.stack([random.permutation(choices) for _ in range(groups)], axis=1)
    within = np.take_along_axis(within, part, 0)
    return ndtri((part + (within + 0.5) / groups) / choices).ravel()


def to_points(table: np.ndarray) -> np.ndarray:
    """Each entry's nearest point."""
    return POINTS[np.searchsorted((POINTS[1:] + POINTS[:-1]) / 2, table)]


def code(z: np.ndarray, table: np.ndarray, bits: int) -> np.ndarray:
    """The states (rows, dim) that code `z` best."""
    codes = viterbi(torch.from_numpy(z), torch.from_numpy(table).float(), bits)
    return windows(codes, bits, len(table).bit_length() - 1).numpy()


def error(table: np.ndarray, bits: int) -> float:
    """Mean squared error on 256 rows of 3,072 normal numbers that no table was trained on."""
    z = np.random.Generator(np.random.Philox(SEED + 1)).standard_normal((256, 3072), dtype=np.float32)
    return float(np.square(z - table[code(z, table, bits)]).mean())


if __name__ == "__main__":
    main()
