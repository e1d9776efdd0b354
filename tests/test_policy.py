"""Plans of the real models against the published counts, and the rules of the policy one by one."""

import functools
import re
from dataclasses import replace
from typing import NamedTuple

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from families import every_family
from orbitdit import ConfigError, OrbitQuantConfig, plan
from orbitdit.model import quantize_
from orbitdit.policy import Layer, as_stored, build_plan

W4A4 = OrbitQuantConfig("w4a4")
ATTENTION = "to_q to_k to_v to_out.0"


class Real(NamedTuple):
    """A published model: class, arguments, counts, billions of parameters (all, quantized), INT4's share, blocks."""

    cls: str
    arguments: dict
    counts: tuple[int, int, int]
    parameters: tuple[str, str]
    int4_share: str
    blocks: dict[int, int]


FLUX, Z_IMAGE = "FluxTransformer2DModel", "ZImageTransformer2DModel"
WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
WAN_SMALL = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
WAN_IMAGE = {"in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280}
COG_LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
WIDE = {5120: 1024, 13824: 512}
FLUX_BLOCKS = {3072: 1024, 12288: 4096, 15360: 1024}
REAL = {
    "FLUX.1-dev": Real(FLUX, {"guidance_embeds": True}, (418, 76, 10), ("11.90", "8.61"), "27%", FLUX_BLOCKS),
    "Z-Image-Turbo": Real(Z_IMAGE, {}, (238, 32, 6), ("6.15", "6.02"), "2%", {3840: 256, 10240: 2048, 256: 256}),
    "Wan 2.1-1.3B": Real(WAN, WAN_SMALL, (300, 0, 6), ("1.42", "1.39"), "0%", {1536: 512, 8960: 256}),
    "Wan 2.1-14B": Real(WAN, {}, (400, 0, 6), ("14.29", "14.05"), "0%", WIDE),
    "Wan 2.1-14B I2V": Real(WAN, WAN_IMAGE, (480, 0, 8), ("16.39", "16.15"), "0%", WIDE),
    "CogVideoX-2b": Real(COGVIDEOX, {}, (180, 60, 5), ("1.69", "1.33"), "21%", {1920: 128, 7680: 512, 512: 512}),
    "CogVideoX-5b": Real(
        COGVIDEOX, COG_LARGE, (252, 84, 5), ("5.57", "4.76"), "14%", {3072: 1024, 12288: 4096, 512: 512}
    ),
}

TIME = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
KEPT = {
    "FLUX.1-dev": {
        "context_embedder",
        "x_embedder",
        "norm_out.linear",
        "proj_out",
        *(f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "guidance", "text") for i in (1, 2)),
    },
    "Z-Image-Turbo": {
        "all_x_embedder.2-1",
        "all_final_layer.2-1.linear",
        "all_final_layer.2-1.adaLN_modulation.1",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
    },
    "Wan 2.1-1.3B": {
        "condition_embedder.time_proj",
        "proj_out",
        *(f"condition_embedder.{part}_embedder.linear_{i}" for part in ("time", "text") for i in (1, 2)),
    },
    "CogVideoX-2b": {
        "patch_embed.text_proj",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "norm_out.linear",
        "proj_out",
    },
}
KEPT["Wan 2.1-14B"] = KEPT["Wan 2.1-1.3B"]
KEPT["Wan 2.1-14B I2V"] = KEPT["Wan 2.1-14B"] | {
    f"condition_embedder.image_embedder.ff.net.{n}" for n in ("0.proj", "2")
}
KEPT["CogVideoX-5b"] = KEPT["CogVideoX-2b"]


@functools.cache
def on_meta(cls: str, arguments: tuple = ()) -> nn.Module:
    with init_empty_weights():
        model = getattr(diffusers, cls)(**dict(arguments))
    return nn.Module.to(model, torch.bfloat16)


def real_model(name: str) -> nn.Module:
    return on_meta(REAL[name].cls, tuple(REAL[name].arguments.items()))


def expand(prefix: str, count: int, parts: str) -> set[str]:
    return {f"{prefix}.{i}.{part}" for i in range(count) for part in parts.split()}


def names(found, *actions: str) -> set[str]:
    return {row.name for row in found.select(*actions)}


