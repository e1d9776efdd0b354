"""A weight matrix to codes and scales, and back.

Each row w_i is rotated, w'_i = R w_i, and divided by its norm n_i = ||w'_i||. Its codes are then the nearest centroids
(the paper's), or those of a trellis (see `codebooks.trellis`), and stand for a row w^'_i. What is stored as the row's
scale, in bf16, is n_i ("norm", the paper's) or n_i * ||w'_i||^2 / <w'_i, w^'_i> ("unbiased-rows"). Codes of least
squared error shrink what they stand for, by 12% at 2 bits; the unbiased scale, that of EDEN (Vargaftik et al., arXiv
2108.08842), undoes it: w_i times what its codes stand for is ||w_i||^2 again.

A layer's tokens are coded too, and shrink likewise, by 3.5% at 3 bits. The factor hardly differs from token to token,
so a constant undoes it: with "unbiased" the rows' scales carry it (`token_gain`), and layers compute as before.

INT4, for the modulation layers, is symmetric round-to-nearest in groups of 64 inputs with scale = absmax / 7.

All work in fp64 (the trellis search in fp32), row block by row block, so that the same weight gives the same codes on
every device and in every version: rounding differences practically never decide.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.codebooks import CODEBOOKS, indices, points, token_gain, window
from orbitdit.codebooks.lloyd_max import look_up, nearest
from orbitdit.config import ACTIVATION_BITS, SCALES
from orbitdit.errors import ConfigError, TensorError
from orbitdit.ops import ops
from orbitdit.ops.decode.reference import dequantize
from orbitdit.ops.rotate_encode.means import GROUP_SIZE
from orbitdit.packing import GROUP, pack, packed_width
from orbitdit.rotation import rotation
from orbitdit.spec import INT4, LayerSpec, WeightCode

TOKEN_BITS = tuple(bits for bits in ACTIVATION_BITS if bits != 16)
"""Bits of token codes: 16 stand for tokens that are not coded."""
_BLOCK_ELEMENTS, _LARGE_BLOCK_ELEMENTS = 1 << 20, 1 << 23
"""Weights that are worked on at a time: 8 MB of fp64 on a CPU, whose larger temporaries are mapped anew each time; a
GPU needs more to be busy."""


class QuantizedWeight(NamedTuple):
    """Packed `codes` (rows, bytes) uint8, and `scales` in bf16: (rows,) or, for INT4, (rows, groups)."""

    codes: Tensor
    scales: Tensor


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise TensorError, naming the tensor, unless `weight` is a finite floating-point matrix."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TensorError(f"{name}: a floating-point matrix is needed; got {weight.dtype} of {tuple(weight.shape)}")
    if weight.is_meta:
        raise TensorError(f"{name} has no data (it is on the meta device): load the weights first")
    check_finite(weight, name)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise TensorError, naming the tensor, for NaN or Inf in a `tensor` of any shape and floating dtype."""
    for block in tensor.detach().reshape(-1).split(_BLOCK_ELEMENTS):
        if not torch.isfinite(block if block.element_size() > 1 else block.float()).all():  # fp8 has no isfinite
            raise TensorError(f"{name} holds NaN or Inf: repair the checkpoint before quantizing it")


def check_scales(scales: Tensor, name: str) -> None:
    """Raise TensorError, naming the tensor, unless all `scales` (of a quantized weight) are finite and not negative."""
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise TensorError(f"{name} holds scales that are NaN, Inf or negative: the file is damaged; copy it again")


def check_spec(spec: LayerSpec) -> None:
    """Raise ConfigError unless the codes, the scale and the tokens of `spec` exist."""
    code, tokens = spec.weight, spec.tokens
    if code.codebook == INT4:
        return
    if code.codebook not in CODEBOOKS:
        raise ConfigError(f"codebook {code.codebook!r} is unknown; choose one of {', '.join(CODEBOOKS)}")
    CODEBOOKS[code.codebook].check(code)
    if code.scale not in SCALES:
        raise ConfigError(f"scale={code.scale!r} is not supported; choose one of {', '.join(SCALES)}")
    if tokens is not None and tokens.bits not in TOKEN_BITS:
        allowed = ", ".join(map(str, TOKEN_BITS))
        raise ConfigError(f"tokens of {tokens.bits} bits are not supported; choose one of {allowed}")
    if tokens is not None and tokens.group_size is not None and not 1 <= tokens.group_size <= GROUP_SIZE:
        raise ConfigError(f"{tokens.group_size} tokens cannot share a mean; choose at most {GROUP_SIZE}")


def quantize_weight(weight: Tensor, spec: LayerSpec, name: str = "weight") -> QuantizedWeight:
    """The codes and scales that `spec` asks for, of `weight` (out_features, in_features), on its device.

    A row of zeros gets scale zero. Raises TensorError for weights that `check_weight` refuses and for another shape,
    ConfigError as `check_spec` does; `name` is used in messages.
    """
    check_weight(weight, name)
    check_spec(spec)
    if weight.shape != (spec.out_features, spec.in_features):
        raise TensorError(f"{name} has shape {tuple(weight.shape)}; {spec.out_features, spec.in_features} is needed")
    return _by_rows(encoder(spec, weight.device, name), weight)


