"""What `explain` says is what runs: against recorded forward passes, and every reason provoked once."""

import copy
import functools
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from torch import nn

from families import FAMILIES, every_family
from further_families import FURTHER
from orbitdit import (
    ConfigError,
    ModelError,
    OrbitLinear,
    OrbitQuantConfig,
    explain,
    fallbacks,
    fusion,
    linear,
    plan,
    quantize_,
)
from orbitdit.model import packed_layers, set_grid_
from orbitdit.ops.int4_linear.cuda import shape_for
from specs import int4

DOCS = Path(__file__).parent.parent / "docs" / "explain.md"
BF16, SM_86 = torch.bfloat16, "cuda sm_86"
"""An architecture whose fastest grid is int8, which the tests run on the CPU."""


def quantized(name, bits="w4a6", **options):
    model = FAMILIES[name].build().to(BF16)
    quantize_(model, OrbitQuantConfig(bits, **options), progress=False)
    return set_grid_(model, "int8").eval()


def on_meta(name, *bits, device="sm_90", **options):
    """The explanation of a small model that is not quantized."""
    with init_empty_weights(include_buffers=True):
        model = FAMILIES[name].cls(**FAMILIES[name].config).to(BF16)
    return explain(model, device=device, config=OrbitQuantConfig(*bits, **options))


def rows(explanation):
    return {row.name: row for row in explanation.layers}


def said(explanation):
    """Route, prologue and number of siblings of each layer with quantized tokens or weights."""
    labelled = [row for row in explanation.layers if row.label.startswith("W")]
    return {row.name: (row.route, row.prologue, row.siblings) for row in labelled}


@pytest.fixture
def ran(monkeypatch):
    """A function: the same of a forward pass on the CPU, which stands in for a device with kernels."""
    calls, project = {}, linear.project

    def recorded(layers, x, grid, prologue="", prologue_args=()):
        calls.update(dict.fromkeys(layers, (f"{grid} kernel", prologue, len(layers) - 1)))
        return project(layers, x, grid, prologue, prologue_args)

    monkeypatch.setattr(linear, "project", recorded)
    monkeypatch.setattr(linear, "fuses", lambda x: not torch.is_grad_enabled())

    def run(family, model):
        calls.clear()
        family.run(model)
        layers = ((name.removesuffix(".base_layer"), layer) for name, layer in packed_layers(model))
        return {n: calls.get(layer, ("exact", "", 0)) for n, layer in layers if isinstance(layer, OrbitLinear)}

    return run


@every_family
def test_what_is_said_is_what_runs(family, ran):
    model = family.build().to(BF16)
    planned = explain(model, device=SM_86, config=OrbitQuantConfig("w4a6"))
    quantize_(model, OrbitQuantConfig("w4a6"), progress=False)
    explanation = explain(model, device=SM_86)
    assert explanation == planned
    assert said(explanation) == ran(family, set_grid_(model, "int8"))
    steps = [row.prologue for row in explanation.layers if row.prologue]
    assert len(set(steps) & {"layer_norm", "gelu", "rms_norm", "silu"}) == len(family.fused)


@pytest.mark.parametrize("exact", ["to_q", "to_k", "to_v"])
def test_siblings_of_an_exact_layer(exact, ran):
    """What runs exactly takes the tokens as a tensor: layers after it find no pending step, unless it is done."""
    model = quantized("flux", rules=((f"*.{exact}", "w8a8"),))
    explanation = explain(model, device=SM_86)
    assert said(explanation) == ran(FAMILIES["flux"], model)
    expected = {"to_q": [False, False], "to_k": [True, True], "to_v": [True, True]}[exact]
    found = [rows(explanation)[name] for name in (Q, K, V) if not name.endswith(exact)]
    assert [row.prologue == "layer_norm" for row in found] == expected
    text = "not fused: attn.to_q, called before it, takes the tokens as a tensor"
    assert [text in row.reasons for row in found] == [not fused for fused in expected]