def layers(*specs: str) -> list[Layer]:
    """Layers from name:in:out, 64 where sizes are left out."""
    parts = [spec.split(":") for spec in specs]
    return [Layer(name, *(int(size) for size in (sizes or (64, 64))), bias=True) for name, *sizes in parts]


def actions(rows: list[Layer], config: OrbitQuantConfig = W4A4, model: str = "Unknown") -> dict[str, str]:
    return {row.name: row.label for row in build_plan(model, rows, config).layers}


@pytest.mark.parametrize("name", REAL)
def test_counts_parameters_and_blocks_of_the_published_models(name):
    expected, model = REAL[name], real_model(name)
    found = plan(model, W4A4)
    assert found.model == expected.cls
    assert found.counts == expected.counts
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized, int4 = (sum(row.weights for row in found.select(action)) for action in ("quantize", "int4"))
    assert (f"{total / 1e9:.2f}", f"{quantized / 1e9:.2f}") == expected.parameters
    assert f"{int4 / total:.0%}" == expected.int4_share
    assert {row.in_features: row.block_size for row in found.select("quantize", "int4")} == expected.blocks


@pytest.mark.parametrize("name", REAL)
def test_exactly_these_layers_are_kept(name):
    found = plan(real_model(name), W4A4)
    assert names(found, "keep") == KEPT[name]
    assert {row.reason for row in found.select("keep")} == {"outside blocks"}
    linears = [n for n, m in real_model(name).named_modules() if isinstance(m, nn.Linear)]
    assert [row.name for row in found.layers] == linears


def test_exactly_these_layers_of_flux_change():
    attention = " ".join(f"attn.{p}" for p in f"{ATTENTION} add_q_proj add_k_proj add_v_proj to_add_out".split())
    found = plan(real_model("FLUX.1-dev"), W4A4)
    assert names(found, "quantize") == expand(
        "transformer_blocks", 19, f"{attention} ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2"
    ) | expand("single_transformer_blocks", 38, "attn.to_q attn.to_k attn.to_v proj_mlp proj_out")
    assert names(found, "int4") == expand("transformer_blocks", 19, "norm1.linear norm1_context.linear") | expand(
        "single_transformer_blocks", 38, "norm.linear"
    )


def test_exactly_these_layers_of_z_image_change():
    parts = " ".join([*(f"attention.{p}" for p in ATTENTION.split()), *(f"feed_forward.w{i}" for i in (1, 2, 3))])
    found = plan(real_model("Z-Image-Turbo"), W4A4)
    lists = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
    assert names(found, "quantize") == set().union(*(expand(name, count, parts) for name, count in lists.items()))
    assert names(found, "int4") == expand("layers", 30, "adaLN_modulation.0") | expand(
        "noise_refiner", 2, "adaLN_modulation.0"
    )


def test_exactly_these_layers_of_wan_and_cogvideox_change():
    wan = " ".join([f"{a}.{p}" for a in ("attn1", "attn2") for p in ATTENTION.split()] + ["ffn.net.0.proj ffn.net.2"])
    assert names(plan(real_model("Wan 2.1-1.3B"), W4A4), "quantize") == expand("blocks", 30, wan)
    image = plan(real_model("Wan 2.1-14B I2V"), W4A4)
    assert names(image, "quantize") == expand("blocks", 40, f"{wan} attn2.add_k_proj attn2.add_v_proj")
    cog = plan(real_model("CogVideoX-5b"), W4A4)
    parts = " ".join([f"attn1.{p}" for p in ATTENTION.split()] + ["ff.net.0.proj ff.net.2"])
    assert names(cog, "quantize") == expand("transformer_blocks", 42, parts)
    assert names(cog, "int4") == expand("transformer_blocks", 42, "norm1.linear norm2.linear")


