"""On a CUDA device: the same codes as on the CPU, kernels against their definitions, layers, whole models."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import orbitdit
from encoding_checks import FLIPS, NORMS, counted, flips, random, tokens, tokens_of_one_input
from families import FAMILIES
from orbitdit import Int4Linear, OrbitLinear, OrbitQuantConfig, Rotation, kernels
from orbitdit.kernels import E4M3, EXACT, INT8, ops, reference
from orbitdit.kernels.reference import encode_tokens
from orbitdit.model import packed_layers, set_grid_
from orbitdit.packing import PACKED_BITS, pack, packed_width
from orbitdit.quantize import QuantizedWeight, dequantize_int4, quantize_int4, quantize_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIMS = [1, 63, 137, 256, 1920, 3072, 3840, 12288]
WIDTHS = [16, 48, 64, 128, 192, 256, 960, 1024, 1536, 1920, 2048, 3072, 3840, 4096, 5120]
WIDE = [7680, 8960, 10240, 12288, 13824, 15360]
TOKENS = [1, 63, 137, 199]
NARROW = [torch.bfloat16, torch.float16]
BF16 = torch.bfloat16
CUDA = torch.device("cuda", 0)
ENCODINGS = {"flux": 20, "z-image": 16, "wan": 14, "cogvideox": 8}


def grids():
    return [name for name in kernels.device_grids(CUDA) if name != "exact"]


@pytest.fixture(params=["e4m3", "int8"])
def grid(request):
    """Each grid that this device multiplies."""
    if request.param not in grids():
        pytest.skip(f"{torch.cuda.get_device_name()} does not multiply {request.param}")
    return request.param


def encode(x, bits, grid, seed=1):
    return ops.rotate_encode(x, bits, seed, kernels.GRIDS[grid])


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def all_same(left, right):
    return all(map(same, left, right))


def relative(got, expected):
    return float((got.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


def packed(rows, dim, bits):
    codes = torch.randint(1 << bits, (rows, dim), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    return pack(codes, bits), random(rows).exp().bfloat16()


def orbit(dim, rows, bits=(4, 4), dtype=BF16, bias=True):
    linear = nn.Linear(dim, rows, bias=bias)
    linear.weight.data = random(rows, dim) / dim**0.5
    if bias:
        linear.bias.data = random(rows, seed=1)
    return OrbitLinear.from_linear(linear.to(dtype), *bits, seed=3).eval()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_weight_codes_are_those_of_the_cpu(dim, bits):
    weight = random(50, dim).bfloat16()
    cpu, gpu = quantize_weight(weight, bits, seed=1), quantize_weight(weight.cuda(), bits, seed=1)
    assert torch.equal(gpu.codes.cpu(), cpu.codes)
    assert torch.equal(gpu.scales.cpu(), cpu.scales)
    cpu, gpu = quantize_int4(weight), quantize_int4(weight.cuda())
    assert torch.equal(gpu.codes.cpu(), cpu.codes)
    assert torch.equal(gpu.scales.cpu(), cpu.scales)


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_that_of_the_cpu(dim):
    x = random(7, dim).double()
    rotation = Rotation(dim, 5)
    torch.testing.assert_close(rotation.apply(x.cuda()).cpu(), rotation.apply(x))
    torch.testing.assert_close(rotation.inverse(rotation.apply(x.cuda())).cpu(), x)


@pytest.mark.parametrize("dim", [256, 1920, 3072])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_activation_codes_flip_only_at_boundaries(dim, bits):
    x = random(500, dim)
    (cpu, cpu_norm), (gpu, gpu_norm) = encode_tokens(x, bits), encode_tokens(x.cuda(), bits)
    assert (gpu.cpu() != cpu).float().mean() <= 1e-4
    assert (gpu.cpu().int() - cpu.int()).abs().max() <= 1
    torch.testing.assert_close(gpu_norm.cpu(), cpu_norm)


# The kernels


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("dim", WIDTHS)
def test_rotate_encode(dim, bits, dtype, grid):
    total = flipped = 0
    for count in (*TOKENS, -(-100_000 // dim)):
        x = tokens(count, dim, dtype, seed=count).to(CUDA)
        flipped += flips(encode(x, bits, grid), x, bits, grid)
        total += x.numel()
    assert flipped <= FLIPS[bits] * total


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("dim", WIDE)
def test_rotate_encode_of_wide_tokens(dim, bits, dtype):
    x = tokens(199, dim, dtype).to(CUDA)
    assert flips(encode(x, bits, grids()[0]), x, bits, grids()[0]) <= FLIPS[bits] * x.numel()


def test_rotate_encode_of_many_tokens(grid):
    """More than the device holds at a time: every block takes several groups; past 2^31 bytes nothing wraps."""
    x = torch.randn(100_003, 256, device=CUDA, dtype=BF16)
    assert flips(encode(x, 4, grid), x, 4, grid) <= FLIPS[4] * x.numel()
    if torch.cuda.mem_get_info(CUDA)[0] > 24 << 30:
        x = torch.randn((1 << 31) // 12288 + 70, 12288, device=CUDA, dtype=BF16)
        values, scales = encode(x, 4, grid)
        last = encode(x[-64:], 4, grid)
        assert all_same((values[-64:], scales[-64:]), last)


@pytest.mark.parametrize("dim", [64, 3072, 4096, 12288])
def test_encoding_twice_gives_the_same_bits_whatever_else_is_encoded(dim, grid):
    x = tokens(199, dim).to(CUDA)
    values, scales = encode(x, 4, grid)
    assert all_same((values, scales), encode(x, 4, grid))
    for part in (slice(0, 1), slice(100, 163), slice(198, None)):
        assert all_same((values[part], scales[part]), encode(x[part], 4, grid))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("dim", [64, 1536, 3072, 4096, 12288])
@pytest.mark.parametrize("dtype", NARROW)
def test_spoilt_tokens_and_zeros_leave_the_others_alone(dtype, dim, bits, grid):
    x = tokens(10, dim, dtype).to(CUDA)
    values, scales = encode(x, bits, grid)
    for row, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        x[row, 5 * row] = value
    x[2] = 0
    spoilt, spoilt_scales = encode(x, bits, grid)
    good = torch.tensor([0, 3, 5, 6, 8, 9], device=CUDA)
    assert all_same((spoilt[good], spoilt_scales[good]), (values[good], scales[good]))
    assert not spoilt_scales[[1, 4, 7]].isfinite().any()
    assert all_same((spoilt[2:3], spoilt_scales[2:3]), reference.rotate_encode(x[2:3], bits, 1, grid))


@pytest.mark.parametrize("dim", [64, 3072, 4096, 12288])
def test_norms_of_any_size(dim, grid):
    unit = nn.functional.normalize(random(len(NORMS), dim), dim=1)
    x = (unit * torch.tensor(NORMS)[:, None]).bfloat16().to(CUDA)
    for bits in (4, 6):
        assert flips(encode(x, bits, grid), x, bits, grid) <= 3 + FLIPS[bits] * x.numel()
    half = (random(4, dim).clamp(-2, 2) * torch.tensor([3e-7, 1e-4, 1.0, 3e4])[:, None]).half().to(CUDA)
    assert flips(encode(half, 4, grid), half, 4, grid) <= 3 + 2e-3 * half.numel()


@pytest.mark.parametrize("dim", [16, 192, 256, 3072, 4096])
def test_tokens_of_one_input(dim, grid):
    x = tokens_of_one_input(dim).to(CUDA)
    for bits in (3, 4):
        (values, scales), expected = encode(x, bits, grid), reference.rotate_encode(x, bits, 1, grid)
        assert same(values, expected[0])
        torch.testing.assert_close(scales, expected[1], rtol=1e-6, atol=0)


def test_no_tokens_and_views(grid):
    values, scales = encode(torch.empty(0, 64, device=CUDA, dtype=BF16), 4, grid)
    assert (values.shape, scales.shape) == ((0, 64), (0,))
    flat = torch.randn(5 * 64 + 8, device=CUDA, dtype=BF16)
    for offset in (8, 3):  # bytes 16 and 6 of a storage
        x = flat[offset : offset + 5 * 64].view(5, 64)
        assert all_same(encode(x, 4, grid), encode(x.clone(), 4, grid))


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("rows", "dim"), [(0, 64), (1, 16), (7, 48), (199, 1920), (3072, 12288), (12288, 3072)])
def test_decode_is_exact(rows, dim, bits, grid):
    codes = torch.randint(256, (rows, packed_width(dim, bits)), device=CUDA, dtype=torch.uint8)
    scales = torch.rand(rows, device=CUDA).bfloat16()
    found = ops.decode(codes, scales, bits, dim, kernels.GRIDS[grid])
    assert all_same(found, reference.decode(codes, scales, bits, dim, grid))


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [16, 208, 3072])
def test_matmul(rows, dtype, bias, grid):
    """Twice what rounding to the output's dtype loses; e4m3 products come rounded to bf16."""
    bias = None if bias is None else random(rows).to(CUDA, bias)
    for dim in (64, 3072):
        weight = ops.decode(*(t.to(CUDA) for t in packed(rows, dim, 4)), 4, dim, kernels.GRIDS[grid])
        for count in (0, 1, 16, 17, 31, 33, 63, 137, 199):
            values, scales = encode(tokens(count, dim, dtype).to(CUDA), 4, grid)
            y = ops.matmul(values, scales, *weight, bias, dtype)
            assert (y.shape, y.dtype) == ((count, rows), dtype)
            if not count:
                continue
            exact = reference.matmul(values.double().float(), scales, *weight, bias, torch.float32)
            rounded = exact.to(dtype if grid == "int8" else BF16)
            assert relative(y, exact) <= 2 * relative(rounded, exact)
            assert same(y, ops.matmul(values, scales, *weight, bias, dtype))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dim", "n"), [(3072, 18432), (3072, 9216), (256, 23040), (512, 1536), (1152, 31), (137, 33), (63, 7), (1, 17)]
)
def test_int4_rows(dim, n, bias, dtype):
    """Equal to the fp64 product up to one rounding of the output and what fp32 sums lose."""
    quantized = QuantizedWeight(*(t.to(CUDA) for t in quantize_int4(random(n, dim))))
    weight = dequantize_int4(quantized, dim).double()
    bias = random(n, seed=2).to(CUDA, dtype) if bias else None
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8):
        x = random(rows, dim, seed=1).to(CUDA, dtype)
        y = ops.int4_linear(x, *quantized, bias)
        assert (y.shape, y.dtype) == ((rows, n), dtype)
        expected = x.double() @ weight.T + (0 if bias is None else bias.double())
        sums = x.double().abs() @ weight.abs().T
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * sums + torch.finfo(dtype).smallest_normal
        assert ((y.double() - expected).abs() <= bound).all()
        assert same(y, ops.int4_linear(x, *quantized, bias))
    x = random(9, dim, seed=1).to(CUDA, dtype)
    torch.testing.assert_close(ops.int4_linear(x, *quantized, bias), reference.int4_linear(x, *quantized, bias))
    x = x[:8].view(2, 4, dim)
    assert same(ops.int4_linear(x, *quantized, bias).view(8, n), ops.int4_linear(x.view(8, dim), *quantized, bias))