@pytest.mark.parametrize("name", ["anyflow", "z-image-omni"])
def test_modulation_by_token_is_a_note(name, ran):
    model = FURTHER[name].build().to(BF16)
    quantize_(model, OrbitQuantConfig("w4a6"), progress=False)
    explanation, found = explain(model, device=SM_86), ran(FURTHER[name], set_grid_(model, "int8"))
    differ = {layer: step for layer, (_, step, _) in said(explanation).items() if step != found[layer][1]}
    assert len(differ) >= 8
    assert set(differ.values()) <= {"layer_norm", "rms_norm"}
    assert "Norms with a modulation of its own for each token (Wan 2.2 TI2V has it) are not fused." in explanation.notes


@every_family
def test_rows_are_those_of_the_plan(family):
    model = family.build()
    found = plan(model, OrbitQuantConfig("w4a4"))
    explanation = explain(model, BF16, "sm_90")
    assert [(row.name, row.label) for row in explanation.layers] == [(row.name, row.label) for row in found.layers]
    assert explanation.groups()[0][:2] == found.groups()[0][:2]
    assert sum(count for _, count, _ in explanation.groups()) == len(found.layers)


Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
NORM = "transformer_blocks.0.norm2"
UP, DOWN = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"


def offload(*names):
    def change(model):
        for name in names:
            add_hook_to_module(model.get_submodule(name), ModelHook())

    return change


def offload_leaves(model):
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def offload_connect_and_undo(model):
    fusion.disconnect(model)
    offload(NORM)(model)
    fusion.connect(model)
    remove_hook_from_module(model.transformer_blocks[0].norm2)


def put(name, **values):
    def change(model):
        vars(model.get_submodule(name)).update(values)

    return change


def with_affine_norm(model):
    norm = nn.LayerNorm(64, eps=1e-6, dtype=BF16)
    model.transformer_blocks[0].norm2 = norm
    fusion.connect(model)


def with_norm_in_fp32(model):
    model.layers[0].ffn_norm1.float()


def with_norm_that_has_no_weight(model):
    model.layers[0].ffn_norm1.weight = None


def with_hook(model):
    model.transformer_blocks[0].norm2.register_forward_hook(lambda *_: None)


def without_sibling(model):
    model.transformer_blocks[0].attn.to_k = nn.Linear(64, 64, dtype=BF16)


def with_copied_layer(model):
    model.original = [model.transformer_blocks[0].attn.to_q]
    model.transformer_blocks[0].attn.to_q = copy.copy(model.transformer_blocks[0].attn.to_q)


def with_another_grid(model):
    model.transformer_blocks[0].attn.to_k.set_grid("e4m3", False)


def with_cached_weight(model):
    model.transformer_blocks[0].attn.to_q.set_grid("int8", True)


def with_another_bias(model):
    model.transformer_blocks[0].attn.to_q.bias.data = torch.zeros(64)


def with_adapters(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))


