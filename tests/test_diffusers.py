"""diffusers: on-load and in-place quantization, save and reload, whole pipelines, LoRA, dtypes, damaged files."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import orbitdit
from families import FAMILIES
from orbitdit import (
    CheckpointError,
    ConfigError,
    Int4Linear,
    ModelError,
    OrbitLinear,
    OrbitQuantConfig,
    TensorError,
    policy,
)
from orbitdit.families import blocks
from orbitdit.integrations.diffusers import OrbitQuantizer
from orbitdit.manifest import read_header
from orbitdit.model import packed_layers
from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.pipeline import ShapesPipeline, initial_noise

CONFIG = OrbitQuantConfig("w4a4", seed=3)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """The full-precision model, its folder with one file, its folder with shards, and an in-place quantized copy."""
    folder = tmp_path_factory.mktemp(family.cls.__name__)
    model = family.build()
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="100KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    quantized = copy.deepcopy(model)
    orbitdit.quantize_(quantized, CONFIG, progress=False)
    return model, folder, quantized


def test_orbitdit_is_registered():
    assert AUTO_QUANTIZER_MAPPING["orbitdit"] is OrbitQuantizer


@pytest.mark.parametrize("source", ["whole", "sharded"])
def test_on_load_equals_in_place(family, saved, source):
    model, folder, quantized = saved
    loaded = family.cls.from_pretrained(folder / source, quantization_config=CONFIG)
    assert_same_state(loaded.state_dict(), quantized.state_dict())
    kinds = {name: type(layer) for name, layer in packed_layers(quantized)}
    assert {name: type(layer) for name, layer in packed_layers(loaded)} == kinds
    reference, output = family.run(model), family.run(loaded)
    torch.testing.assert_close(output, family.run(quantized), rtol=1e-4, atol=1e-4)
    assert (output - reference).norm() < 0.25 * reference.norm()


@pytest.mark.parametrize("how", ["in place", "on load", "on load, sharded"])
def test_saving_and_loading_is_exact(family, saved, how, tmp_path):
    _, folder, quantized = saved
    model = quantized
    if how != "in place":
        model = family.cls.from_pretrained(folder / "whole", quantization_config=CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="50KB" if "sharded" in how else "10GB")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    record = {name: layer.spec.key for name, layer in packed_layers(quantized)}
    fingerprint = settings.pop("fingerprint")
    assert settings == {**CONFIG.to_dict(), "layers": record}
    for file in tmp_path.glob("*.safetensors"):
        assert json.loads(read_header(file).metadata["orbitdit"])["fingerprint"] == fingerprint
    loaded = family.cls.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), quantized.state_dict())
    assert loaded.config.quantization_config == CONFIG
    torch.testing.assert_close(family.run(loaded), family.run(quantized), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_keep_their_dtype_whatever_the_model_computes_in(family, saved, dtype, tmp_path):
    _, folder, quantized = saved
    quantized.save_pretrained(tmp_path)
    for source, options in ((folder / "whole", {"quantization_config": CONFIG}), (tmp_path, {})):
        model = family.cls.from_pretrained(source, dtype=dtype, **options)
        for name, layer in packed_layers(model):
            twin = quantized.get_submodule(name)
            assert torch.equal(layer.codes, twin.codes)
            assert torch.equal(layer.scales, twin.scales)
            assert (layer.codes.dtype, layer.scales.dtype) == (torch.uint8, torch.bfloat16)
        assert model.dtype == dtype
        assert family.run(model).isfinite().all()


def test_a_quantized_model_refuses_casts_and_dequantizes(family, saved):
    _, folder, _ = saved
    model = family.cls.from_pretrained(folder / "whole", quantization_config=CONFIG)
    with pytest.raises(ValueError, match="quantized"):
        model.to(torch.float16)
    before = family.run(model)
    model.dequantize()
    assert not list(packed_layers(model))
    assert (family.run(model) - before).norm() < 0.2 * before.norm()


def test_rules_and_settings_travel_with_the_checkpoint(tmp_path):
    family = FAMILIES["flux"]
    family.build().save_pretrained(tmp_path / "full")
    rules = (("transformer_blocks.0.*", "keep"), ("*.ff.*", "w6a6"), ("proj_out", "int4"))
    config = OrbitQuantConfig("w3a3", modulation_bits=16, rules=rules)
    model = family.cls.from_pretrained(tmp_path / "full", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    loaded = family.cls.from_pretrained(tmp_path / "quantized")
    assert_same_state(loaded.state_dict(), model.state_dict())
    keys = {name: layer.spec.key for name, layer in packed_layers(loaded)}
    assert not any(name.startswith("transformer_blocks.0.") for name in keys)
    assert keys["transformer_blocks.1.ff.net.2"] == "256x64 scalar6.unbiased a6 s0"
    assert keys["transformer_blocks.1.attn.to_q"] == "64x64 trellis3.12.unbiased a3g16 s0"
    with torch.no_grad():
        assert torch.equal(family.run(loaded), family.run(model))
    assert keys["proj_out"] == "64x8 int4 a16"
    assert "transformer_blocks.1.norm1.linear" not in keys


@pytest.mark.parametrize("recorded", [True, False])
def test_quantized_models_load_as_they_were_saved_whatever_the_rules_say_today(recorded, monkeypatch, tmp_path):
    """By the record of their layers, or without one (up to format version 4) by what is stored."""
    family = FAMILIES["flux"]
    model = family.build()
    orbitdit.quantize_(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    if not recorded:
        settings = json.loads((tmp_path / "config.json").read_text())
        del settings["quantization_config"]["layers"]
        (tmp_path / "config.json").write_text(json.dumps(settings))
    today = replace(policy.FAMILIES[family.cls.__name__], rules=blocks("transformer_blocks.0.attn.*", "proj_out"))
    monkeypatch.setitem(policy.FAMILIES, family.cls.__name__, today)
    assert orbitdit.plan(family.build(), CONFIG).counts == (9, 0, 39)
    loaded = family.cls.from_pretrained(tmp_path)
    assert {name: layer.spec for name, layer in packed_layers(loaded)} == {
        name: layer.spec for name, layer in packed_layers(model)
    }
    assert_same_state(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_folders_of_older_versions_load_as_what_they_were(version, tmp_path):
    """Their configurations are those that each version wrote (see tests/golden); the tensors are ours."""
    golden = Path(__file__).parent / "golden" / f"version-{version}-w2a4"
    config = json.loads((golden / "config.json").read_text())
    expected = {name: key for name, key in json.loads((golden / "plan.json").read_text()).items() if "kept" not in key}
    model = diffusers.FluxTransformer2DModel.from_config(config)
    orbitdit.quantize_(model, OrbitQuantConfig.from_dict(config["quantization_config"]), progress=False)
    model.save_pretrained(tmp_path / "ours")
    rewrite(tmp_path / "ours", tmp_path / "older", lambda tensors: None)
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "older")
    assert {name: layer.spec.key for name, layer in packed_layers(loaded)} == expected
    states = [{n: t for n, t in m.state_dict().items() if not n.endswith(".spec")} for m in (loaded, model)]
    assert_same_state(*states)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    family = FAMILIES["flux"]
    model = family.build()
    model.save_pretrained(folder / "full")
    orbitdit.quantize_(model, CONFIG, progress=False)
    model.save_pretrained(folder / "quantized")
    return family, folder


def rewrite(folder, target, change):
    """Copy a model folder with its tensors changed by `change`, as version 4 wrote it: without a manifest."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".spec")}
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        del config["quantization_config"]["layers"], config["quantization_config"]["fingerprint"]
        config["quantization_config"]["format_version"] = 4
    (target / "config.json").write_text(json.dumps(config))


