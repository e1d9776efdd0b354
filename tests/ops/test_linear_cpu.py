"""The CPU's layers against the definition, exact and on the int8 grid: codes, outputs, tokens that need care."""

import pytest
import torch

from encoding_checks import random
from orbitdit.codebooks.lloyd_max import lloyd_max
from orbitdit.linear import OrbitLinear
from orbitdit.ops.decode import cpu as decode_cpu
from orbitdit.ops.decode.reference import decode
from orbitdit.ops.linear import cpu, reference
from orbitdit.ops.linear.cpu import Weight
from orbitdit.ops.rotate_encode import cpu as encode_cpu
from orbitdit.ops.rotate_encode.reference import encode_tokens, rotate_encode
from orbitdit.packing import PACKED_BITS, pack, unpack
from orbitdit.rotation import rotation
from orbitdit.spec import Encoding
from specs import code, orbit, spec

DTYPES = [torch.bfloat16, torch.float16]
GRID_BITS = [bits for bits in PACKED_BITS if bits <= 6]


def made(dim: int, rows: int, weight_bits: int, activation_bits: int, seed: int = 0) -> OrbitLinear:
    linear = torch.nn.Linear(dim, rows)
    linear.weight.data, linear.bias.data = random(rows, dim, seed=1) / dim**0.5, random(rows, seed=2)
    return orbit(linear, weight_bits, activation_bits, seed)


def encoding_of(layer: OrbitLinear) -> Encoding:
    """How the layer's tokens are encoded on the int8 grid."""
    return Encoding(layer.in_features, layer.spec.tokens.bits, "int8", layer.spec.seed)


