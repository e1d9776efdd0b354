"""`matmul` on CUDA: library GEMMs with the scales and the bias in the epilogue, or right after it.

e4m3: `torch._scaled_mm` with row and column scales, which rounds to bf16; it accumulates fast, which costs an output
0.5 to 1% of relative error beside the 10 to 40% of the codes themselves. int8: `torch._int_mm` to int32, then one pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.ops.nvrtc import kernel, num_sms

THREADS = 256
_INT_MM_ROWS = 32
"""`torch._int_mm` refuses 16 rows and fewer."""
_TILE = 128
_TILES, _DIM = 96, 3072
"""cuBLAS has no row and column scales for products that it would split along a long sum: those of fewer tiles than this
over a longer sum than this (seen at 137 tokens, 12,288 inputs and 256 rows; 512 tokens and 3,072 rows work). One scale
for all it has; fast accumulation would then cost 3% over 12,288 inputs, where few tiles hide none of it."""


class Scaled(NamedTuple):
    """`values` (rows, dim) on a number grid and one fp32 scale a row, `scales` (rows,)."""

    values: Tensor
    scales: Tensor


def matmul(tokens: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See reference.py; `dtype` is bf16 or fp16. Its calls are such that compilers see through them on e4m3."""
    count, rows = tokens.values.shape[0], weight.values.shape[0]
    compiling = torch.compiler.is_compiling()
    if not compiling and not count:
        return tokens.values.new_empty((0, rows), dtype=dtype)
    if tokens.values.dtype == torch.int8:
        values = tokens.values
        padded = values if count >= _INT_MM_ROWS else torch.nn.functional.pad(values, (0, 0, 0, _INT_MM_ROWS - count))
        sums = torch._int_mm(padded, weight.values.t())
        return _scaled(sums, tokens.scales, weight.scales, bias, dtype)
    if has_row_scales(count, rows, tokens.values.shape[1]):
        return _scaled_mm(tokens, weight, bias, dtype)
    one = tokens.scales.new_ones(())
    sums = torch._scaled_mm(tokens.values, weight.values.t(), one, one, out_dtype=torch.float32)
    if not compiling:
        return _scaled(sums, tokens.scales, weight.scales, bias, dtype)
    y = sums * tokens.scales[:, None] * weight.scales
    return (y if bias is None else y + bias).to(dtype)


def has_row_scales(tokens: int, rows: int, dim: int) -> bool:
    """Whether the library multiplies e4m3 with row and column scales at this size."""
    return dim <= _DIM or -(-tokens // _TILE) * -(-rows // _TILE) >= _TILES


def _scaled_mm(tokens: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product on e4m3 with row and column scales and bias, in one call."""
    if bias is not None and bias.dtype != torch.bfloat16:
        bias = bias.to(torch.bfloat16)
    y = torch._scaled_mm(
        tokens.values,
        weight.values.t(),
        tokens.scales[:, None],
        weight.scales[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y if dtype == torch.bfloat16 else y.to(dtype)


def _scaled(sums: Tensor, token_scales: Tensor, row_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums (at least tokens, rows) in int32 or fp32, times both scales, plus bias."""
    tokens, rows = len(token_scales), len(row_scales)
    y = torch.empty(tokens, rows, dtype=dtype, device=sums.device)
    if bias is not None and bias.dtype not in (torch.bfloat16, torch.float16):
        bias = bias.to(dtype)
    constants = compile_options(sums.dtype, dtype, None if bias is None else bias.dtype)
    device = sums.device.index
    built = kernel("linear/scale.cu", "scale", tuple(constants.items()), "PPPPPii", device)
    blocks = min(tokens, num_sms(device) * 8)
    tensors = sums, token_scales, row_scales, y if bias is None else bias, y
    built.launch(blocks, THREADS, 0, *(t.data_ptr() for t in tensors), tokens, rows)
    return y


def compile_options(sums: torch.dtype, output: torch.dtype, bias: torch.dtype | None) -> dict[str, int]:
    """The compile-time constants of scale.cu, by the dtypes of what it reads and writes."""
    return {
        "SUMS": int(sums == torch.float32),
        "OUTPUT": int(output == torch.float16),
        "BIAS": (None, torch.bfloat16, torch.float16).index(bias),
        "THREADS": THREADS,
    }
