"""The kernels on a CUDA device against their definitions there: codes, products, and the tokens that need care."""

import pytest
import torch
from torch import nn

from encoding_checks import (
    FLIPS,
    NORMS,
    defined,
    flips,
    packed,
    prologue_inputs,
    random,
    relative,
    same,
    tokens,
    tokens_of_one_input,
)
from orbitdit.codebooks import trellis
from orbitdit.codebooks.lloyd_max import on_grid
from orbitdit.ops import ops
from orbitdit.ops.decode import cuda as decode_cuda
from orbitdit.ops.decode import reference as decode_reference
from orbitdit.ops.int4_linear import reference as int4_reference
from orbitdit.ops.int4_linear.reference import dequantize_int4
from orbitdit.ops.linear import reference as linear_reference
from orbitdit.ops.linear.matmul import Scaled, matmul
from orbitdit.ops.operands import Packed
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.rotate_encode import reference
from orbitdit.ops.rotate_encode.reference import apply_prologue
from orbitdit.ops.viterbi.reference import viterbi
from orbitdit.packing import PACKED_BITS, packed_width, unpack
from orbitdit.quantize import QuantizedWeight, quantize_int4, search
from orbitdit.spec import Encoding
from parameters import TRELLISES
from specs import code, key_of, spec, tokens_key

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTHS = [16, 48, 64, 128, 192, 256, 960, 1024, 1536, 1920, 2048, 3072, 3840, 4096, 5120]
WIDE = [7680, 8960, 10240, 12288, 13824, 15360]
TOKENS = [1, 63, 137, 199]
NARROW = [torch.bfloat16, torch.float16]
BF16 = torch.bfloat16
CUDA = torch.device("cuda", 0)


def encode(x, bits, grid, seed=1):
    return ops.rotate_encode(x, tokens_key(x.shape[1], bits, grid, seed))


def all_same(left, right):
    return all(map(same, left, right))


