"""The operations that a quantized layer is made of, as custom ops of torch, and the only place that chooses one.

    rotate_encode   tokens -> values on a number grid and one scale a token
    decode          packed codes -> values on the grid and one scale a row
    dequantize      packed codes -> the weight that they stand for
    encode_decode   both
    linear          the layer, or several on one input side by side: encode, decode, multiply
    exact_linear    the whole layer with fp32 centroids: the reference, and the route of devices without kernels
    int4_linear     weight-only INT4, for modulation
    viterbi         rows of about N(0, 1) -> codes of least error on a trellis, when a model is quantized

Each has a folder: `reference` defines it in plain torch, `cuda` and `cpu` are fast. On CUDA the kernels run, or raise.

A tensor core only multiplies, so centroids need not be uniform: each codebook is laid on the points of e4m3 (compute
capability 8.9 and newer) or int8 (8.0 and newer), and a layer of any bit width is encode, decode, one library GEMM.

What a layer is crosses the schemas as a short text, its key (see `spec`): `torch.compile` sees ops with known shapes,
and tables are kept beside the ops by what they depend on, not in graphs. `operands` of one or more layers are codes,
scales and bias (or None) of the first, then of the second, and so on; in place of codes and scales there may be what
`decode` made of them.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from orbitdit.grids import E4M3, EXACT, GRIDS, INT8, dtype_of
from orbitdit.ops.decode import cuda as decode_cuda
from orbitdit.ops.decode import reference as decode_reference
from orbitdit.ops.int4_linear import cuda as int4_cuda
from orbitdit.ops.int4_linear import reference as int4_reference
from orbitdit.ops.linear import cpu as linear_cpu
from orbitdit.ops.linear import cuda as linear_cuda
from orbitdit.ops.linear import reference as linear_reference
from orbitdit.ops.operands import check_devices
from orbitdit.ops.rotate_encode import cpu as rotate_encode_cpu
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.viterbi import cuda as viterbi_cuda
from orbitdit.ops.viterbi import reference as viterbi_reference
from orbitdit.spec import LayerSpec, Projection

GRID_BITS = 6
"""Codes of more bits have more levels than a grid tells apart: such layers run exactly."""

CUDA_GRIDS = (E4M3.name, INT8.name)
"""The grids that kernels and tensor cores have, fastest first. Others of `GRIDS` are there to compare, on a CPU."""

_LIBRARY = torch.library.Library("orbitdit", "DEF")
ops = torch.ops.orbitdit


def device_grids(device: torch.device) -> tuple[str, ...]:
    """The grids that layers on `device` can run on, fastest first. Before "exact" are those that it multiplies faster;
    behind it, on a CPU, all the others, to compare."""
    return _device_grids(device)


# What torch.compiler.assume_constant_result does, without importing the compiler: traced code takes the answer as is.
device_grids._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _device_grids(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        fast = (INT8.name, EXACT) if linear_cpu.multiplies_int8() else (EXACT, INT8.name)
        return *fast, *(grid for grid in GRIDS if grid not in fast)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else (0, 0)
    grids = cuda_grids(capability)
    if grids == (EXACT,) and device.type != "meta":
        warnings.warn(
            f"orbitdit has no kernels for {device}: layers run in plain torch, slower than bf16", stacklevel=2
        )
    return grids


def cuda_grids(capability: tuple[int, int]) -> tuple[str, ...]:
    """The grids of NVIDIA devices of this compute capability, fastest first."""
    if capability >= (8, 9):
        return *CUDA_GRIDS, EXACT
    return (INT8.name, EXACT) if capability >= (8, 0) else (EXACT,)


def has_kernel(spec: LayerSpec) -> bool:
    """Whether the kernels take a layer."""
    if spec.tokens is None or max(spec.weight.bits, spec.tokens.bits) > GRID_BITS:
        return False
    return rotate_encode_cuda.has_kernel(spec.in_features) and spec.out_features % 16 == 0


def choose(forced: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The grid that a layer which `has_kernel` runs on: this is decided here alone. Exact for fp32 and fp64 inputs."""
    if dtype not in (torch.bfloat16, torch.float16):
        return EXACT
    return device_grids(device)[0] if forced is None else forced


def run_linear(x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str) -> Tensor:
    """The op `linear` in the way that costs the host least: outputs (..., rows of all layers) for what the prologue of
    the projection `key` makes of `x` (..., channels).

    A compiler sees the products and allocates for itself, and eager mode on CUDA calls the kernels without torch's
    dispatcher, where no dispatch mode is active.
    """
    if x.is_cuda:
        if torch.compiler.is_compiling():
            if linear_cuda.scaled_together(x, operands, key):
                return linear_cuda.linear_in_parts(ops.encode_decode, x, prologue_args, operands, key)
        elif type(x) is Tensor and not torch._C._len_torch_dispatch_stack():
            return linear_cuda.linear(x, prologue_args, operands, key)
    y: Tensor = ops.linear(x, prologue_args, operands, key)
    return y


Function = Callable[..., Any]


