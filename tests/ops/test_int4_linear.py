"""The INT4 kernel, run on the CPU by the emulator, against the layer's definition in fp32."""

import pytest
import torch

from cuda_emulator import Launch, launch
from encoding_checks import random
from orbitdit.ops.int4_linear.cuda import Shape, compile_options, shape_for
from orbitdit.ops.int4_linear.reference import dequantize_int4
from orbitdit.quantize import QuantizedWeight, quantize_int4

DTYPES = [torch.bfloat16, torch.float16]
SMALL = Shape(warps=2, stages=2, bulk=False)


def int4_linear(x, quantized, bias, shape=SMALL, blocks=3, reverse=False):
    (rows, dim), n = x.shape, len(quantized.codes)
    y = torch.full((rows, n), torch.nan, dtype=x.dtype)
    defines = compile_options(dim, x.dtype == torch.float16, shape)
    args = [x, quantized.codes, quantized.scales, bias, y, rows, n]
    how = Launch((blocks, 1, 1), shape.threads, shape.shared_bytes(dim), reverse)
    launch("int4_linear/int4_linear.cu", "int4_linear", how, args, defines)
    return y


def check(y, x, quantized, bias):
    """Equal to the fp64 product up to one rounding of the output and what fp32 sums lose."""
    weight = dequantize_int4(*quantized, x.shape[1]).double()
    expected = x.double() @ weight.T
    if bias is not None:
        expected += bias.double()
    sums = x.double().abs() @ weight.abs().T
    bound = torch.finfo(x.dtype).eps / 2 * expected.abs() + 1e-6 * sums + torch.finfo(x.dtype).smallest_normal
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "dim", "n"),
    [
        (1, 256, 48),
        (8, 256, 16),
        (3, 64, 1),
        (2, 63, 7),  # odd: half a byte is left over
        (5, 137, 33),
        (7, 1, 17),
        (4, 192, 40),  # whole groups, not whole chunks
        (8, 1152, 31),
        (2, 1544, 50),  # more chunks than warps
    ],
)
def test_product(dtype, bias, rows, dim, n):
    quantized, x = quantize_int4(random(n, dim)), random(rows, dim, seed=1).to(dtype)
    bias = random(n, seed=2).to(dtype) if bias else None
    check(int4_linear(x, quantized, bias), x, quantized, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize(
    ("warps", "stages", "blocks"), [(1, 2, 1), (1, 5, 2), (4, 3, 2), (3, 8, 1), (3, 2, 1), (2, 4, 20)]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_shape_of_launch_gives_the_product(dtype, bulk, warps, stages, blocks, reverse):
    quantized, x = quantize_int4(random(112, 768)), random(3, 768, seed=1).to(dtype)
    bias = random(112, seed=2).to(dtype)
    check(int4_linear(x, quantized, bias, Shape(warps, stages, bulk), blocks, reverse), x, quantized, bias)


@pytest.mark.parametrize("dim", [32, 352, 1184])
def test_bulk_copies_of_rows_that_end_within_a_chunk(dim):
    quantized, x = quantize_int4(random(48, dim)), random(5, dim, seed=1).bfloat16()
    for shape in (Shape(2, 3, True), Shape(3, 2, True)):
        check(int4_linear(x, quantized, None, shape, 2), x, quantized, None)


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("dim", [1, 137, 256, 512, 1536, 3072, 3840, 6144, 12288])
def test_the_launch_for_each_width(dim, bulk):
    bulk = bulk and dim % 32 == 0
    shared = 227 << 10 if bulk else 99 << 10  # what a block may have on sm_90 and on sm_89
    shape = shape_for(dim, bulk, shared)
    assert shape.shared_bytes(dim) <= shared
    quantized, x = quantize_int4(random(48, dim)), random(8, dim, seed=1).bfloat16()
    check(int4_linear(x, quantized, None, shape, 2), x, quantized, None)


def test_every_width_up_to_12288_has_a_launch_on_every_device():
    for shared in (99 << 10, 163 << 10, 227 << 10):  # compute capability 8.6 and 8.9; 8.0; 9.0
        for dim in range(1, 12289, 61):
            assert shape_for(dim, False, shared).shared_bytes(dim) <= shared
        assert shape_for(12289, False, shared) is None


def test_two_blocks_for_3072_inputs_fit_beside_each_other():
    """A processor of compute capability 9.0 has 228 KiB, and takes 1 KiB for each block."""
    assert 2 * (shape_for(3072, True, 227 << 10).shared_bytes(3072) + 1024) <= 228 << 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_in_every_place(dtype):
    """Each row of x picks one input, so each output is one weight, exactly."""
    codes = random(16, 128).mul(1000).int().to(torch.uint8)
    quantized = QuantizedWeight(codes, torch.tensor([0.5, 1, 2, 4]).bfloat16().expand(16, 4).contiguous())
    weight = dequantize_int4(*quantized, 256)
    assert set(weight[:, 64:128].flatten().tolist()) == set(range(-8, 8))
    for start in range(0, 256, 8):
        x = torch.eye(256)[start : start + 8].to(dtype)
        assert torch.equal(int4_linear(x, quantized, None, blocks=1).float(), weight[:, start : start + 8].T)


def test_the_sum_is_the_same_in_any_order_of_threads():
    quantized, x = quantize_int4(random(64, 1024)), random(8, 1024, seed=1).half()
    outputs = [
        int4_linear(x, quantized, None, Shape(4, 3, c), b, r)
        for r in (False, True)
        for b in (1, 4)
        for c in (False, True)
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_leaves_the_others_alone(bad):
    quantized, x = quantize_int4(random(20, 320)), random(8, 320, seed=1).bfloat16()
    good = int4_linear(x, quantized, None)
    x[3, 5] = bad
    y = int4_linear(x, quantized, None)
    assert not y[3].isfinite().any()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(y[others], good[others])


def test_no_rows():
    assert int4_linear(torch.empty(0, 64).half(), quantize_int4(random(20, 64)), None).shape == (0, 20)


def test_a_row_of_zeros_gives_the_bias():
    weight = random(20, 64)
    weight[4] = 0
    bias = random(20, seed=2).half()
    y = int4_linear(random(2, 64, seed=1).half(), quantize_int4(weight), bias)
    assert (y[:, 4] == bias[4]).all()
