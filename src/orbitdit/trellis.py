"""Trellis-coded weights: the code of a weight is a window on its row's bit stream (QTIP, arXiv 2406.11235).

With b bits a weight and 2^L states (L is called `states` everywhere), code c_i is the b new bits of weight i, and

    s_i = (s_{i-1} >> b) | (c_i << (L - b)),  s_{-1} = 0        w^_i ~ T[s_i]

So a state is the last L bits of the row's stream as `packing` lays it out: a weight takes exactly b bits, and all
weights of a row can be decoded at once. One table T of 2^L values for N(0, 1) serves all weights; it was fitted to
normal numbers alone (training/train_trellis.py). Each value is a multiple of 1/32 with four significant bits, below 4:
exact in e4m3, in int8 (times 32) and in bf16, so that every device computes with the same weights.

`encode` finds the codes of least squared error by Viterbi's algorithm. In fp32, each operation rounded on its own,

    M_i[g] = min over j < 2^b of D_{i-1}[g * 2^b + j]               D_{-1}[0] = 0, elsewhere infinity
    D_i[s] = M_i[s mod 2^(L-b)] + (z_i - T[s])^2

where ties take the lowest j, and the way back begins at the lowest state of least distance: every device finds the same
codes.

Squared error on normal rows of 3,072, as training/trellis_log.jsonl has it (scalar Lloyd-Max: .1175, .0345, .0095):

    L     2 bits   3 bits   4 bits
    8     .0788    .0218    .0066
    10    .0741    .0197    .0055
    12    .0709    .0185    .0049

Points in place of free values cost 0.1% (2 bits) and 0.2% (3 bits) of that at L = 12, and at most 1.3% elsewhere. The
start in state 0 is the simple choice. Tail-biting, where the row's last bits come before its first, would save 0.2% on
rows of 3,072 weights, 0.7% (2 bits) and 0.8% (3 bits) on rows of 1,024, 2.4% and 3.2% on rows of 256 (65,536 weights
each, L = 12, the state at the seam from a search over the row turned by half); every search would run twice for it.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from orbitdit.config import TRELLIS_BITS, TRELLIS_STATES
from orbitdit.errors import CheckpointError, ConfigError
from orbitdit.tables import shared

UNIT = 1 / 32
"""Table values are whole multiples of it."""
FILE = Path(__file__).with_name("trellis.safetensors")
SHA256 = "bed89d3dd4cbf148da5ce88b029b7ee5e8d34673bda471bf22718673b87d8c09"
CHUNK_STATES = 1 << 17
"""Rows times states that a thread works on at a time: what its core's cache holds."""


@shared
def table(bits: int, states: int) -> Tensor:
    """T for `bits` (2, 3, 4) and 2**`states` states (8, 10, 12): (2**states,) fp64 on the CPU, about N(0, 1).

    Treat it as constant. Raises ConfigError for other arguments, CheckpointError when the file of tables is damaged.
    """
    check(bits, states)
    return _tables()[f"w{bits}.states{states}"].double() * UNIT


@shared
def table_on(bits: int, states: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`table(bits, states)` in `dtype` (exact in all of bf16 and wider) on `device`."""
    return table(bits, states).to(device, dtype)


def check(bits: int, states: int) -> None:
    """Raise ConfigError unless there is a table for these."""
    for name, value, allowed in (("bits", bits, TRELLIS_BITS), ("states", states, TRELLIS_STATES)):
        if type(value) is not int or value not in allowed:
            raise ConfigError(
                f"a trellis with {name}={value!r} is not supported; choose {', '.join(map(str, allowed))}"
            )


@shared
def on_grid(bits: int, states: int) -> tuple[Tensor, float]:
    """`values` (2**states,) fp64, whole numbers up to 120 that are exact in e4m3 and in int8, and `scale`: T = scale *
    values."""
    return table(bits, states) / UNIT, UNIT


def encode(z: Tensor, bits: int, states: int) -> Tensor:
    """Codes (rows, dim) uint8, on the device of `z` (rows, dim) fp32, of rows whose coordinates are about N(0, 1).

    The codes are the same on every device, and a CPU takes some thousand times as long: it leaves them to a GPU if
    there is one.
    """
    device = search_device(z.device)
    points = table_on(bits, states, device, torch.float32)
    return torch.ops.orbitdit.viterbi(z.to(device), points, bits).to(z.device)


def search_device(device: torch.device) -> torch.device:
    """Where codes of weights on `device` are searched."""
    if device.type == "cpu" and torch.version.cuda is not None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def windows(codes: Tensor, bits: int, states: int) -> Tensor:
    """States (rows, dim) int32 that `codes` (rows, dim) uint8 lead through: indices into the table."""
    state = torch.zeros(codes.shape, dtype=torch.int32, device=codes.device)
    for back in range(min(-(-states // bits), codes.shape[1])):
        past, shift = codes[:, : codes.shape[1] - back].int(), states - bits - back * bits
        state[:, back:] |= past << shift if shift >= 0 else past >> -shift
    return state


def viterbi(z: Tensor, points: Tensor, bits: int) -> Tensor:
    """`encode` on the CPU with any table `points` (2**states,) fp32, states >= 2 * bits; rows are shared by threads."""
    codes = torch.empty(z.shape, dtype=torch.uint8)
    numbers, values, found = z.numpy(), points.numpy(), codes.numpy()
    rows = max(1, CHUNK_STATES // len(values))

    def encode_chunk(start: int) -> None:
        found[start : start + rows] = _viterbi(numbers[start : start + rows], values, bits)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in pool.map(encode_chunk, range(0, len(z), rows)):
            assert done is None  # an exception of a thread is raised here
    return codes


def _viterbi(z: np.ndarray, points: np.ndarray, bits: int) -> np.ndarray:
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


def _trace(state: np.ndarray, wins: list[np.ndarray], bits: int, groups: int) -> np.ndarray:
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


@shared
def _tables() -> dict[str, Tensor]:
    """All tables, int8, in units of `UNIT`."""
    data = FILE.read_bytes() if FILE.is_file() else b""
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise CheckpointError(f"{FILE} is missing or damaged, its checksum is off: install orbitdit again")
    return safetensors.torch.load(data)
