"""Blocks whose norms and activations run inside an encoding: as diffusers' own, and when they are left to diffusers."""

import copy
import pickle
from threading import Thread

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from peft import LoraConfig
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

import orbitdit
from encoding_checks import relative
from families import FAMILIES
from orbitdit import OrbitLinear, OrbitQuantConfig, fusion
from orbitdit.kernels import reference
from orbitdit.linear import SharedInput, share_inputs
from orbitdit.model import dequantize_, set_grid_

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """The CPU stands in for a device with kernels: what precedes an encoding is then the definition's."""
    ready = fusion._ready

    class OnCuda:
        is_cuda = True

        def __init__(self, x):
            self.dtype, self.device = x.dtype, x.device

    monkeypatch.setattr(fusion, "_ready", lambda x, *modules: ready(OnCuda(x), *modules))


@pytest.fixture
def used(monkeypatch):
    """How often each thing came before an encoding."""
    counts = {}
    apply = reference.apply_before

    def counted(x, before, extras):
        counts[before] = counts.get(before, 0) + 1
        return apply(x, before, extras)

    monkeypatch.setattr(reference, "apply_before", counted)
    return counts


def quantized(name, dtype=torch.bfloat16):
    model = FAMILIES[name].build().to(dtype)
    orbitdit.quantize_(model, OrbitQuantConfig("w4a6"), progress=False)
    return set_grid_(model, "int8").eval()


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_fused_blocks_give_what_the_others_give(name, dtype, used):
    family, model = FAMILIES[name], quantized(name, dtype)
    output = family.run(model)
    assert used == family.fused
    fusion.unfuse_blocks(model)
    used.clear()
    expected = family.run(model)
    assert not used
    assert relative(output, expected) <= 0.03
    assert all(m.shared_input is None or not m.shared_input.held for m in model.modules() if type(m) is OrbitLinear)


@every_family
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_blocks_with_centred_tokens_are_not_fused(name, used):
    model = FAMILIES[name].build().to(torch.bfloat16)
    orbitdit.quantize_(model, OrbitQuantConfig("w4a3"), progress=False)
    output = FAMILIES[name].run(set_grid_(model, "int8").eval())
    assert not used
    assert output.isfinite().all()


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
    family = FAMILIES[name]
    output, graphs = compiled(family, quantized(name))
    torch.testing.assert_close(output, family.run(quantized(name)), rtol=0, atol=0)
    unfused = quantized(name)
    fusion.unfuse_blocks(unfused)
    assert graphs <= compiled(family, unfused)[1]


def test_on_a_cpu_blocks_run_as_they_were(used):
    family, model = FAMILIES["flux"], quantized("flux")
    expected = family.run(model)
    assert not used
    fusion.unfuse_blocks(model)
    assert torch.equal(family.run(model), expected)


def test_classes_keep_their_names_and_can_be_copied_and_undone():
    model = quantized("flux")
    block = model.transformer_blocks[0]
    assert isinstance(block, FluxTransformerBlock)
    assert type(block) is not FluxTransformerBlock
    assert type(block).__name__ == "FluxTransformerBlock"
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(again) is type(block)
        assert torch.equal(again.ff.net[2].codes, block.ff.net[2].codes)
    orbitdit.fusion.fuse_blocks(model)
    assert type(model.transformer_blocks[0]) is type(block)
    dequantize_(model)
    assert type(model.transformer_blocks[0]) is FluxTransformerBlock
    assert not any(hasattr(m, "unfused") for m in model.modules())


@pytest.mark.parametrize("removed", [True, False])
@torch.no_grad()
def test_blocks_with_hooks_of_accelerate_can_be_undone(removed):
    family, model = FAMILIES["flux"], quantized("flux")
    for block in model.transformer_blocks:
        add_hook_to_module(block, ModelHook())
        if removed:
            remove_hook_from_module(block)
    dequantize_(model)
    plain = FAMILIES["flux"].build().bfloat16().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(family.run(model), family.run(plain))


def test_a_forward_pass_of_other_parameters_is_left_alone():
    class FeedForward(nn.Module):
        def forward(self, tokens):
            return tokens

    model = nn.Sequential(FeedForward())
    fusion.fuse_blocks(model)
    assert type(model[0]) is FeedForward


@pytest.mark.usefixtures("kernels_everywhere")
def test_a_feed_forward_with_another_activation_runs_as_it_was(used):
    """It has the name, the layers and the parameters of Z-Image's."""

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = (
                OrbitLinear.from_linear(nn.Linear(64, 64, bias=False).bfloat16(), 4, 4) for _ in range(3)
            )

        def forward(self, x):
            return self.w2(nn.functional.gelu(self.w1(x)) * self.w3(x))

    model = nn.Sequential(FeedForward())
    x = torch.randn(3, 64).bfloat16()
    expected = model(x)
    fusion.fuse_blocks(model)
    assert torch.equal(model(x), expected)
    assert not used