@pytest.mark.parametrize(
    ("bits", "after", "effective"), [("w4a4", 6028013568, 4.0036892), ("w2a4", 3876335616, 2.0036892)]
)
def test_bytes_and_bits_of_flux_by_hand(bits, after, effective):
    """1,984,512 quantized rows and 1,050,624 INT4 rows of 48 groups, each row with a bf16 bias."""
    weights, int4, rows, int4_rows = 8606711808, 3227516928, 1984512, 1050624
    code_bytes = weights * int(bits[1]) // 8
    assert code_bytes + rows * (2 + 2) + int4 // 2 + int4_rows * (2 * 48 + 2) == after
    found = plan(real_model("FLUX.1-dev"), OrbitQuantConfig(bits))
    assert found.bytes_before == 2 * (weights + int4 + rows + int4_rows)
    assert found.bytes_after == after
    assert found.effective_bits == pytest.approx(effective, abs=1e-7)
    assert found.effective_bits == pytest.approx(int(bits[1]) + 16 * rows / weights, rel=1e-12)


@pytest.mark.parametrize(
    ("layer", "action", "before", "after"),
    [
        (Layer("b.0.x", 96, 10, True, 2), "w3a4", 10 * 192 + 20, 10 * (36 + 2) + 20),
        (Layer("b.0.x", 96, 10, False, 2), "w3a4", 10 * 192, 10 * (36 + 2)),
        (Layer("b.0.x", 96, 10, True, 4), "w8a8", 10 * 384 + 40, 10 * (96 + 2) + 40),
        (Layer("b.0.x", 99, 10, False, 2), "w3a16", 10 * 198, 10 * (38 + 2)),
        (Layer("b.0.x", 96, 10, True, 2), "int4", 10 * 192 + 20, 10 * (48 + 2 * 2) + 20),
        (Layer("b.0.x", 65, 10, False, 4), "int4", 10 * 260, 10 * (33 + 2 * 2)),
        (Layer("b.0.x", 96, 10, True, 2), "keep", 10 * 192 + 20, 10 * 192 + 20),
    ],
)
def test_bytes_of_one_layer_by_hand(layer, action, before, after):
    """Rows end at a byte, every row has a bf16 scale (INT4: one a group of 64), the bias stays."""
    found = build_plan("Unknown", [layer], OrbitQuantConfig(rules=(("*", action),)))
    (row,) = found.layers
    assert (row.bytes_before, row.bytes_after) == (before, after)
    assert row.weights == layer.in_features * layer.out_features
    changed = action != "keep"
    assert (found.bytes_before, found.bytes_after) == ((before, after) if changed else (0, 0))
    codes = after - layer.out_features * layer.itemsize * layer.bias
    assert found.effective_bits == (8 * codes / row.weights if changed else 0)


def test_effective_bits_count_every_quantized_weight_alike():
    rows = layers("b.0.x:96:10", "b.0.y:64:1000")
    found = build_plan("Unknown", rows, OrbitQuantConfig(rules=(("*.x", "w8a8"), ("*.y", "w2a4"))))
    assert found.effective_bits == 8 * (10 * 98 + 1000 * 18) / (960 + 64000)


STRUCTURAL = {
    "SD3Transformer2DModel": (
        (213, 36, 7),
        expand("transformer_blocks", 18, "norm1.linear norm1_context.linear"),
        {"context_embedder", "norm_out.linear", "proj_out"}
        | {f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "text") for i in (1, 2)},
    ),
    "PixArtTransformer2DModel": (
        (280, 0, 8),
        set(),
        {"proj_out", "adaln_single.linear"}
        | {
            f"adaln_single.emb.{p}_embedder.linear_{i}"
            for p in ("timestep", "resolution", "aspect_ratio")
            for i in (1, 2)
        },
    ),
    "DiTTransformer2DModel": (
        (168, 28, 58),
        expand("transformer_blocks", 28, "norm1.linear"),
        {"proj_out_1", "proj_out_2"} | expand("transformer_blocks", 28, " ".join(f"norm1.emb.{t}" for t in TIME)),
    ),
    "HunyuanVideoTransformer3DModel": (
        (440, 80, 27),
        expand("transformer_blocks", 20, "norm1.linear norm1_context.linear")
        | expand("single_transformer_blocks", 40, "norm.linear"),
        {"context_embedder.proj_in", "norm_out.linear", "proj_out"}
        | {f"time_text_embed.{p}_embedder.linear_{i}" for p in ("timestep", "text", "guidance") for i in (1, 2)}
        | {f"context_embedder.time_text_embed.{p}_embedder.linear_{i}" for p in ("timestep", "text") for i in (1, 2)}
        | expand(
            "context_embedder.token_refiner.refiner_blocks",
            2,
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 ff.net.0.proj ff.net.2 norm_out.linear",
        ),
    ),
    "LTXVideoTransformer3DModel": (
        (280, 0, 7),
        set(),
        {"proj_in", "proj_out", "time_embed.linear", "caption_projection.linear_1", "caption_projection.linear_2"}
        | {f"time_embed.emb.{t}" for t in TIME},
    ),
    "QwenImageTransformer2DModel": (
        (720, 120, 6),
        expand("transformer_blocks", 60, "img_mod.1 txt_mod.1"),
        {"img_in", "txt_in", "norm_out.linear", "proj_out"} | {f"time_text_embed.{t}" for t in TIME},
    ),
    "Flux2Transformer2DModel": (
        (192, 0, 11),
        set(),
        {"x_embedder", "context_embedder", "norm_out.linear", "proj_out", "single_stream_modulation.linear"}
        | {f"double_stream_modulation_{stream}.linear" for stream in ("img", "txt")}
        | {f"time_guidance_embed.{p}_embedder.linear_{i}" for p in ("timestep", "guidance") for i in (1, 2)},
    ),
}


