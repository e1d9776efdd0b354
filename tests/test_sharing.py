"""Layers that take the same tensor encode it once: how often, that nothing else changes, and what stays apart."""

import copy

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from encoding_checks import counted
from families import FAMILIES
from orbitdit import ConfigError, OrbitLinear, OrbitQuantConfig, kernels, plan, quantize_
from orbitdit.kernels import E4M3, EXACT, INT8
from orbitdit.linear import share_inputs
from orbitdit.model import (
    empty_layer,
    linear_named,
    packed_layers,
    replace_module,
    set_grid_,
    share_model_inputs,
)

BF16 = torch.bfloat16
every_family = pytest.mark.parametrize("name", FAMILIES)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def quantized(name, grid="int8", bits="w4a4"):
    model = FAMILIES[name].build().to(BF16)
    quantize_(model, OrbitQuantConfig(bits, trellis_states=8), progress=False)
    return set_grid_(model, grid)


def orbit_layers(model):
    return [layer for _, layer in packed_layers(model) if isinstance(layer, OrbitLinear)]


def nothing_is_held(model):
    return all(m.shared_input is None or not m.shared_input.held for m in orbit_layers(model))


@every_family
@pytest.mark.parametrize("grid", ["int8", "e4m3"])
def test_common_inputs_are_encoded_once_and_outputs_stay(name, grid):
    family, model = FAMILIES[name], quantized(name, grid)
    layers = len(orbit_layers(model))
    assert layers == family.counts[0]
    for _ in range(2):
        shared, number = counted(lambda: family.run(model))
        assert number == family.encodings
        assert nothing_is_held(model)
    for layer in orbit_layers(model):
        layer.shared_input = None
    alone, number = counted(lambda: family.run(model))
    assert number == layers
    assert torch.equal(alone, shared)


@every_family
@torch.no_grad()
def test_compiled_blocks_encode_common_inputs_once(name):
    """All repeated blocks, each one graph; what runs between them is left as it is."""
    family, model = FAMILIES[name], quantized(name)
    expected, graphs = family.run(model), []

    def backend(module, example_inputs):
        graphs.append(sum("orbitdit.project" in str(node.target) for node in module.graph.nodes))
        return lookup_backend("aot_eager")(module, example_inputs)

    torch._dynamo.reset()
    for blocks in (m for m in model.children() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(family.run(model), expected, rtol=0, atol=0)
    assert set(graphs) - {0} == family.block_encodings
    assert nothing_is_held(model)


@every_family
def test_exact_layers_encode_for_themselves(name):
    model = quantized(name, "exact")
    assert counted(lambda: FAMILIES[name].run(model))[1] == 0
    assert nothing_is_held(model)


@pytest.mark.parametrize(
    ("cls", "config", "layers", "encodings"),
    [
        (diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, 418, 228),
        (diffusers.ZImageTransformer2DModel, {}, 238, 136),
        (diffusers.WanTransformer3DModel, {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}, 300, 210),
        (diffusers.CogVideoXTransformer3DModel, {}, 180, 120),
    ],
)
def test_encodings_of_the_published_models(cls, config, layers, encodings):
    with init_empty_weights(include_buffers=True):
        model = cls(**config)
    rows = plan(model, OrbitQuantConfig("w4a4")).select("quantize")
    for row in rows:
        replace_module(model, row.name, empty_layer(linear_named(model, row.name), row, 0))
    share_model_inputs(model)
    assert len(rows) == layers
    packed = orbit_layers(model)
    assert len({id(layer if layer.shared_input is None else layer.shared_input) for layer in packed}) == encodings
    for layer in packed:
        assert layer.shared_input is None or layer.shared_input.members[layer.shared_place] is layer


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if hasattr(family.cls, "add_adapter")])
def test_an_adapter_on_one_projection_keeps_working_and_sharing(name):
    family, model = FAMILIES[name], quantized(name)
    before = family.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    adapted, number = counted(lambda: family.run(model))
    assert number == family.encodings
    assert not torch.allclose(adapted, before)
    assert nothing_is_held(model)
    model.disable_adapters()
    off, number = counted(lambda: family.run(model))
    assert number == family.encodings
    assert torch.equal(off, before)


@every_family
def test_copies_share_among_themselves(name):
    family, model = FAMILIES[name], quantized(name)
    twin = copy.deepcopy(model)
    for one, other in zip(orbit_layers(model), orbit_layers(twin), strict=True):
        assert (one.shared_input is None) == (other.shared_input is None)
        assert one.shared_input is None or one.shared_input is not other.shared_input
    expected = family.run(model)
    output, number = counted(lambda: family.run(twin))
    assert number == family.encodings
    assert torch.equal(output, expected)


class Block(nn.Module):
    def __init__(self, *bits):
        super().__init__()
        torch.manual_seed(0)
        layers = [OrbitLinear.from_linear(nn.Linear(64, 64).to(BF16), *b) for b in bits or [(4, 4)] * 3]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.set_grid(INT8, False)
        share_inputs(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]

    def alone(self, *inputs):
        other = copy.deepcopy(self)
        for layer in other.layers:
            layer.shared_input = None
        return [layer(x) for layer, x in zip(other.layers, inputs, strict=True)]


