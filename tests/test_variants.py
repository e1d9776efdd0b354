"""What was tried beyond trellis codes and unbiased rows: each variant's layer does what it says."""

import math
import re

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from baselines import Statistics, stored_bits
from encoding_checks import defined
from orbitdit import OrbitLinear, OrbitQuantConfig, plan, quantize_
from orbitdit.errors import ConfigError
from orbitdit.model import linear_named
from orbitdit.model import quantize_layer as default_layer
from orbitdit.rotation import rotation
from scripts import variants
from scripts.variants import VARIANTS, Codebook, Encoding, allotted, quantize_variant_, variant_layer
from tiny import tiny_pipeline


class Blocks(nn.Module):
    """Two blocks of a model without a table of its own: 96 = 3 * 32 inputs, 16 rows."""

    def __init__(self, dim=96, rows=16, scales=(1.0, 1.0)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(dim, rows)}) for _ in scales)
        for block, scale in zip(self.blocks, scales, strict=True):
            weight = torch.randn(rows, dim, generator=generator) * scale * dim**-0.5
            block["proj"].load_state_dict({"weight": weight, "bias": torch.randn(rows, generator=generator)})
        self.requires_grad_(False)


def layer_and_row(bits="w3a3", seed=0, **options):
    model = Blocks(**options)
    config = OrbitQuantConfig(bits, scale="unbiased-rows", centred_bits=(), seed=seed)
    row = plan(model, config).select("quantize")[0]
    return linear_named(model, row.name), row


def tokens(*shape, offset=0.0):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator) + offset * torch.randn(shape[-1], generator=generator)


def statistics_of(x):
    """Of tokens (tokens, dim)."""
    return Statistics(x.abs().expand(3, *x.shape).amax(1), x.amin(0), x.mean(0), x.T @ x / len(x), x)


@pytest.fixture
def unquantized(monkeypatch):
    """Tokens and weights as they are: what is left is the transform of both sides."""
    monkeypatch.setattr(Encoding, "part", lambda self, x, tokens: (self.mix(x), torch.ones(1)))

    def build(linear, row, variant):
        layer = variant_layer(linear, row, variant, 5, statistics_of(tokens(40, row.in_features, offset=3)))
        balance = layer.encoding.balance
        weight = linear.weight if balance is None else linear.weight * balance
        layer.values, layer.row_scales = layer.encoding.mix(weight), torch.ones(row.out_features)
        return layer

    return build


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dim", [64, 96])
def test_both_sides_are_transformed_alike(name, dim, unquantized):
    linear, row = layer_and_row(dim=dim)
    layer = unquantized(linear, row, VARIANTS[name]._replace(own_mean=False))
    x = tokens(2, 7, dim, offset=2)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [1, 32, 63, 96, 1920])
