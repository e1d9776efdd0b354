"""`linear` on CUDA: tokens are encoded, weights decoded, and both multiplied. See `ops` for the arguments."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orbitdit.grids import dtype_of
from orbitdit.ops.decode.cuda import MEMBERS, decode, decode_all
from orbitdit.ops.linear.matmul import Scaled, has_row_scales, matmul
from orbitdit.ops.operands import Packed, check_devices, packed_of
from orbitdit.ops.rotate_encode.cuda import rotate_encode
from orbitdit.spec import Projection

EncodeDecode = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None], str], list[Tensor]]


def linear(x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str) -> Tensor:
    """The op `linear` on CUDA. What is decoded lives until the product is queued; torch's allocator hands the memory
    to the next layer."""
    if scaled_together(x, operands, key):
        return linear_in_parts(encode_decode, x, prologue_args, operands, key)
    projection = Projection.parse(key)
    packed = _checked(x, operands)
    tokens = Scaled(*rotate_encode(x, projection.tokens, projection.prologue, prologue_args))
    biases = packed.biases
    if _decodes_together(packed, projection):
        values, scales, bias = decode_all(packed, projection.first, projection.grid)
        decoded, biases = [Scaled(values, scales)], [bias]
    else:
        decoded = []
        for codes, scales, spec in zip(packed.codes, packed.scales, projection.layers, strict=True):
            ready = codes.dtype != torch.uint8  # decoded before
            decoded.append(Scaled(codes, scales) if ready else Scaled(*decode(codes, scales, spec, projection.grid)))

    parts = [matmul(tokens, weight, bias, x.dtype) for weight, bias in zip(decoded, biases, strict=True)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def linear_in_parts(
    encode_decode: EncodeDecode,
    x: Tensor,
    prologue_args: Sequence[Tensor],
    operands: Sequence[Tensor | None],
    key: str,
) -> Tensor:
    """`linear` where `scaled_together`: one encoding, one decoding and one product. `encode_decode` is the op, for
    compilers to see the product, or the function below."""
    values, scales, weight, row_scales, *collected = encode_decode(x, prologue_args, operands, key)
    bias = collected[0] if collected else operands[2]
    y = matmul(Scaled(values, scales), Scaled(weight, row_scales), bias, x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def encode_decode(
    x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str
) -> list[Tensor]:
    """The op `encode_decode` on CUDA."""
    projection = Projection.parse(key)
    packed = _checked(x, operands)
    tokens = rotate_encode(x, projection.tokens, projection.prologue, prologue_args)
    values, scales, bias = decode_all(packed, projection.first, projection.grid)
    collected = [bias] if bias is not None and len(packed.codes) > 1 else []
    return [*tokens, values, scales, *collected]


def scaled_together(x: Tensor, operands: Sequence[Tensor | None], key: str) -> bool:
    """Whether `linear_in_parts` takes this: e4m3, weights that are decoded together, and a size that has row and
    column scales."""
    together, dim, rows = facts(key)
    if not together or not x.numel() or not _copied_together(packed_of(operands)):
        return False
    return has_row_scales(x.numel() // x.shape[-1], rows, dim)


def facts(key: str) -> tuple[bool, int, int]:
    """Of the projection with this key: whether it is on e4m3 and its weights have one code, its inputs and outputs."""
    projection = Projection.parse(key)
    together = dtype_of(projection.grid) == torch.float8_e4m3fn and projection.decodes_together
    return together, projection.tokens.dim, projection.out_features


# What torch.compiler.assume_constant_result does, without importing the compiler: traced code takes the answer as is.
facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(x: Tensor, operands: Sequence[Tensor | None]) -> Packed:
    packed = packed_of(operands)
    check_devices(x, packed.codes)
    return packed


def _decodes_together(packed: Packed, projection: Projection) -> bool:
    """Whether one call of the kernel decodes all of these."""
    return projection.decodes_together and _copied_together(packed)


def _copied_together(packed: Packed) -> bool:
    """Whether these are packed codes, and biases that the kernel copies."""
    codes, biases = packed.codes, packed.biases
    if len(codes) == 1:
        return codes[0].dtype == torch.uint8
    dtype = None if biases[0] is None else biases[0].dtype
    if len(codes) > MEMBERS or dtype not in (None, torch.bfloat16, torch.float16):
        return False
    for weight, bias in zip(codes, biases, strict=True):
        if weight.dtype != torch.uint8 or dtype != (None if bias is None else bias.dtype):
            return False
    return True
