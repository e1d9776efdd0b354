"""quantize_, dequantize_ and plan on tiny models of every family, and what they refuse."""

import copy
import json
import re

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import nn

from families import FAMILIES, every_family
from orbitdit import (
    ConfigError,
    Int4Linear,
    ModelError,
    OrbitLinear,
    OrbitQuantConfig,
    TensorError,
    dequantize_,
    plan,
    quantize_,
)
from orbitdit.config import QuantMethod
from orbitdit.model import packed_layers, replace_module
from orbitdit.quantize import quantize_weight
from parameters import NOT_FINITE
from specs import spec

W4A4 = OrbitQuantConfig("w4a4")
KINDS = {"quantize": OrbitLinear, "int4": Int4Linear, "keep": nn.Linear}


def quantized(family, config=W4A4, seed=0):
    model = family.build(seed)
    quantize_(model, config, progress=False)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, expected):
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@every_family
def test_the_plan_is_carried_out(family):
    model = family.build()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = plan(model, W4A4)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert quantize_(model, W4A4, progress=False) == expected
    assert expected.counts == family.counts
    assert [row.name for row in expected.layers] == list(linears)
    for row in expected.layers:
        module, before = model.get_submodule(row.name), linears[row.name]
        assert type(module) is KINDS[row.action], row.name
        assert (module.in_features, module.out_features) == (before.in_features, before.out_features)
        assert module.weight.shape == before.weight.shape
        assert module.bias is before.bias if module.bias is None else torch.equal(module.bias, before.bias)
        if row.action == "keep":
            assert module is before
        else:
            assert module.spec == row.spec
        if row.action == "quantize":
            assert module.spec.key == f"{row.in_features}x{row.out_features} scalar4.unbiased a4 s0"
            assert module.codes.shape == (row.out_features, -(-row.in_features // 2))


@every_family
def test_bytes_of_the_plan_are_those_of_the_tensors(family):
    model = nn.Module.to(family.build(), torch.bfloat16)
    found = quantize_(model, OrbitQuantConfig("w3a8", trellis_states=8), progress=False)
    for row in found.layers:
        tensors = model.get_submodule(row.name).parameters()
        assert sum(t.numel() * t.element_size() for t in tensors) == row.bytes_after, row.name


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w4a16", "w2a4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_stay_near_full_precision(name, bits):
    family, limit = FAMILIES[name], FAMILIES[name].errors[bits]
    model = family.build()
    expected = family.run(model)
    quantize_(model, OrbitQuantConfig(bits, trellis_states=10), progress=False)
    got = family.run(model)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    assert limit / 4 < relative(got, expected) < limit


@every_family
def test_bf16_models_stay_bf16_and_lose_little_more(family):
    """fp32 weights of the same values give the same codes; 16-bit activations leave the arithmetic to differ alone."""
    model = nn.Module.to(family.build(), torch.bfloat16)
    wide = nn.Module.to(copy.deepcopy(model), torch.float32)
    rounding = relative(family.run(model), family.run(wide))
    for each in (model, wide):
        quantize_(each, OrbitQuantConfig("w4a16"), progress=False)
    for (name, left), right in zip(model.state_dict().items(), wide.state_dict().values(), strict=True):
        assert torch.equal(left, right.to(left.dtype)), name
    got = family.run(model)
    assert got.dtype == model.dtype == torch.bfloat16
    assert relative(got, family.run(wide)) < 2 * rounding


def test_rules_and_widths_reach_the_layers():
    rules = (("*.to_q", "w6a8"), ("proj_out", "int4"), ("*.norm1.linear", "keep"), ("*.to_add_out", "keep"))
    model = quantized(FAMILIES["flux"], OrbitQuantConfig("w2a3", modulation_bits=16, seed=3, rules=rules))
    block = model.transformer_blocks[1]
    assert block.attn.to_q.spec.key == "64x64 scalar6.unbiased a8 s3"
    assert block.attn.to_k.spec.key == "64x64 trellis2.12.unbiased a3g16 s3"
    assert type(model.proj_out) is Int4Linear
    kept = (block.norm1.linear, block.norm1_context.linear, block.attn.to_add_out, model.x_embedder)
    assert [type(module) for module in kept] == [nn.Linear] * 4


def test_recipes_reach_the_layers():
    """The paper's: nearest centroids and norms. The best one: trellis codes, and scales that undo what codes shrink."""
    weight = dict(FAMILIES["wan"].build().named_parameters())["blocks.0.ffn.net.2.weight"]
    for config, bits, coding in (
        (OrbitQuantConfig("w2a4", "paper", seed=3), 2, {}),
        (OrbitQuantConfig("w2a4", trellis_states=8, seed=3), 2, {"states": 8, "scale": "unbiased"}),
        (OrbitQuantConfig("w4a4", seed=3), 4, {"scale": "unbiased"}),
    ):
        layer = quantized(FAMILIES["wan"], config).blocks[0].ffn.net[2]
        asked = spec(*reversed(weight.shape), bits, 4, 3, **coding)
        expected = quantize_weight(weight, asked)
        assert layer.spec == asked
        assert torch.equal(layer.codes, expected.codes)
        assert torch.equal(layer.scales, expected.scales)


def test_the_seed_decides_the_codes():
    family = FAMILIES["wan"]
    first, again = quantized(family, OrbitQuantConfig(seed=1)), quantized(family, OrbitQuantConfig(seed=1))
    other = quantized(family, OrbitQuantConfig(seed=2))
    assert_same_state(again, first.state_dict())
    assert torch.equal(family.run(first), family.run(again))
    codes = [name for name in first.state_dict() if name.endswith(".codes")]
    assert len(codes) == 20
    assert not any(torch.equal(first.state_dict()[name], other.state_dict()[name]) for name in codes)
    assert relative(family.run(other), family.run(first)) > 1e-3


@every_family
def test_a_state_dict_moves_to_another_quantized_model(family):
    """Bit for bit, though the other model was made from other weights."""
    source, target = quantized(family), quantized(family, seed=1)
    expected = family.run(source)
    assert not torch.equal(family.run(target), expected)
    target.load_state_dict(snapshot(source), strict=True)
    assert torch.equal(family.run(target), expected)


@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_mode_are_carried(training):
    model = FAMILIES["flux"].build().train(training)
    model.transformer_blocks[0].attn.to_q.train(not training)
    for change in (lambda: quantize_(model, W4A4, progress=False), lambda: dequantize_(model)):
        change()
        assert model.transformer_blocks[0].attn.to_q.training is not training
        assert model.transformer_blocks[0].attn.to_k.training is training
        assert model.transformer_blocks[0].norm1.linear.training is training


@pytest.mark.parametrize("value", NOT_FINITE)
@every_family
def test_a_bad_weight_in_the_last_layer_leaves_the_model_as_it_was(family, value):
    model = family.build()
    last = plan(model, W4A4).select("quantize", "int4")[-1].name
    model.get_submodule(last).weight.data[-1, -1] = value
    modules, state, config = dict(model.named_modules()), snapshot(model), dict(model.config)
    with pytest.raises(TensorError) as caught:
        quantize_(model, W4A4, progress=False)
    assert str(caught.value).startswith(f"{last}.weight ")
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)
    assert dict(model.config) == config
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("name", ["proj_out.weight", "transformer_blocks.0.attn.to_q.bias"])
def test_what_is_kept_is_looked_at_too(name):
    """A NaN in a kept layer or in a bias would make every picture NaN."""
    model = FAMILIES["flux"].build()
    model.get_parameter(name).data.view(-1)[-1] = float("nan")
    state = snapshot(model)
    with pytest.raises(TensorError, match=f"^{name} holds NaN or Inf"):
        quantize_(model, W4A4, progress=False)
    assert_same_state(model, state)


def test_a_quantized_model_is_refused():
    model = quantized(FAMILIES["cogvideox"])
    state = snapshot(model)
    for refuse in (lambda: quantize_(model, W4A4), lambda: plan(model, OrbitQuantConfig("w2a4"))):
        with pytest.raises(ModelError, match="CogVideoXTransformer3DModel is quantized already"):
            refuse()
    assert_same_state(model, state)
    assert model.config.quantization_config == W4A4


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (nn.Linear(64, 64), W4A4),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3)), W4A4),
        (FAMILIES["wan"].build(), OrbitQuantConfig(rules=(("*", "keep"),))),
    ],
    ids=["one layer", "no layer", "all kept"],
)
def test_nothing_to_quantize(model, config):
    linears = sum(isinstance(m, nn.Linear) for m in model.modules() if m is not model)
    for refuse in (plan, quantize_):
        with pytest.raises(ModelError, match=f"{type(model).__name__} has nothing to quantize: none of its {linears} "):
            refuse(model, config)
    assert not hasattr(model, "config") or "quantization_config" not in model.config


