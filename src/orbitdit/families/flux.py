"""FLUX.1: double-stream and single-stream blocks. A single-stream block's MLP runs beside its attention."""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=("FluxTransformer2DModel",),
    rules=(
        *modulation(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
        ),
        *blocks("transformer_blocks.*", "single_transformer_blocks.*"),
    ),
    shared=((*qkv("attn"), "proj_mlp"), added_qkv("attn")),
)