# Layers


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 4), (4, 6), (4, 16)])
def test_exact_layers_give_what_the_cpu_gives(bits, dtype):
    layer, x = orbit(1536, 208, bits, torch.float32), tokens(99, 1536, dtype).view(3, 33, 1536)
    layer.set_grid(EXACT, False)
    with torch.no_grad():
        expected, output = reference_of(layer, x, "exact"), layer.cuda()(x.cuda())
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative(output, expected) <= tolerance


def reference_of(layer, x, grid):
    """The definition of a layer on the CPU, its output in fp32 (for an exact layer, in the dtype of `x`)."""
    flat, bits = x.reshape(-1, x.shape[-1]), (layer.weight_bits, layer.activation_bits)
    if grid == "exact":
        y = reference.exact_linear(flat, layer.codes, layer.scales, layer.bias, *bits, layer.seed)
    else:
        weight = reference.decode(layer.codes, layer.scales, bits[0], layer.in_features, grid)
        encoded = reference.rotate_encode(flat, bits[1], layer.seed, grid)
        y = reference.matmul(*encoded, *weight, layer.bias, torch.float32)
    return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 4), (2, 3), (4, 6)])
@pytest.mark.parametrize(("dim", "rows"), [(64, 48), (1536, 208), (3072, 3072), (12288, 256)])
@torch.no_grad()
def test_layers_on_a_grid(dim, rows, bits, dtype, grid):
    """Rounding of the output, twice, where the codes are the kernel's own; a few codes that are neighbours otherwise."""
    layer, x = orbit(dim, rows, bits, dtype), tokens(137, dim, dtype)
    expected = reference_of(layer, x, grid)
    layer.set_grid(kernels.GRIDS[grid], False)
    layer.cuda()
    y = layer(x.cuda())
    assert y.dtype == dtype
    encoded = [t.cpu() for t in encode(x.cuda(), bits[1], grid, layer.seed)]
    weight = reference.decode(layer.codes.cpu(), layer.scales.cpu(), bits[0], dim, grid)
    bias = layer.bias.cpu()
    own = reference.matmul(*encoded, *weight, bias, torch.float32)
    assert relative(y, own) <= 2 * relative(own.to(dtype if grid == "int8" else BF16), own)
    assert relative(y, expected) <= 0.02
    for count in (0, 1, 63, 199):
        x = tokens(count, dim, dtype, seed=count).cuda()
        assert layer(x).shape == (count, rows)
        assert same(layer(x), layer(x))


