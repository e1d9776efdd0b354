"""The bit layout of codes: dense, row by row, little end first. This file is its definition.

Code j of a row takes bits j*b .. j*b + b - 1 of the row's bit stream, lowest bit first; bit k of the stream is
bit k % 8 of byte k // 8. A row ends at a byte: unused bits of its last byte are zero. Three bits mean three
bits: eight codes fill three bytes.
"""

import math

import torch
from torch import Tensor

from orbitdit.errors import ConfigError, TensorError

PACKED_BITS = (2, 3, 4, 6, 8)
GROUP = 64
"""Inputs that share one scale in INT4 layers."""


def packed_width(dim: int, bits: int) -> int:
    """Bytes of one row of `dim` codes. Raises ConfigError for bits without a layout."""
    if bits not in PACKED_BITS:
        raise ConfigError(f"bits={bits!r} has no layout; choose one of {', '.join(map(str, PACKED_BITS))}")
    return -(-dim * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., dim) below 2^bits -> uint8 bytes (..., packed_width). Raises TensorError for other codes."""
    if codes.dtype != torch.uint8 or codes.ndim < 1:
        raise TensorError(f"codes must be rows of uint8; got {codes.dtype} of shape {tuple(codes.shape)}")
    width = packed_width(codes.shape[-1], bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise TensorError(f"codes of {bits} bits are below {1 << bits}; got {int(codes.max())}")
    per_word, word_bytes = _word(bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    word = (codes.int() << bits * torch.arange(per_word, device=codes.device, dtype=torch.int32)).sum(
        -1, dtype=torch.int32
    )
    shift = 8 * torch.arange(word_bytes, device=codes.device, dtype=torch.int32)
    return (word[..., None] >> shift & 255).to(torch.uint8).flatten(-2)[..., :width].contiguous()


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of `pack`: uint8 codes (..., dim). Raises TensorError when `packed` has another size."""
    width = packed_width(dim, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1:] != (width,):
        raise TensorError(
            f"{dim} codes of {bits} bits take {width} uint8 bytes a row; got {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    per_word, word_bytes = _word(bits)
    packed = torch.nn.functional.pad(packed, (0, -width % word_bytes)).unflatten(-1, (-1, word_bytes))
    word = (packed.int() << 8 * torch.arange(word_bytes, device=packed.device, dtype=torch.int32)).sum(
        -1, dtype=torch.int32
    )
    shift = bits * torch.arange(per_word, device=packed.device, dtype=torch.int32)
    return (word[..., None] >> shift & (1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :dim].contiguous()


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the shortest run of whole codes in whole bytes (at most 24 bits)."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8
