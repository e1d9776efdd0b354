"""Tiny random models, one row a family, with inputs for one forward pass and what is expected of it."""

from collections.abc import Callable
from typing import NamedTuple

import diffusers
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
    block_encodings: set[int]
    errors: dict[str, float]
    fused: dict[str, int]

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
    """A tuple of sizes becomes noise, a list is filled item by item, tensors stay; all on the model's device."""
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
}
