"""Casts reach the bias and the compute dtype of a quantized layer, and never its codes and scales."""

import copy
import pickle

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from torch import nn

import orbitdit
from families import FAMILIES
from orbitdit import OrbitQuantConfig, dequantize_
from orbitdit.model import packed_layers, set_grid_
from specs import int4, orbit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MAKERS = {
    "w4a4": orbit,
    "w2a16": lambda li: orbit(li, 2, 16, 5, scale="unbiased"),
    "trellis": lambda li: orbit(li, 2, 4, states=8, scale="unbiased", group_size=16),
    "int4": int4,
}
every_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to, by name": (lambda m: m.to(dtype=torch.bfloat16, non_blocking=True), torch.bfloat16),
    "to, with a device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to, as a tensor": (lambda m: m.to(torch.zeros(1).double()), torch.float64),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "type, by name": (lambda m: m.type("torch.DoubleTensor"), torch.float64),
    "apply": (lambda m: m._apply(lambda tensor: tensor.to(torch.bfloat16)), torch.bfloat16),
    "fp8": (lambda m: m.to(torch.float8_e4m3fn), torch.float32),
    "other fp8": (lambda m: m.to(torch.float8_e5m2), torch.float32),
    "there and back": (lambda m: m.to(torch.float8_e5m2).half(), torch.float16),
}


def plain_linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(64, 32, bias).to(dtype)


