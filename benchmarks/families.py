"""The transformers of the models suite, at the sizes of their papers, and inputs for one step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn


def noise(device: str, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def flux_inputs(device: str, side: int = 64, text: int = 512, sizes: tuple[int, int, int] = (64, 4096, 768)) -> dict:
    """`side` squared image tokens and `text` tokens; `sizes` are of the latents, the text and the pooled text."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return {
        "hidden_states": noise(device, 1, side * side, sizes[0]),
        "encoder_hidden_states": noise(device, 1, text, sizes[1]),
        "pooled_projections": noise(device, 1, sizes[2]),
        "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "img_ids": ids.to(device, torch.bfloat16),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=device),
    }


def z_image_inputs(device: str) -> dict[str, Any]:
    """1024 x 1024 pixels: 4,096 image tokens; 128 text tokens."""
    return {
        "x": [noise(device, 16, 1, 128, 128)],
        "t": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "cap_feats": [noise(device, 128, 2560)],
    }


def wan_inputs(device: str) -> dict[str, Any]:
    """832 x 480 pixels, 81 frames: 32,760 tokens."""
    return {
        "hidden_states": noise(device, 1, 16, 21, 60, 104),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": noise(device, 1, 512, 4096),
    }


def cogvideox_inputs(device: str, rotary: bool) -> dict[str, Any]:
    """720 x 480 pixels, 49 frames: 17,550 tokens, and 226 of text."""
    inputs = {
        "hidden_states": noise(device, 1, 13, 16, 60, 90),
        "encoder_hidden_states": noise(device, 1, 226, 4096),
        "timestep": torch.tensor([500], device=device),
    }
    if rotary:
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            embed_dim=64, crops_coords=((0, 0), (30, 45)), grid_size=(30, 45), temporal_size=13, device=device
        )
    return inputs


@dataclass(frozen=True)
class Model:
    """A transformer, its inputs on a device, and what its repeated blocks are called where diffusers does not say."""

    name: str
    cls: type[nn.Module]
    inputs: Callable[[str], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    def make(self) -> nn.Module:
        return self.cls(**self.config)

    def mark_blocks(self, model: nn.Module) -> None:
        if self.blocks:
            model._repeated_blocks = list(self.blocks)


MODELS = (
    Model("FLUX.1-dev", diffusers.FluxTransformer2DModel, flux_inputs, {"guidance_embeds": True}),
    Model("Z-Image-Turbo", diffusers.ZImageTransformer2DModel, z_image_inputs),
    Model(
        "Wan 2.1-1.3B",
        diffusers.WanTransformer3DModel,
        wan_inputs,
        {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
    ),
    Model("Wan 2.1-14B", diffusers.WanTransformer3DModel, wan_inputs),
    Model(
        "CogVideoX-2b",
        diffusers.CogVideoXTransformer3DModel,
        partial(cogvideox_inputs, rotary=False),
        blocks=("CogVideoXBlock",),
    ),
    Model(
        "CogVideoX-5b",
        diffusers.CogVideoXTransformer3DModel,
        partial(cogvideox_inputs, rotary=True),
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        blocks=("CogVideoXBlock",),
    ),
)

TINY = Model(
    "tiny",
    diffusers.FluxTransformer2DModel,
    partial(flux_inputs, side=4, text=5, sizes=(8, 24, 32)),
    {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    },
)
"""A FLUX for CPUs, to see whether a benchmark runs."""
