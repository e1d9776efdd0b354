"""Caches and other hooks of diffusers, which look blocks up by their classes, on quantized models as on plain ones."""

import copy
import functools

import pytest
import torch
from diffusers import hooks
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from torch import nn

import orbitdit
from encoding_checks import counted, relative
from families import FAMILIES, _fill
from orbitdit import OrbitLinear, OrbitQuantConfig, fusion
from orbitdit.linear import is_offloaded
from orbitdit.model import dequantize_, packed_layers, set_grid_
from orbitdit.ops.linear import cpu
from orbitdit.ops.rotate_encode import reference
from orbitdit.tokens import Tokens, TokensTensor

STEPS = 4


class Timestep:
    """The timestep that caches ask for: outside all their ranges at the first step, inside later."""

    now = 999

    def __call__(self):
        return self.now


def faster(timestep, skips):
    within = (-1, 900 if skips else 0)
    return hooks.FasterCacheConfig(
        is_guidance_distilled=True,
        tensor_format="BCFHW",
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=within,
        current_timestep_callback=timestep,
        attention_weight_callback=lambda module: 0.3,
    )


def broadcast(timestep, skips):
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 900 if skips else 101),
        cross_attention_timestep_skip_range=(100, 900 if skips else 101),
        current_timestep_callback=timestep,
    )


def magnitudes(timestep, skips):
    if not skips:
        return hooks.MagCacheConfig(calibrate=True, num_inference_steps=2 * STEPS)
    return hooks.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, threshold=1.0)


CACHES = {
    "first block": lambda timestep, skips: hooks.FirstBlockCacheConfig(threshold=99.0 if skips else 0.0),
    "magnitudes": magnitudes,
    "taylor": lambda timestep, skips: hooks.TaylorSeerCacheConfig(
        disable_cache_before_step=1 if skips else 99,
        cache_interval=3,
        cache_identifiers=[r"transformer_blocks\.\d+\.attn", r"blocks\.\d+\.(attn1|ffn)"],
    ),
    "taylor, lite": lambda timestep, skips: hooks.TaylorSeerCacheConfig(
        disable_cache_before_step=1 if skips else 99, cache_interval=3, use_lite_mode=True
    ),
    "taylor, layers": lambda timestep, skips: hooks.TaylorSeerCacheConfig(
        disable_cache_before_step=1 if skips else 99, cache_interval=3, cache_identifiers=[r".*\.to_q", r".*net\.2"]
    ),
    "broadcast": broadcast,
    "faster": faster,
    "sea": lambda timestep, skips: hooks.SeaCacheConfig(threshold=9.0 if skips else 0.0),
    "text": lambda timestep, skips: hooks.TextKVCacheConfig(),
}
ASK_LAYERS = ("taylor, layers",)
"""Their hooks lie on quantized layers, which compute for themselves then."""
NEVER_SKIP = {("flux", "sea"), ("flux", "text"), ("wan", "text")}
"""Caches that are made for models of other kinds."""
every_cache = pytest.mark.parametrize("cache", CACHES)
every_model = pytest.mark.parametrize("name", ["flux", "wan"])


@pytest.fixture
def timestep():
    return Timestep()


@pytest.fixture(params=[True, False], ids=["kernels", "cpu"])
def kernels(request):
    return request.param


@pytest.fixture
def used(kernels, monkeypatch):
    """How often each prologue was computed inside an encoding, where the CPU stands in for a device with kernels."""
    counts = {}

    def apply(x, prologue, prologue_args):
        counts[prologue] = counts.get(prologue, 0) + 1
        return reference.apply_prologue(x, prologue, prologue_args)

    monkeypatch.setattr(cpu, "apply_prologue", apply)
    monkeypatch.setattr("orbitdit.linear.fuses", lambda x: kernels and not torch.is_grad_enabled())
    return counts


@functools.cache
def quantized(name):
    model = FAMILIES[name].build().bfloat16()
    orbitdit.quantize_(model, OrbitQuantConfig("w4a6", trellis_states=8), progress=False)
    return set_grid_(model, "int8")


