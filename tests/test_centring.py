"""Tokens less a mean that they share: against an independent calculation, and what must not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from encoding_checks import counted, random, relative, same
from orbitdit import OrbitLinear, OrbitQuantConfig, TensorError, linear, quantize_
from orbitdit.codebooks.lloyd_max import shrinkage
from orbitdit.grids import EXACT, GRIDS
from orbitdit.linear import share_inputs
from orbitdit.model import packed_layers
from orbitdit.ops import ops
from orbitdit.ops.linear.reference import exact_linear
from orbitdit.ops.rotate_encode import means
from orbitdit.ops.rotate_encode.reference import apply_prologue
from orbitdit.quantize import QuantizedWeight
from orbitdit.spec import TokenCode
from orbitdit.tokens import Tokens
from specs import key_of, orbit

DIM, ROWS = 96, 48


def layer(grid=None, group_size=16, scale="unbiased", seed=3, bias=True):
    plain = nn.Linear(DIM, ROWS, bias=bias)
    plain.weight.data = random(ROWS, DIM, seed=seed)
    if bias:
        plain.bias.data = random(ROWS, seed=1)
    own = orbit(plain, 2, 3, seed=7, scale=scale, group_size=group_size).eval()
    own.set_grid(grid, False)
    return own


def uncentred(own):
    """The same layer on tokens as they are."""
    other = OrbitLinear(with_tokens(own, 3), own.bias, QuantizedWeight(own.codes, own.scales))
    other.set_grid(own.grid, False)
    return other


def with_tokens(own, bits):
    """The spec of a layer with tokens of `bits`, none centred."""
    return replace(own.spec, tokens=TokenCode(bits))


def pictures(*shape, dim=DIM):
    """Tokens that have much in common within a picture, and more with their neighbours."""
    x = random(*shape, dim) + 4 * random(*shape[:-1], 1, dim, seed=1)
    return x + 2 * random(*shape, 1, seed=2).cumsum(-2) / shape[-1] ** 0.5


def plain(of, x, bits, bias):
    """The layer on tokens (tokens, dim) of `bits`, none centred."""
    return exact_linear(x, of.codes, of.scales, bias, with_tokens(of, bits))


@pytest.mark.parametrize("scale", ["unbiased", "unbiased-rows", "norm"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 50])
@torch.no_grad()
def test_the_formula(count, scale):
    """y = W Q(x - m) + W Q6(m), picture by picture and group by group, means from numpy."""
    own, x = layer(scale=scale), pictures(2, 3, count)
    gain = shrinkage(DIM, 3) / shrinkage(DIM, 6) if scale == "unbiased" else 1
    expected = torch.empty(2, 3, count, ROWS)
    for picture in np.ndindex(2, 3):
        for start in range(0, count, 16):
            tokens = x[picture][start : start + 16]
            mean = torch.from_numpy(np.mean(tokens.numpy(), 0, dtype=np.float64, keepdims=True)).float()
            y = plain(own, tokens - mean, 3, own.bias) + gain * plain(own, mean, 6, None)
            expected[picture][start : start + 16] = y
    assert relative(own(x), expected) < 2e-3  # a code here and there, where a mean rounds differently


@pytest.mark.parametrize("grid", [EXACT, *GRIDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_all_routes_and_what_it_gains(grid, dtype):
    own, x = layer(grid), pictures(2, 50).to(dtype)
    target = torch.nn.functional.linear(x.float(), own.dequantize(), own.bias)
    y, error = own(x), relative(own(x).float(), target)
    assert (y.dtype, y.shape) == (dtype, (2, 50, ROWS))
    assert error < 0.5 * relative(uncentred(own)(x).float(), target)


@pytest.mark.parametrize("grid", [EXACT, "int8"])
@torch.no_grad()
def test_pictures_do_not_know_each_other(grid):
    own, x = layer(grid), pictures(3, 40).bfloat16()
    assert same(own(x)[1:2], own(x[1:2]))


@pytest.mark.parametrize("grid", [EXACT, "int8"])
@torch.no_grad()
def test_rows_without_a_picture_are_not_centred(grid):
    own, x = layer(grid), pictures(40).bfloat16()
    assert same(own(x), uncentred(own)(x))
    assert own(x[None, :0]).shape == (1, 0, ROWS)


@pytest.mark.parametrize("grid", [EXACT, "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_spoilt_token_shows_and_leaves_the_others_alone(value, grid):
    own, x = layer(grid), pictures(2, 40).bfloat16()
    good = own(x)
    x[1, 20, 7] = value
    y = own(x)
    assert not y[1, 20].isfinite().any()
    y[1, 20] = good[1, 20]
    assert relative(y.float(), good.float()) < 0.2
    y[1, 16:32] = good[1, 16:32]
    assert same(y, good)


@torch.no_grad()
def test_layers_with_one_input_share_its_means():
    layers = [layer("int8", seed=seed, bias=seed != 5) for seed in (3, 4, 5)]
    x = pictures(2, 40).bfloat16()
    alone = [own(x) for own in layers]
    share_inputs([*layers, other := layer(group_size=None)])
    shared = Tokens(x)
    together, encodings = counted(lambda: [own(shared) for own in layers])
    assert encodings == 1
    assert other.siblings is None
    assert all(relative(a.float(), b.float()) < 5e-3 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("prologue", ["gelu", "layer_norm"])
@torch.no_grad()
def test_means_are_of_what_is_encoded(prologue, monkeypatch):
    """A step that is still to do is done before, also where kernels would take it."""
    monkeypatch.setattr(linear, "fuses", lambda x: True)
    own, x = layer("int8"), pictures(2, 40).bfloat16()
    args = [] if prologue == "gelu" else [random(2, DIM, seed=n).bfloat16() for n in (4, 5)]
    made = apply_prologue(x.view(-1, DIM), prologue, args).view(x.shape)
    assert same(own(Tokens(x, lambda: made, prologue, tuple(args))), own(made))


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("count", [40, 48])
@torch.no_grad()
def test_compiled_layers_give_the_same(grid, count):
    own, x = layer(grid), pictures(2, count).bfloat16()
    compiled = torch.compile(own.forward, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x).float(), own(x).float()) < 5e-3


@pytest.mark.parametrize("count", [40, 48])
def test_gradients_are_near_those_without_means(count):
    own, found = layer(), []
    for each in (own, uncentred(own)):
        x = pictures(2, count).requires_grad_()
        each(x).square().sum().backward()
        found.append(x.grad)
    assert relative(*found) < 0.3


@pytest.fixture
def set_mean_gain(monkeypatch):
    """Sets the factor of means for layers that are made and run after."""

    def change(gain):
        for module in (means, linear):
            monkeypatch.setattr(module, "mean_gain", lambda spec: gain)
        means.mean_encoding.cache_clear()

    yield change
    means.mean_encoding.cache_clear()


@pytest.mark.parametrize("grid", list(GRIDS))
@torch.no_grad()
def test_products_of_means_have_a_factor_on_every_grid(grid, set_mean_gain):
    x = pictures(2, 40).bfloat16()
    set_mean_gain(0.5)
    expected = layer(EXACT)(x).float()
    assert relative(layer(grid)(x).float(), expected) < 0.06
    set_mean_gain(1.0)
    assert relative(layer(grid)(x).float(), expected) > 0.3


def test_the_op_refuses_means_of_what_is_not_encoded():
    own, x = layer(), pictures(2, 40).bfloat16()
    with pytest.raises(TensorError, match="means are of what is encoded: apply 'gelu' to the tokens first"):
        ops.linear(x, [], [own.codes, own.scales, own.bias], key_of(own.spec, grid="int8", prologue="gelu"))


@pytest.mark.parametrize(("bits", "size"), [("w2a4", 16), ("w2a3", 16), ("w3a3", 16), ("w4a4", None), ("w2a6", None)])
def test_what_models_get(bits, size):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    found = quantize_(model, OrbitQuantConfig(bits, trellis_states=8), progress=False)
    assert {own.spec.tokens.group_size for _, own in packed_layers(model)} == {size}
    assert {row.spec.tokens.group_size for row in found.layers} == {size}
    assert ("centred by 16" in found.layers[0].coding) == bool(size)


def test_groups_and_their_spread():
    rows = torch.arange(6.0).view(6, 1)
    assert [means.groups(n, 16) for n in (1, 16, 17, 48)] == [1, 1, 2, 3]
    assert means.spread(rows, 5, 2).flatten().tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert means.group_size_for(torch.zeros(2, 5, 8), 16) == 5
    assert means.group_size_for(torch.zeros(5, 8), 16) is None
    assert means.group_size_for(torch.zeros(2, 5, 8), None) is None