def encoder(spec: LayerSpec, device: torch.device, name: str = "weight") -> Callable[[Tensor], QuantizedWeight]:
    """What makes codes and scales of a block of rows (rows, in_features) on `device`, of any floating dtype.

    Rows are coded one by one, so a weight can be given in blocks of `block_rows`; `quantize_weight` does. Raises
    TensorError for rows whose norm bf16 does not hold.
    """
    if spec.weight.codebook == INT4:
        return lambda block: _held(_encode_int4(block), block.double(), name)
    code, dim = spec.weight, spec.in_features
    gain = token_gain(spec)
    centroids, step = points(code, dim, device, torch.float64)
    searched = window(code) != code.bits
    boundaries = (centroids[1:] + centroids[:-1]) / 2

    def encode(block: Tensor) -> QuantizedWeight:
        block = block.double()
        rotated = rotation(dim, spec.seed or 0).apply(block)
        norm = rotated.norm(dim=1)
        unit = rotated / norm.where(norm > 0, 1)[:, None]
        codes = search((unit * dim**0.5).float(), code, dim) if searched else nearest(unit, boundaries)
        if code.scale != "norm":
            projection = (unit * look_up(indices(codes, code), centroids)).sum(1) * step
            norm = norm * (unit.square().sum(1) / projection).where(projection > 0, 1) * gain
        return _held(QuantizedWeight(pack(codes, code.bits), norm.to(torch.bfloat16)), block, name)

    return encode


def block_rows(in_features: int, device: torch.device) -> int:
    """How many rows of a weight of this width are worked on at a time."""
    return max(1, (_LARGE_BLOCK_ELEMENTS if device.type == "cuda" else _BLOCK_ELEMENTS) // max(1, in_features))


def _held(quantized: QuantizedWeight, block: Tensor, name: str) -> QuantizedWeight:
    """`quantized`, the codes of `block`, if bf16 holds its scales. Raises TensorError otherwise."""
    scales = quantized.scales
    largest = scales.amax(1) if scales.ndim == 2 else scales
    if not torch.isfinite(largest).all() or ((largest == 0) & (block != 0).any(1)).any():
        raise TensorError(f"{name} has rows that are too large or too small for a scale in bf16: rescale the model")
    return quantized


def search(z: Tensor, code: WeightCode, dim: int) -> Tensor:
    """Codes (rows, dim) uint8, on the device of `z` (rows, dim) fp32, of rows whose coordinates are about N(0, 1), for
    a codebook whose indices slide along the row.

    The codes are the same on every device, and a CPU takes some thousand times as long: it leaves them to a GPU if
    there is one.
    """
    device = search_device(z.device)
    table = points(code, dim, device, torch.float32)[0]
    codes: Tensor = ops.viterbi(z.to(device), table, code.bits).to(z.device)
    return codes


def search_device(device: torch.device) -> torch.device:
    """Where codes of weights on `device` are searched."""
    if device.type == "cpu" and torch.version.cuda is not None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def dequantize_weight(quantized: QuantizedWeight, spec: LayerSpec) -> Tensor:
    """The weight (out_features, in_features) in fp32 that the codes stand for, rotated back."""
    return dequantize(*quantized, spec)


def quantize_int4(weight: Tensor) -> QuantizedWeight:
    """INT4 codes (stored plus 8) and bf16 scales (rows, groups of 64) of a finite `weight` (rows, dim)."""
    return _by_rows(_encode_int4, weight)


def _encode_int4(block: Tensor) -> QuantizedWeight:
    dim = block.shape[1]
    groups = torch.nn.functional.pad(block.double(), (0, -dim % GROUP)).unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    step = scale.double().where(scale > 0, 1)[..., None]
    codes = (groups / step).round().clamp(-7, 7) + 8
    return QuantizedWeight(pack(codes.to(torch.uint8).flatten(1)[:, :dim], 4), scale)


def empty_weight(spec: LayerSpec, device: torch.device | str | None = None) -> QuantizedWeight:
    """Uninitialized codes and scales of the right shapes and dtypes, to load a checkpoint into."""
    rows, dim = spec.out_features, spec.in_features
    scales = (rows, -(-dim // GROUP)) if spec.weight.codebook == INT4 else (rows,)
    codes = torch.empty(rows, packed_width(dim, spec.weight.bits), dtype=torch.uint8, device=device)
    return QuantizedWeight(codes, torch.empty(scales, dtype=torch.bfloat16, device=device))


def _by_rows(encode: Callable[[Tensor], QuantizedWeight], weight: Tensor) -> QuantizedWeight:
    """`encode` over blocks of rows, to bound the memory that fp64 takes."""
    parts = [encode(block) for block in weight.detach().split(block_rows(weight.shape[1], weight.device))]
    return QuantizedWeight(*(torch.cat(column) for column in zip(*parts, strict=True)))