def test_nothing_to_undo():
    with pytest.raises(ModelError, match="FluxTransformer2DModel is not quantized"):
        dequantize_(FAMILIES["flux"].build())


def test_weights_without_data_are_refused_and_planned():
    family = FAMILIES["flux"]
    with init_empty_weights():
        model = family.cls(**family.config)
    first = plan(model, W4A4).select("quantize", "int4")[0].name
    with pytest.raises(TensorError, match=f"{first}.weight has no data"):
        quantize_(model, W4A4)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_subclasses_of_linear_are_left_alone():
    class Tied(nn.Linear):
        pass

    model = FAMILIES["flux"].build()
    model.transformer_blocks[0].attn.to_q = special = Tied(64, 64)
    found = quantize_(model, W4A4, progress=False)
    assert found.counts == (33, 6, 9)
    assert [row.name for row in found.layers if "subclass" in row.reason] == ["transformer_blocks.0.attn.to_q"]
    assert model.transformer_blocks[0].attn.to_q is special


def test_what_is_no_model_or_no_configuration_or_has_adapters_is_refused():
    model = FAMILIES["flux"].build()
    with pytest.raises(ModelError, match="such as pipe"):
        plan(object(), W4A4)
    with pytest.raises(ConfigError, match=r"OrbitQuantConfig\('w4a4'\)"):
        quantize_(model, "w4a4")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ModelError, match="adapters"):
        quantize_(model, W4A4)


