"""Layers that take the same tokens encode them once: how often, that nothing else changes, and what stays apart."""

import copy
import gc
import pickle
import weakref

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
from orbitdit import ConfigError, OrbitLinear, OrbitQuantConfig, ops, plan, quantize_
from orbitdit.fusion import share_inputs_of
from orbitdit.linear import share_inputs
from orbitdit.model import empty_layer, linear_named, packed_layers, replace_module, set_grid_
from orbitdit.tokens import Tokens

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


def unshare(model):
    for layer in orbit_layers(model):
        layer.siblings = None


@every_family
@pytest.mark.parametrize("grid", ["int8", "e4m3"])
def test_common_inputs_are_encoded_once_and_outputs_stay(name, grid):
    family, model = FAMILIES[name], quantized(name, grid)
    layers, encodings = family.counts[0], family.encodings
    assert len(orbit_layers(model)) == layers
    for _ in range(2):
        shared, number = counted(lambda: family.run(model))
        assert number == encodings
    unshare(model)
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
        graphs.append(sum("orbitdit.linear" in str(node.target) for node in module.graph.nodes))
        return lookup_backend("aot_eager")(module, example_inputs)

    torch._dynamo.reset()
    for blocks in (m for m in model.children() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(family.run(model), expected, rtol=0, atol=0)
    assert set(graphs) - {0} == family.block_encodings


@every_family
def test_exact_layers_encode_for_themselves(name):
    assert counted(lambda: FAMILIES[name].run(quantized(name, "exact")))[1] == 0


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
        replace_module(model, row.name, empty_layer(linear_named(model, row.name), row))
    share_inputs_of(model)
    assert len(rows) == layers
    packed = orbit_layers(model)
    assert len({id(layer.siblings or layer) for layer in packed}) == encodings
    for layer in packed:
        assert layer.siblings is None or layer.siblings.layers()[layer.place] is layer


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if hasattr(family.cls, "add_adapter")])
def test_an_adapter_on_one_projection_keeps_working_and_sharing(name):
    family, model = FAMILIES[name], quantized(name)
    before = family.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    adapted, number = counted(lambda: family.run(model))
    assert number == FAMILIES[name].encodings
    assert not torch.allclose(adapted, before)
    model.disable_adapters()
    off, number = counted(lambda: family.run(model))
    assert number == FAMILIES[name].encodings
    assert torch.equal(off, before)


@every_family
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(name, duplicate):
    family, model = FAMILIES[name], quantized(name)
    expected = family.run(model)
    twin = duplicate(model)
    for one, other in zip(orbit_layers(model), orbit_layers(twin), strict=True):
        assert (one.siblings is None) == (other.siblings is None)
        assert one.siblings is None or other.siblings.layers()[other.place] is other
    del model
    output, number = counted(lambda: family.run(twin))
    assert number == FAMILIES[name].encodings
    assert torch.equal(output, expected)


@every_family
def test_models_that_are_loaded_share_too(name, tmp_path):
    family = FAMILIES[name]
    family.build().to(BF16).save_pretrained(tmp_path)
    config = OrbitQuantConfig("w4a4")
    model = set_grid_(family.cls.from_pretrained(tmp_path, quantization_config=config, dtype=BF16), "int8")
    assert counted(lambda: family.run(model))[1] == FAMILIES[name].encodings


@torch.no_grad()
def test_nothing_is_held_and_no_cycle_keeps_a_model():
    """Outputs live as long as the block's own variable; models go without the garbage collector, also after an error in
    the middle of a block."""
    family, model = FAMILIES["flux"], quantized("flux")

    def fail(module, args):
        raise RuntimeError("in the middle")

    handle = model.transformer_blocks[0].attn.to_k.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        family.run(model)
    handle.remove()
    gc.collect()
    before = sum(type(thing) is Tokens for thing in gc.get_objects())
    family.run(model)
    assert sum(type(thing) is Tokens for thing in gc.get_objects()) == before == 0
    codes = weakref.ref(model.transformer_blocks[0].attn.to_q.codes)
    gc.disable()
    try:
        del model, handle
        assert codes() is None
    finally:
        gc.enable()


@every_family
@torch.no_grad()
def test_a_layer_gives_its_own_product_at_every_moment(name):
    """to_q(x) is W x for any tensor, whatever its block has done before or is doing."""
    family, model = FAMILIES[name], quantized(name)
    layers = orbit_layers(model)
    x = {layer.in_features: random(2, 5, layer.in_features) for layer in layers}
    expected, seen = [layer(x[layer.in_features]) for layer in layers], []

    def check(*_):
        found = [layer.forward(x[layer.in_features]) for layer in layers]
        seen.append(all(map(torch.equal, found, expected)))

    handles = [layer.register_forward_hook(check) for layer in layers[:2]]
    family.run(model)
    for handle in handles:
        handle.remove()
    check()
    assert seen == [True] * 3