@torch.no_grad()
def test_the_fastest_grid_is_taken_and_exact_where_none_fits():
    x = tokens(33, 1536).cuda()
    layer = orbit(1536, 208).cuda()
    by_default = layer(x)
    layer.set_grid(kernels.GRIDS[kernels.device_grids(CUDA)[0]], False)
    assert same(layer(x), by_default)
    for dim, rows, bits in ((1536, 200, (4, 4)), (1000, 208, (4, 4)), (1536, 208, (4, 16)), (1536, 208, (8, 8))):
        layer, x = orbit(dim, rows, bits), tokens(33, dim)
        assert relative(layer.cuda()(x.cuda()), reference_of(layer.cpu(), x, "exact")) <= 1e-2


@torch.no_grad()
def test_int4_layers_give_what_the_cpu_gives():
    layer, x = Int4Linear.from_linear(nn.Linear(256, 100)), random(2, 256)
    torch.testing.assert_close(layer(x), layer.cuda()(x.cuda()).cpu(), rtol=1e-4, atol=1e-4)
    layer.cpu().bfloat16()
    for rows in (1, 2, 8, 9, 40):
        x = random(rows, 256).bfloat16()
        assert relative(layer.cuda()(x.cuda()), layer.cpu()(x)) <= 1e-2


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (4, 6)])
@torch.no_grad()
def test_resident_weights_give_the_same_bits(bits, grid):
    layer, x = orbit(1536, 208, bits).cuda(), tokens(137, 1536).cuda()
    layer.set_grid(kernels.GRIDS[grid], False)
    expected = layer(x)
    layer.set_grid(kernels.GRIDS[grid], True)
    assert layer.resident_values.is_cuda
    assert same(layer(x), expected)
    assert same(layer.half().bfloat16().cpu().cuda()(x), expected)


