"""The operations that a quantized layer is made of, as custom ops of torch, and the only place that chooses one.

    rotate_encode   tokens -> values on a number grid and one scale a token
    decode          packed codes -> values on the grid and one scale a row
    encode_decode   both, and means of tokens if they are centred, into memory that is given
    project         the layer, or several on one input side by side: encode, decode, multiply
    int4_linear     weight-only INT4, for modulation
    viterbi         rows of about N(0, 1) -> trellis codes of least error, when a model is quantized
    exact_linear    the whole layer with fp32 centroids: the reference, and the route of devices without kernels

A tensor core only multiplies, so centroids need not be uniform: each codebook is laid on the points of e4m3 (compute
capability 8.9 and newer) or int8 (8.0 and newer), and a layer of any bit width is encode, decode, one library GEMM.
Weights may be scalar codes or those of a trellis: `states` beside their bits tells (0: scalar, else see `trellis`).

`reference` defines each op in plain torch and runs it where there are no kernels. On CUDA the kernels run, or raise.
`torch.compile` sees ops with known shapes; tables are kept beside them by value (dim, bits, seed, grid), not in graphs.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from orbitdit import trellis
from orbitdit.kernels import cpu, reference
from orbitdit.kernels import decode as decode_cuda
from orbitdit.kernels import int4_linear as int4_cuda
from orbitdit.kernels import rotate_encode as rotate_encode_cuda
from orbitdit.kernels import viterbi as viterbi_cuda
from orbitdit.kernels.layer import (
    E4M3,
    EXACT,
    GRIDS,
    NAMES,
    check_devices,
    dtype_of,
    encode_decode_on_cpu,
    encode_decode_on_cuda,
    mean_tokens,
    project_e4m3,
    project_on_cpu,
    project_on_cuda,
    scaled_together,
    tokens_of,
    unsigned,
)
from orbitdit.kernels.layer import (
    INT8 as INT8,
)

GRID_BITS = 6
"""Codes of more bits have more levels than a grid tells apart: such layers run exactly."""

_LIBRARY = torch.library.Library("orbitdit", "DEF")
ops = torch.ops.orbitdit


def device_grids(device: torch.device) -> tuple[str, ...]:
    """The grids that layers on `device` can run on, fastest first; a CPU runs all of them, to compare."""
    return _device_grids(device)


# What torch.compiler.assume_constant_result does, without importing the compiler: traced code takes the answer as is.
device_grids._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _device_grids(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("int8", "exact", "e4m3") if cpu.multiplies_int8() else ("exact", "int8", "e4m3")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else (0, 0)
    if capability >= (8, 9):
        return "e4m3", "int8", "exact"
    if capability >= (8, 0):
        return "int8", "exact"
    if device.type != "meta":
        warnings.warn(
            f"orbitdit has no kernels for {device}: layers run in plain torch, slower than bf16", stacklevel=2
        )
    return ("exact",)


def fits(shape: tuple[int, int], bits: tuple[int, int]) -> bool:
    """Whether the kernels take a layer of `shape` (in, out) and `bits` (weight, activation)."""
    return rotate_encode_cuda.supported(shape[0]) and shape[1] % 16 == 0 and max(bits) <= GRID_BITS


def choose(forced: int | None, device: torch.device, dtype: torch.dtype) -> int:
    """The grid that a layer which `fits` runs on: this is decided here alone. Exact for fp32 and fp64 inputs."""
    if dtype not in (torch.bfloat16, torch.float16):
        return EXACT
    return GRIDS[device_grids(device)[0]] if forced is None else forced


def project(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    weight_bits: Sequence[int],
    weight_states: Sequence[int],
    activation_bits: int,
    seed: int,
    grid: int,
    before: str = "",
    extras: Sequence[torch.Tensor] = (),
    each: int = 0,
    mean_gain: float = 1.0,
) -> torch.Tensor:
    """The op `project` in the way that costs the host least; `before` and `extras`: see `reference.apply_before`.
    `each`: tokens that share a mean (see `centring`), 0 for none; the products of means are multiplied by `mean_gain`.

    A compiler sees the products and allocates for itself, and eager mode on CUDA calls the kernels without torch's
    dispatcher, where nothing listens in on it.
    """
    each = mean_tokens(x, each)
    if before and each:  # means are of what is encoded
        x, before, extras = tokens_of(x, before, extras).view(*x.shape[:-1], -1), "", ()
    encoding = activation_bits, seed, grid, before, extras, each, mean_gain
    arguments = x, weights, scales, biases, weight_bits, weight_states, *encoding
    if x.is_cuda:
        if torch.compiler.is_compiling():
            if grid == E4M3 and scaled_together(x, weights, biases, weight_bits, weight_states, before, extras):
                return project_e4m3(ops.encode_decode, *arguments)
        elif type(x) is torch.Tensor and not torch._C._len_torch_dispatch_stack():
            return project_on_cuda(*arguments)
    return ops.project(*arguments)


def signed(seed: int) -> int:
    """A seed below 2^64 as the signed 64-bit integer that ops take."""
    return seed - (1 << 64) if seed >> 63 else seed


def _define(schema: str, cpu_function, cuda_function, fake, any_function=None) -> None:
    """One op: its schema, what runs it on the CPU, on CUDA and on any other device, and the shapes of its results."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    if any_function is not None:
        _LIBRARY.impl(name, _without_autocast(any_function), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _without_autocast(cpu_function), "CPU")
    _LIBRARY.impl(name, cuda_function, "CUDA")
    torch.library.register_fake(f"orbitdit::{name}", fake, lib=_LIBRARY)


