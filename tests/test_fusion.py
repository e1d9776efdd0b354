"""Norms and activations inside an encoding: as diffusers' own modules, and where they are left to these."""

import copy
import functools
import inspect
import pickle
import textwrap
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_flux, transformer_wan
from peft import LoraConfig
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

import orbitdit
from encoding_checks import relative
from families import FAMILIES
from orbitdit import OrbitLinear, OrbitQuantConfig, fusion
from orbitdit.model import dequantize_, set_grid_
from orbitdit.ops.linear import cpu
from orbitdit.ops.rotate_encode import reference
from orbitdit.tokens import Modulation, Tokens

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """The CPU stands in for a device with kernels: what precedes an encoding is then the definition's."""
    monkeypatch.setattr("orbitdit.linear.fuses", lambda x: not torch.is_grad_enabled())


@pytest.fixture
def used(monkeypatch):
    """How often each prologue was computed inside an encoding."""
    counts = {}

    def counted(x, prologue, prologue_args):
        counts[prologue] = counts.get(prologue, 0) + 1
        return reference.apply_prologue(x, prologue, prologue_args)

    monkeypatch.setattr(cpu, "apply_prologue", counted)
    return counts


def quantized(name, dtype=torch.bfloat16, bits="w4a6"):
    model = FAMILIES[name].build().to(dtype)
    orbitdit.quantize_(model, OrbitQuantConfig(bits, trellis_states=8), progress=False)
    return set_grid_(model, "int8").eval()


def unfused(model):
    """A copy in which every module is diffusers' own."""
    twin = copy.deepcopy(model)
    fusion.disconnect(twin)
    return twin


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("kernels_everywhere")
def test_fused_blocks_give_what_the_others_give(name, dtype, used):
    family, model = FAMILIES[name], quantized(name, dtype)
    output = family.run(model)
    assert used == family.fused
    used.clear()
    expected = family.run(unfused(model))
    assert not used
    assert relative(output, expected) <= 0.03


@every_family
@pytest.mark.usefixtures("kernels_everywhere")
def test_centred_tokens_are_fused_as_others(name, used):
    """Means are part of the encoding, of what the step gives."""
    family, model = FAMILIES[name], quantized(name, bits="w4a3")
    output = family.run(model)
    assert used == family.fused
    used.clear()
    expected = family.run(unfused(model))
    assert not used
    assert relative(output, expected) <= 0.1