def with_adapter_and_apart(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for layer in model.modules():
        if isinstance(layer, OrbitLinear):
            layer.siblings = None


def exactly(model):
    set_grid_(model, "exact")


def disconnected(model):
    fusion.disconnect(model)


OFFLOADED = "not shared: the layer or a sibling is offloaded by itself"
CHANGES = {
    "forced": ("flux", exactly, UP, "exact: set_grid_ asks for it; int8 is the fastest of cuda sm_86"),
    "exact, before": ("flux", exactly, UP, "not fused: layers that run exactly take no step before them"),
    "exact, siblings": ("flux", exactly, Q, "not shared: layers that run exactly encode for themselves"),
    "offloaded": ("flux", offload(UP), UP, "not fused: the layer is offloaded by itself"),
    "offloaded sibling": ("flux", offload(K), Q, OFFLOADED),
    "offloaded leaves": ("flux", offload_leaves, V, OFFLOADED),
    "offloaded norm": ("flux", offload(NORM), UP, "not fused: LayerNorm is offloaded by itself"),
    "not replaced": (
        "flux", offload_connect_and_undo, UP,
        "not fused: LayerNorm was not replaced when the model was quantized (it was offloaded, perhaps)",
    ),
    "own forward": (
        "flux", put(NORM, forward=lambda x: x), UP,
        "not fused: LayerNorm was given another forward pass, as hooks of other libraries do",
    ),
    "hook": ("flux", with_hook, UP, "not fused: a hook is registered on LayerNorm"),
    "epsilon": (
        "z-image", put("layers.0.ffn_norm1", eps=1e-6), "layers.0.feed_forward.w1",
        "not fused: RMSNorm has epsilon 1e-06; the kernel's is 1e-05",
    ),
    "affine": ("flux", with_affine_norm, UP, "not fused: LayerNorm has a weight of its own"),
    "norm in fp32": (
        "z-image", with_norm_in_fp32, "layers.0.feed_forward.w2",
        "exact: inputs are fp32, since the weight of a norm before is not bf16; kernels take bf16 and fp16",
    ),
    "norm's weight": (
        "z-image", with_norm_that_has_no_weight, "layers.0.feed_forward.w3", "not fused: RMSNorm has no weight",
    ),
    "GELU": (
        "flux", put("transformer_blocks.0.ff.net.0", approximate="none"), DOWN,
        "not fused: GELU is not the tanh approximation",
    ),
    "after a tensor": (
        "flux", without_sibling, V, "not fused: attn.to_k, called before it, takes the tokens as a tensor",
    ),
    "after an adapter": (
        "flux", with_adapter_and_apart, V, "not fused: attn.to_q, called before it, takes the tokens as a tensor",
    ),
    "sibling gone": ("flux", without_sibling, Q, "not shared: a sibling is gone"),
    "copy": ("flux", with_copied_layer, Q, "not shared: the layer is a copy whose siblings are those of another"),
    "grids": ("flux", with_another_grid, Q, "not shared: a sibling runs on another grid"),
    "disconnected": ("flux", disconnected, Q, "not shared with attn.to_k, attn.to_v: they are not connected"),
    "cached": ("flux", with_cached_weight, Q, "cache_decoded: the decoded weight is kept, a byte each"),
    "sibling cached": (
        "flux", with_cached_weight, K, "siblings are decoded and multiplied one by one: one has cache_decoded",
    ),
    "biases": (
        "flux", with_another_bias, K,
        "siblings are decoded and multiplied one by one: their biases are not all bf16 or all fp16",
    ),
    "adapter": (
        "flux", with_adapters, Q,
        "adapter: it takes the tokens as a tensor, so the step before runs once more in torch",
    ),
    "adapter alone": (
        "flux", with_adapters, "transformer_blocks.0.attn.to_out.0",
        "adapter: its own matrices are multiplied beside the layer",
    ),
}  # fmt: skip
"""Family, what is done to its quantized model, a layer, and what is said of it."""


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_changed_is_said_and_is_what_runs(case, ran):
    name, change, layer, reason = CHANGES[case]
    model = quantized(name)
    change(model)
    explanation = explain(model, device=SM_86)
    assert reason in rows(explanation)[layer].reasons
    assert not any(row.reasons for row in explain(quantized(name), device=SM_86).layers)
    assert said(explanation) == ran(FAMILIES[name], model)


def test_layers_that_diffusers_has_fused_are_not_run(ran):
    model = quantized("flux")
    model.fuse_qkv_projections()
    found, called = rows(explain(model, device=SM_86)), ran(FAMILIES["flux"], model)
    for name, made in ((K, "to_qkv"), (K.replace("to_k", "add_k_proj"), "to_added_qkv")):
        assert called[name] == ("exact", "", 0)  # not at all
        assert (found[name].route, found[name].siblings) == ("not run", 0)
        assert found[name].reasons == (f"not run: fuse_projections has put its weight into {made}, in full precision",)
        assert found[f"{name.rpartition('.')[0]}.{made}"].route == "torch"


def test_an_unknown_norm(monkeypatch, ran):
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x * self.weight)
    monkeypatch.setattr(fusion, "_known", functools.cache(fusion._known.__wrapped__))
    with pytest.warns(UserWarning, match="RMSNorm is not as orbitdit knows it"):
        model = quantized("z-image")
    explanation = explain(model, device=SM_86)
    assert rows(explanation)["layers.0.attention.to_q"].reasons == ("not fused: RMSNorm is not as orbitdit knows it",)
    assert said(explanation) == ran(FAMILIES["z-image"], model)


def test_a_sibling_on_another_device():
    model = quantized("flux")
    model.transformer_blocks[0].attn.to_k.to("meta")
    assert "not shared: a sibling is on another device" in rows(explain(model))[Q].reasons


# Reasons that need no run.