def _without_autocast(function):
    """Autocast would round what these functions compute in fp32. On CUDA the kernels know none."""

    def run(x, *rest):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    return run


def _rotate_encode_fake(x, bits, seed, grid):
    return x.new_empty(x.shape, dtype=dtype_of(grid)), x.new_empty(x.shape[:1], dtype=torch.float32)


def _decode_fake(codes, scales, bits, dim, grid, states=0):
    rows = codes.shape[0]
    return codes.new_empty((rows, dim), dtype=dtype_of(grid)), codes.new_empty((rows,), dtype=torch.float32)


def _project_fake(x, weights, *_):
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


def _rows_fake(x, codes, *_):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _int4_on_cuda(x, codes, scales, bias):
    """In plain torch on devices that are too old for the kernel, or no NVIDIA devices."""
    check_devices(x, (codes,))
    has_kernels = device_grids(x.device) != ("exact",)
    return (int4_cuda if has_kernels else reference).int4_linear(x, codes, scales, bias)


def _exact_on_cpu(x, codes, scales, bias, weight_bits, activation_bits, seed, states=0):
    return cpu.exact_linear(x, codes, scales, bias, weight_bits, activation_bits, unsigned(seed), states)


def _exact(x, codes, scales, bias, weight_bits, activation_bits, seed, states=0):
    return reference.exact_linear(x, codes, scales, bias, weight_bits, activation_bits, unsigned(seed), states)


def _viterbi_on_cuda(z, points, bits):
    has_kernels = device_grids(z.device) != ("exact",)
    return (viterbi_cuda.encode if has_kernels else _viterbi_elsewhere)(z, points, bits)


def _viterbi_elsewhere(z, points, bits):
    """On the CPU, for devices without the kernel."""
    return trellis.viterbi(z.cpu(), points.cpu(), bits).to(z.device)


_define(
    "viterbi(Tensor z, Tensor points, int bits) -> Tensor",
    trellis.viterbi,
    _viterbi_on_cuda,
    lambda z, points, bits: z.new_empty(z.shape, dtype=torch.uint8),
    _viterbi_elsewhere,
)
_define(
    "rotate_encode(Tensor x, int bits, int seed, int grid) -> (Tensor, Tensor)",
    lambda x, bits, seed, grid: cpu.rotate_encode(x, bits, unsigned(seed), NAMES[grid]),
    lambda x, bits, seed, grid: rotate_encode_cuda.rotate_encode(x, bits, unsigned(seed), NAMES[grid]),
    _rotate_encode_fake,
)
_define(
    "decode(Tensor codes, Tensor scales, int bits, int dim, int grid, int states=0) -> (Tensor, Tensor)",
    lambda codes, scales, bits, dim, grid, *states: reference.decode(codes, scales, bits, dim, NAMES[grid], *states),
    lambda codes, scales, bits, dim, grid, *states: decode_cuda.decode(codes, scales, bits, dim, NAMES[grid], *states),
    _decode_fake,
)
_define(
    "encode_decode(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] biases, int weight_bits, int states,"
    " int activation_bits, int seed, int grid, str before, Tensor[] extras, int each, float mean_gain,"
    " Tensor(a!) values, Tensor(b!) token_scales, Tensor(c!)? mean_values, Tensor(d!)? mean_scales,"
    " Tensor(e!) weight, Tensor(f!) row_scales, Tensor(g!)? bias) -> ()",
    encode_decode_on_cpu,
    encode_decode_on_cuda,
    lambda *_: None,
)
_define(
    "project(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, int[] weight_bits, int[] weight_states,"
    " int activation_bits, int seed, int grid, str before, Tensor[] extras, int each=0, float mean_gain=1.0) -> Tensor",
    project_on_cpu,
    project_on_cuda,
    _project_fake,
)
_define(
    "exact_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int weight_bits, int activation_bits, int seed,"
    " int states=0) -> Tensor",
    _exact_on_cpu,
    _without_autocast(_exact),
    _rows_fake,
    _exact,
)
_define(
    "int4_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
    reference.int4_linear,
    _int4_on_cuda,
    _rows_fake,
    reference.int4_linear,
)
