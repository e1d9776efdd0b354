"""Centred tokens from the kernels, run by the emulator: the means, and tokens that are sums of two codes."""

import pytest
import torch
from emulated import How, rotate_encode

from encoding_checks import FLIPS, flips, prologue_inputs, same, tokens
from orbitdit.ops import CUDA_GRIDS
from orbitdit.ops.rotate_encode import reference
from orbitdit.ops.rotate_encode.means import add, groups, groups_of, mean_gain, parts_of, token_means
from orbitdit.ops.rotate_encode.reference import apply_prologue
from orbitdit.spec import Encoding

DTYPES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check(x, sample, bits, grid, found, prologue="", args=()):
    """Against the parts of the definition: means, their codes, and the sum, for what the kernel has as means."""
    values, scales, (rows, mean_values, mean_scales) = found
    made = apply_prologue(x, prologue, args)
    dim = made.shape[1]
    expected = token_means(made.view(-1, sample[0], dim), sample[1])
    torch.testing.assert_close(
        rows, expected, rtol=2 * ROUNDING[x.dtype], atol=2**-7 * float(made.abs().max()) ** 0.5 if prologue else 1e-5
    )
    encoding = Encoding(dim, bits, grid, 1, sample[1], True)
    own_scales = mean_scales / mean_gain(encoding)
    assert flips((mean_values, own_scales), rows, 6, "int8") <= 3 + FLIPS[6] * rows.numel()
    group = groups_of(len(x) // sample[0], *sample, x.device)
    less = (made.float() - rows.float()[group]).to(x.dtype)
    own = reference.rotate_encode(less, parts_of(encoding)[0])
    both, total = add(own, (mean_values, own_scales), group, encoding)
    torch.testing.assert_close(scales, total, rtol=2e-2 if prologue else 2e-6, atol=0)
    # the next number of the grid, where fp16 rounds; and a code here and there
    off = (values.float() * scales[:, None] - both.float() * total[:, None]).abs()
    size = both.float().abs() * total[:, None]
    near = off <= (size / 8 + total[:, None] * 2**-9 if grid == "e4m3" else 1.01 * total[:, None])
    assert (~near).float().mean() < (0.02 if prologue else 2 * FLIPS[bits])
    assert (off > 0.01 * total[:, None]).float().mean() < (0.06 if prologue else 0.02)


@pytest.mark.parametrize("grid", list(CUDA_GRIDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 960, 1920, 3072, 7680])
def test_sums_of_two_codes(dim, dtype, grid):
    """Two samples; a last group that is smaller."""
    x, sample = tokens(10, dim, dtype) + tokens(1, dim, dtype, seed=5), (5, 3)
    check(x, sample, 3, grid, rotate_encode(x, 3, grid, sample=sample))


@pytest.mark.parametrize("sample", [(1, 16), (15, 16), (17, 16), (6, 2), (16, 16)])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_sizes_of_samples_and_groups(bits, sample):
    x = tokens(2 * sample[0], 256) + tokens(1, 256, seed=5)
    found = rotate_encode(x, bits, "int8", sample=sample)
    check(x, sample, bits, "int8", found)
    again = rotate_encode(x, bits, "int8", sample=sample, how=How(blocks=1, reverse=True))
    assert all(same(a, b) for a, b in zip((*found[:2], *found[2]), (*again[:2], *again[2]), strict=True))


@pytest.mark.parametrize("dim", [192, 1536])
@pytest.mark.parametrize("prologue", ["gelu", "silu", "layer_norm", "rms_norm"])
def test_means_of_what_a_prologue_makes(prologue, dim):
    for first, batch in ((0, 2), (64, 1), (0, 0)):
        if (first and prologue != "gelu") or (not batch and prologue != "rms_norm"):
            continue
        x, args = prologue_inputs(prologue, 14, dim, first, batch)
        check(x, (7, 4), 4, "e4m3", rotate_encode(x, 4, "e4m3", prologue, args, sample=(7, 4)), prologue, args)


@pytest.mark.parametrize("grid", list(CUDA_GRIDS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_spoilt_token_leaves_the_others_finite(value, grid):
    x = tokens(20, 64)
    good = rotate_encode(x, 4, grid, sample=(10, 4))
    x[5, 3] = value
    values, scales, (rows, _, mean_scales) = rotate_encode(x, 4, grid, sample=(10, 4))
    assert rows.isfinite().all()
    assert mean_scales.isfinite().all()
    others = torch.arange(20) != 5
    assert (values.float() * scales[:, None])[others].isfinite().all()
    assert value == 1e30 or not (values.float() * scales[:, None])[5].isfinite().any()
    apart = torch.arange(20) // 4 != 1
    apart[8:12] = True  # the second sample begins at 10
    assert torch.equal(values.float()[apart], good[0].float()[apart])
    assert torch.equal(scales[apart], good[1][apart])


def test_one_token_is_its_own_mean():
    x = tokens(3, 256)
    values, scales, _ = rotate_encode(x, 3, "e4m3", sample=(1, 16))
    expected = reference.rotate_encode(x, parts_of(Encoding(256, 3, "e4m3", 1))[1])
    gain = mean_gain(Encoding(256, 3, "e4m3", 1, 16, True))
    found, wanted = values.float() * scales[:, None], expected[0].float() * expected[1][:, None] * gain
    assert ((found - wanted).norm() / wanted.norm()) < 0.04
    assert groups(1, 16) == 1