def stacked(parts):
    """The rows of all `parts`, bytes of numbers that torch does not concatenate included."""
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("dim", WIDTHS)
def test_rotate_encode(dim, bits, dtype, grid):
    total = flipped = 0
    for count in (*TOKENS, -(-100_000 // dim)):
        x = tokens(count, dim, dtype, seed=count).to(CUDA)
        flipped += flips(encode(x, bits, grid), x, bits, grid)
        total += x.numel()
    assert flipped <= FLIPS[bits] * total


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("dim", WIDE)
def test_rotate_encode_of_wide_tokens(dim, bits, dtype, grid):
    x = tokens(199, dim, dtype).to(CUDA)
    assert flips(encode(x, bits, grid), x, bits, grid) <= FLIPS[bits] * x.numel()


def test_rotate_encode_of_many_tokens(grid):
    """More than the device holds at a time: every block takes several groups; past 2^31 bytes nothing wraps."""
    x = torch.randn(100_003, 256, device=CUDA, dtype=BF16)
    assert flips(encode(x, 4, grid), x, 4, grid) <= FLIPS[4] * x.numel()
    if torch.cuda.mem_get_info(CUDA)[0] > 24 << 30:
        x = torch.randn((1 << 31) // 12288 + 70, 12288, device=CUDA, dtype=BF16)
        values, scales = encode(x, 4, grid)
        last = encode(x[-64:], 4, grid)
        assert all_same((values[-64:], scales[-64:]), last)


@pytest.mark.parametrize("dim", [64, 3072, 4096, 12288])
def test_encoding_twice_gives_the_same_bits_whatever_else_is_encoded(dim, grid):
    x = tokens(199, dim).to(CUDA)
    values, scales = encode(x, 4, grid)
    assert all_same((values, scales), encode(x, 4, grid))
    for part in (slice(0, 1), slice(100, 163), slice(198, None)):
        assert all_same((values[part], scales[part]), encode(x[part], 4, grid))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("dim", [64, 1536, 3072, 4096, 12288])
@pytest.mark.parametrize("dtype", NARROW)
def test_spoilt_tokens_and_zeros_leave_the_others_alone(dtype, dim, bits, grid):
    x = tokens(10, dim, dtype).to(CUDA)
    values, scales = encode(x, bits, grid)
    for row, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        x[row, 5 * row] = value
    x[2] = 0
    spoilt, spoilt_scales = encode(x, bits, grid)
    good = torch.tensor([0, 3, 5, 6, 8, 9], device=CUDA)
    assert all_same((spoilt[good], spoilt_scales[good]), (values[good], scales[good]))
    assert not spoilt_scales[[1, 4, 7]].isfinite().any()
    assert all_same((spoilt[2:3], spoilt_scales[2:3]), defined(x[2:3], bits, grid))


@pytest.mark.parametrize("dim", [64, 3072, 4096, 12288])
def test_norms_of_any_size(dim, grid):
    unit = nn.functional.normalize(random(len(NORMS), dim), dim=1)
    x = (unit * torch.tensor(NORMS)[:, None]).bfloat16().to(CUDA)
    for bits in (4, 6):
        assert flips(encode(x, bits, grid), x, bits, grid) <= 3 + FLIPS[bits] * x.numel()
    half = (random(4, dim).clamp(-2, 2) * torch.tensor([3e-7, 1e-4, 1.0, 3e4])[:, None]).half().to(CUDA)
    assert flips(encode(half, 4, grid), half, 4, grid) <= 3 + 2e-3 * half.numel()


@pytest.mark.parametrize("dim", [16, 192, 256, 3072, 4096])
def test_tokens_of_one_input(dim, grid):
    x = tokens_of_one_input(dim).to(CUDA)
    for bits in (3, 4):
        (values, scales), expected = encode(x, bits, grid), defined(x, bits, grid)
        assert same(values, expected[0])
        torch.testing.assert_close(scales, expected[1], rtol=1e-6, atol=0)


def test_no_tokens_and_views(grid):
    values, scales = encode(torch.empty(0, 64, device=CUDA, dtype=BF16), 4, grid)
    assert (values.shape, scales.shape) == ((0, 64), (0,))
    flat = torch.randn(5 * 64 + 8, device=CUDA, dtype=BF16)
    for offset in (8, 3):  # bytes 16 and 6 of a storage
        x = flat[offset : offset + 5 * 64].view(5, 64)
        assert all_same(encode(x, 4, grid), encode(x.clone(), 4, grid))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("prologue", "dim", "first", "batch"),
    [
        *(("gelu", dim, 0, 1) for dim in (64, 1536, 7680, 8960, 12288, 13824)),
        ("gelu", 15360, 3072, 1),
        *(("layer_norm", dim, 0, 3) for dim in (64, 1536, 1920, 3072, 5120)),
        *(("silu", dim, 0, 1) for dim in (64, 1536, 1920, 3072, 10240)),
        *(("rms_norm", dim, 0, 3) for dim in (64, 1536, 1920, 3072, 3840, 5120)),
        ("rms_norm", 3840, 0, 0),
    ],
)
def test_what_comes_before_the_encoding(prologue, dim, first, batch, dtype, grid):
    x, args = prologue_inputs(prologue, 198, dim, first, batch, dtype, CUDA)
    found = rotate_encode_cuda.rotate_encode(x, Encoding(dim, 4, grid, 1), prologue, args)
    expected = defined(apply_prologue(x, prologue, args), 4, grid)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=0)
    levels = on_grid(dim, 4, grid, True).values.float().to(CUDA)
    code, expected_code = (torch.bucketize(values.float(), levels) for values in (found[0], expected[0]))
    assert (code - expected_code).abs().max() <= 1
    assert (code != expected_code).sum() <= 3 + 3e-3 * code.numel()
    assert all_same(found, rotate_encode_cuda.rotate_encode(x, Encoding(dim, 4, grid, 1), prologue, args))


def centred(x, bits, grid, prologue="", args=()):
    """Values and scales of tokens (samples, tokens, channels) from the kernels, alone and sample by sample, and what
    the definition's stand for."""
    dim = apply_prologue(x[0, :1], prologue, [t[:1] for t in args]).shape[1]
    encoding = Encoding(dim, bits, grid, 1, 16, True)
    found = rotate_encode_cuda.rotate_encode(x, encoding, prologue, args)
    assert all_same(found, rotate_encode_cuda.rotate_encode(x, encoding, prologue, args))
    made = apply_prologue(x.flatten(0, 1), prologue, args).view(*x.shape[:2], dim)
    values, scales = reference.rotate_encode(made, encoding)
    return found, values.float() * scales[:, None], encoding


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (3, torch.float16)])
@pytest.mark.parametrize("count", [1, 15, 17, 63, 5120])
@pytest.mark.parametrize("dim", [256, 384, 1536, 1920, 3072, 3840, 5120, 8960, 12288, 15360])
def test_centred_tokens(dim, count, bits, dtype, grid):
    """Two samples of tokens that have much in common; they do not know each other."""
    x = tokens(2 * count, dim, dtype).view(2, count, dim) / 30 + random(2, 1, dim, seed=5).to(dtype)
    x = x.to(CUDA)
    found, expected, encoding = centred(x, bits, grid)
    stood_for = found[0].float() * found[1][:, None]
    assert relative(stood_for, expected) <= 0.03
    alone = [rotate_encode_cuda.rotate_encode(sample, encoding) for sample in x]
    assert all_same(found, map(stacked, zip(*alone, strict=True)))


