"""Means of tokens, and tokens less their means, as the kernels make them, run by the emulator."""

import pytest
import torch
from emulated import rotate_encode

from cuda_emulator import Launch, launch
from encoding_checks import FLIPS, flips, tokens
from orbitdit.ops.rotate_encode.cuda import Means
from orbitdit.ops.rotate_encode.means import groups, less_means, token_means
from orbitdit.ops.rotate_encode.means_cuda import THREADS, compile_options

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 960, 1920, 3072, 7680])
@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_tokens_less_their_means(dim, group_size, dtype):
    """Two pictures of five tokens; two and three of them leave a mean of fewer."""
    x = tokens(10, dim, dtype)
    rows = token_means(x.view(2, 5, dim), group_size)
    found = rotate_encode(x, 3, "e4m3", means=Means(rows, 5, group_size))
    assert flips(found, less_means(x, rows, 5, group_size), 3, "e4m3") <= 3 + FLIPS[3] * x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "group_size"), [(5, 2), (5, 5), (32, 16), (33, 16)])
@pytest.mark.parametrize("dim", [16, 1920])
def test_means_of_tokens(dim, count, group_size, dtype):
    """Rounded once of fp32 sums; a token that is spoilt counts as zero where it is."""
    x = tokens(3 * count, dim, dtype).view(3, count, dim)
    x[1, 0, 3], x[2, -1, 5] = torch.nan, torch.inf
    number = groups(count, group_size)
    found = torch.full((3 * number, dim), -7, dtype=dtype)
    blocks = -(-3 * number * dim // 8 // THREADS)
    defines = compile_options(dtype == torch.float16)
    sizes = [3 * number, dim // 8, count, number, group_size]
    launch("rotate_encode/means.cu", "token_means", Launch((blocks, 1, 1), THREADS), [x, found, *sizes], defines)
    expected = token_means(x, group_size)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-5)
