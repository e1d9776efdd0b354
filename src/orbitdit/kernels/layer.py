"""How the op `project` runs: tokens are encoded, weights decoded, and both multiplied, on the CPU and on CUDA.

Arguments are those of the ops (see `orbitdit.kernels`). Where tokens are centred (`each` is not 0), their means are
encoded beside them, and outputs are the sum of both products (see `centring`).
"""

import torch

from orbitdit.codebook import GRID_DTYPES
from orbitdit.errors import TensorError
from orbitdit.kernels import centring, cpu, reference
from orbitdit.kernels import decode as decode_cuda
from orbitdit.kernels import matmul as matmul_cuda
from orbitdit.kernels import means as means_cuda
from orbitdit.kernels import rotate_encode as rotate_encode_cuda

EXACT, E4M3, INT8 = 0, 1, 2
GRIDS = {"exact": EXACT, "e4m3": E4M3, "int8": INT8}
"""Number grids by name; ops take the number."""
NAMES = {number: name for name, number in GRIDS.items()}


def dtype_of(grid: int) -> torch.dtype:
    """The dtype of values on a grid."""
    return GRID_DTYPES[NAMES[grid]]


def unsigned(number: int) -> int:
    """Inverse of `signed`."""
    return number % (1 << 64)


def mean_tokens(x: torch.Tensor, each: int) -> int:
    """`each`, at most all tokens of a picture, for inputs that have pictures of tokens; else 0."""
    return min(each, x.shape[-2]) if each and x.ndim > 2 and x.numel() else 0


def _flat(x):
    """(..., channels) as (rows, channels)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def tokens_of(x, before, extras):
    """What is encoded, where no kernel makes it on the way."""
    return reference.apply_before(_flat(x), before, [_flat(t) for t in extras]) if before else _flat(x)


def _with_means(multiply, tokens, means, biases, x, each):
    """The outputs of one or more weights side by side: `multiply` takes encoded tokens, which are values and scales,
    and a bias or None for each weight. `means`, encoded too, are those of `each` tokens of `x`, if that is not 0."""
    if not each:
        return multiply(tokens, biases)
    y = multiply(tokens, [None] * len(biases))
    return centring.add_means(y, multiply(means, biases), x.shape[-2], each)


def _check_means(before, each):
    if before and each:
        raise TensorError(f"means are of what is encoded: apply {before!r} to the tokens first, or do not centre them")


def _encode_on_cpu(x, activation_bits, seed, grid, before, extras, each, mean_gain):
    """Values and scales of tokens, and of means if there are any."""
    _check_means(before, each)
    tokens, code = tokens_of(x, before, extras), (unsigned(seed), NAMES[grid])
    if not each:
        return cpu.rotate_encode(tokens, activation_bits, *code), None
    means = centring.token_means(x, each)
    values, scales = cpu.rotate_encode(means, centring.MEAN_BITS, *code)
    tokens = centring.less_means(tokens, means, x.shape[-2], each)
    return cpu.rotate_encode(tokens, activation_bits, *code), (values, scales * mean_gain)


def project_on_cpu(
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
        (values, token_scales), outputs = encoded, []
        for weight, scale, bias, bits, states in zip(weights, scales, biases, weight_bits, weight_states, strict=True):
            if weight.dtype == torch.uint8:
                outputs.append(cpu.linear(values, token_scales, weight, scale, bias, bits, x.dtype, states))
            else:
                outputs.append(reference.matmul(values, token_scales, weight, scale, bias, x.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    tokens, means = _encode_on_cpu(x, activation_bits, seed, grid, before, extras, each, mean_gain)
    y = _with_means(multiply, tokens, means, biases, x, each)
    return y.view(*x.shape[:-1], y.shape[1])


def encode_decode_on_cpu(
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
        decoded = reference.decode(packed, scale, bits, values.shape[1], NAMES[grid], states)
        weight[rows], row_scales.view(-1)[rows] = decoded
        first = rows.stop
    if bias is not None:
        bias.copy_(torch.cat(biases))


def _encode_on_cuda(
    x, activation_bits, seed, grid, before, extras, each, mean_gain, values, token_scales, mean_values, mean_scales
):
    """Tokens, and means if there are any, into the memory that is given."""
    _check_means(before, each)
    code, means, encode = (unsigned(seed), NAMES[grid]), None, rotate_encode_cuda.rotate_encode_into
    if each:
        rows = means_cuda.token_means(x, each)
        encode(rows, centring.MEAN_BITS, *code, mean_values, mean_scales, gain=mean_gain)
        means = rotate_encode_cuda.Means(rows, x.shape[-2], each)
    more = [_flat(t) for t in extras]
    encode(_flat(x), activation_bits, *code, values, token_scales, before=before, extras=more, means=means)


def encode_decode_on_cuda(
    x, codes, scales, biases, bits, states, activation_bits, seed, grid, before, extras, each, mean_gain, *outputs
):
    check_devices(x, codes)
    *encoded, weight, row_scales, bias = outputs
    _encode_on_cuda(x, activation_bits, seed, grid, before, extras, each, mean_gain, *encoded)
    decode_cuda.decode_into(codes, scales, biases, bits, NAMES[grid], weight, row_scales, bias, states)


def project_on_cuda(
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
    if grid == E4M3 and x.numel() and scaled_together(x, weights, biases, weight_bits, weight_states, before, extras):
        arguments = x, weights, scales, biases, weight_bits, weight_states, *encoding
        return project_e4m3(encode_decode_on_cuda, *arguments)
    check_devices(x, weights)
    dim, name = reference.encoded_width(x, before, extras), NAMES[grid]
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
        (values, token_scales), parts = encoded, []
        for (weight, scale), bias in zip(decoded, biases, strict=True):
            parts.append(matmul_cuda.matmul(values, token_scales, weight, scale, bias, x.dtype))
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


def scaled_together(x, weights, biases, weight_bits, weight_states, before, extras):
    """Whether `project_e4m3` takes this: weights that are decoded alike, at a size that has row and column scales."""
    if not _decoded_alike(weights, biases, weight_bits, weight_states):
        return False
    rows, tokens = sum(weight.shape[0] for weight in weights), x.numel() // x.shape[-1]
    return matmul_cuda.has_row_scales(tokens, rows, reference.encoded_width(x, before, extras))


def project_e4m3(
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
        values, token_scales = encoded
        return matmul_cuda.product(values, token_scales, weight, row_scales, biases[0], x.dtype)

    y = _with_means(multiply, tokens, means, [bias], x, each)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], rows)


def check_devices(x, weights):
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