@pytest.mark.parametrize(
    ("prologue", "dim", "first", "batch"),
    [
        ("gelu", 8960, 0, 1),
        ("gelu", 15360, 3072, 1),
        *(("layer_norm", dim, 0, 2) for dim in (256, 1536, 1920, 3072, 5120)),
        ("silu", 10240, 0, 1),
        *(("rms_norm", dim, 0, 2) for dim in (1536, 3840)),
        ("rms_norm", 3840, 0, 0),
    ],
)
def test_centred_tokens_behind_a_prologue(prologue, dim, first, batch, grid):
    x, args = prologue_inputs(prologue, 2 * 99, dim, first, batch, BF16, CUDA)
    x = x.unflatten(0, (2, 99))
    found, expected, _ = centred(x, 4, grid, prologue, args)
    assert relative(found[0].float() * found[1][:, None], expected) <= 0.03


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_spoilt_token_leaves_its_group_finite(value, grid):
    x = tokens(40, 3072).to(CUDA)[None]
    x[0, 20, 7] = value
    values, scales = rotate_encode_cuda.rotate_encode(x, Encoding(3072, 4, grid, 1, 16, True))
    finite = (values.float() * scales[:, None]).isfinite().all(1)
    assert finite[:20].all()
    assert finite[21:].all()
    assert finite[20] == (value == 1e30)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heights", [(16,), (48, 208), (3072, 16, 1024), (64, 64, 64, 12288)])
def test_weights_that_are_decoded_together_are_those_decoded_alone(heights, bias, bits, grid):
    dim = 3072
    codes, scales = zip(*([t.to(CUDA) for t in packed(rows, dim, bits)] for rows in heights), strict=True)
    biases = [None if bias is None else random(rows, seed=rows).to(CUDA, bias) for rows in heights]
    layer = spec(dim, 16, bits)  # rows are those of the tensors
    values, row_scales, together = decode_cuda.decode_all(Packed(codes, scales, biases), layer, grid)
    alone = [decode_reference.decode(c, s, layer, grid) for c, s in zip(codes, scales, strict=True)]
    assert all_same((values, row_scales), map(stacked, zip(*alone, strict=True)))
    assert together is None if bias is None else same(together, torch.cat(biases))


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("rows", "dim"), [(0, 64), (1, 16), (7, 48), (199, 1920), (3072, 12288), (12288, 3072)])
def test_decode_is_exact(rows, dim, bits, grid):
    codes = torch.randint(256, (rows, packed_width(dim, bits)), device=CUDA, dtype=torch.uint8)
    scales = torch.rand(rows, device=CUDA).bfloat16()
    layer = spec(dim, 16, bits)
    found = ops.decode(codes, scales, key_of(layer, grid=grid))
    assert all_same(found, decode_reference.decode(codes, scales, layer, grid))