NAME = "transformer_blocks.1.attn.to_k"


@pytest.mark.parametrize(
    ("source", "change", "error", "message"),
    [
        (
            "quantized",
            lambda t: t.update({f"{NAME}.codes": t[f"{NAME}.codes"][:, 1:].contiguous()}),
            TensorError,
            f"{NAME}.codes",
        ),
        ("quantized", lambda t: t.update({f"{NAME}.codes": t[f"{NAME}.codes"].short()}), TensorError, f"{NAME}.codes"),
        ("quantized", lambda t: t.pop(f"{NAME}.scales"), CheckpointError, f"{NAME}.scales"),
        ("full", lambda t: t.pop(f"{NAME}.weight"), CheckpointError, f"{NAME}.weight"),
        ("full", lambda t: t[f"{NAME}.weight"][3, 5].fill_(torch.nan), TensorError, f"{NAME}.weight holds NaN"),
    ],
)
def test_damaged_tensors_are_named(flux, tmp_path, source, change, error, message):
    family, folder = flux
    rewrite(folder / source, tmp_path / "damaged", change)
    options = {"quantization_config": CONFIG} if source == "full" else {}
    with pytest.raises(error, match=message) as caught:
        family.cls.from_pretrained(tmp_path / "damaged", **options)
    assert "\n" not in str(caught.value)


