"""Tiny random models, one row a family, with inputs for one forward pass and what is expected of it."""

from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor, nn


class Family(NamedTuple):
    """A model class, a tiny configuration, inputs for `forward`, and what is expected.

    `counts` are those of the plan, `encodings` are counted by hand: those of a forward pass, and in each kind of
    block. `errors` bounds the relative error of a forward pass by bits: twice what was measured. `fused` says how
    often a forward pass computes something inside an encoding.
    """

    cls: type[nn.Module]
    config: dict
    inputs: Callable[[], dict]
    counts: tuple[int, int, int]
    encodings: int
    block_encodings: Set[int] = frozenset()
    errors: Mapping[str, float] = MappingProxyType({})
    fused: Mapping[str, int] = MappingProxyType({})

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.cls(**self.config).eval()

    def run(self, model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        inputs = {k: _fill(v, generator, model) for k, v in self.inputs().items()}
        with torch.no_grad():
            output = model(**inputs, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output


def _fill(value, generator: torch.Generator, model: nn.Module):
    """A tuple of sizes becomes noise, a list is filled item by item, tensors stay; all on the model's device.
    What a function returns, and numbers, are passed on as they are."""
    if callable(value):
        return value()
    if isinstance(value, int):
        return value
    if isinstance(value, tuple):
        value = torch.randn(value, generator=generator).to(model.dtype)
    return [_fill(item, generator, model) for item in value] if isinstance(value, list) else value.to(model.device)


FAMILIES = {
    "flux": Family(
        diffusers.FluxTransformer2DModel,
        {
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": (2, 12, 8),
            "encoder_hidden_states": (2, 5, 24),
            "pooled_projections": (2, 32),
            "timestep": torch.tensor([0.3, 0.8]),
            "img_ids": torch.zeros(12, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        counts=(34, 6, 8),
        encodings=20,
        block_encodings={8, 2},
        errors={"w8a8": 0.01, "w4a4": 0.03, "w4a16": 0.025, "w2a4": 0.07},
        fused={"layer_norm": 10, "gelu": 6},
    ),
    "z-image": Family(
        diffusers.ZImageTransformer2DModel,
        {
            "in_channels": 16,
            "dim": 96,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 48,
            "axes_dims": [8, 12, 12],
            "axes_lens": [256, 32, 32],
        },
        lambda: {"x": [(16, 1, 8, 8)], "t": torch.tensor([0.4]), "cap_feats": [(7, 48)]},
        counts=(28, 3, 6),
        encodings=16,
        block_encodings={4},
        errors={"w8a8": 0.05, "w4a4": 0.2, "w4a16": 0.15, "w2a4": 0.5},
        fused={"rms_norm": 8, "silu": 4},
    ),
    "wan": Family(
        diffusers.WanTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 80,
            "num_layers": 2,
        },
        lambda: {
            "hidden_states": (1, 4, 2, 8, 8),
            "timestep": torch.tensor([300]),
            "encoder_hidden_states": (1, 6, 16),
        },
        counts=(20, 0, 6),
        encodings=14,
        block_encodings={7},
        errors={"w8a8": 0.005, "w4a4": 0.05, "w4a16": 0.04, "w2a4": 0.17},
        fused={"layer_norm": 4, "gelu": 2},
    ),
    "cogvideox": Family(
        diffusers.CogVideoXTransformer3DModel,
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
        },
        lambda: {
            "hidden_states": (1, 2, 4, 8, 8),
            "encoder_hidden_states": (1, 6, 16),
            "timestep": torch.tensor([500]),
        },
        counts=(12, 4, 5),
        encodings=8,
        block_encodings={4},
        errors={"w8a8": 0.006, "w4a4": 0.04, "w4a16": 0.03, "w2a4": 0.11},
        fused={"gelu": 2},
    ),
    "sd3": Family(
        diffusers.SD3Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 48,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 4,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 24),
            "pooled_projections": (2, 32),
            "timestep": torch.tensor([300.0, 800.0]),
        },
        counts=(25, 4, 7),
        encodings=15,
        block_encodings={10, 5},
        errors={"w8a8": 0.01, "w4a4": 0.027, "w4a16": 0.02, "w2a4": 0.076},
        fused={"gelu": 3},
    ),
    "pixart": Family(
        diffusers.PixArtTransformer2DModel,
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 16,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 16),
            "timestep": torch.tensor([300.0, 800.0]),
        },
        counts=(20, 0, 6),
        encodings=14,
        block_encodings={7},
        errors={"w8a8": 0.0027, "w4a4": 0.055, "w4a16": 0.048, "w2a4": 0.13},
        fused={"gelu": 2},
    ),
    "qwen-image": Family(
        diffusers.QwenImageTransformer2DModel,
        {
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": (2, 12, 8),
            "encoder_hidden_states": (2, 5, 24),
            "timestep": torch.tensor([0.3, 0.8]),
            "img_shapes": lambda: [[(1, 3, 4)]] * 2,
        },
        counts=(24, 4, 6),
        encodings=16,
        block_encodings={8},
        errors={"w8a8": 0.0041, "w4a4": 0.021, "w4a16": 0.015, "w2a4": 0.057},
        fused={"gelu": 4},
    ),
    "hunyuan-video": Family(
        diffusers.HunyuanVideoTransformer3DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": (1, 4, 2, 4, 4),
            "timestep": torch.tensor([300]),
            "encoder_hidden_states": (1, 6, 24),
            "encoder_attention_mask": torch.ones(1, 6),
            "pooled_projections": (1, 8),
            "guidance": torch.tensor([6000.0]),
        },
        counts=(17, 3, 20),
        encodings=11,
        block_encodings={8, 3},
        errors={"w8a8": 0.0088, "w4a4": 0.035, "w4a16": 0.024, "w2a4": 0.072},
        fused={"gelu": 2},
    ),
    "ltx": Family(
        diffusers.LTXVideoTransformer3DModel,
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "cross_attention_dim": 48,
            "num_layers": 2,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": (2, 12, 8),
            "encoder_hidden_states": (2, 5, 16),
            "timestep": torch.tensor([300, 800]),
            "encoder_attention_mask": torch.ones(2, 5),
            "num_frames": 2,
            "height": 2,
            "width": 3,
        },
        counts=(20, 0, 7),
        encodings=14,
        block_encodings={7},
        errors={"w8a8": 0.005, "w4a4": 0.067, "w4a16": 0.044, "w2a4": 0.13},
        fused={"gelu": 2},
    ),
    "flux2": Family(
        diffusers.Flux2Transformer2DModel,
        {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {
            "hidden_states": (2, 12, 8),
            "encoder_hidden_states": (2, 5, 24),
            "timestep": torch.tensor([0.3, 0.8]),
            "img_ids": torch.zeros(12, 4),
            "txt_ids": torch.zeros(5, 4),
            "guidance": torch.tensor([4.0, 4.0]),
        },
        counts=(16, 0, 11),
        encodings=12,
        block_encodings={8, 2},
        errors={"w8a8": 0.00082, "w4a4": 0.014, "w4a16": 0.0084, "w2a4": 0.028},
        fused={},
    ),
    "chroma": Family(
        diffusers.ChromaTransformer2DModel,
        {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        lambda: {
            "hidden_states": (2, 12, 8),
            "encoder_hidden_states": (2, 5, 24),
            "timestep": torch.tensor([0.3, 0.8]),
            "img_ids": torch.zeros(12, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        counts=(22, 0, 9),
        encodings=12,
        block_encodings={8, 2},
        errors={"w8a8": 0.0058, "w4a4": 0.073, "w4a16": 0.051, "w2a4": 0.14},
        fused={"gelu": 2},
    ),
    "auraflow": Family(
        diffusers.AuraFlowTransformer2DModel,
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 48,
            "pos_embed_max_size": 16,
        },
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 24),
            "timestep": torch.tensor([0.3, 0.8]),
        },
        counts=(28, 4, 6),
        encodings=16,
        block_encodings={8, 4},
        errors={"w8a8": 0.0021, "w4a4": 0.0076, "w4a16": 0.0053, "w2a4": 0.016},
        fused={},
    ),
    "lumina2": Family(
        diffusers.Lumina2Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (30, 16, 16),
            "cap_feat_dim": 24,
        },
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "timestep": torch.tensor([0.3, 0.8]),
            "encoder_hidden_states": (2, 5, 24),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
        counts=(28, 3, 6),
        encodings=16,
        block_encodings={4},
        errors={"w8a8": 0.025, "w4a4": 0.19, "w4a16": 0.15, "w2a4": 0.34},
        fused={},
    ),
    "sana": Family(
        diffusers.SanaTransformer2DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 24),
            "timestep": torch.tensor([300, 800]),
        },
        counts=(16, 0, 6),
        encodings=10,
        block_encodings={5},
        errors={"w8a8": 0.0069, "w4a4": 0.14, "w4a16": 0.1, "w2a4": 0.22},
        fused={},
    ),
    "mochi": Family(
        diffusers.MochiTransformer3DModel,
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 2,
            "pooled_projection_dim": 96,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
            "max_sequence_length": 6,
        },
        lambda: {
            "hidden_states": (1, 4, 2, 4, 4),
            "encoder_hidden_states": (1, 6, 24),
            "timestep": torch.tensor([300]),
            "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        },
        counts=(21, 4, 8),
        encodings=13,
        block_encodings={8, 5},
        errors={"w8a8": 0.034, "w4a4": 0.15, "w4a16": 0.12, "w2a4": 0.32},
        fused={},
    ),
}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