@pytest.mark.parametrize("cls", STRUCTURAL)
def test_the_structural_rule_and_the_plan_on_further_classes(cls):
    counts, int4, kept = STRUCTURAL[cls]
    found = plan(on_meta(cls), W4A4)
    linears = [Layer(row.name, row.in_features, row.out_features, True) for row in found.layers]
    for rows in (found, build_plan("a class without a table", linears, W4A4)):
        assert rows.counts == counts
        assert names(rows, "int4") == int4
        assert names(rows, "keep") == kept


@pytest.mark.parametrize("name", REAL)
def test_the_structural_rule_agrees_with_the_tables(name):
    found = plan(real_model(name), W4A4)
    linears = [Layer(row.name, row.in_features, row.out_features, True) for row in found.layers]
    assert actions(linears) == {row.name: row.label for row in found.layers}


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["proj_in", "mid.attn.to_q", "mid.ff.0", "mid.ff.2", "proj_out"], {"kept"}),
        (["blocks.0.to_q", "blocks.0.to_k", "blocks.0.norm.linear:64:128"], {"kept"}),
        (["blocks.0.attn", "blocks.1.ff"], {"kept"}),
        (["layers.0", "layers.1", "layers.2"], {"kept"}),
        (["blocks.0.to_q", "blocks.7.to_q"], {"W4A4"}),
        (["blocks.0.a[b].x*", "blocks.1.a[b].x*"], {"W4A4"}),
        (["a.blocks.0.to_q:64:32", "a.blocks.1.to_q:32:64"], {"W4A4"}),
        (["blocks.0.ada_mod.1:64:128", "blocks.1.ada_mod.1:64:384"], {"INT4"}),
        (["blocks.0.normed_proj:64:64", "blocks.1.normed_proj:64:64"], {"W4A4"}),
        (["norm_blocks.0.to_q:64:128", "norm_blocks.1.to_q:64:128"], {"W4A4"}),
        (["blocks.0.time_embedding.1", "blocks.1.time_embedding.1", "x.emb.0.linear", "x.emb.1.linear"], {"kept"}),
        (["stages.0.blocks.0.to_q", "stages.0.blocks.1.to_q"], {"W4A4"}),
        (["stages.0.0.to_q", "stages.0.1.to_q"], {"W4A4"}),
        (["blocks.0.norm1.linear", "blocks.1.norm1.linear", "blocks.0.img_mod.1", "blocks.1.img_mod.1"], {"INT4"}),
        (["blocks.0.film.scale_bias:64:128", "blocks.1.film.scale_bias:64:128"], {"INT4"}),
        (["blocks.0.resnet.time_emb_proj", "blocks.1.resnet.time_emb_proj"], {"kept"}),
        (["blocks.0.to_q", "blocks.1.to_q", "blocks.0.ff_context"], {"W4A4"}),
    ],
)
def test_the_structural_rule_on_synthetic_models(specs, expected):
    assert set(actions(layers(*specs)).values()) == expected