@pytest.mark.parametrize(
    ("options", "layer", "reasons"),
    [
        (
            {"bits": "w4a16"}, DOWN,
            ("exact: tokens are not quantized (A16)", "not fused: layers that run exactly take no step before them"),
        ),
        ({"bits": "w4a8"}, K.replace("to_k", "to_out.0"),
         ("exact: codes of more than 6 bits have more levels than a grid (W4A8)",)),
        ({"rules": (("*.to_k", "w4a6"),)}, K,
         ("not shared with attn.to_q, attn.to_v: tokens are encoded otherwise there",)),
        ({"rules": (("*.to_k", "w4a6"),)}, Q, ("not shared with attn.to_k: tokens are encoded otherwise there",)),
        ({"rules": (("*.to_k", "w6a4"),)}, Q,
         ("siblings are decoded and multiplied one by one: their weights have different codes",)),
    ],
)  # fmt: skip
def test_reasons_of_a_configuration(options, layer, reasons):
    assert rows(on_meta("flux", **options))[layer].reasons == reasons


def test_siblings_are_counted_without_those_that_encode_otherwise():
    found = rows(on_meta("flux", rules=(("*.to_k", "w4a6"),)))
    assert [found[name].siblings for name in (Q, K, V)] == [1, 0, 1]
    assert {row.siblings for name, row in rows(on_meta("flux")).items() if "single" in name} == {0, 3}


class Block(nn.Module):
    """Layers that no kernel takes, each for its own reason, and one that a kernel takes."""

    def __init__(self):
        super().__init__()
        self.odd, self.narrow = nn.Linear(40, 64), nn.Linear(64, 60)
        self.wide, self.power = nn.Linear(24576, 64), nn.Linear(8192, 64)
        self.good = nn.Linear(12288, 512)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))


def unknown_model():
    with torch.device("meta"):
        return Model().to(BF16)


def test_shapes_that_no_kernel_takes():
    explanation = explain(unknown_model(), device="sm_90", config=OrbitQuantConfig("w4a4", rules=(("*", "quantize"),)))
    found = {row.name.rpartition(".")[2]: row.reasons for row in explanation.layers}
    assert found == {
        "odd": ("exact: 40 inputs are no multiple of 16",),
        "narrow": ("exact: 60 outputs are no multiple of 16",),
        "wide": ("exact: 24,576 inputs are more than the 24,064 that kernels take",),
        "power": ("exact: kernels have no Hadamard blocks of 8,192 (for 8,192 inputs)",),
        "good": ("few tokens: up to 2,944 of them, scales are applied by a kernel after the product",),
    }
    assert {row.route for row in explanation.layers} == {"exact", "e4m3 kernel"}
    assert explanation.notes[0] == (
        "Model is of no known family: its layers share no inputs, and its norms are not fused."
    )


@pytest.mark.parametrize(("bits", "few"), [("w4a4", None), ("w3a4", 128)])
def test_few_tokens_are_counted_with_all_that_is_multiplied_at_once(bits, few):
    """96 tiles of 128 x 128 are needed: 3 x 6,144 rows have 144 at any number of tokens, 6,144 rows have 48."""
    with init_empty_weights():
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=0, num_attention_heads=48).to(BF16)
    config = OrbitQuantConfig("w4a4", rules=(("*.to_k", bits),))
    reasons = [reason for reason in rows(explain(model, device="sm_90", config=config))[Q].reasons if "few" in reason]
    text = f"few tokens: up to {few} of them, scales are applied by a kernel after the product"
    assert reasons == ([] if few is None else [text])