def with_adapter(model):
    targets = ["to_q", "net.2", "proj_mlp", "w3"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def with_other_processor(model):
    class Own(type(model.transformer_blocks[0].attn.processor)):
        pass

    model.set_attn_processor(Own())


def with_erf(model):
    for block in model.transformer_blocks:
        block.ff.net[0].approximate = block.ff_context.net[0].approximate = "none"
    for block in model.single_transformer_blocks:
        block.act_mlp = nn.GELU()


def with_exact_layers(model):
    set_grid_(model, "exact")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("flux", with_adapter),
        ("flux", with_erf),
        ("flux", with_exact_layers),
        ("z-image", with_adapter),
        ("z-image", with_exact_layers),
        ("wan", with_adapter),
        ("wan", with_exact_layers),
    ],
)
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_what_is_unusual_runs_as_it_was(name, change, used):
    family, model = FAMILIES[name], quantized(name)
    change(model)
    output = family.run(model)
    assert not used
    fusion.unfuse_blocks(model)
    assert torch.equal(family.run(model), output)


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_hooks_see_what_they_are_on(used):
    """A module that is watched runs as diffusers has it, and so does its block; the others stay fused."""
    family, model = FAMILIES["flux"], quantized("flux")
    block, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    for watched in (block.attn.to_q, block.ff.net[2], block.norm2, single.norm, single.act_mlp, single.proj_out):
        seen = []
        handles = [
            watched.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0])),
            watched.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y)),
        ]
        output = family.run(model)
        for handle in handles:
            handle.remove()
        assert len(seen) == 2
        assert used.pop("layer_norm") >= 6
        used.clear()
        assert relative(output, family.run(model)) <= 0.03
        used.clear()


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_another_attention_processor_gets_normalized_tokens(used):
    family, model = FAMILIES["flux"], quantized("flux")
    with_other_processor(model)
    output = family.run(model)
    assert used == {"gelu": 4}  # of the feed-forwards
    fusion.unfuse_blocks(model)
    assert relative(family.run(model), output) <= 0.03


def z_image_inputs(count, dtype=torch.bfloat16):
    """What a block of the small Z-Image takes for a batch of 2: tokens, no mask, no rotary embedding, modulation."""
    generator = torch.Generator().manual_seed(2)
    x, adaln = torch.randn(2, count, 96, generator=generator), torch.randn(2, 96, generator=generator)
    return x.to(dtype), None, None, adaln.to(dtype)


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_z_image_modulates_each_of_a_batch_by_its_own(used):
    block, given = quantized("z-image").layers[0], z_image_inputs(5)
    assert relative(block(*given), block.unfused_forward(*given)) <= 0.03
    assert used == {"rms_norm": 2, "silu": 2}  # the feed-forward's own is left


def with_modulation_by_token(block, x, *others):
    noisy = torch.arange(x.shape[1]).expand(2, -1) % 2
    return x, None, None, None, noisy, others[-1], 2 * others[-1]


def with_norms_of_another_epsilon(block, *given):
    block.attention_norm1.eps = 1e-6
    return given


def with_weights_in_fp32(block, *given):
    block.ffn_norm1.float()
    return given


@pytest.mark.parametrize("change", [with_modulation_by_token, with_norms_of_another_epsilon, with_weights_in_fp32])
@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_blocks_of_z_image_leave_other_norms_to_diffusers(change, used):
    block = quantized("z-image").layers[0]
    given = change(block, *z_image_inputs(4))
    output = block(*given)
    assert "rms_norm" not in used
    fusion.unfuse_blocks(block.feed_forward)
    assert relative(output, block.unfused_forward(*given)) <= 0.03


def wan_inputs(count, modulation):
    """What a block of the small Wan takes for a batch of 2."""
    generator = torch.Generator().manual_seed(3)
    x, text, temb = (torch.randn(size, generator=generator) for size in ((2, count, 48), (2, 6, 48), modulation))
    return x.bfloat16(), text.bfloat16(), temb, None


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_wan_modulates_each_of_a_batch_by_its_own(used):
    block, given = quantized("wan").blocks[0], wan_inputs(5, (2, 6, 48))
    assert relative(block(*given), block.unfused_forward(*given)) <= 0.03
    assert used == {"layer_norm": 2, "gelu": 2}


@pytest.mark.usefixtures("kernels_everywhere")
@torch.no_grad()
def test_modulation_by_token_is_left_to_diffusers(used):
    block, given = quantized("wan").blocks[0], wan_inputs(5, (2, 5, 6, 48))
    assert torch.equal(block(*given), block.unfused_forward(*given))
    assert "layer_norm" not in used


def test_what_precedes_an_encoding_is_what_z_image_computes():
    block, (x, *_, scale) = FAMILIES["z-image"].build().layers[0], z_image_inputs(3, torch.float32)
    torch.nn.init.normal_(block.attention_norm1.weight)
    expected = block.attention_norm1(x) * (1 + scale[:, None])
    found = reference.apply_before(x.view(6, 96), "rms_norm", (block.attention_norm1.weight[None], scale))
    torch.testing.assert_close(found.view(2, 3, 96), expected)
    found = reference.apply_before(x.view(6, 96), "rms_norm", (block.attention_norm1.weight[None],))
    torch.testing.assert_close(found.view(2, 3, 96), block.attention_norm1(x))
    found = reference.apply_before(x[0], "silu", (x[1],))
    torch.testing.assert_close(found, block.feed_forward._forward_silu_gating(x[0], x[1]))


