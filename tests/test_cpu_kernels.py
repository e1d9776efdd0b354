"""The CPU forward against the definition: codes, centroids, outputs, and the tokens that need care."""

import pytest
import torch

from orbitdit.codebook import lloyd_max
from orbitdit.kernels import cpu
from orbitdit.kernels.reference import encode_tokens
from orbitdit.linear import OrbitLinear
from orbitdit.packing import PACKED_BITS, pack, unpack
from orbitdit.rotation import rotation

DTYPES = [torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(dim: int, rows: int, weight_bits: int, activation_bits: int, seed: int = 0) -> OrbitLinear:
    linear = torch.nn.Linear(dim, rows)
    linear.weight.data, linear.bias.data = random(rows, dim, seed=1) / dim**0.5, random(rows, seed=2)
    return OrbitLinear.from_linear(linear, weight_bits, activation_bits, seed)


def run(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    return cpu.linear(x, layer.codes, layer.scales, layer.bias, layer.weight_bits, layer.activation_bits, layer.seed)


def tokens(layer: OrbitLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition's rotated tokens, as exact centroids in fp64, and their norms, for `x` in any dtype."""
    if layer.activation_bits == 16:
        norm = x.double().norm(dim=1, keepdim=True)
        unit = x.double() / norm.where(norm > 0, 1)
        return rotation(layer.in_features, layer.seed).apply(unit), norm
    codes, norm = encode_tokens(x, layer.activation_bits, layer.seed)
    return lloyd_max(layer.in_features, layer.activation_bits).centroids[codes.long()], norm.double()


def product(layer: OrbitLinear, token: torch.Tensor, norm: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """The outputs for rotated tokens, with the product in `dtype` and rounded to it."""
    codes = unpack(layer.codes, layer.weight_bits, layer.in_features)
    rows = lloyd_max(layer.in_features, layer.weight_bits).centroids[codes.long()]
    y = (token.to(dtype) @ rows.to(dtype).T) * norm * layer.scales.double() + layer.bias.double()
    return y.to(dtype)


def definition(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    return product(layer, *tokens(layer, x))


def given_codes(layer: OrbitLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition's outputs for the codes that the kernel takes, some of which may lie at a boundary."""
    return product(layer, *cpu.encode(x, layer.activation_bits, layer.seed, torch.float32))


def relative(a: torch.Tensor, b: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(a.double() - b.double(), dim=dim) / torch.linalg.vector_norm(b.double(), dim=dim)


@pytest.fixture(params=[True, False], ids=["int8", "float"])
def multiplies_int8(request, monkeypatch):
    """Both products; the one in int8 only where the CPU has it."""
    if request.param and not cpu._multiplies_int8():
        pytest.skip("this CPU does not multiply int8 exactly")
    monkeypatch.setattr(cpu, "_multiplies_int8", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("weight_bits", PACKED_BITS)
def test_outputs_are_as_near_to_the_definition_as_bf16_is(weight_bits, activation_bits, dtype):
    layer = made(768, 96, weight_bits, activation_bits)
    x = (random(257, 768) * random(768, seed=3).exp()).to(dtype)
    token, norm = tokens(layer, x)
    expected = product(layer, token, norm)
    of_bf16 = relative(product(layer, token, norm, torch.bfloat16), expected)
    y = run(layer, x)
    assert y.dtype == dtype
    # the 64 centroids of 6 bits lie less well on the grid of int8
    times = (
        4
        if cpu._operand(dtype, weight_bits, activation_bits) == torch.int8 and 6 in (weight_bits, activation_bits)
        else 2
    )
    assert relative(y, expected) <= times * of_bf16


@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("weight_bits", PACKED_BITS)
def test_fp32_is_exact_to_fp32(weight_bits, activation_bits):
    layer = made(384, 40, weight_bits, activation_bits, seed=5)
    x = random(33, 384)
    assert relative(run(layer, x), definition(layer, x)) < 1e-6
    torch.testing.assert_close(run(layer, x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(3, torch.int8), (4, torch.int8), (6, torch.int8), (4, torch.bfloat16), (8, torch.bfloat16)]
)
@pytest.mark.parametrize("dim", [137, 256, 1536])
def test_fewer_than_one_code_in_a_thousand_differs(dim, bits, dtype):
    x = random(-(-(1 << 19) // dim), dim).bfloat16()
    codes, norm = encode_tokens(x, bits)
    values, own = cpu.encode(x, bits, 0, dtype)
    assert (values != cpu._values(dim, bits, dtype).values[codes.long()]).float().mean() < 1e-3
    torch.testing.assert_close(own, norm)


@pytest.mark.parametrize("dim", [1, 2, 3, 63, 64, 137, 768])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_decoding_is_exact(dim, bits):
    codes = torch.randint(1 << bits, (7, dim), generator=torch.Generator().manual_seed(dim)).to(torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, *([torch.int8] if bits in cpu.INT8_BITS else [])):
        expected = cpu._values(dim, bits, dtype).values[codes.long()]
        for rows in (slice(None), slice(2, 5)):
            torch.testing.assert_close(
                cpu.decode(pack(codes, bits)[rows], bits, dim, dtype), expected[rows], rtol=0, atol=0
            )


@pytest.mark.parametrize(("bits", "excess"), [(2, 1e-4), (3, 1e-4), (4, 2e-3), (6, 0.08)])
def test_int8_grids_keep_the_mean_squared_error(bits, excess):
    centroids, boundaries = lloyd_max(3072, bits)
    values, step = cpu._values(3072, bits, torch.int8)
    x = random(1 << 20).double() / 3072**0.5
    codes = torch.bucketize(x, boundaries)
    exact, own = ((x - c[codes]).square().mean() for c in (centroids, step * values.double()))
    assert own < (1 + excess) * exact
    assert torch.equal(values, -values.flip(0))


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_finite_stay_alone(dtype, activation_bits):
    layer = made(192, 48, 4, activation_bits)
    x = random(9, 192).to(dtype)
    expected = run(layer, x)
    for row, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        x[row, 5 * row] = value
    y = run(layer, x)
    good = torch.tensor([0, 2, 3, 5, 6, 8])
    assert torch.equal(y[good], expected[good])
    assert not y[[1, 4, 7]].isfinite().any()


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("activation_bits", [4, 16])
def test_norms_of_any_size(activation_bits):
    layer = made(256, 32, 4, activation_bits)
    direction = random(1, 256).sign().bfloat16()
    size = torch.tensor([0, 1e-38, 1e-20, 1e-12, 1e-10, 1e-3, 1, 1e10, 1e18, 1e30, 1e36]).bfloat16()[:, None]
    x = direction * size
    assert (relative(run(layer, x), given_codes(layer, x), dim=1) < 0.02).all()
    assert (relative(run(layer, x), definition(layer, x), dim=1) < 0.05).all()
    assert torch.equal(run(layer, torch.zeros(3, 256).bfloat16()), layer.bias.detach().bfloat16().expand(3, 32))


@pytest.mark.usefixtures("multiplies_int8")
@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("dim", [1, 2, 63, 137, 199, 320])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (3, 6), (6, 3), (2, 4), (8, 16)])
def test_awkward_shapes(dim, tokens, weight_bits, activation_bits):
    layer = made(dim, 67, weight_bits, activation_bits)
    x = random(tokens, dim).bfloat16()
    y = run(layer, x)
    assert y.shape == (tokens, 67)
    torch.testing.assert_close(y.double(), given_codes(layer, x), rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("multiplies_int8")
def test_blocks_of_rows_and_tokens_do_not_show(monkeypatch):
    layer = made(96, 200, 3, 4)
    x = random(50, 96).bfloat16()
    expected = run(layer, x)
    monkeypatch.setattr(cpu, "WEIGHT_ELEMENTS", 1)
    monkeypatch.setattr(cpu, "TOKEN_ELEMENTS", 7 * 96)
    torch.testing.assert_close(run(layer, x), expected, rtol=0.01, atol=0.01)
    assert torch.equal(run(layer, x), run(layer, x))


@pytest.mark.usefixtures("multiplies_int8")
def test_views_no_bias_and_a_seed():
    layer = made(64, 40, 4, 4, seed=9)
    x = random(64, 30).bfloat16().T
    expected = given_codes(layer, x)
    torch.testing.assert_close(run(layer, x).double(), expected, rtol=0.02, atol=0.05)
    layer.bias = None
    assert torch.equal(run(layer, x), run(layer, x.contiguous()))
    torch.testing.assert_close(run(layer, x).double() + random(40, seed=2), expected, rtol=0.02, atol=0.05)


def test_coordinates_beyond_the_table():
    """A coordinate beyond the last boundary, as far as a token of one input gives it, has the outermost centroid."""
    x = torch.zeros(3, 1027).bfloat16()
    x[0, 3], x[1, 5], x[2, 7] = 2.0, -3.0, 1.0
    values, _ = cpu.encode(x, 4, 0, torch.int8)
    codes, _ = encode_tokens(x, 4)
    assert torch.equal(values, cpu._values(1027, 4, torch.int8).values[codes.long()])