@torch.no_grad()
def run(name, model, timestep=None, count=STEPS):
    """Outputs of a few steps, whose timesteps and noise differ."""
    outputs = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        inputs = {key: _fill(value, generator, model) for key, value in FAMILIES[name].inputs().items()}
        inputs["timestep"] = inputs["timestep"] - (0.1 if inputs["timestep"].is_floating_point() else 20) * step
        if timestep is not None:
            timestep.now = 999 if step == 0 else 600 - step
        with model.cache_context("cond", step_index=step, num_inference_steps=count, sigma=1 - step / count):
            outputs.append(model(**inputs, return_dict=False)[0])
    return outputs


def same(found, expected):
    return [torch.equal(*pair) for pair in zip(found, expected, strict=True)]


@pytest.fixture(scope="module")
def baselines():
    return {}


@pytest.fixture
def baseline(name, used, kernels, baselines):
    """Outputs without a cache, and how often a prologue was computed for them."""
    if (name, kernels) not in baselines:
        baselines[name, kernels] = run(name, quantized(name)), dict(used)
    used.clear()
    return baselines[name, kernels]


@every_model
@every_cache
def test_a_cache_that_skips_nothing_changes_nothing(name, cache, baseline, used, timestep):
    model, (expected, fused) = copy.deepcopy(quantized(name)), baseline
    model.enable_cache(CACHES[cache](timestep, False))
    found = run(name, model, timestep)
    if cache in ASK_LAYERS:
        assert max(map(relative, found, expected)) <= 0.03
        assert not fused or 0 < used["layer_norm"] < fused["layer_norm"]
    else:
        assert all(same(found, expected))
        assert used == fused
    used.clear()
    model.disable_cache()
    assert torch.equal(run(name, model, count=1)[0], expected[0])
    assert used == {prologue: number // STEPS for prologue, number in fused.items()}


@every_model
@every_cache
def test_a_cache_skips_what_it_skips_on_other_modules(name, cache, baseline, used, timestep):
    model, plain, (without, fused) = copy.deepcopy(quantized(name)), copy.deepcopy(quantized(name)), baseline
    fusion.disconnect(plain)
    outputs = []
    for each in (model, plain):
        each.enable_cache(CACHES[cache](timestep, True))
        outputs.append(run(name, each, timestep))
    assert max(map(relative, *outputs)) <= 0.03
    assert torch.equal(outputs[0][0], without[0]) or cache in ASK_LAYERS
    skips = (name, cache) not in NEVER_SKIP
    assert all(same(outputs[0], without)) != skips or cache in ASK_LAYERS
    if fused:
        assert 0 < sum(used.values()) < sum(fused.values()) + (not skips)
    model.disable_cache()
    assert torch.equal(run(name, model, count=1)[0], without[0])


def test_every_cache_of_diffusers_is_tried():
    configs = {cls for cls in vars(hooks).values() if isinstance(cls, type) and cls.__name__.endswith("CacheConfig")}
    configs.add(hooks.PyramidAttentionBroadcastConfig)
    assert configs == {type(make(lambda: 0, True)) for make in CACHES.values()}


@every_model
@pytest.mark.parametrize("cache", ["first block", "broadcast", "faster"])
def test_a_model_with_a_cache_can_be_quantized(name, cache, timestep):
    model = FAMILIES[name].build().bfloat16()
    model.enable_cache(CACHES[cache](timestep, False))
    orbitdit.quantize_(model, OrbitQuantConfig("w4a6", trellis_states=8), progress=False)
    set_grid_(model, "int8")
    expected = run(name, quantized(name), count=2)
    assert all(same(run(name, model, timestep, count=2), expected))
    model.disable_cache()
    assert all(same(run(name, model, count=2), expected))


@pytest.mark.parametrize("cache", ["broadcast", "faster"])
@every_model
def test_hooked_attention_still_shares_its_inputs(name, cache, timestep):
    model = copy.deepcopy(quantized(name))
    _, expected = counted(lambda: run(name, model, count=1))
    model.enable_cache(CACHES[cache](timestep, False))
    _, number = counted(lambda: run(name, model, timestep, count=1))
    assert number == expected
    dequantize_(model)
    assert all(output.isfinite().all() for output in run(name, model, timestep))


@pytest.mark.parametrize("cache", ["first block", "faster"])
def test_compiled_blocks_with_a_cache(cache, timestep):
    name, model = "wan", copy.deepcopy(quantized("wan"))
    expected = run(name, model, count=2)
    model.enable_cache(CACHES[cache](timestep, False))
    torch._dynamo.reset()
    model.blocks[0].compile(backend="aot_eager")
    assert all(same(run(name, model, timestep, count=2), expected))


# Other hooks.


def skip(**settings):
    return lambda model: hooks.apply_layer_skip(model, hooks.LayerSkipConfig([1], **settings))


def offload(kind):
    device = torch.device("cpu")
    return lambda model: model.enable_group_offload(device, device, offload_type=kind, num_blocks_per_group=1)


OTHERS = {
    "skip blocks": skip(),
    "skip attention": skip(skip_ff=False),
    "skip feed-forwards": skip(skip_attention=False),
    "skip scores": skip(skip_attention=False, skip_attention_scores=True, skip_ff=False),
    "drop nothing": skip(skip_ff=False, dropout=0.0),
    "smoothed energy": lambda model: _apply_smoothed_energy_guidance_hook(
        model, SmoothedEnergyGuidanceConfig([0, 1]), 1.0
    ),
    "blocks offloaded": offload("block_level"),
    "layers offloaded": offload("leaf_level"),
}
SUPPORTED = {
    "flux": {"skip blocks", "skip feed-forwards", "blocks offloaded", "layers offloaded"},
    "wan": {"skip blocks", "skip feed-forwards", "smoothed energy", "blocks offloaded", "layers offloaded"},
    "z-image": set(OTHERS) - {"skip blocks"},
    "cogvideox": {"skip blocks", "skip feed-forwards", "smoothed energy", "blocks offloaded", "layers offloaded"},
}
"""What diffusers 0.42 supports on plain models of these kinds."""


def hooked(model, hook):
    OTHERS[hook](model)
    return model


@pytest.mark.parametrize(("name", "hook"), [(name, hook) for name in SUPPORTED for hook in OTHERS])
@pytest.mark.usefixtures("used")
def test_other_hooks_do_what_they_do_on_plain_models(name, hook):
    family = FAMILIES[name]
    if hook not in SUPPORTED[name]:
        with pytest.raises((AttributeError, KeyError, ValueError)):
            family.run(hooked(family.build(), hook))
        return
    model, plain = copy.deepcopy(quantized(name)), copy.deepcopy(quantized(name))
    fusion.disconnect(plain)
    assert relative(family.run(hooked(model, hook)), family.run(hooked(plain, hook))) <= 0.03


def test_a_layer_whose_hooks_are_gone_shares_again():
    model = copy.deepcopy(quantized("wan"))
    layer = next(layer for _, layer in packed_layers(model) if isinstance(layer, OrbitLinear))
    registry = hooks.HookRegistry.check_if_exists_or_initialize(layer)
    assert not is_offloaded(layer)
    registry.register_hook(hooks.ModelHook(), "own")
    assert is_offloaded(layer)
    registry.remove_hook("own")
    assert not is_offloaded(layer)


def test_tokens_in_a_tensors_clothing():
    """What hooks are given, and what they may do with it."""
    x = torch.randn(2, 3, 8)
    made = []

    def dressed():
        return TokensTensor(Tokens(x, lambda: made.append(1) or x * 2, "layer_norm"))

    value = dressed()
    assert torch.is_tensor(value)
    assert (value.shape, value.dtype, value.device, value.size(0), value.ndim) == (x.shape, x.dtype, x.device, 2, 3)
    assert not made
    for function in (
        lambda t: t + 1, lambda t: t.chunk(2)[1], lambda t: t[0], lambda t: torch.cat([t, x]), lambda t: t.clone(),
        lambda t: t.to(torch.float64), lambda t: nn.functional.layer_norm(t, (8,)), lambda t: t.mul_(1.0),
    ):  # fmt: skip
        assert torch.equal(function(dressed()), function(x * 2))
