"""`matmul` on CUDA: library GEMMs with the scales and the bias in the epilogue, or right after it.

e4m3: `torch._scaled_mm` with row and column scales, which rounds to bf16. int8: `torch._int_mm`, then one pass.
"""

import torch
from torch import Tensor

from orbitdit.kernels.nvrtc import kernel, processors

THREADS = 256
_INT_MM_ROWS = 32
"""`torch._int_mm` refuses 16 rows and fewer."""


def matmul(
    values: Tensor, token_scales: Tensor, weight: Tensor, row_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See reference.py; `dtype` is bf16 or fp16."""
    if not len(values):
        return values.new_empty((0, len(weight)), dtype=dtype)
    if values.dtype == torch.int8:
        return _int8(values, token_scales, weight, row_scales, bias, dtype)
    if bias is not None and bias.dtype != torch.bfloat16:
        bias = bias.to(torch.bfloat16)
    y = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=token_scales[:, None],
        scale_b=row_scales[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y if dtype == torch.bfloat16 else y.to(dtype)


def _int8(values, token_scales, weight, row_scales, bias, dtype):
    tokens, rows = len(values), len(weight)
    if tokens < _INT_MM_ROWS:
        values = torch.nn.functional.pad(values, (0, 0, 0, _INT_MM_ROWS - tokens))
    sums = torch._int_mm(values, weight.t())
    y = torch.empty(tokens, rows, dtype=dtype, device=values.device)
    if bias is not None and bias.dtype not in (torch.bfloat16, torch.float16):
        bias = bias.to(dtype)
    kind = 0 if bias is None else 1 if bias.dtype == torch.bfloat16 else 2
    defines = (("OUTPUT", int(dtype == torch.float16)), ("BIAS", kind), ("THREADS", THREADS))
    device = values.device.index
    built = kernel("scale.cu", "scale", defines, "PPPPPii", device)
    blocks = min(tokens, processors(device) * 8)
    tensors = sums, token_scales, row_scales, y if bias is None else bias, y
    built.launch(blocks, THREADS, 0, *(t.data_ptr() for t in tensors), tokens, rows)
    return y