@pytest.mark.usefixtures("kernels_everywhere")
def test_gradients_take_the_original_path(used):
    model = quantized("flux")
    x = (
        torch.randn(1, 4, model.config.num_attention_heads * model.config.attention_head_dim)
        .bfloat16()
        .requires_grad_()
    )
    model.transformer_blocks[0].ff(x).sum().backward()
    assert x.grad is not None
    assert not used


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("part", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.usefixtures("kernels_everywhere")
def test_gradients_of_text_and_modulation_take_the_original_path(part, wanted, used):
    """Prompts that are learned: the picture's tokens need no gradient in the first block."""
    model = quantized("flux")
    block, width = getattr(model, part)[0], model.config.num_attention_heads * model.config.attention_head_dim
    inputs = [
        torch.randn(1, 4, width).bfloat16(),
        torch.randn(1, 3, width).bfloat16(),
        torch.randn(1, width).bfloat16(),
    ]
    inputs[wanted].requires_grad_()
    outputs = block(*inputs)
    assert not used
    sum(output.float().sum() for output in outputs).backward()
    found, inputs[wanted].grad = inputs[wanted].grad, None
    fusion.unfuse_blocks(model)
    expected = block(*inputs)
    assert all(map(torch.equal, outputs, expected))
    sum(output.float().sum() for output in expected).backward()
    assert torch.equal(inputs[wanted].grad, found)


def sharing_layers():
    layers = [OrbitLinear.from_linear(nn.Linear(64, 32, bias=False).bfloat16(), 4, 4) for _ in range(2)]
    for layer in layers:
        layer.set_grid(2, False)
    share_inputs(layers)
    return layers


@torch.no_grad()
def test_what_a_thread_holds_is_its_own():
    """Two threads run one model: what one computes between the other's hold and its calls must not take its place."""
    layers, scale, shift = sharing_layers(), torch.ones(1, 64).bfloat16(), torch.ones(1, 64).bfloat16()
    shared, x = layers[0].shared_input, torch.randn(3, 64).bfloat16()

    def run(tokens, between=lambda: None):
        shared.hold(tokens, "layer_norm", scale, shift)
        first = layers[0](tokens)
        between()
        return first, layers[1](tokens)

    def other():
        thread = Thread(target=run, args=(torch.randn(3, 64).bfloat16(),))
        thread.start()
        thread.join()

    assert all(map(torch.equal, run(x, other), run(x)))
    assert not shared.held


def test_held_outputs_are_of_the_modulated_tokens():
    layers = sharing_layers()
    x, scale, shift = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    shared = layers[0].shared_input
    assert isinstance(shared, SharedInput)
    expected = [
        layer(reference.apply_before(x.view(6, 64), "layer_norm", (scale, shift)).view(2, 3, 64)) for layer in layers
    ]
    shared.held.clear()
    shared.hold(x, "layer_norm", scale, shift)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert not shared.held
    assert not torch.equal(layers[0](x), expected[0])


@pytest.mark.parametrize("misuse", ["twice", "changed"])
def test_what_is_held_is_never_taken_for_something_else(misuse):
    layers = [OrbitLinear.from_linear(nn.Linear(64, 32).bfloat16(), 4, 4) for _ in range(2)]
    for layer in layers:
        layer.set_grid(2, False)
    share_inputs(layers)
    x, ones = torch.randn(3, 64).bfloat16(), torch.ones(1, 64).bfloat16()
    layers[0].shared_input.hold(x, "layer_norm", ones, ones)
    if misuse == "twice":
        layers[0](x)
    else:
        x.add_(1)
    with pytest.raises(RuntimeError, match="held for one call of each layer"):
        layers[0](x)


def test_the_norms_of_z_image_are_those_that_the_kernel_has():
    block = FAMILIES["z-image"].build().layers[0]
    norm, x = block.attention_norm1, torch.ones(2, 96)
    assert fusion._plain_rms_norm(norm, x)
    assert fusion._plain_rms_norm(block.ffn_norm1, x)
    assert not fusion._plain_rms_norm(nn.RMSNorm(96, eps=1e-6), x)
    assert not fusion._plain_rms_norm(norm, x.half())
    assert not fusion._plain_rms_norm(norm.to("meta"), x)  # its weight is elsewhere until it is called


def test_the_norms_of_flux_are_those_that_the_kernel_has():
    model = FAMILIES["flux"].build()
    assert all(fusion._plain_norm(block.norm2) for block in model.transformer_blocks)
    assert not fusion._plain_norm(nn.LayerNorm(8))
    assert not fusion._plain_norm(nn.LayerNorm(8, elementwise_affine=False))
