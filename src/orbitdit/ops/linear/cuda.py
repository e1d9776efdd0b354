"""`linear` on CUDA: tokens are encoded, weights decoded, and both multiplied. See `ops` for the arguments.

Where tokens are centred, their means are encoded beside them, and outputs are the sum of both products (see
`rotate_encode.means`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orbitdit.grids import dtype_of
from orbitdit.ops.decode.cuda import MEMBERS, decode, decode_all
from orbitdit.ops.linear.matmul import Scaled, has_row_scales, matmul
from orbitdit.ops.operands import Packed, check_devices, check_means, packed_of
from orbitdit.ops.rotate_encode.cuda import Means, rotate_encode_into
from orbitdit.ops.rotate_encode.means import add_means, group_size_for, groups, mean_encoding
from orbitdit.ops.rotate_encode.means_cuda import token_means
from orbitdit.spec import Projection

EncodeDecode = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None], str], list[Tensor]]


def linear(x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str) -> Tensor:
    """The op `linear` on CUDA. What is decoded lives until the product is queued; torch's allocator hands the memory
    to the next layer."""
    if scaled_together(x, operands, key):
        return linear_in_parts(encode_decode, x, prologue_args, operands, key)
    projection = Projection.parse(key)
    packed = _checked(x, operands)
    size = group_size_for(x, _group_size(projection))
    tokens, means = _encode(x, prologue_args, key)
    biases = packed.biases
    if _decodes_together(packed, projection):
        values, scales, bias = decode_all(packed, projection.first, projection.grid)
        decoded, biases = [Scaled(values, scales)], [bias]
    else:
        decoded = []
        for codes, scales, spec in zip(packed.codes, packed.scales, projection.layers, strict=True):
            ready = codes.dtype != torch.uint8  # decoded before
            decoded.append(Scaled(codes, scales) if ready else Scaled(*decode(codes, scales, spec, projection.grid)))

    def multiply(encoded: Scaled, biases: Sequence[Tensor | None]) -> Tensor:
        parts = [matmul(encoded, weight, bias, x.dtype) for weight, bias in zip(decoded, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    if means is None or size is None:
        y = multiply(tokens, biases)
    else:
        y = add_means(multiply(tokens, [None] * len(biases)), multiply(means, biases), x.shape[-2], size)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def linear_in_parts(
    encode_decode: EncodeDecode,
    x: Tensor,
    prologue_args: Sequence[Tensor],
    operands: Sequence[Tensor | None],
    key: str,
) -> Tensor:
    """`linear` where `scaled_together`: one encoding, one decoding and one product, or two of them where there are
    means. `encode_decode` is the op, for compilers to see the products, or the function below."""
    values, scales, weight, row_scales, *rest = encode_decode(x, prologue_args, operands, key)
    bias = operands[2]
    if bias is not None and len(operands) > 3:
        bias, *rest = rest
    tokens, decoded = Scaled(values, scales), Scaled(weight, row_scales)
    size = group_size_for(x, facts(key)[3])
    if size is None:
        y = matmul(tokens, decoded, bias, x.dtype)
    else:
        of_tokens, of_means = matmul(tokens, decoded, None, x.dtype), matmul(Scaled(*rest), decoded, bias, x.dtype)
        y = add_means(of_tokens, of_means, x.shape[-2], size)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def encode_decode(
    x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str
) -> list[Tensor]:
    """The op `encode_decode` on CUDA."""
    projection = Projection.parse(key)
    packed = _checked(x, operands)
    tokens, means = _encode(x, prologue_args, key)
    values, scales, bias = decode_all(packed, projection.first, projection.grid)
    collected = [bias] if bias is not None and len(packed.codes) > 1 else []
    return [*tokens, values, scales, *collected, *(means or ())]


def scaled_together(x: Tensor, operands: Sequence[Tensor | None], key: str) -> bool:
    """Whether `linear_in_parts` takes this: e4m3, weights that are decoded together, and a size that has row and
    column scales."""
    together, dim, rows, _ = facts(key)
    if not together or not x.numel() or not _copied_together(packed_of(operands)):
        return False
    return has_row_scales(x.numel() // x.shape[-1], rows, dim)


def facts(key: str) -> tuple[bool, int, int, int | None]:
    """Of the projection with this key: whether it is on e4m3 and its weights have one code, its inputs and outputs, and
    how many tokens share a mean."""
    projection = Projection.parse(key)
    together = dtype_of(projection.grid) == torch.float8_e4m3fn and projection.decodes_together
    return together, projection.tokens.dim, projection.out_features, _group_size(projection)


# What torch.compiler.assume_constant_result does, without importing the compiler: traced code takes the answer as is.
facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _group_size(projection: Projection) -> int | None:
    tokens = projection.first.tokens
    return None if tokens is None else tokens.group_size


def _checked(x: Tensor, operands: Sequence[Tensor | None]) -> Packed:
    packed = packed_of(operands)
    check_devices(x, packed.codes)
    return packed


def _encode(x: Tensor, prologue_args: Sequence[Tensor], key: str) -> tuple[Scaled, Scaled | None]:
    """Tokens of `x` (..., channels), and their means if they are centred, encoded."""
    projection = Projection.parse(key)
    encoding, prologue = projection.tokens, projection.prologue
    size = group_size_for(x, _group_size(projection))
    check_means(prologue, size)
    tokens = x.numel() // x.shape[-1]
    out = _room(tokens, x, projection)
    if size is None:
        args = [_flat(t) for t in prologue_args] if prologue else ()
        rotate_encode_into(out, _flat(x), encoding, prologue, args)
        return out, None
    rows = token_means(x, size)
    of_means = _room(tokens // x.shape[-2] * groups(x.shape[-2], size), x, projection)
    rotate_encode_into(of_means, rows, mean_encoding(key))
    rotate_encode_into(out, _flat(x), encoding, means=Means(rows, x.shape[-2], size))
    return out, of_means


def _room(rows: int, x: Tensor, projection: Projection) -> Scaled:
    """Memory for values and scales."""
    values = torch.empty((rows, projection.tokens.dim), dtype=dtype_of(projection.grid), device=x.device)
    return Scaled(values, torch.empty(rows, dtype=torch.float32, device=x.device))


def _flat(x: Tensor) -> Tensor:
    """(..., channels) as (rows, channels)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


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