class Net(nn.Module):
    """A model of no library: two blocks of a quantized layer, INT4 modulation, and a norm that is neither."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        parts = [("norm", nn.LayerNorm(64)), ("mod", nn.Linear(64, 128, bias)), ("proj", nn.Linear(64, 64, bias))]
        self.blocks = nn.ModuleList(nn.ModuleDict(copy.deepcopy(dict(parts))) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            scale, shift = block["mod"](x).chunk(2, -1)
            x = x + block["proj"](block["norm"](x) * (1 + scale) + shift)
        return x


def quantized(name, dtype=torch.float32, bits="w4a4"):
    model = FAMILIES[name].build().to(dtype)
    orbitdit.quantize_(model, OrbitQuantConfig(bits, trellis_states=8), progress=False)
    return model


def codes(model):
    return [(layer.codes.clone(), layer.scales.clone()) for _, layer in packed_layers(model)]


def assert_same_codes(model, expected):
    found = codes(model)
    assert len(found) == len(expected)
    for pair, (its_codes, its_scales) in zip(found, expected, strict=True):
        assert (pair[0].dtype, pair[1].dtype) == (torch.uint8, torch.bfloat16)
        assert torch.equal(pair[0], its_codes)
        assert torch.equal(pair[1].view(torch.int16), its_scales.view(torch.int16))


# Casts.


@pytest.fixture(params=["in place", "overwritten", "swapped"])
def conversion(request):
    """The ways in which torch puts converted parameters into a module."""
    torch.__future__.set_overwrite_module_params_on_conversion(request.param == "overwritten")
    torch.__future__.set_swap_module_params_on_conversion(request.param == "swapped")
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.__future__.set_swap_module_params_on_conversion(False)


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.usefixtures("conversion")
def test_a_cast_layer_has_the_same_codes_and_computes_the_same(make, bias, cached):
    for name, (cast, dtype) in CASTS.items():
        linear, x = plain_linear(bias=bias), torch.randn(3, 64)
        model = nn.ModuleDict({"layer": make(linear)})
        set_grid_(model, "int8", cache_decoded=cached)
        layer, before = model["layer"], codes(model)
        reference = copy.deepcopy(layer)
        layer(x.half())
        cast(nn.ModuleList([model, linear]))
        assert_same_codes(model, before)
        assert layer.dtype == layer.weight.dtype == dtype, name
        if bias:
            assert torch.equal(layer.bias.float(), linear.bias.float())
            assert layer.bias.dtype == linear.bias.dtype
            reference.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        for each in DTYPES:
            assert torch.equal(layer(x.to(each)), reference(x.to(each))), name


@pytest.mark.parametrize("target", ["blocks.0.proj", "blocks.1", "blocks", ""])
@pytest.mark.parametrize("bias", [True, False])
def test_parts_and_models_are_cast(target, bias):
    for name, (cast, dtype) in CASTS.items():
        model = Net(bias)
        orbitdit.quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
        before = codes(model)
        cast(model.get_submodule(target))
        assert_same_codes(model, before)
        for path, layer in packed_layers(model):
            assert layer.weight.dtype == (dtype if path.startswith(target) else torch.float32), name
            assert layer.bias is None or "fp8" in name or layer.bias.dtype == layer.weight.dtype


@every_layer
def test_devices_and_empty_tensors(make):
    layer, x = make(plain_linear(torch.float16)), torch.randn(3, 64)
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    assert layer.to("cpu") is layer
    assert torch.equal(layer(x), expected)
    meta = copy.deepcopy(layer).to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    for empty in (meta.to_empty(device="cpu"), copy.deepcopy(layer).to_empty(device="cpu")):
        assert {key: value.dtype for key, value in empty.state_dict().items()} == {k: v.dtype for k, v in state.items()}
        empty.load_state_dict(state)
        assert torch.equal(empty(x), expected)
        assert empty.weight.dtype == torch.float16
    meta = copy.deepcopy(layer).to("meta")
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), expected)
    twin = copy.deepcopy(layer).share_memory()
    assert torch.equal(twin(x), expected)


# The dtype of weights, and of adapters beside them.


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_weights_have_the_dtype_that_the_model_computes_in(dtype, bias):
    model = Net(bias).to(dtype)
    orbitdit.quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {layer.weight.dtype for _, layer in packed_layers(each)} == {dtype}
    for other in DTYPES:
        assert {layer.weight.dtype for _, layer in packed_layers(copy.deepcopy(model).to(other))} == {other}
        again = dequantize_(copy.deepcopy(model).to(other))
        assert {m.weight.dtype for m in again.modules() if isinstance(m, nn.Linear)} == {other}


@pytest.mark.parametrize("name", ["flux", "z-image", "wan"])
def test_loaded_models_have_the_dtype_that_was_asked_for(name, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "full")
    quantized(name, torch.bfloat16).save_pretrained(tmp_path / "quantized")
    for dtype in DTYPES:
        for source in ("full", "quantized"):
            options = {"quantization_config": OrbitQuantConfig("w4a4")} if source == "full" else {}
            model = family.cls.from_pretrained(tmp_path / source, dtype=dtype, **options)
            assert {layer.weight.dtype for _, layer in packed_layers(model)} == {dtype}
            model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
            assert {p.dtype for key, p in model.named_parameters() if "lora" in key} == {dtype}


@every_dtype
@pytest.mark.parametrize("name", ["flux", "z-image", "wan"])
def test_adapters_have_the_dtype_that_they_have_on_a_plain_model(name, dtype):
    found = []
    for model in (FAMILIES[name].build().to(dtype), quantized(name, dtype)):
        model.requires_grad_(False).add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "ff.net.2"]))
        lora = {key: p for key, p in model.named_parameters() if "lora" in key}
        before = {key: p.detach().clone() for key, p in lora.items()}
        optimizer = torch.optim.SGD(lora.values(), lr=1e-4)
        for p in lora.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = torch.cat([(lora[key] != old).flatten() for key, old in before.items()])
        found.append(({key: p.dtype for key, p in lora.items()}, moved.float().mean().item()))
    assert found[0][0] == found[1][0]
    assert set(found[0][0].values()) == {dtype}
    assert found[0][1] == pytest.approx(found[1][1], abs=0.1)


# Layerwise casting.

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("storage", FP8, ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["flux", "z-image", "sd3", "cogvideox"])
def test_layerwise_casting_reaches_biases_alone_and_is_saved(name, compute, storage, tmp_path):
    family, model = FAMILIES[name], quantized(name, compute)
    before, reference = codes(model), copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    for _ in range(2):
        output = family.run(model)
        assert_same_codes(model, before)
        assert {layer.weight.dtype for _, layer in packed_layers(model)} == {compute}
    for key, p in reference.named_parameters():  # what the hooks do, once
        if model.get_parameter(key).dtype == storage:
            p.data = p.data.to(storage).to(compute)
    assert torch.equal(family.run(reference), output)
    model.save_pretrained(tmp_path)
    loaded = family.cls.from_pretrained(tmp_path, dtype=compute)
    assert_same_codes(loaded, before)
    assert {p.dtype for p in loaded.parameters()} <= {torch.uint8, torch.bfloat16, compute}
    assert torch.equal(family.run(loaded), output)
    loaded.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    assert torch.equal(family.run(loaded), output)


@pytest.mark.parametrize("quantize_first", [True, False])
def test_layerwise_casting_of_other_models_and_whole_blocks(quantize_first):
    model, x = Net(), torch.randn(3, 64)
    orbitdit.quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    before, expected = codes(model), model(x)
    if quantize_first:
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    else:
        for block in model.blocks:
            for part in block.values():
                apply_layerwise_casting(part, torch.float8_e4m3fn, torch.float32, None)
    output = model(x)
    assert_same_codes(model, before)
    assert 0 < (output - expected).norm() < 0.1 * expected.norm()
    again = dequantize_(model)
    assert {m.weight.dtype for m in again.modules() if isinstance(m, nn.Linear)} == {torch.float32}
    assert again(x).isfinite().all()


def test_adapters_of_a_model_with_layerwise_casting():
    family, model = FAMILIES["wan"], quantized("wan")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = family.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    assert {p.dtype for key, p in model.named_parameters() if "lora" in key} == {torch.float32}
    torch.testing.assert_close(family.run(model), before, rtol=1e-4, atol=1e-4)
