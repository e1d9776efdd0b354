"""`rotate_encode` in plain torch: what the kernels are held to, and what runs where there are none."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orbitdit.codebooks.lloyd_max import code_table, codebook_on, look_up, nearest, nearest_by_table, on_grid
from orbitdit.grids import dtype_of
from orbitdit.ops.rotate_encode.means import encode_centred
from orbitdit.rotation import rotation
from orbitdit.spec import Encoding
from orbitdit.tables import constant

EPSILON = 1e-10
"""Added to a token's norm (OrbitQuant, arXiv 2607.02461)."""
NORM_EPSILONS = {"layer_norm": 1e-6, "rms_norm": 1e-5}
"""Of the norms in front of AdaLN's modulation: LayerNorm's in every family, and Z-Image's RMSNorm."""


def normalize(x: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """x / (||x|| + epsilon) and ||x|| (..., 1), in fp32; the norm neither overflows nor underflows where it exists."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    norm = largest * (x / largest.where(largest > 0, 1)).norm(dim=-1, keepdim=True)
    return x / (norm + epsilon), norm


def apply_prologue(x: Tensor, prologue: str, prologue_args: Sequence[Tensor]) -> Tensor:
    """Tokens (tokens, dim) as they are encoded, in the dtype of `x` (tokens, channels): the step before the encoding.

    "": `x` itself. "gelu": the channels of `prologue_args[0]` (tokens, first), if given, and gelu(x) in its tanh
    approximation. "silu": silu(x) * gate for the argument gate (tokens, dim). "layer_norm": LayerNorm(x) * (1 + scale)
    + shift for scale and shift (batch, dim), each row for as many consecutive tokens. "rms_norm": RMSNorm(x) * weight *
    (1 + scale) for weight (1, dim) and scale (batch, dim), or without the last factor if that is not given. In fp32,
    rounded once.
    """
    if not prologue:
        return x
    if prologue == "gelu":
        y = torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)
        return torch.cat([*prologue_args, y], dim=1)
    if prologue == "silu":
        return (torch.nn.functional.silu(x.float()) * prologue_args[0].float()).to(x.dtype)
    rows = [t.float().repeat_interleave(x.shape[0] // t.shape[0], 0) for t in prologue_args]
    if prologue == "rms_norm":
        weight, *scales = rows
        y = torch.nn.functional.rms_norm(x.float(), x.shape[1:], eps=NORM_EPSILONS[prologue]) * weight
        return (y * (1 + scales[0]) if scales else y).to(x.dtype)
    scale, shift = rows
    y = torch.nn.functional.layer_norm(x.float(), x.shape[1:], eps=NORM_EPSILONS[prologue])
    return (y * (1 + scale) + shift).to(x.dtype)


def encoded_width(x: Tensor, prologue: str, prologue_args: Sequence[Tensor]) -> int:
    """Channels of what `apply_prologue` makes."""
    return x.shape[-1] + (prologue_args[0].shape[-1] if prologue == "gelu" and prologue_args else 0)


def rotate_encode(x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Tokens `x` (..., dim) to values (tokens, dim) on the grid and scales (tokens,) fp32.

    Value * scale is the nearest point of the grid's codebook to R x, in fp32, or the sum of two such points if tokens
    are centred (see means.py).
    """
    if encoding.group_size is not None:
        return encode_centred(x, encoding, rotate_encode)
    unit, norm = normalize(x.reshape(-1, encoding.dim))
    values, boundaries, scale = _token_codebook(encoding.dim, encoding.bits, encoding.grid, x.device)
    codes = nearest(rotation(encoding.dim, encoding.seed).apply(unit), boundaries)
    return look_up(codes, values.view(torch.uint8)).view(values.dtype), norm.flatten() * scale


def encode_exactly(x: Tensor, encoding: Encoding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `rotate_encode` without a grid: the centroids, or their sums, in `dtype`, and norms (tokens,) fp32."""

    def encode(x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        codes, norm = encode_tokens(x, encoding.bits, encoding.seed)
        return look_up(codes, codebook_on(encoding.dim, encoding.bits, x.device, dtype).centroids), norm.flatten()

    if encoding.group_size is not None:
        return encode_centred(x, encoding, encode)
    return encode(x.reshape(-1, encoding.dim), encoding)


def encode_tokens(x: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (..., d) uint8 and norms (..., 1) fp32 of tokens `x` (..., d) in any floating dtype.

    The codes are the nearest centroids of R x / (||x|| + 1e-10), all in fp32 (OrbitQuant, arXiv 2607.02461).
    """
    unit, norm = normalize(x)
    dim = x.shape[-1]
    rotated = rotation(dim, seed).apply(unit)
    if x.is_cpu:
        return nearest_by_table(rotated, code_table(dim, bits)), norm
    return nearest(rotated, codebook_on(dim, bits, x.device, torch.float32).boundaries), norm


@constant
def _token_codebook(dim: int, bits: int, grid: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    found = on_grid(dim, bits, grid, True)
    return found.values.float().to(dtype_of(grid)).to(device), found.boundaries.float().to(device), found.scale