LAYERS = {
    "e4m3": lambda: with_grid(orbit(256, 208, (3, 4)), E4M3),
    "int8": lambda: with_grid(orbit(256, 208, (2, 4)), INT8),
    "6 bits": lambda: with_grid(orbit(256, 208, (4, 6)), None),
    "exact": lambda: with_grid(orbit(256, 208), EXACT),
    "INT4": lambda: Int4Linear.from_linear(nn.Linear(256, 208).bfloat16()),
}


def with_grid(layer, grid):
    if grid == E4M3 and "e4m3" not in grids():
        pytest.skip("this device does not multiply e4m3")
    layer.set_grid(grid, False)
    return layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_compiled_layers_give_the_same_for_any_number_of_tokens(name, backend):
    layer = LAYERS[name]().cuda().eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for count in (5, 7, 63, 137, 2, 199):
        x = tokens(count, 256).cuda()
        assert same(compiled(x), layer(x))
    assert counter.frame_count <= 2
    assert compiled(x[:0]).shape == (0, 208)


@pytest.mark.parametrize("count", [1, 8, 63, 137])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_cuda_graphs_give_the_same(name, count):
    layer, x = LAYERS[name]().cuda().eval(), tokens(count, 256).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in (1, 2):
        x.copy_(tokens(count, 256, seed=seed))
        graph.replay()
        assert same(y, layer(x))