BLOCKS_WITH_ATTENTION = layers(*(f"blocks.{i}.{part}" for i in range(3) for part in ("attn.to_q", "attn.to_k", "ff")))


@pytest.mark.parametrize(
    ("specs", "label", "reason"),
    [
        (["captions.0.linear", "captions.1.linear", "captions.2.linear"], "kept", "conditioning"),
        (["guidance.layers.0.linear_1:256:256", "guidance.layers.1.linear_1:256:256"], "kept", "conditioning"),
        (["text.refiner.0.attn.to_q", "text.refiner.1.attn.to_q"], "kept", "conditioning"),
        (["text.embedder.refiner.0.attn.to_q", "text.embedder.refiner.1.attn.to_q"], "kept", "embedder"),
        (["text_refiner.0.attn.to_q", "text_refiner.1.attn.to_q"], "W4A4", "block"),
        (["cross.0.to_q:64:128", "cross.1.to_q:64:128"], "W4A4", "block"),
        (["mid_block.0.attn.to_q:96:96", "mid_block.1.attn.to_q:96:96"], "W4A4", "block"),
        ([f"streams.image.{i}.{part}" for i in (0, 1) for part in ("attn.to_q", "attn.to_k", "ff")], "W4A4", "block"),
        (["blocks.0.moe.gate:64:16", "blocks.1.moe.gate:64:16"], "kept", "gate"),
        (["blocks.0.ff.gate:64:256", "blocks.1.ff.gate:64:256"], "W4A4", "block"),
        (["blocks.0.attn.gate_logits:64:4", "blocks.2.attn.gate_logits:64:4"], "kept", "gate"),
        (["blocks.2.ff_context", "blocks.2.to_add_out"], "W4A4", "block"),
    ],
)
def test_repeated_lists_that_do_not_carry_the_tokens_are_kept(specs, label, reason):
    found = build_plan("Unknown", [*BLOCKS_WITH_ATTENTION, *layers(*specs)], W4A4).layers
    assert {(row.label, row.reason) for row in found[: len(BLOCKS_WITH_ATTENTION)]} == {("W4A4", "block")}
    assert {(row.label, row.reason) for row in found[len(BLOCKS_WITH_ATTENTION) :]} == {(label, reason)}


def test_a_large_network_in_a_part_of_the_model_carries_the_tokens():
    """However deep it lies, and whatever small lists lie above it; without attention the upper lists do."""
    large = [f"model.dit.blocks.{i}.{part}:512:512" for i in range(2) for part in ("attn.to_q", "ff")]
    small = ["refiner.0.attn.to_q", "refiner.1.attn.to_q"]
    assert set(actions(layers(*large, *small)).values()) == {"W4A4"}
    plain = ["blocks.0.fc1", "blocks.1.fc1"]
    assert actions(layers(*plain, "guide.layers.0.fc1:32:32", "guide.layers.1.fc1:32:32")) == {
        **dict.fromkeys(plain, "W4A4"),
        **dict.fromkeys(["guide.layers.0.fc1", "guide.layers.1.fc1"], "kept"),
    }
    mixers = [f"blocks.{i}.mixer:512:512" for i in range(2)]
    found = actions(layers(*mixers, "text.layers.0.attn.q_proj", "text.layers.1.attn.q_proj"))
    assert list(found.values()) == ["W4A4", "W4A4", "kept", "kept"]


def test_glob_characters_in_names_stand_for_themselves():
    found = actions(layers("*", "b[01]", "blocks.?.x", "blocks.0.x", "blocks.1.x", "b0"))
    assert list(found.values()) == ["kept", "kept", "kept", "W4A4", "W4A4", "kept"]


def test_a_table_is_chosen_by_the_class_name():
    rows = layers("blocks.0.norm.linear:64:128", "blocks.1.norm.linear:64:128")
    assert set(actions(rows).values()) == {"INT4"}
    assert set(actions(rows, model="WanTransformer3DModel").values()) == {"W4A4"}
    assert set(actions(rows, model="FluxTransformer2DModel").values()) == {"kept"}


