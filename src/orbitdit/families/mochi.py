"""Mochi: two streams of different width and a joint attention; the last block gives no text."""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=("MochiTransformer3DModel",),
    rules=(
        *modulation(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "transformer_blocks.*.norm1_context.linear_1",
        ),
        *blocks("transformer_blocks.*"),
    ),
    shared=(qkv("attn1"), added_qkv("attn1")),
)
