"""The uniform codebook: its error is what the literature gives, and a layer computes with it on every route."""

import pytest
import torch

from encoding_checks import relative
from orbitdit import ConfigError, OrbitLinear, OrbitQuantConfig


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_the_error_on_normal_weights_is_maxs(bits, error):
    """Table I of Max (1960), for 4, 8 and 16 levels."""
    linear = torch.nn.Linear(1024, 512, bias=False)
    linear.weight.data = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    config = OrbitQuantConfig(f"w{bits}a16", recipe="paper", codebook="uniform")
    layer = OrbitLinear.from_linear(linear, config.layer((1024, 512)))
    found = (layer.dequantize() - linear.weight).square().mean() / linear.weight.square().mean()
    assert found.item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("grid", ["int8", "e4m3"])
@torch.no_grad()
def test_layers_compute_on_grids_what_they_do_exactly(grid):
    linear = torch.nn.Linear(192, 64).bfloat16()
    layer = OrbitLinear.from_linear(linear, OrbitQuantConfig("w4a6", codebook="uniform").layer((192, 64)))
    x = torch.randn(7, 192).bfloat16()
    layer.set_grid("exact", False)
    expected = layer(x)
    layer.set_grid(grid, False)
    assert relative(layer(x), expected) < 0.05  # 6-bit tokens have other levels on a grid


def test_other_bits_are_refused():
    with pytest.raises(ConfigError, match="no uniform code; choose 2, 3, 4 bits"):
        OrbitLinear(OrbitQuantConfig("w6a6", codebook="uniform").layer((64, 64)))
