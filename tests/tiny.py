"""Tiny random pipelines of both worlds, a FLUX and an SD3 transformer shaped as trained ones, in milliseconds."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel

from orbitdit.shapes.pipeline import ShapesPipeline, WordEncoder
from orbitdit.shapes.prompts import vocabulary
from orbitdit.shapes.worlds import WORLDS

WIDTH = 64
TEXT = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
TRANSFORMERS = {
    "shapes": (
        FluxTransformer2DModel,
        {"patch_size": 1, "in_channels": 48, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32}
        | {"num_attention_heads": 2, "axes_dims_rope": (4, 14, 14), **TEXT},
    ),
    "glyphs": (
        SD3Transformer2DModel,
        {"sample_size": 64, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 2}
        | {"attention_head_dim": 32, "num_attention_heads": 2, "caption_projection_dim": WIDTH}
        | {"pos_embed_max_size": 16, "qk_norm": "rms_norm", **TEXT},
    ),
}


def tiny_pipeline(world: str) -> ShapesPipeline:
    torch.manual_seed(0)
    cls, config = TRANSFORMERS[world]
    encoder = WordEncoder(len(vocabulary(WORLDS[world])), dim=WIDTH)
    pipeline = ShapesPipeline(cls(**config).eval(), encoder, FlowMatchEulerDiscreteScheduler(shift=2.0), world)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