@pytest.mark.parametrize("name", ["two-rounds", "cross-blocks"])
def test_transforms_are_orthogonal(name, dim):
    encoding = Encoding(VARIANTS[name], dim, 4, 3)
    matrix = encoding.mix(torch.eye(dim, dtype=torch.float64)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
    powers_of_two = dim == dim & -dim
    alone = rotation(dim, 3).matrix()
    assert torch.equal(matrix, alone) == (powers_of_two and name == "cross-blocks") or dim == 1


def test_across_blocks_is_a_kronecker_product():
    dim, size = 96, 32
    r = rotation(dim, 3)
    cas = [
        [(math.cos(a) + math.sin(a)) / 3**0.5 for a in (2 * math.pi * j * k / 3 for k in range(3))] for j in range(3)
    ]
    whole = torch.kron(torch.tensor(cas).double(), torch.from_numpy(hadamard(size) / size**0.5))
    x = tokens(5, dim).double()
    mixed = Encoding(VARIANTS["cross-blocks"], dim, 4, 3).mix(x)
    torch.testing.assert_close(mixed, (x[:, r.permutation] * r.signs) @ whole.T)
    assert whole.abs().min() > 0.01


def test_few_large_channels_are_spread_over_all_blocks():
    x = torch.zeros(1, 96)
    x[0, 7] = 1
    largest = {
        name: float(Encoding(VARIANTS[name], 96, 4, 0).mix(x).abs().max())
        for name in ("base", "two-rounds", "cross-blocks")
    }
    assert largest["base"] == pytest.approx(32**-0.5)
    assert largest["cross-blocks"] < 0.8 * largest["base"]


def test_scales_of_tokens_by_hand():
    codebook = Codebook(torch.tensor([-2.0, 2.0]), torch.tensor([0.0]), 0.25)
    u = torch.tensor([[0.8, -0.6], [0.0, 0.0]])
    cases = {
        variants.by_norm: 0.25,
        variants.unbiased: 1 / 2.8,  # q = (2, -2): <u, q> = 2.8, <u, u> = 1, <q, q> = 8
        variants.searched: 1 / 2.8,  # two levels: every multiple has the same codes
    }
    for function, factor in cases.items():
        values, factors = function(u, codebook)
        assert values[0].tolist() == [2, -2]
        assert torch.as_tensor(factors).expand(2, 1)[0].item() == pytest.approx(factor)
        assert torch.isfinite(torch.as_tensor(factors)).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_scale_that_is_unbiased_on_average(bits):
    codebook = variants.codebook_of(1024, bits)
    u = tokens(400, 1024)
    u /= u.norm(dim=1, keepdim=True)
    each, alike = variants.unbiased(u, codebook)[1], variants.unbiased_on_average(u, codebook)[1]
    assert float(alike) == pytest.approx(float(each.mean()), rel=1e-3)
    loss = {3: 0.0345, 4: 0.0095}[bits]
    assert float(alike) == pytest.approx(codebook.scale / (1 - loss), rel=1e-3)


def test_the_search_finds_the_nearest_direction():
    """A token on 1.16 times the codebook is exact there, and is not as it is."""
    codebook = Codebook(torch.tensor([-3.0, -1.0, 1.0, 3.0]), torch.tensor([-0.2, 0.0, 0.2]), 0.1)
    u = 1.16 * 0.1 * torch.tensor([[3.0, -1.0, -3.0, 1.0], [-1.0, 1.0, 1.0, 3.0]])
    values, factors = variants.searched(u, codebook)
    torch.testing.assert_close(values * factors, u)
    gaussian = tokens(50, 64) / 8
    fine = variants.codebook_of(64, 3)

    def error(function):
        values, _ = function(gaussian, fine)
        along = (gaussian * values).sum(-1) ** 2 / values.square().sum(-1)
        return float((gaussian.square().sum(-1) - along).mean())

    assert error(variants.searched) < 0.97 * error(variants.unbiased)


def test_the_base_is_trellis_codes_and_unbiased_rows():
    linear, row = layer_and_row("w2a4", seed=3)
    ours = default_layer(linear, row)
    base = variant_layer(linear, row, VARIANTS["base"], 3)
    assert torch.equal(base.coded.codes, ours.codes)
    assert torch.equal(base.coded.scales, ours.scales)
    assert stored_bits(base) == stored_bits(ours)
    x = tokens(3, 5, 96).bfloat16()
    values, scales = defined(x.flatten(0, 1), 4, "e4m3", 3)
    assert torch.equal(base.encoding(x)[0][0].flatten(0, 1), values.float())
    assert torch.equal(base.encoding(x)[0][1].flatten(), scales)
    ours.set_grid("e4m3", False)
    assert torch.equal(base(x), ours(x))


def test_the_mean_token_is_multiplied_finely():
    linear, row = layer_and_row("w4a3", dim=64)
    x = tokens(2, 50, 64, offset=5)
    target = x @ variant_layer(linear, row, VARIANTS["base"], 0).coded.dequantize().T + linear.bias

    def errors(name):
        y = variant_layer(linear, row, VARIANTS[name], 0)(x) - target
        return float(y.square().mean()), float(y.mean(1).square().mean())

    (whole, of_mean), (centred, centred_mean) = errors("base"), errors("token-mean")
    assert centred < 0.2 * whole
    assert centred_mean < 0.2 * of_mean
    flat = variant_layer(linear, row, VARIANTS["token-mean"], 0)(x[0])
    torch.testing.assert_close(flat, variant_layer(linear, row, VARIANTS["base"], 0)(x[0]))
    encoding = variant_layer(linear, row, VARIANTS["token-mean"], 0).encoding
    (values, scales), (mean, of_the_mean) = encoding(x[:, :1].expand(-1, 3, -1))
    expected = encoding.mix(x[:, :1])
    assert float((values * scales).norm()) < 1e-5
    assert float((mean * of_the_mean - expected).norm() / expected.norm()) < 0.03


def test_the_bias_takes_off_the_error_on_the_mean():
    linear, row = layer_and_row("w2a4")
    x = tokens(40, 96, offset=2)
    mean = x.mean(0)
    plain = variant_layer(linear, row, VARIANTS["base"], 0)
    layer = variant_layer(linear, row, VARIANTS["own-mean"], 0, statistics_of(x))
    added = layer.coded.bias - linear.bias
    torch.testing.assert_close(added, (linear.weight - plain.coded.dequantize()) @ mean, atol=1e-5, rtol=1e-4)
    assert stored_bits(layer) == stored_bits(plain)
    without = nn.Linear(96, 16, bias=False)
    without.weight = linear.weight
    bias = variant_layer(without, row, VARIANTS["own-mean"], 0, statistics_of(x)).coded.bias
    torch.testing.assert_close(bias, added)


def test_channels_are_balanced():
    linear, row = layer_and_row("w4a4")
    x = tokens(200, 96) * torch.logspace(-1, 1, 96)
    statistics = statistics_of(x)
    balance = variants.balance_of(statistics)
    moments = x.square().mean(0)
    torch.testing.assert_close(balance**4, moments / moments.mean(), atol=1e-4, rtol=0.02)
    plain = variant_layer(linear, row, VARIANTS["base"], 0)
    layer = variant_layer(linear, row, VARIANTS["own-balance"], 0, statistics)
    errors = [float((one(x) - linear(x)).square().sum()) for one in (layer, plain)]
    expected = float(moments.sqrt().sum() ** 2 / (96 * moments.sum()))
    assert errors[0] / errors[1] == pytest.approx(expected, rel=0.2)
    assert stored_bits(layer) == pytest.approx(stored_bits(plain) + 16 / 16)


def test_bits_go_where_weights_are_large_and_average_out():
    model = Blocks(scales=(0.3, 1.0, 1.1, 3.0, 0.9))
    rows = plan(model, OrbitQuantConfig("w3a3")).select("quantize")
    found = allotted(model, rows, 3)
    assert [found[row.name] for row in rows] == [2, 3, 3, 4, 3]
    alike = allotted(Blocks(scales=(1.0,) * 4), rows[:4], 3)
    assert list(alike.values()) == [3, 3, 3, 3]
    default = Blocks(scales=(0.3, 1.0, 1.1, 3.0, 0.9))
    quantize_(default, OrbitQuantConfig("w3a3", scale="unbiased-rows"), progress=False)
    quantize_variant_(model, "allotted", "w3a3")
    coded = [m for m in model.modules() if isinstance(m, OrbitLinear)]
    assert [m.spec.weight.bits for m in coded] == [2, 3, 3, 4, 3]
    assert {m.spec.weight.log2_states for m in coded} == {12}
    assert stored_bits(model) <= stored_bits(default)


def test_bad_use_is_one_line():
    model = Blocks()
    before = [type(m) for m in model.modules()]
    for name, bits, message in (
        ("nothing", "w2a4", "variant 'nothing' is unknown; choose one of base, "),
        ("allotted", "w2a4", "variant allotted is for W3A3, not for W2A4"),
        ("own-mean", "w2a4", "blocks.0.proj has no statistics of its inputs"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            quantize_variant_(model, name, bits)
    assert [type(m) for m in model.modules()] == before


def test_layers_that_encode_alike_encode_once():
    pipeline = tiny_pipeline("shapes")
    quantize_variant_(pipeline.transformer, "base", "w3a3")
    attention = pipeline.transformer.transformer_blocks[0].attn
    encoding = attention.to_q.encoding
    assert attention.to_k.encoding is encoding
    x = tokens(1, 4, 64)
    first = encoding(x)
    assert encoding(x) is first
    x += 1
    assert not torch.equal(encoding(x)[0][0], first[0][0])
    assert encoding(x) is not first


def test_the_same_weight_is_quantized_once(monkeypatch):
    linear, row = layer_and_row("w2a4")
    alone = {name: variant_layer(linear, row, VARIANTS[name], 3) for name in ("token-mean", "two-rounds")}
    codes = {}
    variant_layer(linear, row, VARIANTS["base"], 3, codes=codes)
    variant_layer(linear, row, VARIANTS["two-rounds"], 3, codes=codes)
    assert len(codes) == 2
    balanced = VARIANTS["own-balance"], 3, statistics_of(tokens(40, 96) * torch.logspace(-1, 1, 96))
    layer = variant_layer(linear, row, *balanced, codes=codes)
    assert len(codes) == 2
    assert not torch.equal(layer.coded.codes, variant_layer(linear, row, VARIANTS["base"], 3, codes=codes).coded.codes)
    monkeypatch.setattr(variants, "quantize_weight", None)
    for name, expected in alone.items():
        found = variant_layer(linear, row, VARIANTS[name], 3, codes=codes)
        assert torch.equal(found.coded.codes, expected.coded.codes)
        assert torch.equal(found.coded.scales, expected.coded.scales)


def test_fewer_states_on_request():
    model = Blocks()
    quantize_variant_(model, "base", "w2a4", states=8)
    assert {m.spec.weight.log2_states for m in model.modules() if isinstance(m, OrbitLinear)} == {8}
