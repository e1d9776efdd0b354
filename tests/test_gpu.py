"""On a CUDA device: the same codes as on the CPU, the same outputs up to rounding, whole models."""

import pytest
import torch

import orbitdit
from families import FAMILIES
from orbitdit import Int4Linear, OrbitLinear, OrbitQuantConfig, Rotation
from orbitdit.kernels.reference import encode_tokens
from orbitdit.quantize import quantize_int4, quantize_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIMS = [1, 63, 137, 256, 1920, 3072, 3840, 12288]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_weight_codes_are_those_of_the_cpu(dim, bits):
    weight = random(50, dim, dtype=torch.bfloat16)
    cpu, gpu = quantize_weight(weight, bits, seed=1), quantize_weight(weight.cuda(), bits, seed=1)
    assert torch.equal(gpu.codes.cpu(), cpu.codes)
    assert torch.equal(gpu.scales.cpu(), cpu.scales)
    cpu, gpu = quantize_int4(weight), quantize_int4(weight.cuda())
    assert torch.equal(gpu.codes.cpu(), cpu.codes)
    assert torch.equal(gpu.scales.cpu(), cpu.scales)


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_that_of_the_cpu(dim):
    x = random(7, dim, dtype=torch.float64)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 4), (4, 6), (4, 16)])
def test_layers_give_what_the_cpu_gives(bits, dtype):
    linear = torch.nn.Linear(1536, 200)
    with torch.no_grad():
        linear.weight.copy_(random(200, 1536))
        layer = OrbitLinear.from_linear(linear, *bits)
        x = random(3, 33, 1536, dtype=dtype)
        expected, output = layer(x).float(), layer.cuda()(x.cuda()).cpu().float()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (output - expected).norm() <= tolerance * expected.norm()


def test_int4_layers_give_what_the_cpu_gives():
    linear = torch.nn.Linear(256, 100)
    with torch.no_grad():
        layer, x = Int4Linear.from_linear(linear), random(2, 256)
        torch.testing.assert_close(layer(x), layer.cuda()(x.cuda()).cpu(), rtol=1e-4, atol=1e-4)


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
