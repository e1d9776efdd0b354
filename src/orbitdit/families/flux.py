"""FLUX.1 and its kin: double-stream and single-stream blocks, whose MLP runs beside the attention."""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=(
        "FluxTransformer2DModel",
        "FluxControlNetModel",
        "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    rules=(
        *modulation(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
        ),
        *blocks("transformer_blocks.*", "single_transformer_blocks.*"),
    ),
    shared=((*qkv("attn"), "proj_mlp"), added_qkv("attn")),
    source="norm",
    pending={
        "norm1.norm": qkv("attn"),
        "norm1_context.norm": added_qkv("attn"),
        "norm2": ("ff.net.0.proj",),
        "norm2_context": ("ff_context.net.0.proj",),
        "norm.norm": ("proj_mlp", *qkv("attn")),
        "act_mlp": ("proj_out",),
    },
    modulation_inputs=("norm1.silu", "norm1_context.silu", "norm.silu"),
)