@pytest.mark.parametrize(
    ("device", "dtype", "route", "reason"),
    [
        ("sm_90", BF16, "e4m3 kernel", None),
        ("cuda sm_89", torch.float16, "e4m3 kernel", None),
        ("sm_120", BF16, "e4m3 kernel", None),
        ("sm_80", BF16, "int8 kernel", None),
        ("sm_90", torch.float32, "exact", "exact: inputs are fp32; kernels take bf16 and fp16"),
        ("sm_75", BF16, "exact",
         "exact: no kernels for cuda sm_75: an NVIDIA GPU of compute capability 8.0 or newer is needed"),
        ("mps", BF16, "exact", "exact: no kernels for mps: an NVIDIA GPU of compute capability 8.0 or newer is needed"),
        ("cpu", BF16, "int8 kernel", "not fused: kernels of a CPU take no step before them"),
        ("slow cpu", BF16, "exact", "exact: int8 products of this CPU are not both exact and fast"),
    ],
)  # fmt: skip
def test_devices_and_dtypes(device, dtype, route, reason, monkeypatch):
    grids = ("exact", "int8", "e4m3") if device == "slow cpu" else ("int8", "exact", "e4m3")
    monkeypatch.setattr(fallbacks, "device_grids", lambda device: grids)
    explanation = explain(FAMILIES["flux"].build(), dtype, device.removeprefix("slow "))
    row = rows(explanation)[UP]
    assert (row.route, row.prologue) == (route, "layer_norm" if reason is None else "")
    assert not row.reasons if reason is None else reason in row.reasons
    assert explanation.dtype == {BF16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    no_fp8 = [note for note in explanation.notes if "FP8" in note]
    assert no_fp8 == (["cuda sm_80 has no FP8: e4m3 needs compute capability 8.9."] if device == "sm_80" else [])


def test_left_out_the_device_and_the_dtype_are_the_models(monkeypatch):
    monkeypatch.setattr(fallbacks, "device_grids", lambda device: ("int8", "exact", "e4m3"))
    for model in (FAMILIES["flux"].build(), FAMILIES["flux"].build().to(BF16), quantized("flux")):
        explanation = explain(model)
        assert (explanation.device, explanation.dtype) == ("cpu", "fp32" if model.dtype == torch.float32 else "bf16")
        assert rows(explanation)[K].route == ("exact" if model.dtype == torch.float32 else "int8 kernel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain(unknown_model(), config=OrbitQuantConfig("w4a4")).device == "cpu"


@pytest.mark.parametrize(("cuda", "name", "route"), [("12.8", "cuda sm_86", "int8"), (None, "cuda of ROCm", "exact")])
def test_the_gpu_of_this_machine(cuda, name, route, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for device in ("cuda", None):
        explanation = explain(unknown_model(), device=device, config=OrbitQuantConfig("w4a4"))
        assert explanation.device == name
        assert rows(explanation)["blocks.0.good"].route.removesuffix(" kernel") == route


def test_a_grid_that_the_device_does_not_multiply():
    model = set_grid_(quantized("wan"), "e4m3")
    found = rows(explain(model, device="sm_80"))["blocks.0.attn2.to_out.0"]
    assert found.route == "e4m3 kernel"
    assert found.reasons == ("e4m3: set_grid_ asks for it; cuda sm_80 does not multiply it, and will fail",)
    assert not rows(explain(model, device="sm_90"))["blocks.0.attn2.to_out.0"].reasons


def test_int4():
    name = "transformer_blocks.0.norm1.linear"
    found = on_meta("flux")
    assert (rows(found)[name].route, rows(found)[name].reasons) == ("INT4 kernel", ())
    assert "The INT4 kernel takes up to 8 rows, as modulation has; torch multiplies more." in found.notes
    for device in ("cpu", "sm_75"):
        row = rows(on_meta("flux", device=device))[name]
        assert row.route == "INT4 torch"
        assert row.reasons == ("INT4 in torch: its kernel needs an NVIDIA GPU of compute capability 8.0 or newer",)
    model = FAMILIES["flux"].build()
    row = rows(explain(model, torch.float32, "sm_90"))[name]
    assert row.reasons == ("INT4 in torch: inputs are fp32; its kernel takes bf16 and fp16",)
    quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    model.transformer_blocks[0].norm1.linear = int4(nn.Linear(12304, 16))
    row = rows(explain(model, BF16, "sm_90"))[name]
    assert (row.route, row.reasons) == ("INT4 torch", ("INT4 in torch: its kernel takes at most 12,288 inputs",))
    assert all(shape_for(12288, bulk, 99 << 10) for bulk in (True, False))  # what every architecture has


def test_classes_that_no_kernel_computes():
    found = {r for row in on_meta("mochi").layers for r in row.reasons}
    assert "not fused: no kernel computes SwiGLU" in found


def test_notes_of_families():
    assert "Norms in front of the layers of SD3Transformer2DModel are not fused: its family names none." in (
        on_meta("sd3").notes
    )
    assert on_meta("flux").notes[-1] == (
        "Where gradients are enabled nothing is fused, and inputs that require them run exactly. "
        "Under autocast nothing is fused, and inputs that it leaves in fp32 run exactly."
    )
    assert on_meta("flux", "w4a16", modulation_bits=16, device="cpu").notes == ()


def test_every_known_class_has_a_prologue():
    assert {name.rpartition(".")[2] for name in fusion.KNOWN} == set(fallbacks.PROLOGUES)


def test_a_model_that_is_explained_is_as_it_was():
    model = FAMILIES["flux"].build()
    before = [(type(m), {**vars(m)}, {**m._modules}, {**m._parameters}) for m in model.modules()]
    explain(model, BF16, "sm_90")
    after = [(type(m), {**vars(m)}, {**m._modules}, {**m._parameters}) for m in model.modules()]
    for (cls, values, modules, parameters), others in zip(before, after, strict=True):
        assert cls is others[0]
        assert values.keys() == others[1].keys()
        assert modules.keys() == others[2].keys()
        assert all(modules[name] is others[2][name] for name in modules)
        assert all(parameters[name] is others[3][name] for name in parameters)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_bad_use_is_one_line(monkeypatch):
    model = FAMILIES["wan"].build()
    with pytest.raises(
        ConfigError, match=r"device 'tpu9' is unknown; choose cpu, cuda, or an architecture such as sm_90"
    ):
        explain(model, device="tpu9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device 'cuda': no CUDA device is available; name an architecture"):
        explain(model, device="cuda")
    with pytest.raises(ModelError, match="str is no model"):
        explain("flux")
    with pytest.raises(ModelError, match="WanTransformer3DModel is quantized already: leave out config"):
        explain(quantized("wan"), config=OrbitQuantConfig("w4a4"))


TABLE = """
WanTransformer3DModel: bf16 inputs on cuda sm_80

layers                                     n  to    runs         fused       shares  centred  why not
-----------------------------------------------------------------------------------------------------
condition_embedder.time_embedder.linear_1  1  kept  torch
condition_embedder.time_embedder.linear_2  1  kept  torch
condition_embedder.time_proj               1  kept  torch
condition_embedder.text_embedder.linear_1  1  kept  torch
condition_embedder.text_embedder.linear_2  1  kept  torch
blocks.*.attn1.to_q                        2  W4A4  int8 kernel  layer_norm       2
blocks.*.attn1.to_k                        2  W4A4  int8 kernel  layer_norm       2
blocks.*.attn1.to_v                        2  W4A4  int8 kernel  layer_norm       2
blocks.*.attn1.to_out.0                    2  W4A4  int8 kernel
blocks.*.attn2.to_q                        2  W4A4  int8 kernel
blocks.*.attn2.to_k                        2  W4A4  int8 kernel                   1
blocks.*.attn2.to_v                        2  W4A4  int8 kernel                   1
blocks.*.attn2.to_out.0                    2  W4A4  int8 kernel
blocks.*.ffn.net.0.proj                    2  W4A4  int8 kernel  layer_norm
blocks.0.ffn.net.2                         1  W4A4  int8 kernel  gelu
blocks.1.ffn.net.2                         1  W2A4  int8 kernel  gelu
proj_out                                   1  kept  torch

cuda sm_80 has no FP8: e4m3 needs compute capability 8.9.
Norms with a modulation of its own for each token (Wan 2.2 TI2V has it) are not fused.
Where gradients are enabled nothing is fused, and inputs that require them run exactly. Under
autocast nothing is fused, and inputs that it leaves in fp32 run exactly.
"""


def test_the_table():
    explanation = on_meta("wan", "w4a4", device="sm_80", rules=(("blocks.1.ffn.net.2", "w2a4"),))
    assert str(explanation) == TABLE.strip()


@pytest.mark.parametrize("device", ["sm_90", "cpu"])
def test_the_page_has_what_is_printed(device, monkeypatch):
    monkeypatch.setattr(fallbacks, "device_grids", lambda device: ("int8", "exact", "e4m3"))
    with init_empty_weights():
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True).to(BF16)
    assert f"\n```\n{explain(model, device=device)}\n```\n" in DOCS.read_text()