@torch.no_grad()
def test_only_layers_that_encode_alike_share():
    block, x = Block((4, 4), (2, 4), (4, 3), (4, 16), (3, 3)), random(5, 64)
    outputs, number = counted(lambda: block(x))
    assert number == 2
    assert all(map(torch.equal, outputs, block.alone(*[x] * 5)))


@torch.no_grad()
def test_layers_that_no_kernel_takes_do_not_share():
    layers = [OrbitLinear.from_linear(nn.Linear(64, rows).to(BF16), 4, 4) for rows in (64, 60, 64)]
    share_inputs(layers)
    assert layers[1].shared_input is None
    assert layers[0].shared_input is layers[2].shared_input is not None
    x = random(5, 64)
    assert [layer(x).shape for layer in layers] == [(5, 64), (5, 60), (5, 64)]


@torch.no_grad()
def test_another_tensor_is_encoded_anew():
    block, x = Block(), random(5, 64)
    q, k, v = block.layers
    for inputs in ((x, x.clone(), x), (x, random(5, 64, seed=1), x[:3]), (x, x.view(5, 64), x)):
        outputs = [layer(given) for layer, given in zip((q, k, v), inputs, strict=True)]
        assert all(map(torch.equal, outputs, block.alone(*inputs)))


@torch.no_grad()
def test_a_tensor_that_was_written_to_is_encoded_anew():
    block, x = Block(), random(5, 64)
    q, k, v = block.layers
    q(x)
    x.mul_(-2)
    for layer, expected in zip((q, k, v), block.alone(x, x, x), strict=True):
        assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_outputs_are_the_callers_to_change():
    block, x = Block(), random(5, 64)
    expected = block.alone(x, x, x)
    for order in ((0, 0, 1, 2), (1, 1, 1, 0), (2, 0, 1)):
        for i in order:
            y = block.layers[i](x)
            assert torch.equal(y, expected[i])
            y.zero_()


@torch.no_grad()
def test_layers_called_apart_and_in_other_orders():
    block = Block()
    q, k, v = block.layers
    for order in ((q,), (v, q), (k, k, k, k), (v, k, q), (q, k), (q, k, v)):
        x = random(5, 64, seed=len(order))
        for layer in order:
            expected = block.alone(x, x, x)[list(block.layers).index(layer)]
            assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_a_grid_that_changes_half_way():
    block, x = Block(), random(5, 64)
    q, k, v = block.layers
    q(x)
    for layer in (k, v):
        layer.set_grid(E4M3, False)
    outputs, number = counted(lambda: (k(x), v(x)))
    assert number == 1
    assert all(map(torch.equal, outputs, block.alone(x, x, x)[1:]))


@torch.no_grad()
def test_inference_mode_and_no_tokens():
    block = Block()
    with torch.inference_mode():
        x = random(5, 64)
        outputs, number = counted(lambda: block(x))
    assert number == 1
    assert all(map(torch.equal, outputs, block.alone(x, x, x)))
    assert [y.shape for y in block(random(0, 64))] == [(0, 64)] * 3


def test_gradients_do_not_pass_through_what_is_shared():
    block, x = Block(), random(5, 64).requires_grad_()
    _, number = counted(lambda: sum(y.sum() for y in block(x)))
    assert number == 0
    with torch.no_grad():
        block(x)
    assert all(not layer.shared_input.held for layer in block.layers)


@pytest.mark.parametrize("grid", ["auto", *kernels.GRIDS])
def test_a_grid_can_be_forced(grid):
    model = FAMILIES["wan"].build().to(BF16)
    quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    assert set_grid_(model, grid) is model
    expected = None if grid == "auto" else kernels.GRIDS[grid]
    assert {layer.grid for layer in orbit_layers(model)} == {expected}
    output = FAMILIES["wan"].run(model)
    set_grid_(model, kernels.device_grids(torch.device("cpu"))[0] if grid == "auto" else "auto")
    other = FAMILIES["wan"].run(model)
    assert torch.equal(output, other) == (grid in ("auto", kernels.device_grids(torch.device("cpu"))[0]))
    assert (output - other).norm() < 0.1 * output.norm()


def test_unknown_and_impossible_grids_are_refused(monkeypatch):
    model = quantized("wan", "auto")
    with pytest.raises(ConfigError, match=r"'fp4'.*exact"):
        set_grid_(model, "fp4")
    monkeypatch.setattr("orbitdit.model.device_grids", lambda device: ("exact",))
    with pytest.raises(ConfigError, match="cpu does not multiply e4m3"):
        set_grid_(model, "e4m3")
    assert {layer.grid for layer in orbit_layers(model)} == {None}
    set_grid_(model, "exact")
    assert {layer.grid for layer in orbit_layers(model)} == {EXACT}


