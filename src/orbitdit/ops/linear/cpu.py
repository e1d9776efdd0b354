"""`linear` on a CPU: close to the speed of a bf16 layer, with nothing decoded kept.

Where the CPU multiplies int8 exactly, layers run on the int8 grid: a GEMM at twice the rate of bf16. Elsewhere, and for
8-bit codes and tokens that are not quantized, centroids are multiplied in bf16. Weights are decoded a block of rows at
a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.grids import EXACT, INT8
from orbitdit.ops.decode import cpu as decode_cpu
from orbitdit.ops.decode.reference import decode
from orbitdit.ops.linear import reference
from orbitdit.ops.operands import packed_of
from orbitdit.ops.rotate_encode.cpu import encode, encode_exactly, rotate_encode
from orbitdit.ops.rotate_encode.reference import apply_prologue
from orbitdit.spec import LayerSpec, Projection
from orbitdit.tables import constant

WEIGHT_ELEMENTS = 3 << 19
"""Weights decoded at a time: 512 rows of 3072."""


def linear(x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str) -> Tensor:
    """The op `linear` on a CPU, on any grid."""
    projection, packed = Projection.parse(key), packed_of(operands)
    encoded, outputs = _encode(x, prologue_args, projection), []
    for codes, scales, bias, spec in zip(packed.codes, packed.scales, packed.biases, projection.layers, strict=True):
        if codes.dtype == torch.uint8:
            outputs.append(product(encoded, Weight(codes, scales, bias), spec, projection.grid, x.dtype))
        else:  # decoded before
            outputs.append(reference.matmul(encoded, (codes, scales), bias, x.dtype))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y.view(*x.shape[:-1], y.shape[1])


def encode_decode(
    x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str
) -> list[Tensor]:
    """The op `encode_decode` on a CPU, for tests of compiled code: CUDA devices alone are asked for it."""
    projection, packed = Projection.parse(key), packed_of(operands)
    decoded = [
        decode(codes, scales, spec, projection.grid)
        for codes, scales, spec in zip(packed.codes, packed.scales, projection.layers, strict=True)
    ]
    values, row_scales = (torch.cat(parts) for parts in zip(*decoded, strict=True))
    biases = [bias for bias in packed.biases if bias is not None]
    collected = [torch.cat(biases)] if biases and len(packed.codes) > 1 else []
    return [*_encode(x, prologue_args, projection), values, row_scales, *collected]


def _encode(x: Tensor, prologue_args: Sequence[Tensor], projection: Projection) -> tuple[Tensor, Tensor]:
    """Values and scales of the tokens of `x` (..., channels)."""
    if projection.prologue:
        args = [t.reshape(-1, t.shape[-1]) for t in prologue_args]
        made = apply_prologue(x.reshape(-1, x.shape[-1]), projection.prologue, args)
        x = made.view(*x.shape[:-1], made.shape[1])
    return rotate_encode(x, projection.tokens)


class Weight(NamedTuple):
    """A packed weight: codes (rows, bytes), scales (rows,), and a bias (rows,) or None."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None


def product(tokens: tuple[Tensor, Tensor], weight: Weight, spec: LayerSpec, grid: str, dtype: torch.dtype) -> Tensor:
    """Tokens that are encoded on `grid` times a packed weight, in `dtype`; fast on int8 where the CPU has it."""
    if grid == INT8.name and multiplies_int8():
        values, scales = tokens
        return _by_rows((values, scales[:, None]), weight, spec, dtype)
    return reference.matmul(tokens, decode(weight.codes, weight.scales, spec, grid), weight.bias, dtype)


def exact_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """See reference.py; fast for bf16 and fp16, which is multiplied in fp32 (fp16 products are slow on CPUs)."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return reference.exact_linear(x, codes, scales, bias, spec)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if spec.tokens is None:
        values, norm = encode(x.reshape(-1, x.shape[-1]), None, spec.seed or 0, dtype)
    else:
        values, norm = encode_exactly(x, spec.encoding_on(EXACT), dtype)
    y = _by_rows((values, norm.view(-1, 1)), Weight(codes, scales, bias), spec, x.dtype)
    return y.view(*x.shape[:-1], len(codes))


def _by_rows(tokens: tuple[Tensor, Tensor], weight: Weight, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """Values (tokens, dim) and scales (tokens, 1) times decoded codes, plus bias, a block of rows at a time."""
    (values, token_scales), (codes, scales, bias) = tokens, weight
    scales = scales.float()
    token_scales = token_scales * decode_cpu.weight_values(spec.weight, spec.in_features, values.dtype)[1]
    bias = torch.zeros_like(scales) if bias is None else bias.float()
    outputs = values.new_empty(len(values), len(codes), dtype=dtype)
    rows = max(64, WEIGHT_ELEMENTS // spec.in_features // 64 * 64)
    for start in range(0, len(codes) if len(values) else 0, rows):
        block = slice(start, start + rows)
        decoded = decode_cpu.decode(codes[block], spec.weight, spec.in_features, values.dtype)
        sums = torch._int_mm(values, decoded.T) if decoded.dtype == torch.int8 else values @ decoded.T
        torch.addcmul(bias[block], sums.float().mul_(token_scales), scales[block], out=outputs[:, block])
    return outputs


@constant
def multiplies_int8() -> bool:
    """Whether int8 products are exact and fast: x86 without VNNI saturates, and other CPUs have no such kernel."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    extreme = torch.full((64, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, -extreme.T) == -256 * 127**2).all())