class Block(nn.Module):
    def __init__(self, *bits):
        super().__init__()
        torch.manual_seed(0)
        specs = [OrbitQuantConfig(b, codebook="scalar", recipe="paper").layer((64, 64)) for b in bits or ["w4a4"] * 3]
        self.layers = nn.ModuleList(OrbitLinear.from_linear(nn.Linear(64, 64).to(BF16), spec) for spec in specs)
        for layer in self.layers:
            layer.set_grid("int8", False)
        share_inputs(self.layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@torch.no_grad()
def test_only_layers_that_encode_alike_share():
    block, x = Block("w4a4", "w2a4", "w4a3", "w4a16", "w3a3"), random(5, 64)
    outputs, number = counted(lambda: block(Tokens(x)))
    assert number == 2
    assert all(map(torch.equal, outputs, block(x)))


@torch.no_grad()
def test_layers_that_no_kernel_takes_do_not_share():
    layers = []
    for rows in (64, 60, 64):
        spec = OrbitQuantConfig("w4a4").layer((64, rows))
        layers.append(OrbitLinear.from_linear(nn.Linear(64, rows).to(BF16), spec))
    share_inputs(layers)
    assert layers[1].siblings is None
    assert layers[0].siblings is layers[2].siblings is not None
    assert [layer(Tokens(random(5, 64))).shape for layer in layers] == [(5, 64), (5, 60), (5, 64)]


@torch.no_grad()
def test_plain_tensors_are_not_shared():
    block, x = Block(), random(5, 64)
    assert counted(lambda: block(x))[1] == 3
    assert counted(lambda: block(Tokens(x)))[1] == 1


@torch.no_grad()
def test_tokens_that_were_written_to_are_encoded_anew():
    block, x = Block(), random(5, 64)
    tokens = Tokens(x)
    block.layers[0](tokens)
    x.mul_(-2)
    assert all(torch.equal(layer(tokens), layer(x)) for layer in block.layers)


@torch.no_grad()
def test_tokens_that_were_made_and_written_to_are_what_was_written():
    block, x = Block(), random(5, 64)
    tokens = Tokens(x, lambda: x * 2, "layer_norm")
    assert torch.equal(block.layers[0](tokens), block.layers[0](x * 2))
    tokens.tensor().neg_()
    assert all(torch.equal(layer(tokens), layer(-2 * x)) for layer in block.layers)


@torch.no_grad()
def test_outputs_are_the_callers_to_change():
    block, x = Block(), random(5, 64)
    expected, tokens = block(x), Tokens(x)
    for order in ((0, 0, 1, 2), (1, 1, 1, 0), (2, 0, 1)):
        for i in order:
            y = block.layers[i](tokens)
            assert torch.equal(y, expected[i])
            y.zero_()


@torch.no_grad()
def test_layers_called_apart_and_in_other_orders():
    block = Block()
    for order in ((0,), (2, 0), (1, 1, 1, 1), (2, 1, 0), (0, 1), (0, 1, 2)):
        x = random(5, 64, seed=len(order))
        tokens = Tokens(x)
        for i in order:
            assert torch.equal(block.layers[i](tokens), block.layers[i](x))


@torch.no_grad()
def test_a_grid_that_changes_half_way():
    block, x = Block(), random(5, 64)
    q, k, v = block.layers
    tokens = Tokens(x)
    q(tokens)
    for layer in (k, v):
        layer.set_grid("e4m3", False)
    outputs, number = counted(lambda: (k(tokens), v(tokens)))
    assert number <= 2
    assert torch.equal(outputs[0], k(x))
    assert torch.equal(outputs[1], v(x))


@torch.no_grad()
def test_inference_mode_and_no_tokens():
    block = Block()
    with torch.inference_mode():
        x = random(5, 64)
        outputs, number = counted(lambda: block(Tokens(x)))
    assert number == 1
    assert all(map(torch.equal, outputs, block(x)))
    assert [y.shape for y in block(Tokens(random(0, 64)))] == [(0, 64)] * 3


def test_gradients_do_not_pass_through_what_is_shared():
    block, x = Block(), random(5, 64).requires_grad_()
    _, number = counted(lambda: sum(y.sum() for y in block(Tokens(x))).backward())
    assert number == 0
    assert x.grad is not None


def test_layers_that_are_offloaded_one_by_one_compute_for_themselves():
    """Their weights come when they are called: what lies on the device before may still be on its way."""
    family, model = FAMILIES["flux"], quantized("flux")
    expected, number = counted(lambda: family.run(model))
    for layer in orbit_layers(model):
        if layer.siblings is not None and layer.place == 0:
            add_hook_to_module(layer, ModelHook())
    output, alone = counted(lambda: family.run(model))
    assert torch.equal(output, expected)
    assert number < alone <= family.counts[0]


@torch.no_grad()
def test_a_shallow_copy_uses_its_own_codes():
    block, x = Block("w4a4", "w4a4"), random(5, 64)
    first, second = block.layers
    copied = copy.copy(first)
    copied._parameters = dict(first._parameters, codes=second.codes, scales=second.scales, bias=second.bias)
    assert torch.equal(copied(Tokens(x)), second(x))


@torch.no_grad()
def test_a_sibling_that_is_gone_or_replaced_is_not_missed():
    block, x = Block(), random(5, 64)
    expected = block(x)
    block.layers[1] = nn.Identity()
    gc.collect()
    assert torch.equal(block.layers[0](Tokens(x)), expected[0])
    assert torch.equal(copy.deepcopy(block.layers[2])(Tokens(x)), expected[2])


@pytest.mark.parametrize("grid", ["auto", "exact", "e4m3", "int8"])
def test_a_grid_can_be_forced(grid):
    model = FAMILIES["wan"].build().to(BF16)
    quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    assert set_grid_(model, grid) is model
    assert {layer.grid for layer in orbit_layers(model)} == {None if grid == "auto" else grid}
    output = FAMILIES["wan"].run(model)
    own = ops.device_grids(torch.device("cpu"))[0]
    set_grid_(model, own if grid == "auto" else "auto")
    other = FAMILIES["wan"].run(model)
    assert torch.equal(output, other) == (grid in ("auto", own))
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
    assert {layer.grid for layer in orbit_layers(model)} == {"exact"}