BLOCKS = layers(
    "x_embedder", "blocks.0.norm.linear:64:128", "blocks.0.ff.0", "blocks.1.norm.linear:64:128", "blocks.1.ff.0"
)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("keep", ("keep", "kept", None)),
        ("int4", ("int4", "INT4", "64x{} int4 a16")),
        ("quantize", ("quantize", "W3A8", "64x{} trellis3.12.unbiased a8 s0")),
        ("w6a6", ("quantize", "W6A6", "64x{} scalar6.unbiased a6 s0")),
        ("w2a16", ("quantize", "W2A16", "64x{} trellis2.12.unbiased a16 s0")),
    ],
)
@pytest.mark.parametrize("name", ["x_embedder", "blocks.0.norm.linear", "blocks.1.ff.0"])
def test_a_users_rule_wins_over_the_policy(name, action, expected):
    config = OrbitQuantConfig("w3a8", rules=((name, action),))
    plain = {row.name: row for row in build_plan("Unknown", BLOCKS, OrbitQuantConfig("w3a8")).layers}
    for row in build_plan("Unknown", BLOCKS, config).layers:
        if row.name == name:
            key = row.spec and row.spec.key
            assert (row.action, row.label, key) == (*expected[:2], expected[2] and expected[2].format(row.out_features))
            assert row.reason == f"rule {name!r}"
        else:
            assert row == plain[row.name]


@pytest.mark.parametrize(
    ("bits", "recipe", "expected"),
    [
        ("w4a4", "best", {4: "scalar, unbiased", 6: "scalar, unbiased", 2: "trellis 2^12, unbiased"}),
        ("w3a4", "best", {3: "trellis 2^12, unbiased", 6: "scalar, unbiased", 2: "trellis 2^12, unbiased"}),
        ("w3a4", "paper", {3: "scalar, norm", 6: "scalar, norm", 2: "scalar, norm"}),
    ],
)
def test_each_layer_has_the_codebook_of_its_bits(bits, recipe, expected):
    rules = (("x_embedder", "quantize"), ("blocks.0.norm.*", "int4"), ("blocks.0.ff.*", "w6a6"), ("*.1.ff.*", "w2a8"))
    found = build_plan("Unknown", BLOCKS, OrbitQuantConfig(bits, recipe, rules=rules))
    assert {row.spec.weight.bits: row.coding for row in found.select("quantize")} == expected
    for row in found.select("quantize"):
        code = row.spec.weight
        assert row.coding == ("trellis 2^12, " if code.log2_states == 12 else "scalar, ") + code.scale
    assert {row.coding for row in found.select("int4", "keep")} == {""}
    # the codebook takes no part in the size
    assert found.bytes_after == build_plan("Unknown", BLOCKS, OrbitQuantConfig(bits, "paper", rules=rules)).bytes_after


@pytest.mark.parametrize(("bits", "other"), [("w2a4", "w4a4"), ("w4a4", "w2a4")])
def test_a_rule_with_bits_gives_what_a_configuration_of_these_bits_gives(bits, other):
    """Tokens of 4 bits are centred beside weights of 2 bits, wherever their bits come from."""
    coding = {"W2A4": "trellis 2^12, unbiased, centred by 16", "W4A4": "scalar, unbiased"}
    mixed = build_plan("Unknown", BLOCKS, OrbitQuantConfig(bits, rules=(("*.1.ff.*", other),))).layers
    pure = build_plan("Unknown", BLOCKS, OrbitQuantConfig(other)).layers
    assert [row.label for row in mixed if row.action == "quantize"] == [bits.upper(), other.upper()]
    assert all(row.coding == coding[row.label] for row in mixed if row.action == "quantize")
    assert [row.spec for row in mixed if row.label == other.upper()] == [pure[-1].spec]


RULES = (("x_embedder", "keep"), ("*.0.ff.*", "w2a8"))
FOUND = build_plan("Unknown", BLOCKS, OrbitQuantConfig(rules=RULES))
STORED = {row.name: row.action == "int4" for row in FOUND.select("quantize", "int4")}


