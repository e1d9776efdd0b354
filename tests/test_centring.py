"""Tokens less a mean that they share: against an independent calculation, and what must not change."""

import numpy as np
import pytest
import torch
from torch import nn

from encoding_checks import counted, random, relative, same
from orbitdit import OrbitLinear, OrbitQuantConfig, TensorError, kernels, quantize_
from orbitdit.codebook import kept
from orbitdit.kernels import E4M3, EXACT, INT8, centring
from orbitdit.kernels.reference import apply_before, exact_linear
from orbitdit.linear import share_inputs
from orbitdit.model import packed_layers

DIM, ROWS = 96, 48


def layer(each=16, bits=(2, 3), scale="unbiased", seed=3, bias=True):
    linear = nn.Linear(DIM, ROWS, bias=bias)
    linear.weight.data = random(ROWS, DIM, seed=seed)
    if bias:
        linear.bias.data = random(ROWS, seed=1)
    return OrbitLinear.from_linear(linear, *bits, seed=7, scale=scale, mean_tokens=each).eval()


def pictures(*shape, dim=DIM):
    """Tokens that have much in common within a picture, and more with their neighbours."""
    x = random(*shape, dim) + 4 * random(*shape[:-1], 1, dim, seed=1)
    return x + 2 * random(*shape, 1, seed=2).cumsum(-2) / shape[-1] ** 0.5


def plain(of, x, bits, bias):
    """The layer on tokens (tokens, dim) of `bits`, none centred."""
    return exact_linear(x, of.codes, of.scales, bias, of.weight_bits, bits, of.seed, of.states)


@pytest.mark.parametrize("scale", ["unbiased", "unbiased-rows", "norm"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 50])
@torch.no_grad()
def test_the_formula(count, scale):
    """y = W Q(x - m) + W Q6(m), picture by picture and group by group, means from numpy."""
    own, x = layer(scale=scale), pictures(2, 3, count)
    gain = kept(DIM, 3) / kept(DIM, 6) if scale == "unbiased" else 1
    expected = torch.empty(2, 3, count, ROWS)
    for picture in np.ndindex(2, 3):
        for start in range(0, count, 16):
            tokens = x[picture][start : start + 16]
            mean = torch.from_numpy(np.mean(tokens.numpy(), 0, dtype=np.float64, keepdims=True)).float()
            y = plain(own, tokens - mean, 3, own.bias) + gain * plain(own, mean, 6, None)
            expected[picture][start : start + 16] = y
    assert relative(own(x), expected) < 2e-3  # a code here and there, where a mean rounds differently


@pytest.mark.parametrize("grid", [EXACT, E4M3, INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_all_routes_and_what_it_gains(grid, dtype):
    own, x = layer(), pictures(2, 50).to(dtype)
    target = torch.nn.functional.linear(x.float(), own.dequantize(), own.bias)
    own.set_grid(grid, False)
    y, error = own(x), relative(own(x).float(), target)
    assert (y.dtype, y.shape) == (dtype, (2, 50, ROWS))
    own.mean_tokens = 0
    assert error < 0.5 * relative(own(x).float(), target)


@pytest.mark.parametrize("grid", [EXACT, INT8])
@torch.no_grad()
def test_pictures_do_not_know_each_other(grid):
    own, x = layer(), pictures(3, 40).bfloat16()
    own.set_grid(grid, False)
    assert same(own(x)[1:2], own(x[1:2]))


@pytest.mark.parametrize("grid", [EXACT, INT8])
@torch.no_grad()
def test_rows_without_a_picture_are_not_centred(grid):
    own, x = layer(), pictures(40).bfloat16()
    own.set_grid(grid, False)
    y = own(x)
    own.mean_tokens = 0
    assert same(y, own(x))
    assert own(x[None, :0]).shape == (1, 0, ROWS)


@pytest.mark.parametrize("grid", [EXACT, INT8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_spoilt_token_shows_and_leaves_the_others_alone(value, grid):
    own, x = layer(), pictures(2, 40).bfloat16()
    own.set_grid(grid, False)
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
    layers = [layer(seed=seed, bias=seed != 5) for seed in (3, 4, 5)]
    x = pictures(2, 40).bfloat16()
    for own in layers:
        own.set_grid(INT8, False)
    alone = [own(x) for own in layers]
    share_inputs([*layers, other := layer(each=0)])
    together, encodings = counted(lambda: [own(x) for own in layers])
    assert encodings == 1
    assert other.shared_input is None
    assert all(relative(a.float(), b.float()) < 5e-3 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("before", ["gelu", "layer_norm"])
@torch.no_grad()
def test_means_are_of_what_is_encoded(before):
    own, x = layer(), pictures(2, 40).bfloat16()
    own.set_grid(INT8, False)
    extras = [] if before == "gelu" else [random(2, DIM, seed=n).bfloat16() for n in (4, 5)]
    made = apply_before(x.view(-1, DIM), before, extras).view(x.shape)
    assert same(own.after(before, x, *extras), own(made))


@pytest.mark.parametrize("grid", [E4M3, INT8])
@pytest.mark.parametrize("count", [40, 48])
@torch.no_grad()
def test_compiled_layers_give_the_same(grid, count):
    own, x = layer(), pictures(2, count).bfloat16()
    own.set_grid(grid, False)
    compiled = torch.compile(own.forward, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x).float(), own(x).float()) < 5e-3


@pytest.mark.parametrize("count", [40, 48])
def test_gradients_are_near_those_without_means(count):
    own, found = layer(), []
    for own.mean_tokens in (16, 0):
        x = pictures(2, count).requires_grad_()
        own(x).square().sum().backward()
        found.append(x.grad)
    assert relative(*found) < 0.3


@pytest.mark.parametrize("grid", [E4M3, INT8])
@torch.no_grad()
def test_products_of_means_have_a_factor_on_every_grid(grid):
    own, x = layer(), pictures(2, 40).bfloat16()
    own.mean_gain = 0.5
    own.set_grid(EXACT, False)
    expected = own(x).float()
    own.set_grid(grid, False)
    assert relative(own(x).float(), expected) < 0.06
    own.mean_gain = 1.0
    assert relative(own(x).float(), expected) > 0.3


def test_the_op_refuses_means_of_what_is_not_encoded():
    own, x = layer(), pictures(2, 40).bfloat16()
    arguments = [own.codes], [own.scales], [own.bias], [2], [0], 3, 7, INT8, "gelu", [], 16, 1.0
    with pytest.raises(TensorError, match="means are of what is encoded: apply 'gelu' to the tokens first"):
        kernels.ops.project(x, *arguments)


@pytest.mark.parametrize(("bits", "each"), [("w2a4", 16), ("w2a3", 16), ("w3a3", 16), ("w4a4", 0), ("w2a6", 0)])
def test_what_models_get(bits, each):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    found = quantize_(model, OrbitQuantConfig(bits, trellis_states=8), progress=False)
    assert {own.mean_tokens for _, own in packed_layers(model)} == {each}
    assert {row.mean_tokens for row in found.layers} == {each}
    assert ("centred by 16" in found.layers[0].coding) == bool(each)


def test_groups_and_their_spread():
    rows = torch.arange(6.0).view(6, 1)
    assert [centring.groups(n, 16) for n in (1, 16, 17, 48)] == [1, 1, 2, 3]
    assert centring.spread(rows, 5, 2).flatten().tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert kernels.mean_tokens(torch.zeros(2, 5, 8), 16) == 5
    assert kernels.mean_tokens(torch.zeros(5, 8), 16) == 0