def test_fused_projections_have_the_weights_that_the_codes_stand_for():
    """diffusers concatenates weights there, into ordinary layers; unfused, the model is what it was."""
    family = FAMILIES["flux"]
    model = quantized(family)
    twin, before = copy.deepcopy(model), family.run(model)
    model.fuse_qkv_projections()
    projections = [name for name, _ in packed_layers(twin) if re.search(r"to_[qkv]$|add_[qkv]_proj$", name)]
    assert len(projections) == 2 * 6 + 2 * 3
    for name in projections:
        replace_module(twin, name, twin.get_submodule(name).to_linear(torch.float32))
    assert relative(family.run(model), family.run(twin)) < 1e-5
    model.unfuse_qkv_projections()
    assert torch.equal(family.run(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_dequantized_models_are_ordinary_and_near_the_original(family, dtype):
    """Twice the error that 4 bits make of weights alone: D(4) = 0.0095 of the energy, sqrt of it of the norm."""
    original = nn.Module.to(family.build(), dtype)
    model = copy.deepcopy(original)
    found = quantize_(model, OrbitQuantConfig("w4a16"), progress=False)
    approximate = family.run(model)
    assert dequantize_(model) is model
    state, expected = model.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    for row in found.layers:
        module, before = model.get_submodule(row.name), original.get_submodule(row.name)
        assert type(module) is nn.Linear
        assert module.weight.dtype == dtype
        if row.action == "keep":
            assert torch.equal(module.weight, before.weight)
        else:
            assert 0.001 < relative(module.weight, before.weight) < 0.2, row.name
    biases = [name for name in expected if name.endswith(".bias")]
    assert all(torch.equal(state[name], expected[name]) for name in biases)
    assert relative(family.run(model), approximate) < (1e-5 if dtype is torch.float32 else 0.02)


def test_dequantized_models_have_the_dtype_that_the_model_runs_in(tmp_path):
    """Wan keeps its norms and tables in fp32 when it is loaded in bf16, and its first parameter is such a table."""
    family = FAMILIES["wan"]
    family.build().save_pretrained(tmp_path)
    model = family.cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
    expected = family.run(model)
    quantize_(model, OrbitQuantConfig("w8a16"), progress=False)
    dequantize_(model)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].attn1.to_q.bias.dtype == torch.bfloat16
    assert relative(family.run(model), expected) < 0.05


@every_family
def test_diffusers_bookkeeping(family, tmp_path):
    model = family.build()
    config = dict(model.config)
    quantize_(model, W4A4, progress=False)
    assert model.config.quantization_config == W4A4
    assert (model.is_quantized, model.quantization_method) == (True, QuantMethod.ORBITDIT)
    with pytest.raises(ValueError, match="quantized"):
        model.to(torch.float16)
    dequantize_(model)
    assert dict(model.config) == config
    assert (model.is_quantized, model.hf_quantizer) == (False, None)
    model.save_pretrained(tmp_path)
    loaded = family.cls.from_pretrained(tmp_path)
    assert not getattr(loaded, "is_quantized", False)
    assert "quantization_config" not in loaded.config
    assert_same_state(loaded, model.state_dict())
    assert quantize_(loaded, W4A4, progress=False).counts == family.counts


def test_a_model_quantized_in_memory_can_be_saved_and_loaded(tmp_path):
    family = FAMILIES["z-image"]
    model = quantized(family, OrbitQuantConfig("w3a6", seed=4, rules=(("*.w2", "w8a8"),)))
    model.save_pretrained(tmp_path)
    loaded = family.cls.from_pretrained(tmp_path)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert_same_state(loaded, model.state_dict())
    aligned = copy.deepcopy(loaded).eval()  # MKL rounds differently where a mapped file puts tensors
    assert torch.equal(family.run(aligned), family.run(model))
    assert type(dequantize_(loaded).layers[0].feed_forward.w2) is nn.Linear
    assert_same_state(loaded, dequantize_(model).state_dict())
    assert loaded.hf_quantizer is None


@pytest.mark.parametrize("action", ["int4", "w4a4"])
def test_models_of_packed_layers_alone_keep_their_dtype(action):
    """diffusers asks the first floating-point parameter, and pipelines give inputs of that dtype."""
    family = FAMILIES["flux"]
    model = family.build()
    quantize_(model, OrbitQuantConfig("w4a4", rules=[("*", action)]), progress=False)
    assert model.dtype == torch.float32


def test_a_model_of_version_2_stays_what_it_was(tmp_path):
    """Its "unbiased" scales are those of rows alone, on the way in and out."""
    family = FAMILIES["wan"]
    model = quantized(family, OrbitQuantConfig("w4a3", scale="unbiased-rows"))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] |= {"format_version": 2, "scale": "unbiased"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = family.cls.from_pretrained(tmp_path)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert_same_state(dequantize_(loaded), dequantize_(model).state_dict())


def test_plain_torch_models_work_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mod, self.ff = nn.Linear(64, 128), nn.Linear(64, 64)

    torch.manual_seed(0)
    model = nn.Module()
    model.blocks, model.head = nn.ModuleList([Block(), Block()]), nn.Linear(64, 8)
    assert quantize_(model, W4A4, progress=False).counts == (2, 2, 1)
    assert [type(m) for m in model.blocks[1].children()] == [Int4Linear, OrbitLinear]
    assert not hasattr(model, "is_quantized")
    assert type(dequantize_(model).blocks[1].ff) is nn.Linear


def test_quiet_without_progress(capfd):
    quantized(FAMILIES["cogvideox"])
    assert capfd.readouterr() == ("", "")


def test_progress_leaves_the_result_alone(capsys):
    model = FAMILIES["cogvideox"].build()
    quantize_(model, W4A4)
    assert capsys.readouterr().err == ""
    assert_same_state(model, quantized(FAMILIES["cogvideox"]).state_dict())