def compiled(family, model):
    """The output of the model with each repeated block compiled as one graph, and the number of graphs."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return lookup_backend("aot_eager")(module, example_inputs)

    torch._dynamo.reset()
    for blocks in (m for m in model.children() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)
    return family.run(model), len(graphs)


@pytest.mark.parametrize("name", ["flux", "z-image", "wan", "cogvideox", "sd3"])
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_compiled_fused_blocks_need_no_more_graphs(name):
    family, model = FAMILIES[name], quantized(name)
    expected, plain = family.run(model), unfused(model)
    output, graphs = compiled(family, model)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert graphs <= compiled(family, plain)[1]


@every_family
def test_on_a_cpu_blocks_run_as_they_were(name, used):
    family, model = FAMILIES[name], quantized(name)
    output = family.run(model)
    assert not used
    assert torch.equal(family.run(unfused(model)), output)


@every_family
def test_blocks_keep_their_classes(name):
    plain, model = FAMILIES[name].build(), quantized(name)
    for (path, module), other in zip(plain.named_modules(), model.modules(), strict=True):
        if path.count(".") == 1:
            assert type(other) is type(module)
        assert isinstance(other, type(module))
    dequantize_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_models_can_be_copied_and_pickled():
    family, model = FAMILIES["flux"], quantized("flux")
    expected = family.run(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(family.run(again), expected)
    before = [type(m) for m in model.modules()]
    fusion.connect(model)
    assert [type(m) for m in model.modules()] == before
    assert max(len(m._forward_pre_hooks) for m in model.modules()) == 1


@pytest.mark.parametrize("removed", [True, False])
@torch.no_grad()
def test_blocks_with_hooks_of_accelerate_can_be_undone(removed):
    family, model = FAMILIES["flux"], quantized("flux")
    for block in model.transformer_blocks:
        for module in (block, block.norm2):
            add_hook_to_module(module, ModelHook())
            if removed:
                remove_hook_from_module(module)
    dequantize_(model)
    plain = FAMILIES["flux"].build().bfloat16().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(family.run(model), family.run(plain))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_modules_whose_hook_of_accelerate_was_removed_are_fused(when, used):
    """It leaves the forward pass of a module's own class in the module, bound to it."""
    family, model = FAMILIES["flux"], quantized("flux")
    expected, counts = family.run(model), dict(used)
    assert "layer_norm" in counts
    if when == "before":
        fusion.disconnect(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
        remove_hook_from_module(module)
    fusion.connect(model)
    used.clear()
    assert torch.equal(family.run(model), expected)
    assert used == counts
    fusion.disconnect(model)
    assert "forward" not in vars(model.transformer_blocks[0].norm2)


def with_changed_body(monkeypatch, cls, old, new):
    """Give `cls` a forward pass that differs from its own in one place."""
    source = textwrap.dedent(inspect.getsource(cls.forward))
    assert old in source
    scope = {}
    exec(source.replace(old, new), inspect.getmodule(cls).__dict__, scope)
    monkeypatch.setattr(cls, "forward", scope["forward"])


@pytest.mark.parametrize(
    ("name", "cls", "old", "new"),
    [
        ("flux", transformer_flux.FluxSingleTransformerBlock, "self.proj_mlp(norm_", "self.proj_mlp(4 * norm_"),
        ("flux", transformer_flux.FluxTransformerBlock, "self.norm2(hidden_states)", "self.norm2(hidden_states).abs()"),
        ("wan", transformer_wan.WanTransformerBlock, "self.ffn(norm_hidden_states)", "self.ffn(-norm_hidden_states)"),
    ],
)
@pytest.mark.usefixtures("kernels_everywhere")
def test_a_block_with_another_body_runs_that_body(name, cls, old, new, monkeypatch, used):
    """What diffusers may change tomorrow is computed as it says, and the rest stays fused."""
    family, model = FAMILIES[name], quantized(name)
    before = family.run(model)
    with_changed_body(monkeypatch, cls, old, new)
    used.clear()
    output = family.run(model)
    assert 0 < used["layer_norm"] < family.fused["layer_norm"]
    assert relative(output, family.run(unfused(model))) <= 0.03
    assert relative(output, before) > 0.05


@pytest.mark.usefixtures("kernels_everywhere")
def test_an_unknown_norm_runs_unfused_with_one_warning(monkeypatch, used):
    def forward(self, hidden_states):
        return hidden_states * hidden_states.square().mean(-1, keepdim=True).add(self.eps).rsqrt() * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)
    monkeypatch.setattr(fusion, "_known", functools.cache(fusion._known.__wrapped__))
    family, model = FAMILIES["z-image"], FAMILIES["z-image"].build().bfloat16()
    with pytest.warns(UserWarning, match=r"RMSNorm is not as orbitdit knows it: it runs unfused") as caught:
        orbitdit.quantize_(model, OrbitQuantConfig("w4a6"), progress=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orbitdit.quantize_(FAMILIES["z-image"].build().bfloat16(), OrbitQuantConfig("w4a6"), progress=False)
    output = family.run(set_grid_(model, "int8"))
    assert used == {"silu": 4}
    assert relative(output, family.run(unfused(model))) <= 0.03


def test_a_module_of_another_library_is_left_alone():
    class GELU(nn.Module):
        def forward(self, tokens):
            return tokens

    model = nn.Sequential(GELU())
    fusion.connect(model)
    assert type(model[0]) is GELU


def with_erf(model):
    for block in model.transformer_blocks:
        block.ff.net[0].approximate = block.ff_context.net[0].approximate = "none"
    for block in model.single_transformer_blocks:
        block.act_mlp = nn.GELU()


def with_exact_layers(model):
    set_grid_(model, "exact")


def with_norms_of_another_epsilon(model):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-6


def with_norms_in_fp32(model):
    for block in model.layers:
        block.ffn_norm1.float()


@pytest.mark.parametrize(
    ("name", "change", "left"),
    [
        ("flux", with_erf, {"layer_norm": 10}),
        ("flux", with_exact_layers, {}),
        ("z-image", with_exact_layers, {}),
        ("z-image", with_norms_of_another_epsilon, {"silu": 4}),
        ("z-image", with_norms_in_fp32, {"silu": 2, "rms_norm": 6}),
        ("wan", with_exact_layers, {}),
    ],
)
@pytest.mark.usefixtures("kernels_everywhere")
def test_what_kernels_do_not_compute_is_left_to_diffusers(name, change, left, used):
    family, model = FAMILIES[name], quantized(name)
    change(model)
    output = family.run(model)
    assert used == left
    assert relative(output, family.run(unfused(model))) <= 0.03


@pytest.mark.parametrize("name", ["flux", "z-image", "wan"])
@pytest.mark.usefixtures("kernels_everywhere")
def test_adapters_get_the_normalized_tokens(name, used):
    family, model = FAMILIES[name], quantized(name)
    targets = ["to_q", "net.2", "proj_mlp", "w3"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    output = family.run(model)
    assert used  # by the quantized layers inside
    assert relative(output, family.run(unfused(model))) <= 0.03


@pytest.mark.usefixtures("kernels_everywhere")
def test_hooks_see_tensors_or_what_acts_as_one(used):
    family, model = FAMILIES["flux"], quantized("flux")
    block, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    expected = family.run(model)
    plain = unfused(model)
    for path in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm2",
                 "single_transformer_blocks.0.norm", "single_transformer_blocks.0.act_mlp"):  # fmt: skip
        seen = [[], []]
        for which, each in enumerate((model, plain)):
            module = each.get_submodule(path)
            handles = [
                module.register_forward_pre_hook(lambda m, args, to=seen[which]: to.append(args[0].float().clone())),
                module.register_forward_hook(lambda m, args, y, to=seen[which]: to.append(
                    (y[0] if isinstance(y, tuple) else y).float().clone())),
            ]  # fmt: skip
            output = family.run(each)
            for handle in handles:
                handle.remove()
        assert relative(output, expected) <= 0.03
        for ours, theirs in zip(*seen, strict=True):
            assert relative(ours, theirs) <= 0.05
    assert type(block.norm2)(4).eps
    assert single is model.single_transformer_blocks[0]


@pytest.mark.usefixtures("kernels_everywhere")
def test_another_attention_processor_gets_the_tokens(used):
    family, model = FAMILIES["flux"], quantized("flux")
    expected = family.run(model)

    class Own(type(model.transformer_blocks[0].attn.processor)):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return super().__call__(attn, hidden_states * 1.0, *args, **kwargs)

    model.set_attn_processor(Own())
    assert relative(family.run(model), expected) <= 0.03


def z_image_inputs(count, dtype=torch.bfloat16):
    """What a block of the small Z-Image takes for a batch of 2: tokens, no mask, no rotary embedding, modulation."""
    generator = torch.Generator().manual_seed(2)
    x, adaln = torch.randn(2, count, 96, generator=generator), torch.randn(2, 96, generator=generator)
    return x.to(dtype), None, None, adaln.to(dtype)


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_z_image_modulates_each_of_a_batch_by_its_own(used):
    model, given = quantized("z-image"), z_image_inputs(5)
    output = model.layers[0](*given)
    assert used == {"rms_norm": 2, "silu": 1}
    assert relative(output, unfused(model).layers[0](*given)) <= 0.03


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_z_image_with_modulation_by_token_is_left_to_diffusers(used):
    model, (x, *_, adaln) = quantized("z-image"), z_image_inputs(4)
    given = x, None, None, None, torch.arange(4).expand(2, -1) % 2, adaln, 2 * adaln
    output = model.layers[0](*given)
    assert "rms_norm" not in used
    assert relative(output, unfused(model).layers[0](*given)) <= 0.03


def wan_inputs(count, modulation):
    """What a block of the small Wan takes for a batch of 2."""
    generator = torch.Generator().manual_seed(3)
    x, text, temb = (torch.randn(size, generator=generator) for size in ((2, count, 48), (2, 6, 48), modulation))
    return x.bfloat16(), text.bfloat16(), temb, None


@pytest.mark.parametrize(("modulation", "fused"), [((2, 6, 48), 2), ((2, 5, 6, 48), None)])
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_wan_modulates_each_of_a_batch_by_its_own_and_tokens_by_diffusers(modulation, fused, used):
    model, given = quantized("wan"), wan_inputs(5, modulation)
    output = model.blocks[0](*given)
    assert used.get("layer_norm") == fused
    assert relative(output, unfused(model).blocks[0](*given)) <= 0.03


def test_what_precedes_an_encoding_is_what_z_image_computes():
    block, (x, *_, scale) = FAMILIES["z-image"].build().layers[0], z_image_inputs(3, torch.float32)
    torch.nn.init.normal_(block.attention_norm1.weight)
    expected = block.attention_norm1(x) * (1 + scale[:, None])
    found = reference.apply_prologue(x.view(6, 96), "rms_norm", (block.attention_norm1.weight[None], scale))
    torch.testing.assert_close(found.view(2, 3, 96), expected)
    found = reference.apply_prologue(x.view(6, 96), "rms_norm", (block.attention_norm1.weight[None],))
    torch.testing.assert_close(found.view(2, 3, 96), block.attention_norm1(x))
    found = reference.apply_prologue(x[0], "silu", (x[1],))
    torch.testing.assert_close(found, block.feed_forward._forward_silu_gating(x[0], x[1]))


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("part", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.usefixtures("kernels_everywhere")
def test_gradients_take_the_original_path(part, wanted, used):
    """Those of prompts that are learned, too: the picture's tokens need no gradient in the first block."""
    model = quantized("flux")
    block, width = getattr(model, part)[0], model.config.num_attention_heads * model.config.attention_head_dim
    inputs = [torch.randn(1, count, width).bfloat16() for count in (4, 3)] + [torch.randn(1, width).bfloat16()]
    inputs[wanted].requires_grad_()
    outputs = block(*inputs)
    assert not used
    sum(output.float().sum() for output in outputs).backward()
    found, inputs[wanted].grad = inputs[wanted].grad, None
    expected = getattr(unfused(model), part)[0](*inputs)
    assert all(map(torch.equal, outputs, expected))
    sum(output.float().sum() for output in expected).backward()
    assert torch.equal(inputs[wanted].grad, found)


@pytest.mark.usefixtures("kernels_everywhere")
def test_autocast_is_left_to_diffusers(used):
    family, model = FAMILIES["flux"], quantized("flux")
    with torch.autocast("cpu", torch.bfloat16):
        output = family.run(model)
        assert "layer_norm" not in used
        assert torch.equal(family.run(unfused(model)), output)


# What the values are.


def test_tokens_act_as_their_tensor():
    x = torch.randn(2, 3, 8)
    tokens = Tokens(x, lambda: x * 2, "layer_norm")
    assert tokens.shape == tokens.size() == (2, 3, 8)
    assert (tokens.size(-1), tokens.ndim, tokens.dim(), len(tokens)) == (8, 3, 3, 2)
    assert tokens.dtype == torch.float32
    for function in (
        lambda t: t + 1, lambda t: 1 + t, lambda t: t - 1, lambda t: 1 - t, lambda t: t / 2, lambda t: -t,
        lambda t: t @ t.transpose(1, 2), lambda t: t[0], lambda t: t.mean(1), lambda t: torch.cat([t, x], 1),
        lambda t: torch.cat([x, t], -1), lambda t: torch.stack([t, t]), lambda t: nn.functional.linear(t, x[0]),
        lambda t: t * x, lambda t: x * t, lambda t: x + t, lambda t: nn.functional.dropout(t, 0.5, False),
        lambda t: t.to(torch.float64), lambda t: t.type_as(x.half()), lambda t: t.reshape(6, 8), lambda t: t * 3,
    ):  # fmt: skip
        found = function(Tokens(x, lambda: x * 2, "layer_norm"))
        expected = function(x * 2)
        found = found.tensor() if isinstance(found, Tokens) else found
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_modulation_acts_as_its_tensor():
    m = torch.randn(2, 8)
    for function in (
        lambda t: 1 + t, lambda t: 1 + (1 + t), lambda t: t[:, None], lambda t: (1 + t)[:, None], lambda t: t.tanh(),
        lambda t: t.unsqueeze(1) * m, lambda t: m * t, lambda t: m + (1 + t), lambda t: nn.functional.silu(t),
        lambda t: t.chunk(2, dim=1)[1], lambda t: (1.0 + t).chunk(2, dim=1)[0], lambda t: t + 1, lambda t: 2 + t,
    ):  # fmt: skip
        found = function(Modulation(m))
        found = found.tensor() if isinstance(found, Modulation) else found
        assert torch.equal(found, function(m))


def test_a_step_that_is_not_understood_is_done_by_its_own_code():
    x = torch.randn(2, 3, 8)
    norm = lambda: Tokens(x, lambda: x * 2, "layer_norm")  # noqa: E731
    rows = torch.randn(2, 1, 8)
    assert isinstance(norm() * rows, Tokens)
    assert isinstance(norm() * rows + rows, Tokens)
    assert isinstance(norm() + rows, torch.Tensor)  # a shift without a scale
    assert isinstance(norm() * rows * rows, torch.Tensor)
    assert isinstance(norm() * x, torch.Tensor)  # a scale for each token
    assert isinstance(norm() * 2, torch.Tensor)
    assert (norm() * rows.double()).dtype == torch.float64
    assert torch.equal((norm() * rows + rows).tensor(), x * 2 * rows + rows)


def test_a_layer_given_a_tensor_gives_a_tensor():
    model = quantized("flux")
    for name, layer in model.named_modules():
        if isinstance(layer, (OrbitLinear, orbitdit.Int4Linear)):
            with torch.no_grad():
                assert isinstance(layer(torch.randn(2, layer.in_features).bfloat16()), torch.Tensor), name