@pytest.mark.parametrize("config", [FOUND.config, FOUND.recorded], ids=["without a record", "with a record"])
def test_a_stored_model_is_as_it_was_planned(config):
    assert as_stored(build_plan("Unknown", BLOCKS, config), STORED) == FOUND


def test_a_recorded_model_is_what_the_record_says_whatever_the_rules_say_today():
    recorded = {row.name: row.spec for row in FOUND.layers}
    today = build_plan("Unknown", BLOCKS, replace(FOUND.recorded, rules=(("*.ff.*", "w8a8"), ("*.0.norm.*", "keep"))))
    found = as_stored(today, STORED)
    assert {row.name: row.spec for row in found.layers} == recorded
    changed = {row.name for row, planned in zip(found.layers, today.layers, strict=True) if row != planned}
    assert changed == {"blocks.0.norm.linear", "blocks.0.ff.0", "blocks.1.ff.0"}
    assert {row.reason for row in found.layers if row.name in changed} == {"as stored"}
    assert found.recorded.layers == FOUND.recorded.layers


def test_without_a_record_what_is_stored_counts():
    """Bits are those of the rules where they say the same, else those of the configuration."""
    stored = {"x_embedder": False, "blocks.0.norm.linear": True, "blocks.0.ff.0": False, "blocks.1.norm.linear": False}
    found = as_stored(FOUND, stored)
    assert [row.label for row in found.layers] == ["W4A4", "INT4", "W2A8", "W4A4", "kept"]
    assert [row.reason == "as stored" for row in found.layers] == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(W4A4, layers=FOUND.recorded.layers[1:]), "has no record of the packed layer 'blocks.0.norm.linear'"),
        (
            replace(W4A4, layers=(*FOUND.recorded.layers[:-1], ("blocks.1.ff.0", "64x65 scalar4.unbiased a4 s0"))),
            "records 'blocks.1.ff.0' as '64x65 scalar4.unbiased a4 s0'; its shape is (64, 64)",
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        as_stored(build_plan("Unknown", BLOCKS, config), STORED)


def test_the_first_rule_that_matches_decides():
    rules = (("blocks.1.*", "keep"), ("*.ff.*", "w6a6"), ("blocks.[01].norm.*", "w8a8"))
    assert list(actions(BLOCKS, OrbitQuantConfig(rules=rules)).values()) == ["kept", "W8A8", "W6A6", "kept", "kept"]


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Z-Image-Turbo", "CogVideoX-2b"])
def test_modulation_bits_16_keep_the_modulation(name):
    quantized, int4, kept = REAL[name].counts
    found = plan(real_model(name), OrbitQuantConfig(modulation_bits=16))
    assert found.counts == (quantized, 0, kept + int4)
    modulation = names(plan(real_model(name), W4A4), "int4")
    assert {row.name for row in found.layers if row.reason == "modulation_bits=16"} == modulation
    assert all(row.bytes_after == row.bytes_before for row in found.select("keep"))


def test_modulation_bits_16_leave_users_rules_alone():
    config = OrbitQuantConfig(modulation_bits=16, rules=(("*.0.norm.*", "int4"), ("*.1.ff.*", "int4")))
    assert list(actions(BLOCKS, config).values()) == ["kept", "INT4", "W4A4", "kept", "INT4"]


@every_family
def test_the_plan_does_not_depend_on_where_the_weights_are(family):
    with init_empty_weights():
        skeleton = nn.Module.to(family.cls(**family.config), torch.bfloat16)
    model = nn.Module.to(family.build(), torch.bfloat16)
    expected = plan(skeleton, W4A4)
    assert plan(model, W4A4) == expected
    assert quantize_(model, W4A4, progress=False) == expected
    assert expected.counts == family.counts


def test_groups_cover_the_plan_once():
    found = plan(on_meta("SD3Transformer2DModel"), W4A4)
    groups = {pattern: count for pattern, count, _ in found.groups()}
    assert sum(groups.values()) == len(found.layers)
    assert groups["transformer_blocks.*.norm1.linear"] == 18
    assert groups["transformer_blocks.*.norm1_context.linear"] == 17
    assert groups["transformer_blocks.17.norm1_context.linear"] == 1
    assert groups["time_text_embed.text_embedder.linear_1"] == 1