@pytest.mark.parametrize("grid", ["int8", "e4m3"])
@pytest.mark.parametrize("bits", ["w2a4", "w3a3", "w4a6"])
def test_resident_weights_give_the_same_and_are_no_part_of_the_model(grid, bits):
    family, model = FAMILIES["flux"], quantized("flux", grid, bits)
    expected, keys = family.run(model), list(model.state_dict())
    set_grid_(model, grid, resident=True)
    assert list(model.state_dict()) == keys
    assert {name for name, _ in model.named_parameters()} <= set(keys)
    for layer in orbit_layers(model):
        assert layer.resident_values.shape == (layer.out_features, layer.in_features)
        assert layer.resident_values.dtype == torch.uint8
    resident, number = counted(lambda: family.run(model))
    assert number == family.encodings
    assert (resident - expected).norm() <= 0.01 * expected.norm()
    assert torch.equal(family.run(copy.deepcopy(model)), resident)
    assert torch.equal(family.run(model.to("cpu")), resident)
    set_grid_(model, grid)
    assert all(layer.resident_values is None and layer.resident_scales is None for layer in orbit_layers(model))
    assert torch.equal(family.run(model), expected)


@pytest.mark.parametrize("grid", [INT8, E4M3])
@torch.no_grad()
def test_resident_layers_stay_as_they_are_in_another_dtype(grid):
    layer, x = OrbitLinear.from_linear(nn.Linear(192, 64).to(BF16), 4, 4), random(50, 192)
    layer.set_grid(grid, False)
    expected = layer(x)
    layer.set_grid(grid, True)
    torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=1e-6)
    values, scales = layer.resident_values.clone(), layer.resident_scales.clone()
    layer.to(torch.float16).to(BF16)
    assert torch.equal(layer.resident_values, values)
    assert torch.equal(layer.resident_scales, scales)
    assert layer.to("meta").resident_values.is_meta


def test_resident_weights_pin_the_grid_that_they_lie_on(monkeypatch):
    """On a device whose own grid is another, their bytes would mean other numbers."""
    layer, x = OrbitLinear.from_linear(nn.Linear(64, 64).to(BF16), 4, 4), random(5, 64)
    monkeypatch.setattr(kernels, "device_grids", lambda device: ("int8", "exact", "e4m3"))
    layer.set_grid(None, True)
    expected = layer(x)
    monkeypatch.setattr(kernels, "device_grids", lambda device: ("e4m3", "exact", "int8"))
    assert torch.equal(layer(x), expected)
    layer.set_grid(None, False)
    assert layer.grid is None


def test_resident_exact_layers_keep_nothing():
    model = quantized("wan", "exact")
    set_grid_(model, "exact", resident=True)
    assert all(layer.resident_values is None for layer in orbit_layers(model))


def test_layers_that_are_offloaded_one_by_one_compute_for_themselves():
    """Their weights come when they are called: what lies on the device before may still be on its way."""
    family, model = FAMILIES["flux"], quantized("flux")
    expected, number = counted(lambda: family.run(model))
    for layer in orbit_layers(model):
        if layer.shared_input is not None and layer.shared_place == 0:
            add_hook_to_module(layer, ModelHook())
    output, alone = counted(lambda: family.run(model))
    assert torch.equal(output, expected)
    assert number < alone <= family.counts[0]
    assert nothing_is_held(model)


@torch.no_grad()
def test_a_shallow_copy_uses_its_own_codes():
    layers = [OrbitLinear.from_linear(nn.Linear(64, 32), 4, 4).eval() for _ in range(2)]
    share_inputs(layers)
    copied, x = copy.copy(layers[0]), torch.randn(5, 64).bfloat16()
    copied._parameters = dict(copied._parameters, codes=layers[1].codes, scales=layers[1].scales, bias=layers[1].bias)
    for layer in (*layers, copied):
        layer.set_grid(INT8, False)
    assert torch.equal(copied(x), layers[1](x))


@torch.no_grad()
def test_what_is_held_is_not_copied_or_saved():
    layers = [OrbitLinear.from_linear(nn.Linear(64, 32), 4, 4).eval() for _ in range(2)]
    share_inputs(layers)
    for layer in layers:
        layer.set_grid(INT8, False)
    x = torch.randn(5, 64).bfloat16()
    first = layers[0](x)
    assert layers[0].shared_input.held
    twins = copy.deepcopy(nn.ModuleList(layers))
    assert twins[0].shared_input is twins[1].shared_input is not layers[0].shared_input
    assert not twins[0].shared_input.held
    assert torch.equal(twins[0](x), first)


@every_family
def test_models_that_are_loaded_share_too(name, tmp_path):
    family = FAMILIES[name]
    family.build().to(BF16).save_pretrained(tmp_path)
    config = OrbitQuantConfig("w4a4")
    model = set_grid_(family.cls.from_pretrained(tmp_path, quantization_config=config, dtype=BF16), "int8")
    assert counted(lambda: family.run(model))[1] == family.encodings