@pytest.mark.parametrize(("bits", "states"), TRELLISES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (7, 48), (199, 1920), (3072, 12288), (12288, 3072)])
def test_decode_of_trellis_codes_is_exact(rows, dim, bits, states, grid):
    codes = torch.randint(256, (rows, packed_width(dim, bits)), device=CUDA, dtype=torch.uint8)
    scales = torch.rand(rows, device=CUDA).bfloat16()
    layer = spec(dim, 16, bits, states=states)
    values, row_scales = decode_cuda.decode(codes, scales, layer, grid)
    assert all_same((values, row_scales), decode_cuda.decode(codes, scales, layer, grid))
    table = trellis.table(bits, states) / trellis.UNIT
    part = slice(0, rows, max(1, rows // 100))  # rows stand alone, and windows of all take memory
    expected = table.to(CUDA)[trellis.windows(unpack(codes[part], bits, dim), bits, states).long()]
    assert same(values[part], expected.float().to(values.dtype))
    torch.testing.assert_close(row_scales, scales.float() * (trellis.UNIT / dim**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "states"), [(2, 12), (3, 12), (4, 8)])
def test_trellis_codes_of_several_weights_are_decoded_as_each_alone(bits, states, grid):
    dim, rows = 3072, (137, 1, 3072)
    codes = [torch.randint(256, (n, packed_width(dim, bits)), device=CUDA, dtype=torch.uint8) for n in rows]
    scales = [torch.rand(n, device=CUDA).bfloat16() for n in rows]
    biases = [random(n, seed=n).to(CUDA, BF16) for n in rows]
    layer = spec(dim, 16, bits, states=states)
    values, row_scales, bias = decode_cuda.decode_all(Packed(codes, scales, biases), layer, grid)
    alone = [decode_cuda.decode(c, s, layer, grid) for c, s in zip(codes, scales, strict=True)]
    assert all_same((values, row_scales), map(stacked, zip(*alone, strict=True)))
    assert same(bias, torch.cat(biases))


@pytest.mark.parametrize(("bits", "states"), TRELLISES)
def test_trellis_codes_are_those_of_the_cpu(bits, states):
    """Exactly, for few long rows and for more short ones than the device holds; twice the same."""
    for rows, dim in ((3, 3072), (5, 1920), (1, 15360), (1500, 63), (12_000 if states == 8 else 1, 17), (0, 64)):
        z = random(rows, dim, seed=dim)
        codes = search(z.to(CUDA), code(bits, states), dim)
        assert same(codes.cpu(), viterbi(z, trellis.table(bits, states).float(), bits))
        assert same(codes.cpu(), search(z, code(bits, states), dim))
        assert same(codes, search(z.to(CUDA), code(bits, states), dim))


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [16, 208, 3072])
def test_matmul(rows, dtype, bias, grid):
    """Twice what rounding to the output's dtype loses; e4m3 products come rounded to bf16, and accumulate fast."""
    bias = None if bias is None else random(rows).to(CUDA, bias)
    for dim in (64, 3072, 12288):
        weight = ops.decode(*(t.to(CUDA) for t in packed(rows, dim, 4)), key_of(spec(dim, rows), grid=grid))
        for count in (0, 1, 16, 17, 31, 33, 63, 137, 199):
            encoded = encode(tokens(count, dim, dtype).to(CUDA), 4, grid)
            y = matmul(Scaled(*encoded), Scaled(*weight), bias, dtype)
            assert (y.shape, y.dtype) == ((count, rows), dtype)
            if not count:
                continue
            exact = linear_reference.matmul(encoded, weight, bias, torch.float32)
            rounded = exact.to(dtype if grid == "int8" else BF16)
            assert relative(y, exact) <= 2 * relative(rounded, exact) + (0.015 if grid == "e4m3" else 0)
            assert same(y, matmul(Scaled(*encoded), Scaled(*weight), bias, dtype))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dim", "n"),
    [
        *((3072, 18432), (3072, 9216), (6144, 18432), (6144, 40), (12288, 144)),
        *((256, 23040), (512, 1536), (1152, 31), (137, 33), (63, 7), (1, 17)),
    ],
)
def test_int4_rows(dim, n, bias, dtype):
    """Equal to the fp64 product up to one rounding of the output and what fp32 sums lose."""
    quantized = QuantizedWeight(*(t.to(CUDA) for t in quantize_int4(random(n, dim))))
    weight = dequantize_int4(*quantized, dim).double()
    bias = random(n, seed=2).to(CUDA, dtype) if bias else None
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8):
        x = random(rows, dim, seed=1).to(CUDA, dtype)
        y = ops.int4_linear(x, *quantized, bias)
        assert (y.shape, y.dtype) == ((rows, n), dtype)
        expected = x.double() @ weight.T + (0 if bias is None else bias.double())
        sums = x.double().abs() @ weight.abs().T
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * sums + torch.finfo(dtype).smallest_normal
        assert ((y.double() - expected).abs() <= bound).all()
        assert same(y, ops.int4_linear(x, *quantized, bias))
    x = random(9, dim, seed=1).to(CUDA, dtype)
    torch.testing.assert_close(ops.int4_linear(x, *quantized, bias), int4_reference.int4_linear(x, *quantized, bias))
    x = x[:8].view(2, 4, dim)
    assert same(ops.int4_linear(x, *quantized, bias).view(8, n), ops.int4_linear(x.view(8, dim), *quantized, bias))
