"""Trellis-coded weights: the code of a weight is a window on its row's bit stream (QTIP, arXiv 2406.11235).

With b bits a weight and 2^L states (L is `log2_states`), code c_i is the b new bits of weight i, and

    s_i = (s_{i-1} >> b) | (c_i << (L - b)),  s_{-1} = 0        w^_i ~ T[s_i]

So a state is the last L bits of the row's stream as `packing` lays it out: a weight takes exactly b bits, and all
weights of a row can be decoded at once. One table T of 2^L values for N(0, 1) serves all weights; it was fitted to
normal numbers alone (training/train_trellis.py). Each value is a multiple of 1/32 with four significant bits, below 4:
exact in e4m3, in int8 (times 32) and in bf16, so that every device computes with the same weights.

The op `viterbi` finds the codes of least squared error by Viterbi's algorithm. In fp32, each operation rounded,

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
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from orbitdit.config import TRELLIS_BITS, TRELLIS_STATES
from orbitdit.errors import CheckpointError, ConfigError
from orbitdit.grids import Grid
from orbitdit.spec import WeightCode
from orbitdit.tables import constant

UNIT = 1 / 32
"""Table values are whole multiples of it."""
FILE = Path(__file__).with_name("trellis.safetensors")
SHA256 = "bed89d3dd4cbf148da5ce88b029b7ee5e8d34673bda471bf22718673b87d8c09"


@constant
def table(bits: int, log2_states: int) -> Tensor:
    """T for `bits` (2, 3, 4) and 2**`log2_states` states (8, 10, 12): (2**log2_states,) fp64 on the CPU, about N(0, 1).

    Treat it as constant. Raises ConfigError for other arguments, CheckpointError when the file of tables is damaged.
    """
    for name, value, allowed in (("bits", bits, TRELLIS_BITS), ("log2_states", log2_states, TRELLIS_STATES)):
        if type(value) is not int or value not in allowed:
            raise ConfigError(
                f"a trellis with {name}={value!r} is not supported; choose {', '.join(map(str, allowed))}"
            )
    return _tables()[f"w{bits}.states{log2_states}"].double() * UNIT


class Trellis:
    """Weights coded by the path of a trellis: a `WeightCodebook`."""

    def check(self, code: WeightCode) -> None:
        """Raise ConfigError unless there is a table for these bits and states."""
        table(code.bits, self.window(code))

    def window(self, code: WeightCode) -> int:
        """The bits that a state is made of."""
        return code.log2_states or 0

    def points(self, code: WeightCode, dim: int) -> tuple[Tensor, float]:
        """The table, for coordinates of unit variance."""
        return table(code.bits, self.window(code)), dim**-0.5

    def points_on(self, code: WeightCode, dim: int, grid: Grid) -> tuple[Tensor, float]:
        """The table in units of `UNIT`: whole numbers up to 120 that are exact in e4m3 and in int8; on a coarser grid
        the nearest values, the largest at its end."""
        found = table(code.bits, self.window(code)) / UNIT
        unit = max(1.0, float(found.abs().max()) / grid.largest)
        return grid.round(found / unit), unit * UNIT * dim**-0.5


NAME, CODEBOOK = "trellis", Trellis()


def windows(codes: Tensor, bits: int, window: int) -> Tensor:
    """For each of `codes` (rows, dim) uint8 the last `window` bits of its row's stream, int32 (rows, dim): the states
    that the codes lead through."""
    state = torch.zeros(codes.shape, dtype=torch.int32, device=codes.device)
    for back in range(min(-(-window // bits), codes.shape[1])):
        past, shift = codes[:, : codes.shape[1] - back].int(), window - bits - back * bits
        state[:, back:] |= past << shift if shift >= 0 else past >> -shift
    return state


@constant
def _tables() -> dict[str, Tensor]:
    """All tables, int8, in units of `UNIT`."""
    data = FILE.read_bytes() if FILE.is_file() else b""
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise CheckpointError(f"{FILE} is missing or damaged, its checksum is off: install orbitdit again")
    return safetensors.torch.load(data)
