"""The product in plain torch: on a number grid (`matmul`), and as the method defines a layer (`exact_linear`)."""

import torch
from torch import Tensor

from orbitdit.codebooks import indices, points
from orbitdit.codebooks.lloyd_max import look_up
from orbitdit.grids import EXACT
from orbitdit.ops.rotate_encode.reference import encode_exactly, normalize
from orbitdit.packing import unpack
from orbitdit.rotation import rotation
from orbitdit.spec import LayerSpec


def matmul(
    encoded: tuple[Tensor, Tensor], decoded: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Values and scales of tokens, (tokens, dim) and (tokens,), times those of rows, (rows, dim) and (rows,), on one
    grid, to (tokens, rows) in `dtype`; sums in fp32."""
    values, token_scales = encoded
    weight, row_scales = decoded
    y = (values.float() @ weight.float().T) * token_scales[:, None] * row_scales
    return (y if bias is None else y + bias.float()).to(dtype)


def exact_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """The definition of a layer on tokens `x` (..., dim), packed codes (rows, bytes) and scales (rows,): (..., rows).

    Norms, rotation and codes in fp32; the product multiplies the centroids in the dtype of `x` if that is bf16 or fp16,
    else in fp32, or the sums of two if tokens are centred (see `ops.rotate_encode.means`). Where tokens are not
    quantized, the rotated tokens themselves are multiplied. Source: OrbitQuant, arXiv 2607.02461.
    """
    dim = spec.in_features
    dtype = x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.float32
    table, step = points(spec.weight, dim, x.device, dtype)
    rows = look_up(indices(unpack(codes, spec.weight.bits, dim), spec.weight), table)
    if spec.tokens is None:
        unit, norm = normalize(x.reshape(-1, dim), torch.finfo(torch.float32).tiny)
        token, norm = rotation(dim, spec.seed or 0).apply(unit).to(dtype), norm.flatten()
    else:
        token, norm = encode_exactly(x, spec.encoding_on(EXACT), dtype)
    y = (token @ rows.T) * norm[:, None] * (scales.float() * step)
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], len(codes))