def exact(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    return cpu.exact_linear(x, layer.codes, layer.scales, layer.bias, layer.spec)


def on_int8(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    encoded = encode_cpu.rotate_encode(x, encoding_of(layer))
    return cpu.product(encoded, Weight(layer.codes, layer.scales, layer.bias), layer.spec, "int8", x.dtype)


def reference_on_int8(layer: OrbitLinear, x: torch.Tensor, encoded: tuple[torch.Tensor, torch.Tensor] | None = None):
    """The definition of the int8 route, in fp32; `encoded` in place of the definition's values and scales."""
    encoded = encoded or rotate_encode(x, encoding_of(layer))
    return reference.matmul(encoded, decode(layer.codes, layer.scales, layer.spec, "int8"), layer.bias, torch.float32)


ROUTES = [exact, on_int8]


def token_bits(layer: OrbitLinear) -> int | None:
    return None if layer.spec.tokens is None else layer.spec.tokens.bits


def tokens(layer: OrbitLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition's rotated tokens, as exact centroids in fp64, and their norms, for `x` in any dtype."""
    dim, bits = layer.in_features, token_bits(layer)
    if bits is None:
        norm = x.double().norm(dim=1, keepdim=True)
        unit = x.double() / norm.where(norm > 0, 1)
        return rotation(dim, layer.spec.seed).apply(unit), norm
    codes, norm = encode_tokens(x, bits, layer.spec.seed)
    return lloyd_max(dim, bits).centroids[codes.long()], norm.double()


def product(layer: OrbitLinear, token: torch.Tensor, norm: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """The outputs for rotated tokens, with the product in `dtype` and rounded to it."""
    bits = layer.spec.weight.bits
    codes = unpack(layer.codes, bits, layer.in_features)
    rows = lloyd_max(layer.in_features, bits).centroids[codes.long()]
    y = (token.to(dtype) @ rows.to(dtype).T) * norm * layer.scales.double() + layer.bias.double()
    return y.to(dtype)


def definition(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    return product(layer, *tokens(layer, x))


def given_codes(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition's outputs for the codes that the kernel takes, some of which may lie at a boundary."""
    return product(layer, *encode_cpu.encode(x, token_bits(layer), layer.spec.seed, torch.float32))


def relative(a: torch.Tensor, b: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(a.double() - b.double(), dim=dim) / torch.linalg.vector_norm(b.double(), dim=dim)


@pytest.fixture(params=[True, False], ids=["vnni", "float"])
def multiplies_int8(request, monkeypatch):
    """Both products of the int8 route; the one in int8 only where the CPU has it."""
    if request.param and not cpu.multiplies_int8():
        pytest.skip("this CPU does not multiply int8 exactly")
    monkeypatch.setattr(cpu, "multiplies_int8", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("weight_bits", PACKED_BITS)
def test_exact_outputs_are_as_near_to_the_definition_as_bf16_is(weight_bits, activation_bits, dtype):
    layer = made(768, 96, weight_bits, activation_bits)
    x = (random(257, 768) * random(768, seed=3).exp()).to(dtype)
    token, norm = tokens(layer, x)
    expected = product(layer, token, norm)
    of_bf16 = relative(product(layer, token, norm, torch.bfloat16), expected)
    y = exact(layer, x)
    assert y.dtype == dtype
    assert relative(y, expected) <= 2 * of_bf16


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_bits", [3, 4, 6])
@pytest.mark.parametrize("weight_bits", GRID_BITS)
def test_int8_outputs_are_those_of_the_definition_on_int8(weight_bits, activation_bits, dtype):
    """Given the kernel's own values, only the output is rounded; with the definition's, a few values are neighbours."""
    layer = made(768, 96, weight_bits, activation_bits, seed=4)
    x = (random(257, 768) * random(768, seed=3).exp()).to(dtype)
    y, own = on_int8(layer, x), encode_cpu.rotate_encode(x, encoding_of(layer))
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), reference_on_int8(layer, x, own), rtol=0.51 * eps, atol=2e-6)
    expected = reference_on_int8(layer, x)
    assert relative(y, expected) <= max(0.01, 2 * relative(expected.to(dtype), expected))


@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("weight_bits", PACKED_BITS)
def test_fp32_is_exact_to_fp32(weight_bits, activation_bits):
    layer = made(384, 40, weight_bits, activation_bits, seed=5)
    x = random(33, 384)
    assert relative(exact(layer, x), definition(layer, x)) < 1e-6
    torch.testing.assert_close(exact(layer, x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(3, "exact"), (4, "exact"), (8, "exact"), (3, "int8"), (4, "int8"), (6, "int8")]
)
@pytest.mark.parametrize("dim", [137, 256, 1536])
def test_fewer_than_one_code_in_a_thousand_differs(dim, bits, dtype):
    x = random(-(-(1 << 19) // dim), dim).bfloat16()
    if dtype == "int8":
        encoding = Encoding(dim, bits, "int8", 3)
        (own, scales), (expected, expected_scales) = (f(x, encoding) for f in (encode_cpu.rotate_encode, rotate_encode))
        levels = encode_cpu._token_codebook(dim, bits, torch.int8).values
    else:
        own, scales = encode_cpu.encode(x, bits, 3, torch.bfloat16)
        codes, expected_scales = encode_tokens(x, bits, 3)
        levels = encode_cpu._token_codebook(dim, bits, torch.bfloat16).values
        expected = levels[codes.long()]
    assert own.dtype == expected.dtype
    assert (own != expected).float().mean() < 1e-3
    steps = torch.bucketize(own.float(), levels.float()) - torch.bucketize(expected.float(), levels.float())
    assert steps.abs().max() <= 1
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 63, 64, 137, 768])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_decoding_is_exact(dim, bits):
    codes = torch.randint(1 << bits, (7, dim), generator=torch.Generator().manual_seed(dim)).to(torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, *([torch.int8] if bits in GRID_BITS else [])):
        expected = decode_cpu.weight_values(code(bits), dim, dtype)[0][codes.long()]
        for rows in (slice(None), slice(2, 5)):
            decoded = decode_cpu.decode(pack(codes, bits)[rows], code(bits), dim, dtype)
            torch.testing.assert_close(decoded, expected[rows], rtol=0, atol=0)
    if bits in GRID_BITS:
        defined = decode(pack(codes, bits), torch.ones(7).bfloat16(), spec(dim, 7, bits), "int8")[0]
        assert torch.equal(decode_cpu.decode(pack(codes, bits), code(bits), dim, torch.int8), defined)


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ROUTES)
def test_tokens_that_are_not_finite_stay_alone(run, dtype, activation_bits):
    if run is on_int8 and activation_bits > 6:
        pytest.skip("runs exactly")
    layer = made(192, 48, 4, activation_bits)
    x = random(9, 192).to(dtype)
    expected = run(layer, x)
    for row, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        x[row, 5 * row] = value
    y = run(layer, x)
    good = torch.tensor([0, 2, 3, 5, 6, 8])
    assert torch.equal(y[good], expected[good])
    assert not y[[1, 4, 7]].isfinite().any()


SIZES = [0, 1e-38, 1e-20, 1e-12, 1e-10, 1e-3, 1, 1e10, 1e18, 1e30, 1e36]


@pytest.mark.parametrize("activation_bits", [4, 16])
def test_norms_of_any_size(activation_bits):
    layer = made(256, 32, 4, activation_bits)
    x = random(1, 256).sign().bfloat16() * torch.tensor(SIZES).bfloat16()[:, None]
    assert (relative(exact(layer, x), given_codes(layer, x), dim=1) < 0.02).all()
    assert (relative(exact(layer, x), definition(layer, x), dim=1) < 0.05).all()
    assert torch.equal(exact(layer, torch.zeros(3, 256).bfloat16()), layer.bias.detach().bfloat16().expand(3, 32))


@pytest.mark.usefixtures("multiplies_int8")
def test_norms_of_any_size_on_int8():
    layer = made(256, 32, 4, 4)
    x = random(1, 256).bfloat16() * torch.tensor(SIZES[:-1]).bfloat16()[:, None]
    scales, expected = (encode(x, encoding_of(layer))[1] for encode in (encode_cpu.rotate_encode, rotate_encode))
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)
    assert (relative(on_int8(layer, x), reference_on_int8(layer, x), dim=1) < 0.02).all()
    assert torch.equal(on_int8(layer, torch.zeros(3, 256).bfloat16()), layer.bias.detach().bfloat16().expand(3, 32))


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("dim", [1, 2, 63, 137, 199, 320])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (3, 6), (6, 3), (2, 4), (8, 16)])
def test_awkward_shapes(dim, tokens, weight_bits, activation_bits):
    layer = made(dim, 67, weight_bits, activation_bits)
    x = random(tokens, dim).bfloat16()
    y = exact(layer, x)
    assert y.shape == (tokens, 67)
    torch.testing.assert_close(y.double(), given_codes(layer, x), rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("tokens", [0, 1, 63, 137, 199])
@pytest.mark.parametrize(("dim", "rows"), [(16, 16), (48, 80), (320, 208), (3072, 528)])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (3, 6), (6, 3), (2, 4)])
def test_awkward_shapes_on_int8(dim, rows, tokens, weight_bits, activation_bits):
    layer = made(dim, rows, weight_bits, activation_bits)
    x = random(tokens, dim).bfloat16()
    y, own = on_int8(layer, x), encode_cpu.rotate_encode(x, encoding_of(layer))
    assert y.shape == (tokens, rows)
    torch.testing.assert_close(y.float(), reference_on_int8(layer, x, own), rtol=4e-3, atol=1e-5)


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("run", ROUTES)
def test_blocks_of_rows_and_tokens_do_not_show(run, monkeypatch):
    layer = made(96, 200, 3, 4)
    x = random(50, 96).bfloat16()
    expected = run(layer, x)
    monkeypatch.setattr(cpu, "WEIGHT_ELEMENTS", 1)
    monkeypatch.setattr(encode_cpu, "TOKEN_ELEMENTS", 7 * 96)
    torch.testing.assert_close(run(layer, x), expected, rtol=0.01, atol=0.01)
    assert torch.equal(run(layer, x), run(layer, x))


@pytest.mark.parametrize("run", ROUTES)
def test_views_no_bias_and_a_seed(run):
    layer = made(64, 40, 4, 4, seed=9)
    x = random(64, 30).bfloat16().T
    encoded = encode_cpu.rotate_encode(x.contiguous(), encoding_of(layer))
    expected = given_codes(layer, x) if run is exact else reference_on_int8(layer, x, encoded).double()
    torch.testing.assert_close(run(layer, x).double(), expected, rtol=0.02, atol=0.05)
    layer.bias = None
    assert torch.equal(run(layer, x), run(layer, x.contiguous()))
    torch.testing.assert_close(run(layer, x).double() + random(40, seed=2), expected, rtol=0.02, atol=0.05)


def test_coordinates_beyond_the_table():
    """A coordinate beyond the last boundary, as far as a token of one input gives it, has the outermost centroid."""
    x = torch.zeros(3, 1027).bfloat16()
    x[0, 3], x[1, 5], x[2, 7] = 2.0, -3.0, 1.0
    encoding = Encoding(1027, 4, "int8")
    assert torch.equal(encode_cpu.rotate_encode(x, encoding)[0], rotate_encode(x, encoding)[0])


def test_wider_tokens_and_the_other_grid_take_the_definition():
    x = random(9, 96)
    for given, grid in ((x, "int8"), (x.bfloat16(), "e4m3"), (x, "e4m3")):
        encoding = Encoding(96, 4, grid, 1)
        own, expected = encode_cpu.rotate_encode(given, encoding), rotate_encode(given, encoding)
        assert torch.equal(own[0].view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(own[1], expected[1])
