"""Tokens less a mean that they share: against an independent calculation, and what must not change."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from encoding_checks import counted, prologue_inputs, random, relative, same
from orbitdit import ConfigError, OrbitLinear, OrbitQuantConfig, quantize_
from orbitdit.codebooks import token_gain
from orbitdit.codebooks.lloyd_max import codebook_on, look_up, shrinkage
from orbitdit.grids import EXACT
from orbitdit.linear import share_inputs
from orbitdit.model import packed_layers
from orbitdit.ops import CUDA_GRIDS, ops
from orbitdit.ops.rotate_encode import means
from orbitdit.ops.rotate_encode.reference import apply_prologue, encode_tokens, rotate_encode
from orbitdit.quantize import QuantizedWeight
from orbitdit.rotation import rotation
from orbitdit.spec import Encoding, TokenCode
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


def parts(own, x):
    """What the codes of tokens (tokens, DIM) less their mean stand for, and those of their mean."""
    mean = torch.from_numpy(np.mean(x.numpy(), 0, dtype=np.float64, keepdims=True)).float()
    coded = [encode_tokens(part, bits, 7) for part, bits in ((x - mean, own.spec.tokens.bits), (mean, 6))]
    return [
        look_up(codes, codebook_on(DIM, bits, x.device, torch.float32).centroids) * norm
        for (codes, norm), bits in zip(coded, (own.spec.tokens.bits, 6), strict=True)
    ]


@pytest.mark.parametrize("scale", ["unbiased", "unbiased-rows", "norm"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 50])
@torch.no_grad()
def test_the_formula(count, scale):
    """y = W (Q(x - m) + gain Q6(m)), picture by picture and group by group, means from numpy; fp32 has no grid."""
    own, x = layer(scale=scale), pictures(2, 3, count)
    gain = shrinkage(DIM, 3) / shrinkage(DIM, 6) if scale == "unbiased" else 1
    rotated = rotation(DIM, 7).apply(own.dequantize()) * token_gain(own.spec)
    expected = torch.empty(2, 3, count, ROWS)
    for picture in np.ndindex(2, 3):
        for start in range(0, count, 16):
            tokens, mean = parts(own, x[picture][start : start + 16])
            expected[picture][start : start + 16] = (tokens + gain * mean) @ rotated.T + own.bias
    assert relative(own(x), expected) < 2e-3  # a code here and there, where a mean rounds differently


@pytest.mark.parametrize("grid", [EXACT, *CUDA_GRIDS])
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


@pytest.mark.parametrize("grid", [EXACT, *CUDA_GRIDS])
@torch.no_grad()
def test_rows_are_the_tokens_of_one_picture(grid):
    own, x = layer(grid), pictures(40).bfloat16()
    assert same(own(x), own(x[None])[0])
    assert same(own(x[:1]), own(x[0])[None])
    assert not same(own(x), uncentred(own)(x))
    assert own(x[None, :0]).shape == (1, 0, ROWS)


@pytest.mark.parametrize("grid", [EXACT, "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@torch.no_grad()
def test_a_spoilt_token_shows_and_leaves_the_others_alone(value, grid):
    own, x = layer(grid), pictures(2, 40).bfloat16()
    good = own(x)
    x[1, 20, 7] = value
    y = own(x)
    assert value == 1e30 or not y[1, 20].isfinite().any()
    y[1, 20] = good[1, 20]
    assert y.isfinite().all()
    assert value == 1e30 or relative(y.float(), good.float()) < 0.2
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


@pytest.mark.parametrize("grid", list(CUDA_GRIDS))
@pytest.mark.parametrize("prologue", ["gelu", "silu", "layer_norm", "rms_norm"])
@torch.no_grad()
def test_means_are_of_what_a_prologue_makes(prologue, grid):
    own = layer(grid)
    x, args = prologue_inputs(prologue, 2 * 40, DIM, batch=2)
    made = apply_prologue(x, prologue, args).view(2, 40, DIM)
    operands = [own.codes, own.scales, own.bias]
    y = ops.linear(x.reshape(2, 40, DIM), list(args), operands, key_of(own.spec, grid=grid, prologue=prologue))
    assert same(y, own(made))


@pytest.mark.parametrize("grid", list(CUDA_GRIDS))
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


@pytest.mark.parametrize("grid", list(CUDA_GRIDS))
@torch.no_grad()
def test_codes_of_means_have_a_factor_on_every_grid(grid, monkeypatch):
    x = pictures(2, 40).bfloat16()
    monkeypatch.setattr(means, "mean_gain", lambda encoding: 0.5)
    expected = layer(EXACT)(x).float()
    assert relative(layer(grid)(x).float(), expected) < 0.06
    monkeypatch.undo()
    assert relative(layer(grid)(x).float(), expected) > 0.3


@pytest.mark.parametrize("size", [0, 17])
def test_groups_that_no_kernel_takes_are_refused(size):
    with pytest.raises(ConfigError, match=f"{size} tokens cannot share a mean; choose at most 16"):
        layer(group_size=size)


@pytest.mark.parametrize(("bits", "size"), [("w2a4", 16), ("w2a3", 16), ("w3a3", 16), ("w4a4", None), ("w2a6", None)])
def test_what_models_get(bits, size):
    """Never centred are tokens that are wider than most, which come from an activation, and those of experts, which are
    of all samples."""
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ModuleDict(
            {
                "q": nn.Linear(64, 64),
                "up": nn.Linear(64, 256),
                "down": nn.Linear(256, 64),
                "experts": nn.ModuleList([nn.Linear(64, 64)]),
            }
        )
        for _ in range(2)
    )
    found = quantize_(model, OrbitQuantConfig(bits, trellis_states=8), progress=False)
    for row in found.layers:
        expected = None if "down" in row.name or "experts" in row.name else size
        assert row.spec.tokens.group_size == expected
        assert ("centred by 16" in row.coding) == bool(expected)
    assert {own.spec for _, own in packed_layers(model)} == {row.spec for row in found.layers}


@pytest.mark.parametrize(("grid", "least", "most"), [("e4m3", 25.5, 28), ("int8", 38.5, 41)])
@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_how_far_the_sum_is_from_two_products(bits, grid, least, most):
    """What older models give now, in dB to what they gave, as the changelog says: each code on the grid itself, and
    four fifths of the energy in common."""
    dim, encoding = 768, Encoding(768, bits, grid, 0, 16, True)
    x = (random(256, dim) + 2 * random(1, dim, seed=1)).bfloat16()
    weight = random(128, dim, seed=2)
    mean, group = means.token_means(x[None], 16), means.groups_of(1, 256, 16, x.device)
    less = (x.float() - mean.float()[group]).bfloat16()
    parts = [rotate_encode(less, Encoding(dim, bits, grid)), rotate_encode(mean, Encoding(dim, 6, grid))]
    own, of_mean = (values.float() * scales[:, None] for values, scales in parts)
    values, scales = rotate_encode(x, encoding)
    found = values.float() * scales[:, None] @ weight.T
    assert (
        least < -20 * math.log10(relative(found, (own + means.mean_gain(encoding) * of_mean[group]) @ weight.T)) < most
    )


def test_groups():
    assert [means.groups(n, 16) for n in (1, 16, 17, 48)] == [1, 1, 2, 3]
    assert means.groups_of(2, 5, 2, torch.device("cpu")).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert [means.sample_of(torch.zeros(shape)) for shape in ((3, 2, 5, 8), (5, 8), (8,))] == [5, 5, 1]
