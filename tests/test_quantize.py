"""Weights to codes and back: every code against exhaustive search, scales to the bit, errors that name the tensor."""

import numpy as np
import pytest
import torch

import oracle
from orbitdit import ConfigError, OrbitQuantConfig, TensorError
from orbitdit.codebooks import token_gain, trellis
from orbitdit.ops.int4_linear.reference import dequantize_int4
from orbitdit.quantize import (
    QuantizedWeight,
    block_rows,
    check_scales,
    dequantize_weight,
    encoder,
    quantize_int4,
    quantize_weight,
    search,
)
from orbitdit.spec import LayerSpec, WeightCode
from specs import code, int4_spec, spec

MSE = {2: 0.117482, 3: 0.0345477, 4: 0.00950098, 6: 0.000644238}
CASES = [(2, 3), (3, 4), (63, 6), (137, 3), (199, 4), (256, 8), (960, 2), (1536, 4), (1920, 3), (3072, 6)]


def gaussian(rows, dim, seed=0):
    """Rows of very different norms, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 2, rows)[:, None]
    return (torch.randn(rows, dim, generator=generator) * spread).bfloat16()


def heavy_tailed(rows, dim, seed=0):
    """Student's t with 3 degrees of freedom: single weights dominate their rows."""
    values = np.random.default_rng(seed).standard_t(3, (rows, dim))
    return torch.from_numpy(values).to(torch.bfloat16)


def fp64(tensor):
    return tensor.double().numpy()


def of(weight, bits, seed=0, token_bits=16, **coding):
    """The spec of a layer with this weight; tokens are not coded unless that is asked for."""
    return spec(weight.shape[1], len(weight), bits, token_bits, seed, **coding)


def quantize(weight, bits, seed=0, **coding):
    return quantize_weight(weight, of(weight, bits, seed, **coding))


