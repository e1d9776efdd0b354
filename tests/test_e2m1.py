"""The grid e2m1: its numbers, what it costs a codebook, and a layer that computes on it."""

import pytest
import torch

from encoding_checks import relative
from orbitdit import OrbitLinear, OrbitQuantConfig
from orbitdit.codebooks.lloyd_max import lloyd_max, on_grid, shrinkage
from orbitdit.grids import E2M1


def test_its_numbers_are_those_of_the_format():
    """One bit of sign, two of exponent, one of mantissa."""
    every = {s * m * 2.0**e for s in (-1, 1) for e in (0, 1, 2) for m in (1, 1.5)} | {0, 0.5, -0.5}
    rounded = E2M1.round(torch.linspace(-7, 7, 100001, dtype=torch.float64))
    assert set(rounded.tolist()) == every
    assert torch.equal(torch.from_numpy(E2M1.bytes_of(rounded)).view(E2M1.dtype).double(), rounded)


@pytest.mark.parametrize(("bits", "share"), [(2, 1.007), (3, 1.067), (4, 1.36)])
def test_what_it_costs(bits, share):
    """The squared error of a codebook that is refitted to the grid, beside that of Lloyd-Max, with the scales tried."""
    dim = 4096
    found = on_grid(dim, bits, "e2m1", True)
    z = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * dim**-0.5
    points = found.scale * found.values
    error = (z - points[torch.bucketize(z, found.boundaries)]).square().mean() * dim
    assert lloyd_max(dim, bits).centroids.isfinite().all()
    assert error.item() / (1 - shrinkage(dim, bits)) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("bits", ["w4a4", "w2a4"])
@torch.no_grad()
def test_a_layer_computes_on_it(bits):
    linear = torch.nn.Linear(192, 64).bfloat16()
    layer = OrbitLinear.from_linear(linear, OrbitQuantConfig(bits, trellis_states=8).layer((192, 64)))
    x = torch.randn(1, 7, 192).bfloat16()
    outputs = {}
    for grid in ("exact", "e4m3", "e2m1"):
        layer.set_grid(grid, False)
        outputs[grid] = layer(x)
    assert relative(outputs["e4m3"], outputs["exact"]) < relative(outputs["e2m1"], outputs["exact"]) < 0.25