def test_a_newer_format_asks_for_an_upgrade(flux, tmp_path):
    family, folder = flux
    rewrite(folder / "quantized", tmp_path / "newer", lambda t: None)
    config = json.loads((tmp_path / "newer" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="upgrade orbitdit"):
        family.cls.from_pretrained(tmp_path / "newer")


def test_a_pickle_is_refused(flux, tmp_path):
    family, _ = flux
    model = family.build()
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match="pickle"):
        family.cls.from_pretrained(tmp_path, use_safetensors=False, quantization_config=CONFIG)


def test_disk_offload_is_refused(flux, tmp_path):
    family, folder = flux
    with pytest.raises(ConfigError, match="disk"):
        family.cls.from_pretrained(
            folder / "full", quantization_config=CONFIG, device_map={"": "disk"}, offload_folder=tmp_path
        )


def test_a_single_file_is_quantized_while_loading(flux, tmp_path):
    family, folder = flux
    file = str(folder / "full" / "diffusion_pytorch_model.safetensors")
    model = family.cls.from_single_file(file, config=str(folder / "full"), quantization_config=CONFIG)
    stored = family.cls.from_pretrained(folder / "quantized")
    assert_same_state(model.state_dict(), stored.state_dict())


def test_adapters_run_beside_the_codes_take_gradients_and_can_be_switched_off(flux):
    family, folder = flux
    model = family.cls.from_pretrained(folder / "quantized")
    before = family.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False))
    adapted = family.run(model)
    assert not torch.allclose(adapted, before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora" in name for name in trainable)
    inputs = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in family.inputs().items()}
    model(**inputs, return_dict=False)[0].square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.disable_adapters()
    torch.testing.assert_close(family.run(model), before)


def test_adapters_may_read_the_weight_but_not_write_to_it(flux):
    """DoRA takes the norms of its rows; fusing would add to it, and says what to do instead."""
    family, folder = flux
    model = family.cls.from_pretrained(folder / "quantized")
    before = family.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], use_dora=True), "dora")
    to_q = model.transformer_blocks[1].attn.to_q
    norms = to_q.base_layer.dequantize().norm(dim=1)
    torch.testing.assert_close(to_q.lora_magnitude_vector["dora"].weight.detach(), norms)
    torch.testing.assert_close(family.run(model), before)
    model.delete_adapters("dora")
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "lora")
    adapted = family.run(model)
    for safely in (False, True):
        with pytest.raises(ModelError, match="packed and cannot be written to"):
            model.fuse_lora(safe_fusing=safely)
    assert torch.equal(family.run(model), adapted)


@pytest.fixture(scope="module")
def mapping():
    return PipelineQuantizationConfig(quant_mapping={"transformer": CONFIG})


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red circle", latents=initial_noise([1]), num_inference_steps=2, output_type="np").images


def test_a_whole_pipeline_is_quantized_saved_and_loaded(mapping, tmp_path):
    pipeline = ShapesPipeline.from_pretrained(MODEL_DIR, quantization_config=mapping)
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn.to_q, OrbitLinear)
    assert isinstance(pipeline.transformer.transformer_blocks[0].norm1.linear, Int4Linear)
    pipeline.save_pretrained(tmp_path)
    loaded = ShapesPipeline.from_pretrained(tmp_path)
    assert_same_state(loaded.transformer.state_dict(), pipeline.transformer.state_dict())
    np.testing.assert_allclose(draw(loaded), draw(pipeline), atol=1e-3)


PIPELINES = {
    "flux": (diffusers.FluxPipeline, ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
    "z-image": (diffusers.ZImagePipeline, ["vae", "text_encoder", "tokenizer"]),
    "wan": (diffusers.WanPipeline, ["vae", "text_encoder", "tokenizer"]),
    "cogvideox": (diffusers.CogVideoXPipeline, ["vae", "text_encoder", "tokenizer"]),
    "sd3": (
        diffusers.StableDiffusion3Pipeline,
        ["vae", *(f"{part}{n}" for n in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))],
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_diffusers_own_work_the_same(name, mapping, tmp_path):
    cls, others = PIPELINES[name]
    family, parts = FAMILIES[name], dict.fromkeys(others)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "cogvideox":
        scheduler = diffusers.CogVideoXDDIMScheduler()
    cls(scheduler=scheduler, transformer=family.build(), **parts).save_pretrained(tmp_path / "full")
    expected = family.build()
    orbitdit.quantize_(expected, CONFIG, progress=False)
    pipeline = cls.from_pretrained(tmp_path / "full", quantization_config=mapping, **parts)
    assert_same_state(pipeline.transformer.state_dict(), expected.state_dict())
    pipeline.save_pretrained(tmp_path / "quantized")
    loaded = cls.from_pretrained(tmp_path / "quantized", **parts)
    assert_same_state(loaded.transformer.state_dict(), expected.state_dict())