@torch.no_grad()
def test_another_stream_and_another_device():
    layer, x = orbit(3072, 3072).cuda(), tokens(137, 3072).cuda()
    expected = layer(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        y = layer(x)
    stream.synchronize()
    assert same(y, expected)
    if torch.cuda.device_count() > 1:
        assert torch.cuda.current_device() == 0
        moved = layer.to("cuda:1")(x.to("cuda:1"))
        assert same(moved.cpu(), expected.cpu())


@torch.no_grad()
def test_nothing_decoded_is_kept():
    layer, x = orbit(3072, 12288).cuda(), tokens(64, 3072).cuda()
    layer(x)  # workspaces of the library
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    decoded = 3072 * 12288
    assert torch.cuda.memory_allocated() - before <= y.numel() * 2 + (2 << 20)
    assert torch.cuda.max_memory_allocated() - before <= decoded + 4 * y.numel() * 2 + (4 << 20)
    layers = nn.ModuleList(orbit(3072, 12288).cuda() for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for other in layers:
        y = other(x)
    assert torch.cuda.max_memory_allocated() - before <= decoded + 5 * y.numel() * 2 + (4 << 20)


# Models


def orbit_layers(model):
    return [layer for _, layer in packed_layers(model) if isinstance(layer, OrbitLinear)]


@pytest.mark.parametrize("name", FAMILIES)
def test_models_quantized_on_the_gpu_are_those_quantized_on_the_cpu(name, tmp_path):
    family, config = FAMILIES[name], OrbitQuantConfig("w2a4")
    model = family.build()
    model.save_pretrained(tmp_path)
    orbitdit.quantize_(model, config, progress=False)
    moved = family.build().cuda()
    orbitdit.quantize_(moved, config, progress=False)
    loaded = family.cls.from_pretrained(tmp_path, quantization_config=config, device_map="cuda")
    for other in (moved, loaded):
        state = other.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key].cpu(), value), key
        assert all(p.is_cuda for p in other.parameters())


@pytest.mark.parametrize("bits", ["w4a4", "w2a4", "w3a3", "w4a6"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_on_a_grid_share_and_give_what_the_cpu_gives(name, bits, grid):
    family = FAMILIES[name]
    model = family.build().to(BF16)
    orbitdit.quantize_(model, OrbitQuantConfig(bits), progress=False)
    set_grid_(model, grid)
    expected = family.run(model)
    model.cuda()
    output, number = counted(lambda: family.run(model))
    assert number == ENCODINGS[name]
    assert all(layer.shared_input is None or layer.shared_input.held is None for layer in orbit_layers(model))
    assert same(family.run(model), output)
    assert relative(output, expected) <= (0.1 if name == "z-image" else 0.05)
    for layer in orbit_layers(model):
        layer.shared_input = None
    assert same(family.run(model), output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_compiled_blocks_give_the_same(name):
    """As eager mode does, apart from what the compiler fuses between the layers."""
    family = FAMILIES[name]
    model = family.build().to(BF16).cuda()
    orbitdit.quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    expected = family.run(model)
    torch._dynamo.reset()
    for blocks in (m for m in model.children() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            block.compile(fullgraph=True)
    assert relative(family.run(model), expected) <= (0.2 if name == "z-image" else 0.05)
    assert all(layer.shared_input is None or layer.shared_input.held is None for layer in orbit_layers(model))
