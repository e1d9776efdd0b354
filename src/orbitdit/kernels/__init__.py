"""The operations that a quantized layer is made of, as custom ops of torch, and the only place that chooses one.

    rotate_encode   tokens -> values on a number grid and one scale a token
    decode          packed codes -> values on the grid and one scale a row
    encode_decode   both, into memory that is given
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
from orbitdit.codebook import GRID_DTYPES
from orbitdit.errors import TensorError
from orbitdit.kernels import centring, cpu, reference
from orbitdit.kernels import decode as decode_cuda
from orbitdit.kernels import int4_linear as int4_cuda
from orbitdit.kernels import matmul as matmul_cuda
from orbitdit.kernels import means as means_cuda
from orbitdit.kernels import rotate_encode as rotate_encode_cuda
from orbitdit.kernels import viterbi as viterbi_cuda

EXACT, E4M3, INT8 = 0, 1, 2
GRIDS = {"exact": EXACT, "e4m3": E4M3, "int8": INT8}
"""Number grids by name; ops take the number."""
_NAMES = {number: name for name, number in GRIDS.items()}
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
        x, before, extras = _tokens(x, before, extras).view(*x.shape[:-1], -1), "", ()
    encoding = activation_bits, seed, grid, before, extras, each, mean_gain
    arguments = x, weights, scales, biases, weight_bits, weight_states, *encoding
    if x.is_cuda:
        if torch.compiler.is_compiling():
            if grid == E4M3 and _scaled_together(x, weights, biases, weight_bits, weight_states, before, extras):
                return _project_e4m3(ops.encode_decode, *arguments)
        elif type(x) is torch.Tensor and not torch._C._len_torch_dispatch_stack():
            return _project_on_cuda(*arguments)
    return ops.project(*arguments)


def signed(seed: int) -> int:
    """A seed below 2^64 as the signed 64-bit integer that ops take."""
    return seed - (1 << 64) if seed >> 63 else seed


def _seed(number: int) -> int:
    return number % (1 << 64)


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


def dtype_of(grid: int) -> torch.dtype:
    """The dtype of values on a grid."""
    return GRID_DTYPES[_NAMES[grid]]


def _rotate_encode_fake(x, bits, seed, grid):
    return x.new_empty(x.shape, dtype=dtype_of(grid)), x.new_empty(x.shape[:1], dtype=torch.float32)


def _decode_fake(codes, scales, bits, dim, grid, states=0):
    rows = codes.shape[0]
    return codes.new_empty((rows, dim), dtype=dtype_of(grid)), codes.new_empty((rows,), dtype=torch.float32)


def _project_fake(x, weights, *_):
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


def _rows_fake(x, codes, *_):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def mean_tokens(x: torch.Tensor, each: int) -> int:
    """`each`, at most all tokens of a picture, for inputs that have pictures of tokens; else 0."""
    return min(each, x.shape[-2]) if each and x.ndim > 2 and x.numel() else 0


def _flat(x):
    """(..., channels) as (rows, channels)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _tokens(x, before, extras):
    """What is encoded, where no kernel makes it on the way."""
    return reference.apply_before(_flat(x), before, [_flat(t) for t in extras]) if before else _flat(x)


def _with_means(multiply, tokens, means, biases, x, each):
    """The outputs of one or more weights side by side: `multiply` takes encoded tokens, which are values and scales,
    and a bias or None for each weight. `means`, encoded too, are those of `each` tokens of `x`, if that is not 0."""
    if not each:
        return multiply(tokens, biases)
    y = multiply(tokens, [None] * len(biases))
    return centring.add_means(y, multiply(means, biases), x.shape[-2], each)


def _encode_on_cpu(x, activation_bits, seed, grid, before, extras, each, mean_gain):
    """Values and scales of tokens, and of means if there are any."""
    tokens, code = _tokens(x, before, extras), (_seed(seed), _NAMES[grid])
    if not each:
        return cpu.rotate_encode(tokens, activation_bits, *code), None
    means = centring.token_means(x, each)
    values, scales = cpu.rotate_encode(means, centring.MEAN_BITS, *code)
    tokens = centring.less_means(tokens, means, x.shape[-2], each)
    return cpu.rotate_encode(tokens, activation_bits, *code), (values, scales * mean_gain)


