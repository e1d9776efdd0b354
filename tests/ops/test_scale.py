"""The kernel that scales integer and fp32 sums, run by the emulator."""

import pytest
import torch

from cuda_emulator import Launch, launch
from encoding_checks import random
from orbitdit.ops.linear import reference
from orbitdit.ops.linear.matmul import compile_options

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bias", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rows"), [(1, 16), (5, 48), (3, 400)])
@pytest.mark.parametrize("kind_of_sums", [torch.int32, torch.float32])
def test_scaling_is_what_the_definition_does_to_sums(kind_of_sums, count, rows, dtype, bias):
    generator = torch.Generator().manual_seed(rows)
    values, weight = (torch.randint(-127, 128, (n, 64), generator=generator).to(torch.int8) for n in (count, rows))
    token_scales, row_scales = random(count).exp(), random(rows, seed=1).exp() / 1000
    bias = None if bias is None else random(rows, seed=2).to(bias)
    sums, y = (values.int() @ weight.int().T).to(kind_of_sums), torch.full((count, rows), torch.nan, dtype=dtype)
    defines = compile_options(kind_of_sums, dtype, None if bias is None else bias.dtype) | {"THREADS": 64}
    arguments = [sums, token_scales, row_scales, y if bias is None else bias, y, count, rows]
    launch("linear/scale.cu", "scale", Launch((2, 1, 1), 64), arguments, defines)
    assert torch.equal(y, reference.matmul((values, token_scales), (weight, row_scales), bias, dtype))
