"""Stable Diffusion 3: two streams and a joint attention; in 3.5 medium some blocks attend to the image once more."""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=("SD3Transformer2DModel", "SD3ControlNetModel"),
    rules=(
        *modulation("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear"),
        *blocks("transformer_blocks.*"),
    ),
    shared=(qkv("attn"), added_qkv("attn"), qkv("attn2")),
)
