"""A number grid that no device multiplies, to see what it would cost: a `Grid` in `GRIDS` and nothing else.

Here e2m1, the four-bit floating-point numbers of the OCP's microscaling formats, held in e4m3.
"""

import numpy as np
import pytest
import torch

from encoding_checks import relative
from orbitdit import OrbitLinear, OrbitQuantConfig, ops, set_grid_
from orbitdit.codebooks.lloyd_max import on_grid, shrinkage
from orbitdit.errors import ConfigError
from orbitdit.grids import EXACT, GRIDS, Grid

CPU = torch.device("cpu")
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
LEVELS = torch.cat([-LEVELS[1:].flip(0), LEVELS])


def to_e2m1(values):
    return LEVELS[torch.bucketize(values.double(), (LEVELS[1:] + LEVELS[:-1]) / 2)]


@pytest.fixture(autouse=True)
def e2m1(monkeypatch):
    grid = Grid("e2m1", torch.float8_e4m3fn, 6.0, to_e2m1, tuple(np.linspace(2, 6, 65)))
    monkeypatch.setitem(GRIDS, grid.name, grid)
    ops._device_grids.cache_clear()
    yield grid
    ops._device_grids.cache_clear()


def test_a_cpu_has_it_behind_exact_ones_and_a_gpu_does_not():
    grids = ops.device_grids(CPU)
    assert grids.index("e2m1") > grids.index(EXACT)
    assert "e2m1" not in ops.cuda_grids((10, 0))


@torch.no_grad()
def test_a_device_that_lacks_it_refuses_it(monkeypatch):
    layer = OrbitLinear.from_linear(torch.nn.Linear(192, 64).bfloat16(), OrbitQuantConfig("w4a4").layer((192, 64)))
    monkeypatch.setattr("orbitdit.model.device_grids", lambda device: ops.cuda_grids((9, 0)))
    with pytest.raises(ConfigError, match="cpu does not multiply e2m1; choose auto, e4m3, int8, exact"):
        set_grid_(layer, "e2m1")


@pytest.mark.parametrize(("bits", "share"), [(2, 1.007), (3, 1.067), (4, 1.36)])
def test_what_it_costs(bits, share):
    """The squared error of a codebook that is refitted to the grid, beside that of Lloyd-Max, with the scales tried."""
    dim = 4096
    found = on_grid(dim, bits, "e2m1", True)
    z = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * dim**-0.5
    points = found.scale * found.values
    error = (z - points[torch.bucketize(z, found.boundaries)]).square().mean() * dim
    assert error.item() / (1 - shrinkage(dim, bits)) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("bits", ["w4a4", "w2a4"])
@torch.no_grad()
def test_a_layer_computes_on_it(bits):
    torch.manual_seed(0)
    linear = torch.nn.Linear(192, 64).bfloat16()
    layer = OrbitLinear.from_linear(linear, OrbitQuantConfig(bits, trellis_states=8).layer((192, 64)))
    x = torch.randn(1, 7, 192).bfloat16()
    outputs = {}
    for grid in (EXACT, "e4m3", "e2m1"):
        set_grid_(layer, grid)
        outputs[grid] = layer(x)
    assert relative(outputs["e4m3"], outputs[EXACT]) < relative(outputs["e2m1"], outputs[EXACT]) < 0.25