def there_and_back(weight, bits, seed=0, **coding):
    """What the codes of `weight` stand for."""
    asked = of(weight, bits, seed, **coding)
    return dequantize_weight(quantize_weight(weight, asked), asked)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_codes_are_the_nearest_centroids(dim, bits, make):
    weight = make(9, dim, seed=bits)
    quantized = quantize(weight, bits, seed=4)
    codes, norms = oracle.encode_weight(fp64(weight), bits, 4)
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scales.dtype == torch.bfloat16
    assert quantized.codes.shape == (9, -(-dim * bits // 8))
    np.testing.assert_array_equal(oracle.unpack(quantized.codes.numpy(), bits, dim), codes)
    np.testing.assert_array_equal(fp64(quantized.scales), oracle.to_bf16(norms))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_one_dimension_is_exact(bits):
    weight = torch.tensor([[3.0], [-0.5], [0.0], [1.25]])
    assert torch.equal(there_and_back(weight, bits, seed=9), weight)


def test_codes_use_the_unrounded_norm():
    """A norm in the middle between two bf16 numbers: dividing by the rounded one would move codes."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight *= (256.5 / 256) / weight.norm(dim=1, keepdim=True)
    codes, norms = oracle.encode_weight(weight.numpy(), 8, 0)
    rotated = weight.numpy() @ oracle.rotation_matrix(256, 0).T
    rounded = oracle.nearest(rotated / oracle.to_bf16(norms)[:, None], oracle.codebook(256, 8))
    assert (rounded != codes).sum() > 100
    np.testing.assert_array_equal(quantize(weight, 8).codes.numpy(), codes)


def test_zero_rows_stay_zero():
    weight = gaussian(5, 137)
    weight[[0, 3]] = 0
    quantized, back = quantize(weight, 3, seed=2), there_and_back(weight, 3, seed=2)
    assert (quantized.scales == 0).tolist() == [True, False, False, True, False]
    assert torch.equal(back[[0, 3]], torch.zeros(2, 137))
    codes, _ = oracle.encode_weight(fp64(weight), 3, 2)
    np.testing.assert_array_equal(oracle.unpack(quantized.codes.numpy(), 3, 137)[[1, 2, 4]], codes[[1, 2, 4]])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e30])
def test_magnitude_changes_scales_only(magnitude):
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain, moved = quantize(weight, 4), quantize(weight * magnitude, 4)
    assert torch.equal(plain.codes, moved.codes)
    norms = np.sqrt((fp64(weight * magnitude) ** 2).sum(1))
    np.testing.assert_array_equal(fp64(moved.scales), oracle.to_bf16(norms))


@pytest.mark.parametrize("factor", [1e39, 1e-45])
@pytest.mark.parametrize("make", [lambda w: quantize(w, 4), lambda w: quantize_weight(w, int4_spec(96, 5), "w")])
def test_scales_that_bf16_does_not_hold_are_refused(make, factor):
    """One row overflows to Inf, or becomes zero though it is not."""
    weight = gaussian(5, 96).double()
    weight[3] *= factor
    with pytest.raises(TensorError, match="too large or too small for a scale in bf16"):
        make(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_of_a_file_are_checked(value):
    scales = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.bfloat16)
    check_scales(scales, "to_q.scales")
    scales[1, 0] = value
    with pytest.raises(TensorError, match=r"^to_q\.scales holds scales that are NaN, Inf or negative"):
        check_scales(scales, "to_q.scales")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("make", [lambda w: quantize(w, 4), quantize_int4], ids=["orbit", "int4"])
def test_fp8_weights_are_taken_as_the_numbers_they_are(make, dtype):
    weight = gaussian(5, 96).to(dtype)
    assert all(map(torch.equal, make(weight), make(weight.float())))
    weight = weight.view(torch.uint8)
    weight[2, 3] = 127  # NaN in both
    with pytest.raises(TensorError, match="holds NaN or Inf"):
        quantize(weight.view(dtype), 4)


@pytest.mark.parametrize("recipe", ["w4a4", "w2a4"])
def test_blocks_of_rows_give_the_same_as_the_whole(recipe, monkeypatch):
    monkeypatch.setattr("orbitdit.quantize._BLOCK_ELEMENTS", 4 * 64)
    weight, layer = gaussian(13, 64), OrbitQuantConfig(recipe).layer((64, 13))
    whole, rows = quantize_weight(weight, layer), block_rows(64, weight.device)
    encode = encoder(layer, weight.device)
    parts = [encode(block) for block in weight.split(rows)]
    assert len(parts) == 4
    assert all(torch.equal(torch.cat(p), w) for p, w in zip(zip(*parts, strict=True), whole, strict=True))


@pytest.mark.parametrize("make", [lambda w: quantize(w, 3, seed=1), quantize_int4], ids=["orbit", "int4"])
def test_rows_do_not_depend_on_each_other(make):
    """More than 2^23 weights, so that work in blocks of rows meets a seam; whole against in pieces."""
    weight = gaussian(132_000, 64)
    whole = make(weight)
    pieces = [make(piece) for piece in weight.split([1, 70_000, 7, 61_992])]
    assert torch.equal(whole.codes, torch.cat([piece.codes for piece in pieces]))
    assert torch.equal(whole.scales, torch.cat([piece.scales for piece in pieces]))


@pytest.mark.parametrize("make", [lambda w: quantize(w, 4), quantize_int4], ids=["orbit", "int4"])
def test_dtype_and_strides_do_not_matter(make):
    weight = heavy_tailed(12, 192)
    wide = torch.stack([weight, -weight], dim=2)
    expected = make(weight)
    for copy in (weight.float(), weight.double(), weight.T.contiguous().T, wide[:, :, 0], torch.nn.Parameter(weight)):
        got = make(copy)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scales, expected.scales)
        assert not got.scales.requires_grad


def test_the_input_is_left_alone():
    weight = gaussian(6, 128).float()
    before = weight.clone()
    quantize(weight, 4)
    quantize_int4(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_dequantized_weights_are_what_the_codes_say(dim, bits):
    weight = gaussian(4, dim, seed=dim)
    back = there_and_back(weight, bits, seed=1)
    expected = oracle.rotated_weight(fp64(weight), bits, 1) @ oracle.rotation_matrix(dim, 1)
    assert back.dtype == torch.float32
    assert np.linalg.norm(fp64(back) - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize(("bits", "expected"), MSE.items())
def test_error_is_the_codebooks_own_whatever_the_weights(bits, expected, make):
    """Rotation makes heavy tails as easy as the normal law: relative squared error D(b), averaged over rows."""
    weight = make(96, 1536)
    error = there_and_back(weight, bits) - weight
    relative = error.double().square().sum(1) / weight.double().square().sum(1)
    assert relative.mean().item() == pytest.approx(expected, rel=0.02)


def test_another_seed_gives_other_codes():
    weight = gaussian(4, 96)
    first, second = quantize(weight, 4, seed=0), quantize(weight, 4, seed=1)
    assert not torch.equal(first.codes, second.codes)
    assert torch.equal(first.codes, quantize(weight, 4).codes)


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 137, 192, 1536])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_int4_against_a_calculation_value_by_value(dim, make):
    weight = make(5, dim, seed=dim)
    weight[1] = 0
    weight[2, :64] = 0
    quantized = quantize_int4(weight)
    codes, scales = oracle.int4(fp64(weight))
    assert quantized.codes.shape == (5, -(-dim // 2))
    assert quantized.scales.dtype == torch.bfloat16
    np.testing.assert_array_equal(fp64(quantized.scales), scales)
    np.testing.assert_array_equal(oracle.unpack(quantized.codes.numpy(), 4, dim).astype(int) - 8, codes)
    back = dequantize_int4(*quantized, dim)
    assert back.dtype == torch.float32
    np.testing.assert_array_equal(fp64(back), oracle.int4_weight(codes, scales))


def test_int4_golden_bytes():
    """Scale 1; a scale that bf16 rounds down; and the smallest scale of all, where rounding is so coarse that 9.8
    must be clamped to 7."""
    plain = quantize_int4(torch.tensor([[7.0, -7.0, 0.4, -2.6, 1.5]]))
    assert plain.codes.tolist() == [[0x1F, 0x58, 0x0A]]
    assert plain.scales.tolist() == [[1.0]]
    down = quantize_int4(torch.tensor([[7 * 1.00390625, -7 * 1.00390625, 0.0]]))
    assert down.scales.tolist() == [[1.0]]
    assert down.codes.tolist() == [[0x1F, 0x08]]
    clamped = quantize_int4(torch.tensor([[9.8, -9.8, 1.0]], dtype=torch.float64) * 2.0**-133)
    assert clamped.scales.tolist() == [[2.0**-133]]
    assert clamped.codes.tolist() == [[0x1F, 0x09]]


def test_int4_error_of_normal_weights():
    """E absmax^2 of 64 normal weights is 6.93, so step^2 / 12 is 0.0118; the largest weight itself has no error."""
    weight = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))
    error = (dequantize_int4(*quantize_int4(weight), 3072) - weight).square().mean().item()
    assert error == pytest.approx(0.0116, rel=0.01)


@pytest.mark.parametrize("asked", [spec(64, 4), int4_spec(64, 4)], ids=["orbit", "int4"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(float("nan"))),
        lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))),
        lambda w: w.index_put((torch.tensor(3), torch.tensor(63)), torch.tensor(float("-inf"))),
        lambda w: w.to(torch.int8),
        lambda w: w.bool(),
        lambda w: w.to(torch.complex64),
        lambda w: w[0],
        lambda w: w[None],
        lambda w: w.sum(),
    ],
    ids=["nan", "inf", "-inf", "int8", "bool", "complex", "1-D", "3-D", "0-D"],
)
def test_unusable_weights_are_refused_by_name(spoil, asked):
    weight = spoil(torch.ones(4, 64))
    with pytest.raises(TensorError, match=r"blocks\.7\.attn\.to_q\.weight"):
        quantize_weight(weight, asked, "blocks.7.attn.to_q.weight")


@pytest.mark.parametrize("asked", [spec(64, 4), int4_spec(64, 4)], ids=["orbit", "int4"])
def test_weights_of_another_shape_are_refused_by_name(asked):
    for shape in ((64, 4), (4, 65), (3, 64)):
        with pytest.raises(TensorError, match=r"blocks\.0\.weight has shape .* \(4, 64\) is needed"):
            quantize_weight(torch.ones(shape), asked, "blocks.0.weight")


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 16])
def test_unknown_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=str(bits)):
        quantize(torch.ones(2, 8), bits)


def test_seeds_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="-1"):
        quantize(torch.ones(2, 8), 4, seed=-1)


def test_damaged_codes_are_refused():
    weight = gaussian(3, 64)
    orbit, int4 = quantize(weight, 3), quantize_int4(weight)
    with pytest.raises(TensorError):
        dequantize_weight(QuantizedWeight(orbit.codes[:, :-1], orbit.scales), of(weight, 3))
    with pytest.raises(TensorError):
        dequantize_weight(orbit, of(weight, 4))
    with pytest.raises(TensorError):
        dequantize_weight(QuantizedWeight(int4.codes[:, :-1], int4.scales), int4_spec(64, 3))


def test_no_rows():
    weight = torch.zeros(0, 96)
    empty = quantize(weight, 4)
    assert empty.codes.shape == (0, 48)
    assert empty.scales.shape == (0,)
    assert dequantize_weight(empty, of(weight, 4)).shape == (0, 96)
    assert dequantize_weight(quantize_int4(weight), int4_spec(96, 0)).shape == (0, 96)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize(("bits", "states"), [(2, None), (3, None), (4, None), (8, None), (2, 8), (3, 10), (4, 8)])
def test_the_unbiased_scale_gives_every_row_its_length_back(bits, states, make):
    """<w, w^> = ||w||^2, up to the rounding to bf16; the norm leaves (1 - D) of it."""
    weight = make(12, 192).double()
    weight[3] = 0
    energy = weight.square().sum(1)
    unbiased, norm = (quantize(weight, bits, 1, states=states, scale=s) for s in ("unbiased-rows", "norm"))
    assert torch.equal(unbiased.codes, norm.codes)
    assert unbiased.scales.dtype == torch.bfloat16
    kept = (dequantize_weight(unbiased, of(weight, bits, 1, states=states)).double() * weight).sum(1)
    torch.testing.assert_close(kept, energy, rtol=2**-8, atol=0)
    assert unbiased.scales[3] == norm.scales[3] == 0
    if states is None:
        shrunk = (dequantize_weight(norm, of(weight, bits, 1)).double() * weight).sum(1) / energy.where(energy > 0, 1)
        assert shrunk[energy > 0].mean().item() == pytest.approx(1 - MSE.get(bits, 0), abs=0.02)


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 3), (4, 4), (2, 3), (3, 6), (8, 8)])
@pytest.mark.parametrize("dim", [1, 8, 192])
def test_the_unbiased_scale_undoes_the_shrinking_of_tokens_too(dim, bits, activation_bits):
    """By a constant, which is what `scale` changes beside the rows' own, and what is left out where it is asked for the
    weight; without codes for tokens there is nothing to undo."""
    weight = gaussian(400, dim).double()
    of_rows, of_both = (of(weight, bits, 1, activation_bits, scale=s) for s in ("unbiased-rows", "unbiased"))
    rows, both = quantize_weight(weight, of_rows), quantize_weight(weight, of_both)
    gain = token_gain(of_both)
    assert torch.equal(rows.codes, both.codes)
    torch.testing.assert_close(both.scales.double(), rows.scales.double() * gain, rtol=2**-7, atol=0)
    assert both.scales.double().mean().item() == pytest.approx(rows.scales.double().mean().item() * gain, rel=5e-4)
    back = dequantize_weight(both, of_both).double()
    torch.testing.assert_close(back, dequantize_weight(rows, of_rows).double(), rtol=2**-7, atol=1e-4)
    assert torch.equal(quantize(weight, bits, 1, scale="unbiased").scales, rows.scales)
    assert token_gain(of_rows) == token_gain(of(weight, bits, scale="unbiased")) == 1


@pytest.mark.parametrize(("dim", "bits", "states"), [(137, 2, 8), (96, 3, 8), (64, 4, 10), (1, 2, 8), (63, 2, 12)])
def test_trellis_codes_are_those_of_the_rotated_row(dim, bits, states):
    """Rotated by a dense matrix; the search itself has its tests in test_trellis.py."""
    weight = gaussian(4, dim, seed=dim)
    quantized = quantize(weight, bits, seed=5, states=states)
    rotated = fp64(weight) @ oracle.rotation_matrix(dim, 5).T
    norms = np.sqrt((rotated**2).sum(1))
    z = torch.from_numpy(np.sqrt(dim) * rotated / norms[:, None]).float()
    codes = search(z, code(bits, states), dim)
    np.testing.assert_array_equal(oracle.unpack(quantized.codes.numpy(), bits, dim), codes.numpy())
    np.testing.assert_array_equal(fp64(quantized.scales), oracle.to_bf16(norms))
    values = trellis.table(bits, states)[trellis.windows(codes, bits, states)].numpy() / np.sqrt(dim)
    expected = values * oracle.to_bf16(norms)[:, None] @ oracle.rotation_matrix(dim, 5)
    back = there_and_back(weight, bits, 5, states=states)
    assert np.linalg.norm(fp64(back) - expected) < 1e-6 * np.linalg.norm(expected)


def test_rows_that_no_trellis_code_fits_keep_their_norm():
    """One weight has few states to choose from; its sign is kept all the same, and the scale stays finite."""
    for bits, states in ((2, 8), (3, 12), (4, 10)):
        weight = torch.tensor([[2.0], [-3.0], [0.0], [1e-30]])
        back = there_and_back(weight, bits, states=states, scale="unbiased")
        torch.testing.assert_close(back, weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "mean"}, "scale='mean' is not supported; choose one of unbiased, unbiased-rows, norm"),
        ({"bits": 6, "states": 12}, "a trellis with bits=6"),
        ({"states": 9}, "a trellis with log2_states=9"),
        ({"token_bits": 5}, "tokens of 5 bits are not supported; choose one of 3, 4, 6, 8"),
    ],
)
def test_unknown_scales_trellises_and_tokens_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        quantize(torch.ones(2, 8), **{"bits": 2, **options})


def test_unknown_codebooks_are_refused():
    asked = LayerSpec(8, 2, WeightCode("lattice", 2, "norm"), None)
    with pytest.raises(ConfigError, match="codebook 'lattice' is unknown; choose one of scalar, trellis"):
        quantize_weight(torch.ones(2, 8), asked)
