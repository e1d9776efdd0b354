"""CogVideoX and CogView: text and video tokens in one attention, each modulated by its part of one linear layer."""

from orbitdit.families import Family, blocks, modulation, qkv

FAMILY = Family(
    models=(
        "CogVideoXTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
    ),
    rules=(
        *modulation("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm2.linear"),
        *blocks("transformer_blocks.*"),
    ),
    shared=(qkv("attn1"),),
)