def _project_on_cpu(
    x,
    weights,
    scales,
    biases,
    weight_bits,
    weight_states,
    activation_bits,
    seed,
    grid,
    before,
    extras,
    each=0,
    mean_gain=1.0,
):
    def multiply(encoded, biases):
        outputs = []
        for weight, scale, bias, bits, states in zip(weights, scales, biases, weight_bits, weight_states, strict=True):
            if weight.dtype == torch.uint8:
                outputs.append(cpu.linear(*encoded, weight, scale, bias, bits, x.dtype, states))
            else:
                outputs.append(reference.matmul(*encoded, weight, scale, bias, x.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    encoded = _encode_on_cpu(x, activation_bits, seed, grid, before, extras, each, mean_gain)
    y = _with_means(multiply, *encoded, biases, x, each)
    return y.view(*x.shape[:-1], y.shape[1])


def _encode_decode_on_cpu(
    x, codes, scales, biases, bits, states, activation_bits, seed, grid, before, extras, each, mean_gain, *outputs
):
    values, token_scales, mean_values, mean_scales, weight, row_scales, bias = outputs
    tokens, means = _encode_on_cpu(x, activation_bits, seed, grid, before, extras, each, mean_gain)
    for encoded, into in ((tokens, (values, token_scales)), (means, (mean_values, mean_scales))):
        if encoded is not None:
            into[0].copy_(encoded[0])
            into[1].view(-1).copy_(encoded[1])
    first = 0
    for packed, scale in zip(codes, scales, strict=True):
        rows = slice(first, first + packed.shape[0])
        decoded = reference.decode(packed, scale, bits, values.shape[1], _NAMES[grid], states)
        weight[rows], row_scales.view(-1)[rows] = decoded
        first = rows.stop
    if bias is not None:
        bias.copy_(torch.cat(biases))


def _encode_on_cuda(
    x, activation_bits, seed, grid, before, extras, each, mean_gain, values, token_scales, mean_values, mean_scales
):
    """Tokens, and means if there are any, into the memory that is given."""
    code, means = (_seed(seed), _NAMES[grid]), None
    if each:
        rows, into = means_cuda.token_means(x, each), (mean_values, mean_scales)
        rotate_encode_cuda.rotate_encode_into(rows, centring.MEAN_BITS, *code, *into, gain=mean_gain)
        means = rotate_encode_cuda.Means(rows, x.shape[-2], each)
    into = values, token_scales, None, before, [_flat(t) for t in extras]
    rotate_encode_cuda.rotate_encode_into(_flat(x), activation_bits, *code, *into, means)


def _encode_decode_on_cuda(
    x, codes, scales, biases, bits, states, activation_bits, seed, grid, before, extras, each, mean_gain, *outputs
):
    _check_devices(x, codes)
    *encoded, weight, row_scales, bias = outputs
    _encode_on_cuda(x, activation_bits, seed, grid, before, extras, each, mean_gain, *encoded)
    decode_cuda.decode_into(codes, scales, biases, bits, _NAMES[grid], weight, row_scales, bias, states)


def _project_on_cuda(
    x,
    weights,
    scales,
    biases,
    weight_bits,
    weight_states,
    activation_bits,
    seed,
    grid,
    before,
    extras,
    each=0,
    mean_gain=1.0,
):
    """Weights that are decoded alike are multiplied together. What is decoded lives until the product is queued;
    torch's allocator hands the memory to the next layer."""
    encoding = activation_bits, seed, grid, before, extras, each, mean_gain
    if grid == E4M3 and x.numel() and _scaled_together(x, weights, biases, weight_bits, weight_states, before, extras):
        arguments = x, weights, scales, biases, weight_bits, weight_states, *encoding
        return _project_e4m3(_encode_decode_on_cuda, *arguments)
    _check_devices(x, weights)
    dim, name = reference.encoded_width(x, before, extras), _NAMES[grid]
    tokens, means = _room(x, dim, grid, each)
    _encode_on_cuda(x, *encoding, *tokens, *means)
    if _decoded_alike(weights, biases, weight_bits, weight_states):
        code = weight_bits[0], dim, name, weight_states[0]
        weight, scale, bias = decode_cuda.decode_all(weights, scales, biases, *code)
        decoded, biases = [(weight, scale)], [bias]
    else:
        decoded = []
        for weight, scale, bits, states in zip(weights, scales, weight_bits, weight_states, strict=True):
            packed = weight.dtype == torch.uint8
            decoded.append(decode_cuda.decode(weight, scale, bits, dim, name, states) if packed else (weight, scale))

    def multiply(encoded, biases):
        parts = [matmul_cuda.matmul(*encoded, *w, b, x.dtype) for w, b in zip(decoded, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    y = _with_means(multiply, tokens, means, biases, x, each)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def _room(x, dim, grid, each):
    """Memory for values and scales of the tokens of `x`, and of their means (None twice without)."""
    tokens = x.numel() // x.shape[-1]
    means = tokens // x.shape[-2] * centring.groups(x.shape[-2], each) if each else None
    room = []
    for rows in (tokens, means):
        values = None if rows is None else torch.empty((rows, dim), dtype=dtype_of(grid), device=x.device)
        room.append((values, None if rows is None else torch.empty(rows, dtype=torch.float32, device=x.device)))
    return room


def _scaled_together(x, weights, biases, weight_bits, weight_states, before, extras):
    """Whether `_project_e4m3` takes this: weights that are decoded alike, at a size that has row and column scales."""
    if not _decoded_alike(weights, biases, weight_bits, weight_states):
        return False
    rows, tokens = sum(weight.shape[0] for weight in weights), x.numel() // x.shape[-1]
    return matmul_cuda.has_row_scales(tokens, rows, reference.encoded_width(x, before, extras))


def _project_e4m3(
    encode_decode,
    x,
    codes,
    scales,
    biases,
    weight_bits,
    weight_states,
    activation_bits,
    seed,
    grid,
    before,
    extras,
    each,
    mean_gain,
):
    """`project` in one encoding, one decoding and one product, or two of them where there are means; `encode_decode`
    is the op or what it calls."""
    dim, device, rows = reference.encoded_width(x, before, extras), x.device, 0
    for packed in codes:
        rows += packed.shape[0]
    tokens, means = _room(x, dim, grid, each)
    weight = torch.empty((rows, dim), dtype=torch.float8_e4m3fn, device=device)
    row_scales = torch.empty((rows,), dtype=torch.float32, device=device)
    bias, into = biases[0], None
    if bias is not None and len(codes) > 1:
        bias = into = torch.empty((rows,), dtype=bias.dtype, device=device)
    code = weight_bits[0], weight_states[0]
    inputs = x, codes, scales, biases, *code, activation_bits, seed, grid, before, extras, each, mean_gain
    encode_decode(*inputs, *tokens, *means, weight, row_scales, into)

    def multiply(encoded, biases):
        return matmul_cuda.product(*encoded, weight, row_scales, biases[0], x.dtype)

    y = _with_means(multiply, tokens, means, [bias], x, each)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], rows)


def _check_devices(x, weights):
    """A kernel that is given an address of another device would end the process's use of this one."""
    for weight in weights:
        if weight.device != x.device:
            raise TensorError(f"the layer's codes are on {weight.device}, its input is on {x.device}: move one of them")


def _decoded_alike(weights, biases, weight_bits, weight_states):
    """Whether one call of the kernel decodes all of these: packed codes of one kind, and biases that it copies."""
    if len(weights) == 1:
        return weights[0].dtype == torch.uint8
    dtype = None if biases[0] is None else biases[0].dtype
    if len(weights) > decode_cuda.MEMBERS or dtype not in (None, torch.bfloat16, torch.float16):
        return False
    for weight, bias, bits, states in zip(weights, biases, weight_bits, weight_states, strict=True):
        if weight.dtype != torch.uint8 or bits != weight_bits[0] or states != weight_states[0]:
            return False
        if dtype != (None if bias is None else bias.dtype):
            return False
    return True


def _int4_on_cuda(x, codes, scales, bias):
    """In plain torch on devices that are too old for the kernel, or no NVIDIA devices."""
    _check_devices(x, (codes,))
    has_kernels = device_grids(x.device) != ("exact",)
    return (int4_cuda if has_kernels else reference).int4_linear(x, codes, scales, bias)


def _exact_on_cpu(x, codes, scales, bias, weight_bits, activation_bits, seed, states=0):
    return cpu.exact_linear(x, codes, scales, bias, weight_bits, activation_bits, _seed(seed), states)


def _exact(x, codes, scales, bias, weight_bits, activation_bits, seed, states=0):
    return reference.exact_linear(x, codes, scales, bias, weight_bits, activation_bits, _seed(seed), states)


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
    lambda x, bits, seed, grid: cpu.rotate_encode(x, bits, _seed(seed), _NAMES[grid]),
    lambda x, bits, seed, grid: rotate_encode_cuda.rotate_encode(x, bits, _seed(seed), _NAMES[grid]),
    _rotate_encode_fake,
)
_define(
    "decode(Tensor codes, Tensor scales, int bits, int dim, int grid, int states=0) -> (Tensor, Tensor)",
    lambda codes, scales, bits, dim, grid, *states: reference.decode(codes, scales, bits, dim, _NAMES[grid], *states),
    lambda codes, scales, bits, dim, grid, *states: decode_cuda.decode(codes, scales, bits, dim, _NAMES[grid], *states),
    _decode_fake,
)
_define(
    "encode_decode(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] biases, int weight_bits, int states,"
    " int activation_bits, int seed, int grid, str before, Tensor[] extras, int each, float mean_gain,"
    " Tensor(a!) values, Tensor(b!) token_scales, Tensor(c!)? mean_values, Tensor(d!)? mean_scales,"
    " Tensor(e!) weight, Tensor(f!) row_scales, Tensor(g!)? bias) -> ()",
    _encode_decode_on_cpu,
    _encode_decode_on_cuda,
    lambda *_: None,
)
_define(
    "project(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, int[] weight_bits, int[] weight_states,"
    " int activation_bits, int seed, int grid, str before, Tensor[] extras, int each=0, float mean_gain=1.0) -> Tensor",
    _project_on_cpu,
    _project_on_cuda,
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