def _define(
    schema: str, on_cpu: Function, on_cuda: Function, fake: Function, elsewhere: Function | None = None
) -> None:
    """One op: its schema, what runs it on the CPU, on CUDA and on any other device, and the shapes of its results."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    if elsewhere is not None:
        _LIBRARY.impl(name, _without_autocast(elsewhere), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _without_autocast(on_cpu), "CPU")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"orbitdit::{name}", fake, lib=_LIBRARY)


def _without_autocast(function: Function) -> Function:
    """Autocast would round what these functions compute in fp32. On CUDA the kernels know none."""

    def run(x: Tensor, *rest: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    return run


def _rotate_encode_fake(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    values = x.new_empty((tokens, x.shape[-1]), dtype=dtype_of(Projection.parse(key).grid))
    return values, x.new_empty((tokens,), dtype=torch.float32)


def _decode_fake(codes: Tensor, scales: Tensor, key: str) -> tuple[Tensor, Tensor]:
    projection, rows = Projection.parse(key), codes.shape[0]
    values = codes.new_empty((rows, projection.first.in_features), dtype=dtype_of(projection.grid))
    return values, codes.new_empty((rows,), dtype=torch.float32)


def _encode_decode_fake(
    x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str
) -> list[Tensor]:
    projection = Projection.parse(key)
    dim, dtype, bias = projection.tokens.dim, dtype_of(projection.grid), operands[2]
    found = []
    for rows in (x.numel() // x.shape[-1], projection.out_features):
        found += [x.new_empty((rows, dim), dtype=dtype), x.new_empty((rows,), dtype=torch.float32)]
    if bias is not None and len(operands) > 3:
        found.append(bias.new_empty((projection.out_features,)))
    return found


def _linear_fake(x: Tensor, prologue_args: Sequence[Tensor], operands: Sequence[Tensor | None], key: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], Projection.parse(key).out_features))


def _rows_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _int4_on_cuda(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """In plain torch on devices that are too old for the kernel, or no NVIDIA devices."""
    check_devices(x, (codes,))
    fast = device_grids(x.device) != (EXACT,)
    return (int4_cuda.int4_linear if fast else int4_reference.int4_linear)(x, codes, scales, bias)


def _exact_on_cpu(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, key: str) -> Tensor:
    return linear_cpu.exact_linear(x, codes, scales, bias, LayerSpec.parse(key))


def _exact(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, key: str) -> Tensor:
    return linear_reference.exact_linear(x, codes, scales, bias, LayerSpec.parse(key))


def _viterbi_on_cuda(z: Tensor, points: Tensor, bits: int) -> Tensor:
    fast = device_grids(z.device) != (EXACT,)
    return (viterbi_cuda.encode if fast else _viterbi_elsewhere)(z, points, bits)


def _viterbi_elsewhere(z: Tensor, points: Tensor, bits: int) -> Tensor:
    """On the CPU, for devices without the kernel."""
    return viterbi_reference.viterbi(z.cpu(), points.cpu(), bits).to(z.device)


def _viterbi_fake(z: Tensor, points: Tensor, bits: int) -> Tensor:
    return z.new_empty(z.shape, dtype=torch.uint8)


def _rotate_encode_on_cpu(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    return rotate_encode_cpu.rotate_encode(x, Projection.parse(key).tokens)


def _rotate_encode_on_cuda(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    return rotate_encode_cuda.rotate_encode(x, Projection.parse(key).tokens)


def _dequantize(codes: Tensor, scales: Tensor, key: str) -> Tensor:
    return decode_reference.dequantize(codes, scales, LayerSpec.parse(key))


def _dequantize_fake(codes: Tensor, scales: Tensor, key: str) -> Tensor:
    return codes.new_empty((codes.shape[0], LayerSpec.parse(key).in_features), dtype=torch.float32)


def _decode_on_cpu(codes: Tensor, scales: Tensor, key: str) -> tuple[Tensor, Tensor]:
    projection = Projection.parse(key)
    return decode_reference.decode(codes, scales, projection.first, projection.grid)


def _decode_on_cuda(codes: Tensor, scales: Tensor, key: str) -> tuple[Tensor, Tensor]:
    projection = Projection.parse(key)
    return decode_cuda.decode(codes, scales, projection.first, projection.grid)


_define("viterbi(Tensor z, Tensor points, int bits) -> Tensor", viterbi_reference.viterbi, _viterbi_on_cuda,
        _viterbi_fake, _viterbi_elsewhere)  # fmt: skip
_define("rotate_encode(Tensor x, str key) -> (Tensor, Tensor)", _rotate_encode_on_cpu, _rotate_encode_on_cuda,
        _rotate_encode_fake)  # fmt: skip
_define("decode(Tensor codes, Tensor scales, str key) -> (Tensor, Tensor)", _decode_on_cpu, _decode_on_cuda,
        _decode_fake)  # fmt: skip
_define("dequantize(Tensor codes, Tensor scales, str key) -> Tensor",
        _dequantize, _without_autocast(_dequantize), _dequantize_fake, _dequantize)  # fmt: skip
_define("encode_decode(Tensor x, Tensor[] prologue_args, Tensor?[] operands, str key) -> Tensor[]",
        linear_cpu.encode_decode, linear_cuda.encode_decode, _encode_decode_fake)  # fmt: skip
_define("linear(Tensor x, Tensor[] prologue_args, Tensor?[] operands, str key) -> Tensor",
        linear_cpu.linear, linear_cuda.linear, _linear_fake)  # fmt: skip
_define("exact_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, str key) -> Tensor",
        _exact_on_cpu, _without_autocast(_exact), _rows_fake, _exact)  # fmt: skip
_define("int4_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
        int4_reference.int4_linear, _int4_on_cuda, _rows_fake, int4_reference.int4_linear)  # fmt: skip
