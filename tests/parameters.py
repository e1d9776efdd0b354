"""Values that several test files go through: `pytest.mark.parametrize("dim", AWKWARD)`.

Models are in families.py. They are written out rather than taken from the package, which tests must not follow.
"""

import shutil
import sysconfig
from pathlib import Path

import pytest

AWKWARD = (1, 63, 137, 199)
"""Odd sizes, which no tile divides."""
REAL_WIDTHS = (1536, 1920, 3072, 15360)
"""Inputs of layers of Wan, CogVideoX and FLUX, the widest last."""
WEIGHT_BITS = (2, 3, 4, 6, 8)
GRID_BITS = (2, 3, 4, 6)
"""Bits of codes whose centroids are laid on number grids: all that leave a byte's values unused."""
TRELLISES = tuple((bits, states) for bits in (2, 3, 4) for states in (8, 10, 12))
"""Bits a weight, and log2 of the number of states."""
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="inductor needs g++ and Python.h",
)
BACKENDS = ("aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER))
"""Of torch.compile."""
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
BENCHMARK_RUN = {
    "gpu": "NVIDIA H200",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "packages": {"torchao": "0.18.0"},
    "commit": "abc",
    "date": "2026-11-24",
    "copy_tbps": 4.0,
}
"""What all result lines of a run of the benchmarks have."""
